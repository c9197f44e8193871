"""Reading a store: every committed event of its live and sealed shards, while persist writes them.

Takes no locks. A shard that is sealed between being listed and being opened is found under its new name; a live shard
is read up to its watermark, so nothing is shown that a restart could take back.

Looking for one id asks each shard's sorted ids, or a live shard's index in memory, and opens only what holds it. Both
are kept between calls, for as long as the directory shows the same files.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

import numpy as np

from contracts.errors import ShardError
from contracts.events import Event
from contracts.hashing import MerkleFrontier
from stages.persist.columns import Array
from stages.persist.names import SHARDS, ShardFile
from stages.persist.openshards import OpenShards, View
from stages.persist.sealed import SealedReader, Selection
from stages.persist.storedir import STORE_FILE

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped,import-not-found,unused-ignore]

COLUMNS = (
    "event_id",
    "consultation_id",
    "site",
    "event_type",
    "timestamp_ns",
    "origin",
    "index",
    "audit_hash",
    "partition",
)
"""What `EventStore.columns` can give."""

_DESCRIPTORS_SHARE = 4
"""Sealed shards stay open for look-ups up to one in so many of the file descriptors that the process may have."""

_Rows = Iterator[tuple[int, Event]]


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event and where it is stored.

    Attributes:
        event: the event.
        partition: its partition.
        leaf: its index in the partition's Merkle tree; None where the shards before it are not in this store.
    """

    event: Event
    partition: int
    leaf: int | None


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard of a store.

    Attributes:
        path: the file.
        partition, shard: which one.
        sealed: immutable; else live.
        first_origin, last_origin: what it covers, both inclusive; None for a live shard without commits.
        commits, events: committed ones.
        bytes: size of the file.
    """

    path: Path
    partition: int
    shard: int
    sealed: bool
    first_origin: int | None
    last_origin: int | None
    commits: int
    events: int
    bytes: int


@dataclass(frozen=True, slots=True)
class PartitionEnd:
    """How far a partition's store reaches, to be held against its receipts.

    Attributes:
        partition: lane.
        origin: the last commit's; None without commits.
        tree_size, root: of the Merkle tree over its events, root in hex; None where the shards do not tell.
    """

    partition: int
    origin: int | None
    tree_size: int | None
    root: str | None


class EventStore:
    """The events in a store. For one thread at a time; any number of stores may read one directory.

    Every method raises `ShardCorruptError` where a shard cannot be read, and `OSError` where the disk refuses.
    """

    def __init__(self, path: Path | str) -> None:
        """`path` is a store directory, or a directory with one in its child ``shards``.

        Raises:
            ShardError: there is no store.
        """
        self.directory = find_store(Path(path))
        self._opened = OpenShards(self.directory)

    def close(self) -> None:
        """Closes what is open. The store can still be used."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def partitions(self) -> list[int]:
        """The partitions that have shards here, in order."""
        return sorted(self._opened.shards())

    def shards(self) -> list[ShardInfo]:
        """All shards, by partition and number."""
        return [info for partition in self.partitions() for info in self._each(partition, _info)]

    def count(self) -> int:
        """How many events are committed."""
        return sum(info.events for info in self.shards())

    def ends(self) -> list[PartitionEnd]:
        """How far each partition reaches now: up to a commit whose receipt was accepted. Hashes the live shards."""
        return [self._end(partition) for partition in self.partitions()]

    def iterate(self, partition: int | None = None) -> Iterator[StoredEvent]:
        """All events of one partition, or of all, in order of origin and index. Holds a few MB for each partition."""
        return self._merged(lambda view: view.events(), partition)

    def records(self, partition: int) -> Iterator[tuple[int | None, bytes]]:
        """(leaf, record) of all events of one partition in order: the bytes that its Merkle tree is over.

        `leaf` is as in `StoredEvent`.
        """
        with ExitStack() as opened:
            for view, leaf in self._snapshots(partition, opened):
                for row, record in enumerate(view.records()):
                    yield None if leaf is None else leaf + row, record
                view.close()

    def by(
        self,
        *,
        site: str | None = None,
        event_type: str | None = None,
        since_ns: int | None = None,
        until_ns: int | None = None,
    ) -> Iterator[StoredEvent]:
        """Events from `site`, of `event_type`, with since_ns <= timestamp_ns < until_ns, ordered as in `iterate`."""
        return self.select(Selection(site, event_type, since_ns, until_ns))

    def select(self, wanted: Selection, ends: Iterable[PartitionEnd] | None = None) -> Iterator[StoredEvent]:
        """The events that `wanted` describes, ordered as in `iterate`.

        Args:
            wanted: which.
            ends: no further than these, and of these partitions only. A store only grows, so the same ends give the
                same events at any later time.
        """
        if ends is None:
            return self._merged(lambda view: view.select(wanted), None)
        lanes = [self._lane(end.partition, lambda view: view.select(wanted), end.origin or 0) for end in ends]
        return _in_order(lanes)

    def consultation(self, consultation_id: UUID | str | bytes) -> list[StoredEvent]:
        """A consultation's events in order; none when it is not known."""
        wanted = _id_bytes(consultation_id)
        return self._look_up(lambda view: view.consultation(wanted))

    def event(self, event_id: UUID | str | bytes) -> StoredEvent | None:
        """One event; None when it is not known."""
        wanted = _id_bytes(event_id)

        def find(view: View) -> _Rows:
            found = view.find(wanted)
            return iter(()) if found is None else iter((found,))

        return next(iter(self._look_up(find)), None)

    def columns(self, names: Sequence[str] = COLUMNS) -> dict[str, Array]:
        """Columns of all events in the order of `iterate`, without decoding what is sealed.

        Returns:
            for each name an array of n values: ids n×16 u1, hashes n×32 u1, names as text, the others i8.

        Raises:
            ShardError: an unknown name.
        """
        if unknown := set(names) - set(COLUMNS):
            raise ShardError(f"no column {', '.join(sorted(unknown))}; there are {', '.join(COLUMNS)}")
        read = [*dict.fromkeys([*names, "origin", "index"])]
        pieces: dict[str, list[Array]] = {name: [] for name in read}

        def collect(view: View, _: int | None) -> None:
            rows = {name: view.column(name) for name in read if name != "partition"}
            rows["partition"] = np.full(len(rows["origin"]), view.header.partition, "<i8")
            for name in read:
                pieces[name].append(rows[name])

        for partition in self.partitions():
            self._each(partition, collect)
        if not pieces["origin"]:
            return {name: np.empty(0, "<i8") for name in names}
        joined = {name: np.concatenate(parts) for name, parts in pieces.items()}
        order = np.lexsort((joined["index"], joined["origin"]))
        return {name: joined[name][order] for name in names}

    def to_dataframe(self) -> pd.DataFrame:
        """All columns as a pandas DataFrame: ids as UUID text, hashes as hex, `timestamp_ns` as `timestamp` in UTC.

        Raises:
            ShardError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ShardError("pandas is not installed; install it, or use columns()") from error
        columns: dict[str, Any] = self.columns()
        for name in ("event_id", "consultation_id"):
            columns[name] = [str(UUID(bytes=row.tobytes())) for row in columns[name]]
        columns["audit_hash"] = [row.tobytes().hex() for row in columns["audit_hash"]]
        columns["timestamp"] = pandas.to_datetime(columns.pop("timestamp_ns"), unit="ns", utc=True)
        return pandas.DataFrame(columns)

    def _look_up(self, read: Callable[[View], _Rows]) -> list[StoredEvent]:
        """What `read` gives of every shard, in order. Live shards and the ids of sealed ones stay open for the next."""
        found: list[StoredEvent] = []
        open_max = getrlimit(RLIMIT_NOFILE)[0] // _DESCRIPTORS_SHARE
        sealed = 0
        for partition, shards in self._opened.shards().items():
            for view, leaf in self._views(shards, self._opened.kept):
                found += [
                    StoredEvent(event, partition, None if leaf is None else leaf + row) for row, event in read(view)
                ]
                if isinstance(view, SealedReader):
                    sealed += 1
                    if sealed > open_max:
                        view.close()
                    else:
                        view.close_hdf5()
        found.sort(key=_place)
        return found

    def _snapshots(self, partition: int, opened: ExitStack) -> list[tuple[View, int | None]]:
        """The partition's shards in order, each with the leaf index of its first event; closed with `opened`."""
        views = []
        for view, leaf in self._views(self._opened.shards().get(partition, []), self._opened.snapshot):
            opened.callback(view.close)
            views.append((view, leaf))
        return views

    def _views(
        self, shards: list[ShardFile], view_of: Callable[[ShardFile], View]
    ) -> Iterator[tuple[View, int | None]]:
        """A partition's shards in order, each with the leaf index of its first event."""
        leaf: int | None = None
        for number, shard in enumerate(shards):
            view = view_of(shard)
            if isinstance(view, SealedReader):
                yield view, view.header.tree_size_before
                leaf = view.header.tree_size
                continue
            if view.header.begins:
                leaf = view.header.tree_size_before
            elif number == 0 and view.commits and view.row(0).prev_origin == 0:
                leaf = 0
            yield view, leaf
            leaf = None if leaf is None else leaf + view.count

    def _end(self, partition: int) -> PartitionEnd:
        origin: int | None = None
        tree: MerkleFrontier | None = None
        with ExitStack() as opened:
            for view, leaf in self._snapshots(partition, opened):
                if isinstance(view, SealedReader):
                    origin = view.header.last_origin
                    tree = MerkleFrontier.from_bytes(view.header.tree_size, view.header.frontier)
                    continue
                if view.commits:
                    origin = view.row(view.commits - 1).origin
                if view.header.begins:
                    tree = MerkleFrontier.from_bytes(view.header.tree_size_before, view.header.frontier_before)
                elif leaf == 0:
                    tree = MerkleFrontier()
                if tree is not None:
                    tree.extend(view.records())
        size, root = (None, None) if tree is None else (tree.size, tree.root().hex())
        return PartitionEnd(partition, origin, size, root)

    def _each(self, partition: int, use: Callable[[View, int | None], Any]) -> list[Any]:
        """What `use` gives for each shard of the partition in order; closes each behind it."""
        given = []
        with ExitStack() as opened:
            for view, leaf in self._snapshots(partition, opened):
                given.append(use(view, leaf))
                view.close()
        return given

    def _merged(self, read: Callable[[View], _Rows], partition: int | None) -> Iterator[StoredEvent]:
        partitions = self.partitions() if partition is None else [partition]
        return _in_order([self._lane(number, read) for number in partitions])

    def _lane(
        self, partition: int, read: Callable[[View], _Rows], last_origin: float = math.inf
    ) -> Iterator[StoredEvent]:
        with ExitStack() as opened:
            for view, leaf in self._snapshots(partition, opened):
                for row, event in read(view):
                    if event.origin > last_origin:
                        return
                    yield StoredEvent(event, partition, None if leaf is None else leaf + row)
                view.close()


def find_store(path: Path) -> Path:
    """The store directory that `path` is or has as its child ``shards``.

    Raises:
        ShardError: neither.
    """
    for directory in (path, path / SHARDS):
        if (directory / STORE_FILE).is_file():
            return directory
    raise ShardError(
        f"{path}: there is no store here nor in {path / SHARDS} ({STORE_FILE} is missing); "
        "name a shards directory, or the directory of `fictl up`"
    )


def _in_order(lanes: list[Iterator[StoredEvent]]) -> Iterator[StoredEvent]:
    return heapq.merge(*lanes, key=_place)


def _place(stored: StoredEvent) -> tuple[int, int]:
    return stored.event.origin, stored.event.index


def _id_bytes(value: UUID | str | bytes) -> bytes:
    """16 bytes. Raises `ValueError` for text that is not a UUID."""
    if isinstance(value, bytes):
        return value
    return UUID(value).bytes if isinstance(value, str) else value.bytes


def _info(view: View, _: int | None) -> ShardInfo:
    header = view.header
    if isinstance(view, SealedReader):
        sealed = view.header
        first, last, commits, events = sealed.first_origin, sealed.last_origin, sealed.commits, sealed.events
        return ShardInfo(
            view.path, header.partition, header.shard, True, first, last, commits, events, header.file_bytes
        )
    return ShardInfo(
        view.path,
        header.partition,
        header.shard,
        False,
        view.row(0).prev_origin + 1 if view.commits else None,
        view.row(view.commits - 1).origin if view.commits else None,
        view.commits,
        view.count,
        header.file_bytes,
    )
