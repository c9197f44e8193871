"""Persist's files without a cluster: the persist stage's own code for one partition, its receipts kept in memory.

A commit does everything that persist does between taking frames from its reader and publishing the receipt, and then
shows it to readers. Not in it: the network and its receipt stream.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import msgspec

from benchmarks.report import costs_ms
from benchmarks.storage.samples import Sample, Samples
from contracts.frames import PackedFrame, encode_frame
from contracts.receipts import Receipt, decode_receipt, encode_receipt, first_receipt
from contracts.settings import Settings
from contracts.subjects import output_subject
from stages.persist.core import Group, plan_group
from stages.persist.partition import PartitionFiles
from stages.persist.records import record_of
from stages.persist.seal import SealedInfo, SealJob
from stages.persist.storedir import Store, lock_partition, open_store
from stages.runtime.messages import StoredMessage

PARTITION = 0
RECEIPT_FILE = "last-receipt.json"
"""Beside the shards, once a lane was closed: what opens them again."""

_CLUSTER = "benchmark"
_FILL_BATCH = 512
_SUBJECT = output_subject("hash", PARTITION)


class Seal(NamedTuple):
    """One shard's sealing: seconds, and what went in and came out."""

    seconds: float
    events: int
    record_bytes: int
    file_bytes: int


class Commit(NamedTuple):
    """How long one group took. `rolled_ns` is the time a new live shard took beside it, 0 for nearly all."""

    took_ns: int
    cpu_ns: int
    rolled_ns: int


class Lane:
    """The one owner of a store of one partition. Not for use from several threads at once.

    Attributes:
        files: persist's own.
        seals: what sealing took, oldest first.
    """

    def __init__(self, directory: Path, samples: Samples, settings: Settings | None = None) -> None:
        """`directory` is new, or holds what a lane that was closed left there."""
        self.samples = samples
        self.store = open_store(directory, _CLUSTER, now_ns=time.time_ns())
        self._lock = lock_partition(self.store, PARTITION)
        self.receipt = read_receipt(self.store)
        self._settings = settings or Settings()
        self.files = PartitionFiles.open(self.store, PARTITION, self.receipt, self._settings, time.time_ns)
        self.seals: list[Seal] = []

    @property
    def stored(self) -> int:
        """Events stored."""
        return self.files.frontier.size

    def message(self, samples: Sequence[Sample]) -> StoredMessage:
        """The next events in a frame, as hash would send it."""
        first = self.receipt.origin + 1
        last = self.receipt.origin + len(samples)
        records = tuple(msgspec.Raw(sample.record) for sample in samples)
        frame = PackedFrame(PARTITION, first - 1, first, last, (last, last), "hash", 0, b"", (), records)
        return StoredMessage(_SUBJECT, last, 0, encode_frame(frame), {})

    def next_message(self, events: int) -> StoredMessage:
        """The next `events` events of the data set in a frame."""
        return self.message(list(self.samples.take(self.receipt.origin + 1, events)))

    def commit(self, message: StoredMessage) -> Commit:
        """One group commit, durable and shown to readers; into a new live shard if the group has no room."""
        start_ns, start_cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
        group = plan_group([message], self.receipt.origin, self.files.seen.seen)
        if group is None:
            raise ValueError("a frame that is stored already")
        rolled_ns = rolled_cpu_ns = 0
        if not self.files.fits(group):
            roll_ns, roll_cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
            self.files.roll()
            rolled_ns, rolled_cpu_ns = time.perf_counter_ns() - roll_ns, time.thread_time_ns() - roll_cpu_ns
        self._store_group(group)
        took_ns = time.perf_counter_ns() - start_ns - rolled_ns
        return Commit(took_ns, time.thread_time_ns() - start_cpu_ns - rolled_cpu_ns, rolled_ns)

    def _store_group(self, group: Group) -> None:
        durable_ns = self.files.commit(group)
        self.receipt = msgspec.structs.replace(
            self.receipt,
            ends={self.store.store_id: self.files.end},
            origin=group.origin,
            trail=group.trail,
            persisted=self.files.frontier.size,
            duplicates=self.receipt.duplicates + group.duplicates,
            root=self.files.frontier.root().hex(),
            committed_ns=durable_ns,
        )
        encode_receipt(self.receipt)
        self.files.accepted()

    def run(self, commits: int, events: int) -> list[Commit]:
        """So many commits of so many events. Their frames are made outside of what is measured."""
        taken = [self.commit(self.next_message(events)) for _ in range(commits)]
        self.prepare()
        return taken

    def fill(self, until: int) -> list[int]:
        """Commits until `until` events are stored, sealing what is full. Returns how long each roll took, in ns."""
        rolls: list[int] = []
        while self.stored < until:
            self.prepare()
            took = self.commit(self.next_message(min(_FILL_BATCH, until - self.stored)))
            if took.rolled_ns:
                rolls.append(took.rolled_ns)
                self.seal_all()
        return rolls

    def prepare(self) -> None:
        """Makes the next shard's file when it is time, as persist does in the background."""
        if self.files.wants_next():
            self.files.prepare_next()

    def fill_shard(self) -> SealJob:
        """Commits until the live shard is full, and rolls: a shard that waits to be sealed."""
        waiting = len(self.files.to_seal)
        while len(self.files.to_seal) == waiting:
            self.prepare()
            self.commit(self.next_message(_FILL_BATCH))
        return self.files.to_seal[-1]

    def seal_all(self) -> None:
        """Seals every full shard and lets the sealed file take its place."""
        for job in tuple(self.files.to_seal):
            start_s = time.perf_counter()
            info = self.files.seal(job)
            seconds = time.perf_counter() - start_s
            self.finish_seal(job, info)
            self.seals.append(Seal(seconds, info.header.events, info.header.record_bytes, info.bytes))

    def finish_seal(self, job: SealJob, info: SealedInfo) -> None:
        """What follows a seal: its record, and the sealed file in place of the live one."""
        self.files.keep_record(record_of(info))
        self.files.finish_seal(job, info)

    def close(self) -> None:
        """Lets go of the files, and leaves the last receipt beside them."""
        (self.store.directory / RECEIPT_FILE).write_bytes(encode_receipt(self.receipt))
        with contextlib.closing(self._lock):
            self.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def commit_costs_ms(taken: Sequence[Commit]) -> dict[str, float]:
    """``{"p50", "p95", "p99", "mean"}`` of the time, and the mean ``"cpu"`` time, in milliseconds."""
    cpu_ms = statistics.fmean(commit.cpu_ns for commit in taken) / 1e6
    return {**costs_ms([commit.took_ns for commit in taken]), "cpu": round(cpu_ms, 4)}


def read_receipt(store: Store) -> Receipt:
    """The last receipt of a lane that was closed; for a new store, one that says that nothing is stored."""
    with contextlib.suppress(FileNotFoundError):
        return decode_receipt((store.directory / RECEIPT_FILE).read_bytes())
    return first_receipt(PARTITION, store.cluster_id, store.store_id, "benchmark")
