"""Drives a partition's files in the order of persist's actor: append and fdatasync, then the receipt, then readers see.

The replicated streams are a `Witness`: what it has taken is committed, whatever happens to this process or its disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

import msgspec

from contracts.receipts import Receipt, SealRecord, first_receipt
from contracts.settings import Settings
from stages.persist.core import Group
from stages.persist.partition import PartitionFiles
from stages.persist.records import record_of
from stages.persist.seal import SealedInfo, SealJob
from stages.persist.storedir import Store

from .source import NOW_NS, Source

CLUSTER = "cluster-1"
PARTITION = 3
SETTINGS = Settings(shard_bytes=96 * 1024)
"""Shards far below what a person may set (only `load_settings` checks that), so that rolls and seals come often."""

STEPS = ("takeover", "recover", "append", "receipt", "watermark", "prepare", "roll", "seal", "record", "finish")
"""What a lane may be at; told to its `on_step` at the beginning of each."""


class Witness(Protocol):
    """The replicated streams of receipts and seal records, as far as a lane needs them."""

    @property
    def receipt(self) -> Receipt | None:
        """The last accepted receipt."""

    @property
    def sealed_shard(self) -> int:
        """The shard of the last accepted seal record; 0 before the first."""

    def accept(self, message: Receipt | SealRecord) -> None:
        """Takes one message; it is committed when this returns, and may be when it does not."""


class Lane:
    """One owner of the partition, from takeover on. After any exception it is done for.

    Attributes:
        files: what it drives; set by `open`.
        receipt: its last accepted receipt.
    """

    def __init__(self, store: Store, source: Source, witness: Witness, on_step: Callable[[str], None]) -> None:
        self._store = store
        self._source = source
        self._witness = witness
        self._on_step = on_step
        self.files: PartitionFiles
        self.receipt: Receipt

    def open(self) -> None:
        """Takes the partition over with an empty receipt, and only then recovers its files to it."""
        self._on_step("takeover")
        base = self._witness.receipt or first_receipt(PARTITION, self._store.cluster_id, self._store.store_id, "w")
        self.receipt = msgspec.structs.replace(base, takeover=True)
        self._witness.accept(self.receipt)
        self._on_step("recover")
        self.files = PartitionFiles.open(self._store, PARTITION, self.receipt, SETTINGS, lambda: NOW_NS)

    def append(self, messages: int) -> None:
        """The next `messages` messages as one group, durable but not committed."""
        self._on_step("append")
        self._group = self._next_group(messages)
        if not self.files.fits(self._group):
            self.roll()
            self._on_step("append")
        self.files.commit(self._group)

    def commit(self, messages: int) -> None:
        """As `append`, then its receipt, and then readers may see it."""
        self.append(messages)
        group, last = self._group, self.receipt
        self._on_step("receipt")
        self.receipt = msgspec.structs.replace(
            last,
            ends={**last.ends, self._store.store_id: self.files.end},
            origin=group.origin,
            persisted=self.files.frontier.size,
            duplicates=last.duplicates + group.duplicates,
            dead_lettered=last.dead_lettered + group.dead_lettered,
            root=self.files.frontier.root().hex(),
            takeover=False,
        )
        self._witness.accept(self.receipt)
        self._on_step("watermark")
        self.files.accepted()

    def prepare(self) -> None:
        """Makes the next shard's file ahead of its use."""
        self._on_step("prepare")
        self.files.prepare_next()

    def roll(self) -> None:
        """A new live shard; the full one waits to be sealed. Every commit must be accepted."""
        self._on_step("roll")
        self.files.roll()

    def seal(self, job: SealJob) -> SealedInfo:
        """The sealed form of a full shard. May run in a thread beside commits."""
        self._on_step("seal")
        return self.files.seal(job)

    def finish_seal(self, job: SealJob, info: SealedInfo) -> None:
        """Publishes the seal record, if it was not, and lets the sealed file take the live one's place."""
        if job.shard > self._witness.sealed_shard:
            self._record(info)
        self._on_step("finish")
        self.files.finish_seal(job, info)

    def record_seals(self) -> None:
        """Publishes the records of shards that were sealed by an owner that died before it could."""
        for shard in sorted(self.files.sealed):
            if shard > self._witness.sealed_shard:
                self._record(self.files.sealed_info(shard))

    def seal_all(self) -> None:
        """Seals every full shard, oldest first."""
        for job in tuple(self.files.to_seal):
            self.finish_seal(job, self.seal(job))

    @property
    def has_commits(self) -> bool:
        """True when the live shard holds commits, so that it may be rolled."""
        return self.files.end.commits > 0

    def _record(self, info: SealedInfo) -> None:
        self._on_step("record")
        record = record_of(info)
        self._witness.accept(record)
        self.files.keep_record(record)

    def close(self) -> None:
        """Lets go of the files, also of an open that failed."""
        with contextlib.suppress(AttributeError):
            self.files.close()

    def _next_group(self, messages: int) -> Group:
        prev = self.receipt.origin
        origin = prev + messages
        taken = [self._source.message(number) for number in range(prev + 1, origin + 1)]
        ids = [event_id for message in taken for event_id in message.ids]
        records = [record for message in taken for record in message.records]
        fresh: dict[bytes, bytes] = {}
        for event_id, record, known in zip(ids, records, self.files.seen.seen(ids), strict=True):
            if not known:
                fresh.setdefault(event_id, record)
        refused = sum(message.refused for message in taken)
        return Group(
            prev, origin, list(fresh.values()), list(fresh), len(ids) - len(fresh), refused, (origin,) * 3, b""
        )
