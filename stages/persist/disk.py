"""What persist asks of the disk, so that the same code runs on real files and on simulated ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from contracts.hashing import MerkleFrontier
from contracts.receipts import Receipt, ResumePoint, SealRecord, StoreEnd
from contracts.settings import Settings
from stages.persist.aside import given_up, prepare_aside, set_aside
from stages.persist.backup import copied_shard, forget_copies
from stages.persist.core import Group
from stages.persist.lost import last_place
from stages.persist.names import ShardFile, list_shards, partition_state
from stages.persist.partition import PartitionFiles
from stages.persist.rewind import Damage, Place, begin_at, last_good_place, prepare_begin
from stages.persist.seal import SealedInfo, SealJob
from stages.persist.storedir import Store, lock_partition, probe_disk


class Summary(Protocol):
    """Work on stored ids that makes asking for them quicker.

    Attributes:
        shards: how many sealed shards it is about.
    """

    shards: int

    def make(self) -> None:
        """Blocking; may run beside everything else. Raises `ShardCorruptError`, `OSError`."""

    def take(self) -> None:
        """From now on it counts. Nobody asks meanwhile."""


class Seen(Protocol):
    """The ids of everything that is stored."""

    def unsummarized(self) -> Summary | None:
        """The next such work, if there is any."""

    def seen(self, ids: Sequence[bytes]) -> Sequence[bool]:
        """For each id, whether an event with it is stored."""


class Lock(Protocol):
    """A partition's lock while it is held."""

    def check(self) -> None:
        """As `PartitionLock.check`."""

    def close(self) -> None:
        """Lets go."""


class Files(Protocol):
    """A partition's files in one store; see `stages.persist.partition.PartitionFiles` for all of it."""

    cut_commits: bool

    @property
    def frontier(self) -> MerkleFrontier:
        """The Merkle tree over everything stored."""

    @property
    def seen(self) -> Seen:
        """The ids of everything stored."""

    @property
    def to_seal(self) -> Sequence[SealJob]:
        """Full shards that are not sealed yet, oldest first."""

    @property
    def sealed(self) -> Mapping[int, Path]:
        """The store's own sealed shards, by number."""

    @property
    def trees(self) -> Mapping[int, tuple[int, str]]:
        """As `PartitionFiles.trees`."""

    @property
    def end(self) -> StoreEnd:
        """How far the files reach."""

    def fits(self, group: Group) -> bool:
        """As `PartitionFiles.fits`."""

    def holds_events(self) -> bool:
        """As `PartitionFiles.holds_events`."""

    def commit(self, group: Group) -> int:
        """As `PartitionFiles.commit`."""

    def accepted(self) -> None:
        """As `PartitionFiles.accepted`."""

    def is_empty(self) -> bool:
        """As `PartitionFiles.is_empty`."""

    def is_old(self, share: float = 1.0) -> bool:
        """As `PartitionFiles.is_old`."""

    def is_flushed(self, target: int) -> bool:
        """As `PartitionFiles.is_flushed`."""

    def wants_next(self) -> bool:
        """As `PartitionFiles.wants_next`."""

    def prepare_next(self) -> None:
        """As `PartitionFiles.prepare_next`."""

    def roll(self) -> None:
        """As `PartitionFiles.roll`."""

    def seal(self, job: SealJob, sealed_ns: int | None = None) -> SealedInfo:
        """As `PartitionFiles.seal`."""

    def sealed_info(self, shard: int) -> SealedInfo:
        """As `PartitionFiles.sealed_info`."""

    def resume_after(self, before: ResumePoint, info: SealedInfo) -> ResumePoint:
        """As `PartitionFiles.resume_after`."""

    def settled_origin(self, kept: int, copied: int | None) -> int:
        """As `PartitionFiles.settled_origin`."""

    def keep_record(self, record: SealRecord) -> None:
        """As `PartitionFiles.keep_record`."""

    def finish_seal(self, job: SealJob, info: SealedInfo) -> None:
        """As `PartitionFiles.finish_seal`."""

    def close(self) -> None:
        """Lets go of the files."""


class Turns:
    """Work on a process's disk beside commits, one partition at a time.

    Shards of many partitions fill up together: all at once would keep the commits from their threads, and the disk.

    Attributes:
        sealing: held by who seals, or summarizes what is sealed.
        preparing: held by who makes the next shard's file, which must not wait for all seals.
    """

    def __init__(self) -> None:
        self.sealing = asyncio.Lock()
        self.preparing = asyncio.Lock()


class Disk(NamedTuple):
    """A node's disk, as far as a lane uses it itself. All of it blocks.

    Attributes:
        lock: as `lock_partition`.
        open: as `PartitionFiles.open`.
        probe: as `probe_disk`.
        state: as `partition_state`.
        copied: as `copied_shard`.
    """

    lock: Callable[[Store, int], Lock]
    open: Callable[[Store, int, Receipt, Settings, Callable[[], int]], Files]
    probe: Callable[[Store, int, int], None]
    state: Callable[[Path, int], object]
    copied: Callable[[Path, int], int | None]


LOCAL: Final = Disk(lock_partition, PartitionFiles.open, probe_disk, partition_state, copied_shard)
"""Real files."""


class _LastPlace(Protocol):
    def __call__(self, files: Sequence[ShardFile], *, unshown: bool = False) -> tuple[Place, Damage | None]: ...


class StoreFiles(NamedTuple):
    """What taking partitions back asks of a store's files. All of it blocks.

    Attributes:
        lock: as `lock_partition`.
        shards: as `list_shards`.
        last_place, last_good_place, prepare_begin, begin_at: as those of `stages.persist`.
        given_up, prepare_aside, set_aside: as those of `stages.persist.aside`.
        forget_copies: as that of `stages.persist.backup`.
    """

    lock: Callable[[Store, int], Lock]
    shards: Callable[[Path], dict[int, list[ShardFile]]]
    last_place: _LastPlace
    last_good_place: Callable[..., tuple[Place, Damage | None]]
    prepare_begin: Callable[..., None]
    begin_at: Callable[..., None]
    given_up: Callable[..., list[ShardFile]]
    prepare_aside: Callable[[Store, Sequence[ShardFile], StoreEnd], None]
    set_aside: Callable[[Store, Sequence[ShardFile], StoreEnd, int], list[Path]]
    forget_copies: Callable[[Path, int, int], None]


LOCAL_STORE: Final = StoreFiles(
    lock_partition,
    list_shards,
    last_place,
    last_good_place,
    prepare_begin,
    begin_at,
    given_up,
    prepare_aside,
    set_aside,
    forget_copies,
)
"""Real files."""
