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
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from operator import methodcaller

import msgspec
from msgspec import UNSET

from contracts.budgets import DISK_PAUSE_MAX, DISK_PAUSE_MIN, SHOW, STANDBY
from contracts.errors import FencedError, FiError, NotOursError, ShardError, StoreFailedError
from contracts.receipts import Receipt, SealRecord, encode_receipt
from contracts.statements import Signer
from contracts.subjects import RECEIPTS, receipt_subject, seal_subject
from contracts.telemetry import CIRCUIT_TRIPS, EVENT_PERSIST_FAILED, EVENT_PERSISTED, TARGET_DISK
from stages.persist.core import Group, plan_group
from stages.persist.disk import LOCAL, Disk, Files, Lock, Turns
from stages.persist.flush import Flushes
from stages.persist.lost import begin
from stages.persist.moved import let_go, signed
from stages.persist.records import record_of, speaks_of
from stages.persist.resume import BEGINNING
from stages.persist.room import EARLY_SHARE, EventsRoom
from stages.persist.seal import SealedInfo
from stages.persist.storedir import Store, disk_of
from stages.persist.trim import Trimmer
from stages.runtime.api import Api
from stages.runtime.base import InputFeed, LaneBase
from stages.runtime.checkpoint import Cursor, cursor_from_receipt, last_receipt, last_seal
from stages.runtime.circuit import Circuit
from stages.runtime.messages import StoredMessage
from stages.runtime.tasks import end_tasks, run_blocking
from stages.runtime.writer import FencedWriter

log = logging.getLogger(__name__)

GROUP_FRAMES_MAX = 64
GROUP_BYTES_MAX = 4 * 1024 * 1024


class PersistLane(LaneBase):
    """Owns one partition's shards.

    Arguments as `LaneBase`; `store` is where they lie, `signer` who signs (None: nobody), `flushes` what is to be
    flushed, `room` that of `FI_EVENTS`, `turns` those of this process's disk, `node` the host's name, and `disk` the
    files themselves.
    """

    def __init__(
        self,
        api: Api,
        store: Store,
        partition: int,
        nonce: str,
        on_open: Callable[[int], None],
        clock_ns: Callable[[], int] = time.time_ns,
        signer: Signer | None = None,
        flushes: Flushes | None = None,
        room: EventsRoom | None = None,
        turns: Turns | None = None,
        node: str = "",
        disk: Disk = LOCAL,
    ) -> None:
        super().__init__(api, "persist", partition, nonce, on_open)
        self._flushes = flushes or Flushes(store.cluster_id)
        self._flushes.lanes[partition] = self
        self._room = room or EventsRoom(api)
        self._turns = turns or Turns()
        self._store = store
        self._clock_ns = clock_ns
        self._signer = signer
        self._node = node or socket.gethostname()
        self._disk = disk
        self._trimmer: Trimmer
        self._subject = receipt_subject(partition)
        self._writer = FencedWriter(api, RECEIPTS, self._subject, nonce)
        self._receipt: Receipt
        self._files: Files
        self._lock: Lock
        self._background: list[asyncio.Task[None]] = []
        self._files_lock = asyncio.Lock()
        """Held while a thread changes the partition's state in memory."""
        self._prepare_lock = asyncio.Lock()
        """Held while a thread makes the next shard's file."""
        self._seal_work = asyncio.Event()
        self._all_sealed = asyncio.Event()
        self._standing_by = False
        self._shown = True
        self._disk_circuit = Circuit(
            failures_max=1,
            pause_s_min=DISK_PAUSE_MIN.s,
            pause_s_max=DISK_PAUSE_MAX.s,
            try_s_max=DISK_PAUSE_MAX.s,
            jitter=api.jitter,
            trips=api.telemetry.counter(CIRCUIT_TRIPS, {"target": TARGET_DISK}),
        )
        """Before this partition's files. Closed again by a commit: a disk may take a probe and no commit."""
        self._probe.disk_circuit(self._disk_circuit)

    async def _session(self, nonce: str) -> None:
        try:
            self._lock = await run_blocking(self._disk.lock, self._store, self._partition, undo=methodcaller("close"))
            try:
                await self._own(nonce)
            finally:
                self._lock.close()
        except NotOursError as error:
            if not self._standing_by:
                log.warning("persist partition %d stands by: %s", self._partition, error)
                self._standing_by = True
            self._probe.standing_by()
            self._on_open(self._partition)
            await self._rest(STANDBY.s)
        except StoreFailedError as error:
            now_s = asyncio.get_running_loop().time()
            self._disk_circuit.failed(now_s, now_s)
            await self._stop_partition(error, self._disk_recovers)
        except ShardError as error:
            await self._stop_partition(error, self._files_change)

    async def _stop_partition(self, error: FiError, mended: Callable[[], Awaitable[None]]) -> None:
        """The partition stops, loudly; the others of this process go on, and so does this one once it is mended."""
        log.error(EVENT_PERSIST_FAILED, extra={"partition": self._partition, "reason": str(error)})
        self._probe.stopped(error)
        self._on_open(self._partition)
        await mended()
        if not self._stopping.is_set():
            log.warning("persist partition %d tries again", self._partition)

    async def _disk_recovers(self) -> None:
        """Waits until the disk takes a write again, with room for a shard to be sealed and one to be prepared."""
        while not self._stopping.is_set():
            begun_s = asyncio.get_running_loop().time()
            if pause_s := self._disk_circuit.ask(begun_s):
                await self._rest(pause_s)
                continue
            try:
                await run_blocking(self._disk.probe, self._store, self._partition, 2 * self._api.settings.shard_bytes)
                return
            except StoreFailedError as error:
                self._disk_circuit.failed(asyncio.get_running_loop().time(), begun_s)
                log.error("persist partition %d is still stopped: %s", self._partition, error)
                self._probe.stopped(error)

    async def _files_change(self) -> None:
        """Waits until somebody changed the partition's files or its receipts: neither mends itself."""
        before = await self._state()
        while not self._stopping.is_set():
            await self._rest(STANDBY.s)
            if await self._state() != before:
                return

    async def _state(self) -> object:
        _, seq = await last_receipt(self._api, self._partition)
        try:
            return seq, await run_blocking(self._disk.state, self._store.directory, self._partition)
        except OSError as error:
            return seq, str(error)

    async def _own(self, nonce: str) -> None:
        """Takes the partition over and works until stopped or fenced."""
        await self._take_over(nonce)
        self._standing_by = False
        where = (self._store, self._partition, self._receipt, self._api.settings, self._clock_ns)
        files = await run_blocking(self._disk.open, *where, undo=methodcaller("close"))
        if files.cut_commits:
            log.warning("partition %d: an unaccepted tail was cut", self._partition)
        self._files, self._shown = files, True
        self._trimmer = Trimmer(self._api, self._partition, self._room, self.look_again)
        # The owner before may have died between a commit and its trim: a full stream would then stay full.
        self._trimmer.committed(self._receipt)
        self._background = [
            asyncio.create_task(self._trimmer.run(), name=f"trim {self._partition}"),
            asyncio.create_task(self._keep_sealing(nonce), name=f"seal {self._partition}"),
        ]
        try:
            feed = self._open_feed(nonce, cursor_from_receipt(self._receipt, "persist"))
            for task in self._background:
                task.add_done_callback(lambda _: self.look_again())
            self._suspicious = self._suspicious or self._flush_is_due()
            try:
                while await self._await_input(feed):
                    await self._advance(feed)
                await run_blocking(files.accepted)
            finally:
                await feed.reader.close()
            await self._seal_rest()
        finally:
            # Cancelled again, it raises: not before all have ended.
            try:
                await end_tasks(*self._background)
            finally:
                files.close()

    def look_again(self) -> None:
        """Something may be due beside the commits: look before the next one, and now if nothing comes in."""
        self._suspicious = True
        if self._feed is not None:
            self._feed.reader.wake()

    def _flush_is_due(self) -> bool:
        """True when everything up to the flush's target is committed, and not all of it sealed or about to be."""
        target = self._flushes.target(self._partition)
        return target > 0 and self._receipt.origin >= target and not self._files.is_flushed(target)

    async def _take_over(self, nonce: str) -> None:
        """Claims the partition with a fenced, empty receipt.

        Raises:
            NotOursError: its shards are in another store, or its receipts were lost.
            FencedError: what was read was stale, or another claim came first.
        """
        last, seq = await last_receipt(self._api, self._partition)
        store = self._store
        self._writer = FencedWriter(self._api, RECEIPTS, self._subject, nonce)
        self._writer.expected_seq = seq
        if last is not None and last.store != store.store_id:
            await let_go(self._store, last, self._writer, nonce, self._signer, self._clock_ns)
            raise NotOursError(
                f"partition {self._partition} belongs to store {last.store} on {last.node}, not to {store.store_id} in "
                f"{store.directory}: not mounted? Start persist there, or `fictl partitions move {self._partition}`"
            )
        if last is not None and last.cluster != store.cluster_id:
            raise NotOursError(f"the receipts of partition {self._partition} are of another cluster, {last.cluster}")
        base = last or await begin(self._api, self._partition, store, nonce, self._disk.state, kept=seq > 0)
        await self._claim(msgspec.structs.replace(base, writer=nonce, node=self._node))

    async def _claim(self, receipt: Receipt) -> None:
        """Repeats `receipt` as a takeover. Accepted, it shows that nobody else claimed the partition before."""
        claim = signed(msgspec.structs.replace(receipt, committed_ns=self._clock_ns(), takeover=True), self._signer)
        await self._writer.publish(encode_receipt(claim), f"takeover/{claim.origin}")
        self._receipt = claim

    async def _check_output(self) -> None:
        for task in self._background:
            if task.done():
                task.result()
        _, seq = await last_receipt(self._api, self._partition)
        if seq != self._writer.expected_seq:
            raise FencedError(self._subject, seq)
        if origin := self._trimmer.unclaimed:
            await self._claim(self._receipt)
            self._trimmer.claimed(origin)
        async with self._files_lock:
            early = self._room.short and self._files.is_old(EARLY_SHARE)
            if early or self._files.is_old() or self._flush_is_due():
                await self._roll()
            elif not self._room.spare or self._files.wants_next():
                self._seal_work.set()

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
        self._probe.committed(receipt, group.frames, len(group.records), group.duplicates)
        self._receipt, self._shown = receipt, False
        feed.cursor = Cursor(receipt.origin, receipt.trail[-1], receipt.closed)
        self._holes = 0
        self._disk_circuit.answered(asyncio.get_running_loop().time())
        self._trimmer.committed(receipt)
        log.debug(EVENT_PERSISTED, extra={"stage": self._stage, "partition": self._partition, "origin": receipt.origin})
        if self._files.wants_next():
            self._seal_work.set()
        self._suspicious = self._suspicious or self._flush_is_due()

    async def _finish(self, feed: InputFeed) -> bool:
        """Shows readers the last commit, unless input for another comes soon, whose thread does it."""
        if self._shown:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHOW.s):
                await feed.reader.wait()
        if not feed.reader.buffered:
            await run_blocking(self._files.accepted)
            self._shown = True
        return True

    def _store_group(self, messages: Sequence[StoredMessage], origin: int) -> tuple[Group | None, Receipt | None]:
        """In a thread, which first shows the commit before: the group, and its durable receipt; None without room."""
        self._files.accepted()
        self._shown = True
        with disk_of(self._store):
            group = plan_group(messages, origin, self._files.seen.seen)
        if group is None or not self._files.fits(group) or self._files.is_old():
            return group, None
        return group, self._commit(group)

    def _commit(self, group: Group) -> Receipt:
        """In a thread, which also takes the root and the signature off the event loop: the receipt of the commit."""
        self._lock.check()
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
            stored_ns=group.stored_ns or UNSET,
        )
        return signed(receipt, self._signer)

    async def _roll(self) -> None:
        """A new live shard; the full one is sealed in the background. Every commit in it is accepted by now."""
        async with self._prepare_lock:
            await run_blocking(self._files.roll)
        self._seal_work.set()

    async def _seal_rest(self) -> None:
        """On drain: what is committed is sealed. Interrupted, it stays in the live shard, where it is as safe.

        Not when the partition is handed over: its next owner appends to the same shard.
        """
        if self._api.settings.seal_on_drain and not self._handing_over and self._files.holds_events():
            await self._roll()
            sealing = self._background[-1]
            sealing.add_done_callback(lambda _: self._all_sealed.set())
            while self._files.to_seal and not sealing.done():
                self._all_sealed.clear()
                await self._all_sealed.wait()
            if sealing.done():
                sealing.result()

    async def _keep_sealing(self, nonce: str) -> None:
        """Prepares shards ahead, seals full ones, and publishes their records, until cancelled."""
        files = self._files
        writer = FencedWriter(self._api, RECEIPTS, seal_subject(self._partition), nonce)
        ours = partial(speaks_of, store=self._store.store_id, first=files.end.first, trees=files.trees)
        record, writer.expected_seq = await last_seal(self._api, self._partition, ours)
        if record is not None and record.store == self._store.store_id:
            await run_blocking(files.keep_record, record)
        for shard in sorted(files.sealed):
            if record is None or shard > record.shard:
                record = await self._record(writer, record, await run_blocking(files.sealed_info, shard))
        while True:
            await self._settle()
            for job in tuple(files.to_seal):
                # A record that is there already speaks of a file with its time in it.
                known = record if record is not None and record.shard == job.shard else None
                async with self._turns.sealing:
                    begun_s = time.perf_counter()
                    info = await run_blocking(files.seal, job, None if known is None else known.sealed_ns)
                self._probe.sealed(begun_s, info.bytes)
                if record is None or job.shard > record.shard:
                    record = await self._record(writer, record, info)
                async with self._files_lock:
                    await run_blocking(files.finish_seal, job, info)
                await self._settle()
            if files.wants_next():
                async with self._turns.preparing, self._prepare_lock:
                    if files.wants_next():
                        await run_blocking(files.prepare_next)
            self._seal_work.clear()
            if not files.to_seal:
                self._all_sealed.set()
                if not await self._summarize_next():
                    await self._seal_work.wait()

    async def _settle(self) -> None:
        """What is in sealed shards may leave `FI_EVENTS`, as far as the trimmer lets it."""
        self._trimmer.settle(self._files, await run_blocking(self._disk.copied, self._store.directory, self._partition))

    async def _summarize_next(self) -> bool:
        """Gives the next full group of sealed shards its summary of ids; False when all have theirs."""
        summary = self._files.seen.unsummarized()
        if summary is None:
            return False
        async with self._turns.sealing:
            with disk_of(self._store):
                await run_blocking(summary.make)
        async with self._files_lock:
            await run_blocking(summary.take)
        log.info("ids summarized", extra={"partition": self._partition, "shards": summary.shards})
        return True

    async def _record(self, writer: FencedWriter, before: SealRecord | None, info: SealedInfo) -> SealRecord:
        """Publishes the record of a sealed shard; `before` is that of the shard before it."""
        point = BEGINNING if before is None else before.resume
        if point is not UNSET:
            point = await run_blocking(self._files.resume_after, point, info)
        record = signed(record_of(info, point), self._signer)
        await writer.publish(encode_receipt(record), f"seal/{record.shard}")
        await run_blocking(self._files.keep_record, record)
        log.info("sealed", extra={"partition": self._partition, "file": info.path.name, "events": record.events})
        return record
