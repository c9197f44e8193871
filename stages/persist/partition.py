"""All files of one partition in one store, for the process that owns it. Blocking: called in threads, one at a time.

Opening is recovery: it takes the store to exactly what the last accepted receipt says of it. What was appended past the
receipt is cut; what the receipt speaks of must be there, whole, with the Merkle root the receipt carries. Nothing is
guessed: a contradiction is refused, naming the file.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from contracts.errors import ShardCorruptError
from contracts.events import decode_event_key
from contracts.hashing import MerkleFrontier
from contracts.receipts import Receipt, ResumePoint, SealRecord, StoreEnd
from contracts.settings import Settings
from stages.persist.aside import ASIDE, move_aside
from stages.persist.core import Group, count_settled
from stages.persist.files import publish_file, remove_file, sync_dir
from stages.persist.header import read_sealed_header
from stages.persist.ids import SeenIds
from stages.persist.live import LiveShard
from stages.persist.names import FIRST_SHARD, ShardFile, list_leftovers, list_shards, live_name, next_name, parse_name
from stages.persist.newlive import create_shard, share_bytes
from stages.persist.opening import (
    check_belongs,
    check_rows,
    check_shown,
    frontier_at_begin,
    refuse_unaccepted,
    sealed_rows,
)
from stages.persist.records import keep_record
from stages.persist.resume import resume_after
from stages.persist.rows import blob_bytes
from stages.persist.seal import SealedInfo, SealJob, events_of_sealed, seal, whole_sealed
from stages.persist.storedir import COPIED, Store, disk_of

log = logging.getLogger(__name__)

PREPARE_AT = 0.5
"""The next shard is prepared when the live one is this full."""

PREPARE_AGE_SHARE = 0.9
"""Or has reached this share of its age limit: a quiet partition needs the room for two files for a short time only."""


class PartitionFiles:
    """See the module's text. After any exception the object is done for: close it and open anew.

    Attributes:
        frontier: the Merkle tree over everything stored.
        to_seal: full shards found or made and not sealed yet, oldest first.
        sealed: the store's own sealed shards, by number.
        trees: size and root of the tree after each full shard of the store's own part, and after the one before it.
    """

    def __init__(self, store: Store, partition: int, settings: Settings, clock_ns: Callable[[], int]) -> None:
        self._store = store
        self._partition = partition
        self._settings = settings
        self._clock_ns = clock_ns
        self._live: LiveShard
        self._frontier_before = MerkleFrontier()
        self._first_ns: int | None = None
        self._dropped_bytes = 0
        """Of duplicates that came while the live shard was, as far as this object saw them."""
        self._share_bytes = share_bytes(settings)
        self._first_shard = FIRST_SHARD
        self._told_rows: dict[int, str] = {}
        """As `StoreEnd.rows`, of the receipt that the partition is recovered to."""
        self._found_rows: dict[Path, tuple[int, str]] = {}
        """The number, and the digest of the rows, of shards that it may tell of."""
        self._next_ready = False
        self._damaged: dict[int, Path] = {}
        """Damaged sealed forms of shards whose live form is there too: nothing may be appended to those."""
        self.frontier = MerkleFrontier()
        self.seen = SeenIds()
        self.to_seal: list[SealJob] = []
        self.sealed: dict[int, Path] = {}
        self.trees: dict[int, tuple[int, str]] = {}
        self.cut_commits = False

    @classmethod
    def open(
        cls, store: Store, partition: int, receipt: Receipt, settings: Settings, clock_ns: Callable[[], int]
    ) -> PartitionFiles:
        """Recovers the partition to `receipt`, which must be the caller's own accepted takeover. The lock must be held.

        Raises:
            ShardCorruptError: committed data is missing or changed. Names the file and what to do.
            ShardError: a file of a newer version or another store.
            StoreFailedError: the disk refused a write.
        """
        files = cls(store, partition, settings, clock_ns)
        try:
            with disk_of(store):
                files._recover(receipt)
        except BaseException:
            files.close()
            raise
        return files

    def _recover(self, receipt: Receipt) -> None:
        sync_dir(self._store.directory)  # Or a power cut may take back a name that a killed process gave, and its file.
        found = {file.shard: file for file in list_shards(self._store.directory).get(self._partition, ())}
        self._prefer_whole_forms(found)
        kept = {file.path for file in found.values()}
        spare = [path for path in list_leftovers(self._store.directory, self._partition) if path not in kept]
        for unfinished in [path for path in spare if parse_name(path) is None]:
            remove_file(unfinished)
            spare.remove(unfinished)
        end = receipt.end_of(self._store.store_id)
        self._first_shard, self._told_rows = end.first, end.rows
        self._take_earlier([found.pop(number) for number in sorted(found) if number < end.first])
        if end.first > FIRST_SHARD:
            self.frontier = frontier_at_begin(self._store, self._partition, found.get(end.first), end.first)
            self._note_tree(end.first - 1)
        for number in range(end.first, end.shard):
            self._load_finished(number, found.pop(number, None))
        self._open_current(found.pop(end.shard, None), end)
        for file in found.values():
            self._discard_unaccepted(file)
        if self.frontier.size != receipt.persisted or self.frontier.root().hex() != receipt.root:
            raise ShardCorruptError(
                f"{self._store.directory}: partition {self._partition} holds {self.frontier.size} events with root "
                f"{self.frontier.root().hex()[:16]}…, its last receipt says {receipt.persisted} with "
                f"{receipt.root[:16]}…; run `fictl verify {self._store.directory}`; rebuild or restore what is damaged"
            )
        for path, (number, rows) in self._found_rows.items():
            check_rows(path, number, self._told_rows, rows)
        # Not before: the other form of a shard may be the true one of the two.
        for path in (*spare, *self._damaged.values()):
            remove_file(path)

    def _prefer_whole_forms(self, found: dict[int, ShardFile]) -> None:
        """Where both forms are there, a damaged sealed one gives way to the live one and is sealed again."""
        for number, sealed in found.items():
            live = self._store.directory / live_name(self._partition, number)
            if sealed.sealed and live.exists() and whole_sealed(sealed.path) is None:
                found[number] = ShardFile(live, self._partition, number, sealed=False)
                self._damaged[number] = sealed.path

    def _take_earlier(self, files: list[ShardFile]) -> None:
        """Shards of a time before another store had the partition: their events are known, the tree went on there."""
        for file in files:
            if file.sealed:
                self.seen.add_sealed(file.path)

    def _load_finished(self, number: int, file: ShardFile | None) -> None:
        """A shard before the current one: sealed, or full and still to be sealed."""
        if file is None:
            raise ShardCorruptError(
                f"{self._store.directory}: shard {number} of partition {self._partition} is missing, though receipts "
                "commit it; put the copy that `fictl backup` made in its place, or run `fictl rebuild`"
            )
        if file.sealed:
            self._load_sealed(number, file.path)
            return
        with contextlib.closing(LiveShard(file.path)) as live:
            check_belongs(file.path, live.header, self._store, self._partition, number)
            before = self.frontier.copy()
            if live.commits < live.watermark() <= live.rows_max:
                raise live.lost or ShardCorruptError(
                    f"{file.path}: only {live.commits} of {live.watermark()} committed rows are whole; rebuild it from "
                    "the stream"
                )
            self._found_rows[file.path] = number, live.rows.hexdigest()
            self._replay(live)
            # A power cut may have taken it back.
            live.set_watermark(live.commits)
            self._note_tree(number)
            self.to_seal.append(SealJob(file.path, number, live.commits, before, live.rows.hexdigest()))

    def _load_sealed(self, number: int, path: Path) -> None:
        header = read_sealed_header(path)
        check_belongs(path, header, self._store, self._partition, number)
        if number in self._told_rows:
            # Nobody may have recorded it yet.
            self._found_rows[path] = number, sealed_rows(path)
        if header.tree_size_before != self.frontier.size or header.frontier_before != self.frontier.to_bytes():
            raise ShardCorruptError(f"{path}: does not go on from the shard before it; run `fictl verify`")
        self.frontier = MerkleFrontier.from_bytes(header.tree_size, header.frontier)
        self._note_tree(number)
        self.seen.add_sealed(path)
        self.sealed[number] = path

    def _note_tree(self, shard: int) -> None:
        self.trees[shard] = (self.frontier.size, self.frontier.root().hex())

    def _replay(self, live: LiveShard) -> None:
        """Takes a live shard's events into the tree and the set of seen ids."""
        for _, records in live.scan():
            self.frontier.extend(records)
            self.seen.add(live.header.shard, [decode_event_key(record).event_id for record in records])

    def _open_current(self, file: ShardFile | None, end: StoreEnd) -> None:
        """The shard the receipt stands in: cut to what it accepts; or begun, when nothing in it was ever accepted."""
        if file is not None and (file.sealed or end.shard in self._damaged):
            # It was full, and the process died before the first receipt of the next shard.
            self._load_finished(end.shard, file)
            self._begin(end.shard + 1)
            return
        if file is None:
            if end.commits:
                raise ShardCorruptError(
                    f"{self._store.directory}: live shard {end.shard} of partition {self._partition} is missing, "
                    f"though receipts commit {end.commits} groups in it: {COPIED}"
                )
            self._begin(end.shard)
            return
        live = LiveShard(file.path)
        self._live = live
        check_belongs(file.path, live.header, self._store, self._partition, end.shard)
        check_shown(live, end.commits)
        self.cut_commits = live.cut(end.commits)
        self._found_rows[file.path] = end.shard, live.rows.hexdigest()
        self._frontier_before = self.frontier.copy()
        self._replay(live)
        live.set_watermark(live.commits)
        self._first_ns = live.read_rows(0, 1)[0].committed_ns if live.commits else None

    def _discard_unaccepted(self, file: ShardFile) -> None:
        """A shard after the current one holds nothing that was accepted (its first receipt never was)."""
        refuse_unaccepted(file)
        if file.path != self._live.path:
            try:
                live = LiveShard(file.path)
            except ShardCorruptError as error:
                log.warning("%s; it held nothing that was accepted and is moved aside", error)
                move_aside([file], self._store.directory / ASIDE, self._clock_ns())
                return
            with contextlib.closing(live):
                check_shown(live, 0)
            remove_file(file.path)

    def _create(self, path: Path, number: int) -> None:
        create_shard(path, self._store, self._partition, number, self._settings, self._clock_ns())

    def _begin(self, number: int) -> None:
        """Makes `number` the live shard, from the prepared file if there is one."""
        path = self._store.directory / live_name(self._partition, number)
        prepared = self._store.directory / next_name(self._partition, number)
        used = path.exists() and not prepared.exists()
        if prepared.exists():
            publish_file(prepared, path)
        elif not used:
            self._create(path, number)
        self._live = LiveShard(path)
        check_belongs(path, self._live.header, self._store, self._partition, number)
        check_shown(self._live, 0)
        if used:
            # Reads all of the file; one that was just made is zero.
            self._live.cut(0)
        self._frontier_before = self.frontier.copy()
        self._first_ns = None
        self._dropped_bytes = 0
        self._next_ready = False

    @property
    def end(self) -> StoreEnd:
        """How far the files reach: what a receipt for them says."""
        live = self._live
        shard, rows = live.header.shard, {job.shard: job.rows for job in self.to_seal}
        if live.commits:
            rows[shard] = live.rows.hexdigest()
        return StoreEnd(shard=shard, commits=live.commits, first=self._first_shard, rows=rows)

    def fits(self, group: Group) -> bool:
        """True when the live shard has room for the group, and `FI_EVENTS` for what both keep there, repeats too."""
        live = self._live
        size_bytes = blob_bytes(group.records)
        if not live.commits:
            return live.fits(size_bytes)
        return (
            live.fits(size_bytes)
            and live.end_bytes + size_bytes + self._dropped_bytes + group.dropped_bytes <= self._share_bytes
            and live.events + len(group.records) <= self._settings.shard_events_max
        )

    def holds_events(self) -> bool:
        """True when there is something in the live shard to seal."""
        return self._live.events > 0

    def is_flushed(self, target: int) -> bool:
        """True when nothing that settles origins up to `target` is in the live shard, or no event at all."""
        after = self._live.prev_origin
        return after is None or after >= target or not self.holds_events()

    def commit(self, group: Group) -> int:
        """Appends the group and makes it durable: one fdatasync. Committed only when its receipt is accepted.

        Returns:
            when it was durable, nanoseconds since the epoch.

        Raises:
            StoreFailedError: the disk refused. The partition must stop; nothing may be acknowledged.
        """
        with disk_of(self._store):
            self._live.append(
                group.records,
                prev_origin=group.prev_origin,
                origin=group.origin,
                duplicates=group.duplicates,
                dead_lettered=group.dead_lettered,
                committed_ns=self._clock_ns(),
            )
            self._live.sync()
        self._dropped_bytes += group.dropped_bytes
        self.frontier.extend(group.records)
        self.seen.add(self._live.header.shard, group.ids)
        now_ns = self._clock_ns()
        if self._first_ns is None:
            self._first_ns = now_ns
        return now_ns

    def accepted(self) -> None:
        """The last commit's receipt was accepted: readers may see it. Blocks while the disk hangs."""
        with disk_of(self._store):
            self._live.set_watermark(self._live.commits)

    def is_empty(self) -> bool:
        """True when nothing at all was committed to the live shard."""
        return self._first_ns is None

    def is_old(self, share: float = 1.0) -> bool:
        """True when the live shard's oldest commit has reached the age limit, or that share of it.

        Also when its commits hold no events: `FI_EVENTS` keeps what is not sealed, duplicates and refused ones too. And
        when that lies so far in the future: the clock was put back, and the shard would grow old when it catches up.
        """
        age_ns_max = share * self._settings.shard_age_s_max * 1e9
        return self._first_ns is not None and abs(self._clock_ns() - self._first_ns) >= age_ns_max

    def wants_next(self) -> bool:
        """True when the live shard has come so near to its end that the next one is to be prepared, and was not yet."""
        live, full_bytes = self._live, min(self._settings.shard_bytes, self._share_bytes)
        full = max(
            (live.end_bytes + self._dropped_bytes) / full_bytes,
            live.commits / live.rows_max,
            live.events / self._settings.shard_events_max,
        )
        return not self._next_ready and (full >= PREPARE_AT or self.is_old(PREPARE_AGE_SHARE))

    def prepare_next(self) -> None:
        """Makes the next shard's file ahead of time, off the hot path. Does nothing when it is there."""
        number = self._live.header.shard + 1
        path = self._store.directory / next_name(self._partition, number)
        with disk_of(self._store):
            if not path.exists():
                self._create(path, number)
        self._next_ready = True

    def roll(self) -> None:
        """Ends the live shard, of which every commit must be accepted, and begins the next."""
        full = self._live
        self.accepted()
        job = SealJob(full.path, full.header.shard, full.commits, self._frontier_before, full.rows.hexdigest())
        self._note_tree(job.shard)
        with contextlib.closing(full), disk_of(self._store):
            self._begin(job.shard + 1)
        self.to_seal.append(job)

    def seal(self, job: SealJob, sealed_ns: int | None = None) -> SealedInfo:
        """Writes and verifies the sealed form. Changes no state of this object: it may run beside commits.

        With the time of a record that was published before, the file is byte for byte the recorded one.
        """
        committed, now_ns = (*self.trees[job.shard], job.rows), sealed_ns or self._clock_ns()
        with disk_of(self._store):
            return seal(job.path, commits=job.commits, frontier=job.frontier, sealed_ns=now_ns, committed=committed)

    def sealed_info(self, shard: int) -> SealedInfo:
        """Facts of an already sealed shard, for a seal record that was not published yet."""
        with disk_of(self._store):
            return events_of_sealed(self.sealed[shard])

    def resume_after(self, before: ResumePoint, info: SealedInfo) -> ResumePoint:
        """What the partition can go on from after a sealed shard, from the point before it."""
        with disk_of(self._store):
            return resume_after(before, info.path)

    def settled_origin(self, kept: int, copied: int | None) -> int:
        """How far the sealed shards reach that are settled, as `count_settled` says; 0 when there are none."""
        numbers = sorted(self.sealed)
        settled = count_settled(numbers, kept, copied)
        if not numbers or kept > len(numbers):
            return 0
        named = parse_name(self.sealed[numbers[min(settled, len(numbers) - 1)]])
        if named is None or named.first_origin is None or named.last_origin is None:
            return 0
        return named.last_origin if settled == len(numbers) else named.first_origin - 1

    def keep_record(self, record: SealRecord) -> None:
        """Lays an accepted seal record beside its file, for proofs without the cluster."""
        with disk_of(self._store):
            keep_record(self._store.directory / record.file, record)

    def finish_seal(self, job: SealJob, info: SealedInfo) -> None:
        """The seal record is accepted: the sealed file takes the live one's place."""
        with disk_of(self._store):
            self.seen.replace_live(job.shard, info.path)
            remove_file(job.path)
        self.sealed[job.shard] = info.path
        self.to_seal.remove(job)

    def close(self) -> None:
        """Lets go of the files."""
        if hasattr(self, "_live"):
            self._live.close()
