"""One partition of persist: append, make durable, publish the receipt. Only then is it committed.

The receipt is fenced like every frame, and a new owner first publishes an empty takeover receipt: a read of the last
receipt may be stale (a leader frozen and thawed), and only an accepted takeover proves that it was not. Until
then nothing on disk is touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from msgspec import UNSET

from contracts.errors import FencedError, NotOursError
from contracts.hashing import EMPTY_ROOT
from contracts.receipts import Receipt, SealRecord, decode_seal, encode_receipt
from contracts.statements import Record, Signer
from contracts.subjects import RECEIPTS, receipt_subject, seal_subject
from contracts.telemetry import EVENT_PERSISTED
from stages.persist.core import Group, plan_group
from stages.persist.partition import PartitionFiles
from stages.persist.seal import SealedInfo
from stages.persist.storedir import Store, lock_partition
from stages.persist.trim import Trimmer
from stages.runtime.api import Api, StoredMessage
from stages.runtime.base import InputFeed, LaneBase
from stages.runtime.checkpoint import Cursor, cursor_from_receipt, last_receipt
from stages.runtime.tasks import end_tasks
from stages.runtime.writer import FencedWriter

log = logging.getLogger(__name__)

T = TypeVar("T")

GROUP_FRAMES_MAX = 64
GROUP_BYTES_MAX = 4 * 1024 * 1024
STANDBY_S = 1.0


class PersistLane(LaneBase):
    """Owns one partition's shards. Arguments as `LaneBase`, the store they lie in, and who signs (None: nobody)."""

    def __init__(
        self,
        api: Api,
        store: Store,
        partition: int,
        nonce: str,
        on_open: Callable[[int], None],
        clock_ns: Callable[[], int] = time.time_ns,
        signer: Signer | None = None,
    ) -> None:
        super().__init__(api, "persist", partition, nonce, on_open)
        self._store = store
        self._clock_ns = clock_ns
        self._signer = signer
        self._trimmer = Trimmer(api, partition)
        self._subject = receipt_subject(partition)
        self._writer = FencedWriter(api, RECEIPTS, self._subject, nonce)
        self._receipt: Receipt
        self._files: PartitionFiles
        self._background: list[asyncio.Task[None]] = []
        self._files_lock = asyncio.Lock()
        """Held while a thread changes the partition's state in memory."""
        self._prepare_lock = asyncio.Lock()
        """Held while a thread makes the next shard's file."""
        self._seal_work = asyncio.Event()
        self._all_sealed = asyncio.Event()
        self._standing_by = False

    async def _session(self, nonce: str) -> None:
        try:
            lock = lock_partition(self._store, self._partition)
            try:
                await self._own(nonce)
            finally:
                lock.close()
        except NotOursError as error:
            if not self._standing_by:
                log.warning("persist partition %d stands by: %s", self._partition, error)
                self._standing_by = True
            self._probe.standing_by()
            self._on_open(self._partition)
            await self._rest(STANDBY_S)

    async def _own(self, nonce: str) -> None:
        """Takes the partition over and works until stopped or fenced."""
        await self._take_over(nonce)
        self._standing_by = False
        files = await run_blocking(
            PartitionFiles.open, self._store, self._partition, self._receipt, self._api.settings, self._clock_ns
        )
        if files.cut_commits:
            log.warning("partition %d: an unaccepted tail was cut", self._partition)
        self._files = files
        # The owner before may have died between a commit and its trim: a full stream would then stay full.
        self._trimmer.committed(self._receipt)
        self._background = [
            asyncio.create_task(self._trimmer.run(), name=f"trim {self._partition}"),
            asyncio.create_task(self._keep_sealing(nonce), name=f"seal {self._partition}"),
        ]
        try:
            feed = self._open_feed(nonce, cursor_from_receipt(self._receipt, "persist"))
            for task in self._background:
                task.add_done_callback(lambda _: self._look_again(feed))
            try:
                while await self._await_input(feed):
                    await self._advance(feed)
            finally:
                await feed.reader.close()
            await self._seal_rest()
        finally:
            await end_tasks(*self._background)
            files.close()

    def _look_again(self, feed: InputFeed) -> None:
        self._suspicious = True
        feed.reader.wake()

    async def _take_over(self, nonce: str) -> None:
        """Claims the partition with a fenced, empty receipt.

        Raises:
            NotOursError: its shards are in another store.
            FencedError: what was read was stale, or another claim came first.
        """
        last, seq = await last_receipt(self._api, self._partition)
        store = self._store
        if last is not None and last.store != store.store_id:
            raise NotOursError(
                f"partition {self._partition} belongs to store {last.store} on {last.node}, not to {store.store_id} "
                f"in {store.directory}; start persist there"
            )
        if last is not None and last.cluster != store.cluster_id:
            raise NotOursError(f"the receipts of partition {self._partition} are of another cluster, {last.cluster}")
        base = last or Receipt(
            partition=self._partition,
            cluster=store.cluster_id,
            writer=nonce,
            node="",
            store=store.store_id,
            ends={},
            origin=0,
            trail=(),
            persisted=0,
            duplicates=0,
            dead_lettered=0,
            root=EMPTY_ROOT.hex(),
            closed=b"",
            committed_ns=0,
        )
        self._writer = FencedWriter(self._api, RECEIPTS, self._subject, nonce)
        self._writer.expected_seq = seq
        claim = msgspec.structs.replace(
            base, writer=nonce, node=socket.gethostname(), committed_ns=self._clock_ns(), takeover=True
        )
        claim = self._signed(claim)
        await self._writer.publish(encode_receipt(claim), f"takeover/{claim.origin}")
        self._receipt = claim

    async def _check_output(self) -> None:
        for task in self._background:
            if task.done():
                task.result()
        _, seq = await last_receipt(self._api, self._partition)
        if seq != self._writer.expected_seq:
            raise FencedError(self._subject, seq)
        async with self._files_lock:
            if self._files.is_old():
                await self._roll()

    async def _advance(self, feed: InputFeed) -> None:
        """One group commit: append and fdatasync, then the receipt, then readers may see it."""
        messages = feed.reader.take(GROUP_FRAMES_MAX, GROUP_BYTES_MAX)
        self._probe.begin(messages)
        async with self._files_lock:
            group, receipt = await run_blocking(self._store_group, messages, feed.cursor.origin)
            if group is None:
                self._probe.skipped()
                return
            if receipt is None:
                await self._roll()
                receipt = await run_blocking(self._commit, group)
        self._probe.worked()
        await self._writer.publish(encode_receipt(receipt), str(receipt.origin))
        self._probe.committed(receipt, len(group.records), group.duplicates)
        self._files.accepted()
        self._receipt = receipt
        feed.cursor = Cursor(receipt.origin, receipt.trail[-1], receipt.closed)
        self._holes = 0
        self._trimmer.committed(receipt)
        log.debug(EVENT_PERSISTED, extra={"partition": self._partition, "origin": receipt.origin})
        if self._files.wants_next():
            self._seal_work.set()

    def _store_group(self, messages: Sequence[StoredMessage], origin: int) -> tuple[Group | None, Receipt | None]:
        """In a thread: the group, and its receipt once it is durable; None for that when the shard has no room."""
        group = plan_group(messages, origin, self._files.seen.seen)
        if group is None or not self._files.fits(group) or self._files.is_old():
            return group, None
        return group, self._commit(group)

    def _commit(self, group: Group) -> Receipt:
        """In a thread, which also takes the root and the signature off the event loop: the receipt of the commit."""
        begun_s = time.perf_counter()
        durable_ns = self._files.commit(group)
        self._probe.synced(begun_s, len(group.records))
        last = self._receipt
        receipt = msgspec.structs.replace(
            last,
            ends={**last.ends, self._store.store_id: self._files.end},
            origin=group.origin,
            trail=group.trail,
            persisted=self._files.frontier.size,
            duplicates=last.duplicates + group.duplicates,
            dead_lettered=last.dead_lettered + group.dead_lettered,
            root=self._files.frontier.root().hex(),
            closed=group.closed,
            committed_ns=durable_ns,
            takeover=False,
        )
        return self._signed(receipt)

    def _signed(self, record: Record) -> Record:
        """The record with our signature; without a key, with none (a receipt follows from the one before)."""
        if self._signer is None:
            return msgspec.structs.replace(record, signature=UNSET)
        return self._signer.sign(record)

    async def _roll(self) -> None:
        """A new live shard; the full one is sealed in the background. Every commit in it is accepted by now."""
        async with self._prepare_lock:
            await run_blocking(self._files.roll)
        self._seal_work.set()

    async def _seal_rest(self) -> None:
        """On drain: what is committed is sealed. Interrupted, it stays in the live shard, where it is as safe."""
        if self._api.settings.seal_on_drain and self._files.holds_events():
            self._all_sealed.clear()
            await self._roll()
            sealing = self._background[-1]
            done = asyncio.create_task(self._all_sealed.wait())
            try:
                await asyncio.wait((done, sealing), return_when=asyncio.FIRST_COMPLETED)
                if sealing.done():
                    sealing.result()
            finally:
                await end_tasks(done)

    async def _keep_sealing(self, nonce: str) -> None:
        """Prepares shards ahead, seals full ones, and publishes their records, until cancelled."""
        last = await self._api.last_message(RECEIPTS, seal_subject(self._partition))
        writer = FencedWriter(self._api, RECEIPTS, seal_subject(self._partition), nonce)
        recorded = 0
        if last is not None:
            writer.expected_seq = last.seq
            record = decode_seal(last.data)
            if record.store == self._store.store_id:
                recorded = record.shard
                await run_blocking(self._files.keep_record, record)
        for shard in sorted(self._files.sealed):
            if shard > recorded:
                await self._record(writer, shard, await run_blocking(self._files.sealed_info, shard))
        if self._files.sealed_origin:
            self._trimmer.sealed(self._files.sealed_origin)
        while True:
            for job in tuple(self._files.to_seal):
                begun_s = time.perf_counter()
                info = await run_blocking(self._files.seal, job)
                self._probe.sealed(begun_s, info.bytes)
                if job.shard > recorded:
                    await self._record(writer, job.shard, info)
                async with self._files_lock:
                    await run_blocking(self._files.finish_seal, job, info)
                self._trimmer.sealed(info.header.last_origin)
            if self._files.wants_next():
                async with self._prepare_lock:
                    await run_blocking(self._files.prepare_next)
            self._seal_work.clear()
            if not self._files.to_seal:
                self._all_sealed.set()
                await self._seal_work.wait()

    async def _record(self, writer: FencedWriter, shard: int, info: SealedInfo) -> None:
        header = info.header
        record = SealRecord(
            partition=self._partition,
            store=self._store.store_id,
            shard=shard,
            file=info.path.name,
            sha256=info.sha256,
            first_origin=header.first_origin,
            last_origin=header.last_origin,
            events=header.events,
            tree_size=header.tree_size,
            root=header.root,
            sealed_ns=header.sealed_ns,
            bytes=info.bytes,
            cluster=self._store.cluster_id,
        )
        record = self._signed(record)
        await writer.publish(encode_receipt(record), f"seal/{shard}")
        await run_blocking(self._files.keep_record, record)
        log.info("sealed", extra={"partition": self._partition, "file": info.path.name, "events": header.events})


async def run_blocking(call: Callable[..., T], *arguments: object) -> T:
    """Runs `call` in a thread. Cancelled, it still waits for the thread: files must not be closed under it."""
    future = asyncio.get_running_loop().run_in_executor(None, lambda: call(*arguments))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((future,))
        raise
