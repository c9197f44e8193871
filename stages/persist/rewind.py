"""Going back: the last place that the files and the cluster's records agree on.

A partition whose files are damaged or gone is taken back to such a place with a fenced takeover receipt; everything
after it is made again from `FI_EVENTS` by the stages themselves, and what the files hold of it goes aside
(`stages.persist.aside`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from msgspec import UNSET, UnsetType

from contracts.errors import ShardCorruptError, ShardError
from contracts.hashing import MerkleFrontier
from contracts.receipts import Receipt, ResumePoint, SealRecord, Signature
from contracts.settings import Settings
from stages.persist.aside import read_through
from stages.persist.files import is_lost, publish_file
from stages.persist.live import LiveReader
from stages.persist.names import FIRST_SHARD, ShardFile, list_shards, live_name, next_name, tmp_path
from stages.persist.newlive import create_shard
from stages.persist.opening import check_rows, name_changed_rows, sealed_rows
from stages.persist.rows import encode_row
from stages.persist.seal import events_of_sealed, sealed_info
from stages.persist.storedir import Store


@dataclass(frozen=True, slots=True)
class Place:
    """A point in a partition that a receipt or seal record vouches for.

    Attributes:
        origin: everything up to here is in the files before it.
        shard, commits: where it is in the files.
        tree: the Merkle tree there.
        duplicates, dead_lettered: running totals there.
        closed: segment's memory there.
        rows: of the shards before it that are not sealed, as `StoreEnd.rows`.
        stored_ns: when `FI_EVENTS` stored the message at `origin`; 0 when not known.
        signature: that of the last record beside a shard before it, where the files alone say the place.
    """

    origin: int
    shard: int
    commits: int
    tree: MerkleFrontier
    duplicates: int
    dead_lettered: int
    closed: bytes
    rows: dict[int, str] = field(default_factory=dict)
    stored_ns: int = 0
    signature: Signature | UnsetType = UNSET


@dataclass(frozen=True, slots=True)
class Damage:
    """Why the files cannot be followed further than a place.

    Attributes:
        shard: the number of the shard where they end.
        file: its path, or the directory where it is missing.
        why: what is wrong with it.
    """

    shard: int
    file: Path
    why: str

    @classmethod
    def by(cls, file: ShardFile, error: Exception) -> Damage:
        """What an error in reading `file` says of it; raises one that is of the system and not of the medium."""
        if isinstance(error, OSError) and not is_lost(error):
            raise error
        return cls(file.shard, file.path, str(error) if isinstance(error, ShardError) else f"{file.path}: {error}")


def place_after_seals(receipt: Receipt, seals: Sequence[SealRecord]) -> Place:
    """The last place that the records alone give, without any file: after the last sealed shard, or the beginning.

    Raises:
        ShardError: the last seal record is of the first builds and does not hold it.
    """
    if not seals:
        return Place(0, FIRST_SHARD, 0, MerkleFrontier(), 0, 0, b"")
    last = seals[-1]
    if last.resume is UNSET:
        raise ShardError(
            f"the seal record of shard {last.shard} of partition {last.partition} does not hold its Merkle frontier "
            "(it was written by an older build): the partition cannot be gone on with from there"
        )
    tree = MerkleFrontier.from_bytes(last.tree_size, last.resume.frontier)
    origin = last.last_origin
    return _place(origin, last.shard + 1, 0, tree, receipt if receipt.origin == origin else last.resume)


def _place(
    origin: int,
    shard: int,
    commits: int,
    tree: MerkleFrontier,
    told: Receipt | ResumePoint,
    rows: dict[int, str] | None = None,
) -> Place:
    stored_ns = 0 if told.stored_ns is UNSET else told.stored_ns
    return Place(origin, shard, commits, tree, told.duplicates, told.dead_lettered, told.closed, rows or {}, stored_ns)


def last_good_place(
    store: Store, partition: int, receipts: Sequence[Receipt], seals: Sequence[SealRecord]
) -> tuple[Place, Damage | None]:
    """How far the partition's files agree with the cluster's records, and what is wrong after that (None: nothing).

    Reads and hashes every shard from the store's first on.

    Args:
        store: which owns the partition.
        partition: lane.
        receipts, seals: the records in force, in stream order; the last receipt says how far the files must reach.

    Raises:
        ShardError: as `place_after_seals`, for a store that took the partition over.
        OSError: the store cannot be read.
    """
    last = receipts[-1]
    end = last.end_of(store.store_id)
    before = [seal for seal in seals if seal.shard < end.first]
    walk = _Walk(place_after_seals(last, before), store.store_id, receipts, seals)
    found = {file.shard: file for file in list_shards(store.directory).get(partition, ())}
    for number in range(end.first, end.shard + 1):
        file = found.get(number)
        if file is None:
            if number < end.shard or end.commits or number == end.first != FIRST_SHARD:
                walk.damage = Damage(number, store.directory, f"shard {number} is missing")
        elif file.sealed:
            walk.sealed(file, end.commits if number == end.shard else None)
        else:
            walk.live(file, end.commits if number == end.shard else None)
        if walk.damage is not None:
            break
    return walk.place, walk.damage


class _Walk:
    """Goes through a partition's shards in order, and remembers the last place that a record vouches for."""

    def __init__(self, start: Place, store_id: str, receipts: Sequence[Receipt], seals: Sequence[SealRecord]) -> None:
        self.place = start
        self.damage: Damage | None = None
        self._store_id = store_id
        self._told_rows = receipts[-1].end_of(store_id).rows
        self._rows: dict[int, str] = {}
        """Of the live shards so far."""
        self._tree = start.tree.copy()
        self._receipts = {receipt.origin: receipt for receipt in receipts}
        self._seals = {seal.shard: seal for seal in seals}

    def sealed(self, file: ShardFile, commits: int | None) -> None:
        """`commits`: as for `live`, which has them where only the live form is whole."""
        record = self._seals.get(file.shard)
        try:
            info = events_of_sealed(file.path) if record is None else sealed_info(file.path)
            if record is not None and record.sha256 != info.sha256:
                raise ShardCorruptError(f"{file.path}: is not the file that its seal record speaks of")
            header = info.header
            if (header.tree_size_before, header.frontier_before) != (self._tree.size, self._tree.to_bytes()):
                raise ShardCorruptError(f"{file.path}: does not go on from the shard before it")
            rows = sealed_rows(file.path) if file.shard in self._told_rows else ""
        except (ShardError, OSError) as error:
            damage = Damage.by(file, error)
            live = file.path.with_name(live_name(file.partition, file.shard))
            if live.exists():
                self.live(ShardFile(live, file.partition, file.shard, sealed=False), commits)
            else:
                self.damage = damage
            return
        if rows != self._told_rows.get(file.shard, ""):
            # As its owner, who takes a sealed form that agrees with itself before a live one.
            self.damage = Damage(file.shard, file.path, name_changed_rows(file.path))
            return
        self._tree = info.frontier
        origin = header.last_origin
        if record is not None and record.resume is not UNSET:
            self.place = _place(origin, file.shard + 1, 0, self._tree.copy(), record.resume, dict(self._rows))
        self._hold(file, origin, file.shard + 1, 0)

    def live(self, file: ShardFile, commits: int | None) -> None:
        """`commits`: how many are accepted; None for a full shard, whose owner showed all of them."""
        try:
            with LiveReader(file.path) as reader:
                expected = reader.watermark() if commits is None else commits
                whole, rows = 0, sha256()
                for row, records in reader.scan(commits):
                    self._tree.extend(records)
                    rows.update(encode_row(row))
                    whole, self._rows[file.shard] = row.ordinal, rows.hexdigest()
                    self._hold(file, row.origin, file.shard, row.ordinal)
                    if self.damage is not None:
                        return
                if whole < expected:
                    raise ShardCorruptError(f"{file.path}: only {whole} of {expected} committed rows are whole")
            check_rows(file.path, file.shard, self._told_rows, rows.hexdigest())
            # Its owner reads on from there, and may not get past a page that cannot be read.
            read_through(file.path)
        except (ShardError, ValueError, OSError) as error:
            self.damage = Damage.by(file, error)

    def _hold(self, file: ShardFile, origin: int, shard: int, commits: int) -> None:
        """Holds the tree against the receipt of this origin, if the cluster has it."""
        receipt = self._receipts.get(origin)
        if receipt is None:
            return
        if (receipt.persisted, receipt.root) != (self._tree.size, self._tree.root().hex()):
            why = f"{file.path}: its events up to origin {origin} are not those that were committed"
            self.damage = Damage(file.shard, file.path, why)
            return
        found = self._rows.get(file.shard, "")
        told = receipt.end_of(self._store_id).rows.get(file.shard, "")
        if found and file.shard in self._told_rows and told != found:
            # Changed at or before this commit; or an older build's, of which only a later receipt tells.
            return
        self.place = _place(origin, shard, commits, self._tree.copy(), receipt, dict(self._rows))


def prepare_begin(store: Store, partition: int, place: Place, settings: Settings, clock_ns: Callable[[], int]) -> None:
    """Makes the live shard with which `store` takes the partition over at `place`; it has its name with `begin_at`.

    To be called before the receipt that says so, for it needs room. The lock must be held, until `begin_at` is done.

    Raises:
        OSError: the disk refused.
    """
    create_shard(
        _unbegun(store, partition, place),
        store,
        partition,
        place.shard,
        settings,
        clock_ns(),
        begins_after=place.tree,
    )


def begin_at(store: Store, partition: int, place: Place) -> None:
    """Gives what `prepare_begin` made its name. Interrupted as `publish_file`. Raises `OSError`."""
    publish_file(_unbegun(store, partition, place), store.directory / live_name(partition, place.shard))


def _unbegun(store: Store, partition: int, place: Place) -> Path:
    # Not the unfinished form of the live name: that is another's, which `prepare_aside` makes and takes away.
    return tmp_path(store.directory / next_name(partition, place.shard))
