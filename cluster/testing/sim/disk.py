"""Persist's files in memory: what is appended, what of it is durable, and what a dead process or a power cut leaves.

It keeps `PartitionFiles`' promises and refusals, not its format: shards of commits, cut at opening to what the receipt
accepts, refused when they contradict it. Its own format has its own tests (`tests/chaos/crash`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.testing.sim.loop import Host, current_host
from cluster.testing.sim.shards import Shard, copies_of, rows_of
from contracts.errors import NotOursError, ShardCorruptError, StoreFailedError
from contracts.events import decode_event, decode_event_key, stored_ns_at
from contracts.hashing import MerkleFrontier, leaf_hash
from contracts.receipts import Receipt, ResumePoint, SealRecord, StoreEnd
from contracts.settings import Settings
from stages.persist.core import Group, count_settled
from stages.persist.disk import Disk
from stages.persist.header import SealedHeader
from stages.persist.seal import SealedInfo, SealJob
from stages.persist.storedir import Store

_NO_SUM = "0" * 64  # There is no file to take it of.


class KilledError(Exception):
    """The process was killed inside a disk operation."""


class MemoryDisk:
    """One node's disk with one store on it.

    Args:
        store: its identity.
        rng: decides what a power cut takes.

    Attributes:
        failing: it refuses writes, as a full or broken disk does.
        backed_up: sealed shards are copied to another disk now and then.
        copied: partition → its newest sealed shard that was copied by the last run; None: the store has no such mark.
        kill_in_commit: called between a commit's append and its fdatasync; gives True when it killed the process.
    """

    def __init__(self, store: Store, rng: random.Random) -> None:
        self.store = store
        self.failing = False
        self.backed_up = rng.random() < 0.5
        self.copied: dict[int, int] | None = {} if self.backed_up else None
        self.kill_in_commit: Callable[[Host], bool] = lambda host: False
        self._rng = rng
        self._shards: dict[int, dict[int, Shard]] = {}
        self._copies: dict[int, dict[int, Shard]] = {}
        self._locks: dict[int, _Lock] = {}

    def as_disk(self) -> Disk:
        """What a persist lane is handed."""
        return Disk(self.lock, self._open, self._probe, self._state, self._copied)

    def shards(self, partition: int) -> dict[int, Shard]:
        """The partition's shards by number."""
        return self._shards.setdefault(partition, {})

    def records(self, partition: int) -> list[bytes]:
        """What readers are shown of a partition, in order."""
        found = sorted(self.shards(partition).items())
        return [record for _, shard in found for group in shard.groups[: shard.watermark] for record in group.records]

    def cut_power(self) -> None:
        """What was not synced is lost, any part of it; the processes must be dead already."""
        for shards in self._shards.values():
            for shard in shards.values():
                kept = self._rng.randint(shard.durable, max(shard.durable, len(shard.groups)))
                del shard.groups[kept:]
                shard.watermark = min(self._rng.randint(shard.durable_watermark, shard.watermark), kept)

    def partitions(self) -> list[int]:
        """Those that have shards here."""
        return sorted(partition for partition, shards in self._shards.items() if shards)

    def back_up(self) -> None:
        """As `fictl backup`: what is sealed is copied, what was copied stays, and the store is told."""
        for partition, shards in self._shards.items():
            copies = self._copies.setdefault(partition, {})
            copies.update({number: shard.copy() for number, shard in shards.items() if shard.sealed})
        self.copied = {
            partition: max(number for number, shard in shards.items() if shard.sealed)
            for partition, shards in self._shards.items()
            if any(shard.sealed for shard in shards.values())
        }

    def forget_copies(self, partition: int, shard: int) -> None:
        """As `stages.persist.backup.forget_copies`."""
        if self.copied is not None and self.copied.get(partition, 0) >= shard:
            self.copied[partition] = shard - 1

    def snapshot(self) -> dict[int, dict[int, Shard]]:
        """The files as they are now."""
        return copies_of(self._shards)

    def put_back(self, before: dict[int, dict[int, Shard]]) -> None:
        """The files are as they were `before`, but for sealed shards that were copied: those are put there again.

        The processes must be dead already.
        """
        self._shards = copies_of(before)
        for partition, shards in copies_of(self._copies).items():
            self._shards[partition] = self._shards.get(partition, {}) | shards

    def copy(self) -> MemoryDisk:
        """Another disk with the same files on it, and the same store."""
        made = MemoryDisk(self.store, self._rng)
        made.backed_up, made.copied = False, None if self.copied is None else dict(self.copied)
        made._shards = self.snapshot()
        return made

    def reaches(self, receipt: Receipt) -> bool:
        """Whether what is accepted by the receipt is here: another disk with the same store may be further."""
        end = receipt.end_of(self.store.store_id)
        shard = self.shards(receipt.partition).get(end.shard, Shard())
        told = end.rows.get(end.shard)
        return len(shard.groups) >= end.commits and told in (None, rows_of(shard.groups[: end.commits]))

    def lose(self) -> None:
        """The disk is gone, and the copies are put where it was; the processes must be dead already."""
        self._shards = copies_of(self._copies)
        self.copied = {}

    def lock(self, store: Store, partition: int) -> _Lock:
        """As `lock_partition`."""
        holder = self._locks.get(partition)
        if holder is not None and holder.held:
            raise NotOursError(f"partition {partition} of {store.directory} is held by another process")
        lock = _Lock()
        self._locks[partition] = lock
        return lock

    def _open(
        self, store: Store, partition: int, receipt: Receipt, settings: Settings, clock_ns: Callable[[], int]
    ) -> MemoryFiles:
        return MemoryFiles(self, partition, receipt, settings, clock_ns)

    def _probe(self, store: Store, partition: int, room_bytes: int) -> None:
        self.refuse_if_failing()

    def _state(self, directory: Path, partition: int) -> object:
        return {number: len(shard.groups) for number, shard in self.shards(partition).items()}

    def _copied(self, directory: Path, partition: int) -> int | None:
        return None if self.copied is None else self.copied.get(partition, 0)

    def refuse_if_failing(self) -> None:
        """Raises `StoreFailedError` when the disk is failing."""
        if self.failing:
            raise StoreFailedError(f"{self.store.directory}: No space left on device")


class _Lock:
    def __init__(self) -> None:
        self.held = True

    def check(self) -> None:
        """Nobody takes it away here."""

    def close(self) -> None:
        self.held = False


class _Seen:
    def __init__(self) -> None:
        self.ids: set[bytes] = set()

    def seen(self, ids: Sequence[bytes]) -> Sequence[bool]:
        return [event_id in self.ids for event_id in ids]

    def unsummarized(self) -> None:
        """A set needs no summary."""


class MemoryFiles:
    """A partition's files, open. See `stages.persist.disk.Files`."""

    def __init__(
        self, disk: MemoryDisk, partition: int, receipt: Receipt, settings: Settings, clock_ns: Callable[[], int]
    ) -> None:
        self.frontier = MerkleFrontier()
        self.seen = _Seen()
        self.to_seal: list[SealJob] = []
        self.sealed: dict[int, Path] = {}
        self.trees: dict[int, tuple[int, str]] = {}
        self.cut_commits = False
        self._disk = disk
        self._partition = partition
        self._settings = settings
        self._clock_ns = clock_ns
        self._infos: dict[int, SealedInfo] = {}
        self._shards = disk.shards(partition)
        self._number = 1
        self._first_ns: int | None = None
        self._frontier_before = MerkleFrontier()
        disk.refuse_if_failing()
        self._recover(receipt)

    @property
    def _live(self) -> Shard:
        return self._shards[self._number]

    def _recover(self, receipt: Receipt) -> None:
        end = receipt.end_of(self._disk.store.store_id)
        self._told_rows = end.rows
        where = f"{self._disk.store.directory}: partition {self._partition}"
        for number in [number for number in self._shards if number > end.shard]:
            shard = self._shards[number]
            if shard.sealed or shard.watermark:
                raise ShardCorruptError(f"{where}: readers were shown shard {number}, of which no receipt speaks")
            del self._shards[number]
        for number in range(1, end.shard):
            if number not in self._shards:
                raise ShardCorruptError(f"{where}: shard {number} is missing")
            self._finished(number)
        shard = self._shards.setdefault(end.shard, Shard())
        if len(shard.groups) < end.commits:
            raise ShardCorruptError(f"{where}: {len(shard.groups)} commits in shard {end.shard} of {end.commits}")
        if shard.watermark > end.commits:
            raise ShardCorruptError(f"{where}: readers were shown more than its last receipt accepts")
        self.cut_commits = len(shard.groups) > end.commits
        del shard.groups[end.commits :]
        if shard.sealed:
            self._finished(end.shard)
            self._number = end.shard + 1
            self._shards[self._number] = Shard()
            self._frontier_before = self.frontier.copy()
        else:
            self._number = end.shard
            self._frontier_before = self.frontier.copy()
            self._check_rows(self._number)
            self._replay(shard)
            shard.durable = shard.watermark = shard.durable_watermark = len(shard.groups)
            self._first_ns = self._clock_ns() if shard.groups else None
        if self.frontier.size != receipt.persisted or self.frontier.root().hex() != receipt.root:
            raise ShardCorruptError(
                f"{where} holds {self.frontier.size} events, its last receipt says {receipt.persisted} of another root"
            )

    def _check_rows(self, number: int) -> None:
        found = rows_of(self._shards[number].groups)
        if self._told_rows.get(number, found) != found:
            raise ShardCorruptError(f"the rows of shard {number} of partition {self._partition} are not as committed")

    def _finished(self, number: int) -> None:
        shard = self._shards[number]
        before = self.frontier.copy()
        self._replay(shard)
        self.trees[number] = self.frontier.size, self.frontier.root().hex()
        shard.watermark = len(shard.groups)
        self._check_rows(number)
        job = SealJob(self._path(number), number, len(shard.groups), before, rows_of(shard.groups))
        if shard.sealed:
            self.sealed[number] = job.path
            self._infos[number] = self._info(job, self._clock_ns())
        else:
            self.to_seal.append(job)

    def _replay(self, shard: Shard) -> None:
        for group in shard.groups:
            for record in group.records:
                self.frontier.append(leaf_hash(record))
                self.seen.ids.add(decode_event_key(record).event_id)

    def _path(self, number: int) -> Path:
        return self._disk.store.directory / f"p{self._partition}-{number}"

    @property
    def end(self) -> StoreEnd:
        """See `PartitionFiles.end`."""
        rows = {job.shard: job.rows for job in self.to_seal} | {self._number: rows_of(self._live.groups)}
        return StoreEnd(shard=self._number, commits=len(self._live.groups), rows=rows)

    def fits(self, group: Group) -> bool:
        """See `PartitionFiles.fits`."""
        held = sum(len(before.records) for before in self._live.groups)
        return not self._live.groups or held + len(group.records) <= self._settings.shard_events_max

    def holds_events(self) -> bool:
        """See `PartitionFiles.holds_events`."""
        return any(group.records for group in self._live.groups)

    def commit(self, group: Group) -> int:
        """See `PartitionFiles.commit`."""
        shard = self._live
        shard.groups.append(group)
        self._disk.refuse_if_failing()
        host = current_host()
        if host is not None and self._disk.kill_in_commit(host):
            raise KilledError
        shard.durable = len(shard.groups)
        shard.durable_watermark = shard.watermark
        for record in group.records:
            self.frontier.append(leaf_hash(record))
        self.seen.ids.update(group.ids)
        now_ns = self._clock_ns()
        self._first_ns = self._first_ns or now_ns
        return now_ns

    def accepted(self) -> None:
        """See `PartitionFiles.accepted`."""
        self._live.watermark = len(self._live.groups)

    def is_empty(self) -> bool:
        """See `PartitionFiles.is_empty`."""
        return self._first_ns is None

    def is_old(self, share: float = 1.0) -> bool:
        """See `PartitionFiles.is_old`."""
        age_ns_max = share * self._settings.shard_age_s_max * 1e9
        return self._first_ns is not None and abs(self._clock_ns() - self._first_ns) >= age_ns_max

    def is_flushed(self, target: int) -> bool:
        """See `PartitionFiles.is_flushed`."""
        groups = self._live.groups
        return not groups or groups[0].prev_origin >= target or not self.holds_events()

    def wants_next(self) -> bool:
        """See `PartitionFiles.wants_next`."""
        return False

    def prepare_next(self) -> None:
        """See `PartitionFiles.prepare_next`."""

    def roll(self) -> None:
        """See `PartitionFiles.roll`."""
        self._disk.refuse_if_failing()
        self.accepted()
        groups = self._live.groups
        job = SealJob(self._path(self._number), self._number, len(groups), self._frontier_before, rows_of(groups))
        self.trees[self._number] = self.frontier.size, self.frontier.root().hex()
        self._number += 1
        self._shards[self._number] = Shard()
        self._frontier_before = self.frontier.copy()
        self._first_ns = None
        self.to_seal.append(job)

    def seal(self, job: SealJob, sealed_ns: int | None = None) -> SealedInfo:
        """See `PartitionFiles.seal`."""
        self._disk.refuse_if_failing()
        self._shards[job.shard].sealed = True
        self._infos[job.shard] = self._info(job, sealed_ns or self._clock_ns())
        return self._infos[job.shard]

    def _info(self, job: SealJob, sealed_ns: int) -> SealedInfo:
        groups = self._shards[job.shard].groups
        before, after = job.frontier, job.frontier.copy()
        records = [record for group in groups for record in group.records]
        for record in records:
            after.append(leaf_hash(record))
        header = SealedHeader(
            partition=self._partition,
            shard=job.shard,
            store=self._disk.store.store_id,
            cluster=self._disk.store.cluster_id,
            first_origin=groups[0].prev_origin + 1,
            last_origin=groups[-1].origin,
            commits=len(groups),
            events=len(records),
            record_bytes=sum(map(len, records)),
            timestamp_ns_min=0,
            timestamp_ns_max=0,
            sealed_ns=sealed_ns,
            tree_size_before=before.size,
            frontier_before=before.to_bytes(),
            tree_size=after.size,
            frontier=after.to_bytes(),
            root=after.root().hex(),
            areas={},
            file_bytes=0,
            body_sha256=_NO_SUM,
        )
        return SealedInfo(job.path, header, _NO_SUM, 0)

    def sealed_info(self, shard: int) -> SealedInfo:
        """See `PartitionFiles.sealed_info`."""
        return self._infos[shard]

    def resume_after(self, before: ResumePoint, info: SealedInfo) -> ResumePoint:
        """See `PartitionFiles.resume_after`; it does not follow segment's memory."""
        groups = self._shards[info.header.shard].groups
        last = next((decode_event(group.records[-1]) for group in reversed(groups) if group.records), None)
        return ResumePoint(
            frontier=info.header.frontier,
            duplicates=before.duplicates + sum(group.duplicates for group in groups),
            dead_lettered=before.dead_lettered + sum(group.dead_lettered for group in groups),
            closed=before.closed,
            stored_ns=stored_ns_at(info.header.last_origin, last),
        )

    def settled_origin(self, kept: int, copied: int | None) -> int:
        """See `PartitionFiles.settled_origin`."""
        numbers = sorted(self.sealed)
        settled = count_settled(numbers, kept, copied)
        if not numbers or kept > len(numbers):
            return 0
        header = self._infos[numbers[min(settled, len(numbers) - 1)]].header
        return header.last_origin if settled == len(numbers) else header.first_origin - 1

    def keep_record(self, record: SealRecord) -> None:
        """See `PartitionFiles.keep_record`."""

    def finish_seal(self, job: SealJob, info: SealedInfo) -> None:
        """See `PartitionFiles.finish_seal`."""
        self.sealed[job.shard] = info.path
        self.to_seal.remove(job)

    def close(self) -> None:
        """See `PartitionFiles.close`."""
