"""Having what is pending committed and sealed: noting how far that is, asking persist, and waiting for it.

Everything `FI_EVENTS` holds when it begins is meant, and what was committed before; what comes later is not waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Collection

import msgspec

from cluster.backlog import count_from, sealed_end
from cluster.drain import output_reaches
from cluster.members import MembersReport, look
from cluster.status import FULL_SHARE
from contracts.budgets import FLUSH_EXPLAIN, FLUSH_POLL
from contracts.errors import FiError, WireFormatError
from contracts.flush import Flush, decode_flush, encode_flush
from contracts.receipts import Receipt, decode_seal
from contracts.subjects import (
    CONTROL,
    EVENTS,
    FLUSH_SUBJECT,
    OUTPUT_STREAM,
    RECEIPTS,
    STAGES,
    Stage,
    raw_filter,
    seal_subject,
)
from stages.runtime.api import Api
from stages.runtime.checkpoint import last_receipt
from stages.runtime.facts import ClusterFacts
from stages.runtime.messages import StoredMessage
from stages.runtime.tasks import end_tasks, some_at_a_time
from stages.runtime.writer import replace_last

EXPLAIN_SHARE = 0.25
"""How much of its time a flush that is not done may take to find out why."""


class PartitionFlush(msgspec.Struct, kw_only=True):
    """One partition.

    Attributes:
        partition: which.
        target: origin up to which everything is to be committed and sealed; 0: nothing ever came in.
        waiting: messages that were not committed when it began.
        unsealed: events that were committed and not sealed when it began.
        events, duplicates, dead_lettered: committed meanwhile: stored, known already, refused.
        sealed: events sealed meanwhile.
        shards, bytes: sealed shards written meanwhile, and their size.
        committed, done: as far as `target`; `done` is `committed` where no seal was asked for.
    """

    partition: int
    target: int = 0
    waiting: int = 0
    unsealed: int = 0
    events: int = 0
    duplicates: int = 0
    dead_lettered: int = 0
    sealed: int = 0
    shards: int = 0
    bytes: int = 0
    committed: bool = False
    done: bool = False

    @property
    def pending(self) -> bool:
        """Something was to be done."""
        return self.waiting > 0 or self.unsealed > 0


class Holdup(msgspec.Struct, frozen=True, kw_only=True):
    """What some partitions wait for."""

    partitions: tuple[int, ...]
    stage: Stage
    why: str


class FlushReport(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it.

    Attributes:
        done: of every partition.
        partitions: one by one.
        holdups: who holds up those that are not done.
        elapsed_s: how long it took.
    """

    done: bool
    partitions: tuple[PartitionFlush, ...]
    holdups: tuple[Holdup, ...]
    elapsed_s: float


class _Partition:
    """How one partition stood, and stands."""

    def __init__(self, api: Api, partition: int) -> None:
        self._api = api
        self.report = PartitionFlush(partition=partition)
        self._before: Receipt | None = None
        self._receipt: Receipt | None = None
        self._sealed_before = 0
        self._seal_seq = 0

    async def begin(self) -> None:
        """Notes how far there is something."""
        report, api = self.report, self._api
        last = await api.last_message(EVENTS, raw_filter(report.partition))
        receipt, _ = await last_receipt(api, report.partition)
        self._before = receipt
        origin = 0 if receipt is None else receipt.origin
        report.target = max(origin, 0 if last is None else last.seq)
        if report.target > origin:
            report.waiting = await count_from(api, report.partition, origin + 1)
        seals = await api.last_message(RECEIPTS, seal_subject(report.partition))
        self._seal_seq = 0 if seals is None else seals.seq
        record = await sealed_end(self._api, receipt)
        self._sealed_before = 0 if record is None else record.tree_size
        report.unsealed = 0 if receipt is None else receipt.persisted - self._sealed_before

    async def look_at_commits(self) -> None:
        """Is everything up to the target committed?"""
        self._receipt, _ = await last_receipt(self._api, self.report.partition)
        self.report.committed = (0 if self._receipt is None else self._receipt.origin) >= self.report.target

    async def look_at_seals(self) -> None:
        """Is everything up to the target committed and sealed?"""
        await self.look_at_commits()
        receipt = self._receipt
        record = await sealed_end(self._api, receipt)
        size, reached = (0, 0) if record is None else (record.tree_size, record.last_origin)
        nothing_left = receipt is None or size >= receipt.persisted
        self.report.done = self.report.committed and (reached >= self.report.target or nothing_left)

    @property
    def share(self) -> float:
        """How much of what waited is committed, 0 to 1, by origins."""
        before = 0 if self._before is None else self._before.origin
        now = 0 if self._receipt is None else self._receipt.origin
        span = self.report.target - before
        return 1.0 if span <= 0 else min(1.0, max(0.0, (now - before) / span))

    async def count(self) -> None:
        """Fills in what was done."""
        report, before = self.report, self._before
        await self.look_at_commits()
        after = self._receipt
        if after is not None:
            report.events = after.persisted - (0 if before is None else before.persisted)
            report.duplicates = after.duplicates - (0 if before is None else before.duplicates)
            report.dead_lettered = after.dead_lettered - (0 if before is None else before.dead_lettered)
        subject, seq = seal_subject(report.partition), self._seal_seq
        while (message := await self._api.first_message(RECEIPTS, subject, from_seq=seq + 1)) is not None:
            record = decode_seal(message.data)
            seq = message.seq
            report.shards += 1
            report.bytes += record.bytes
            report.sealed += record.events


class Flusher:
    """One flush.

    Args:
        api: a connection.
        facts: of the cluster.
        partitions: which; the others are left alone.
        by: who asks, as ``user@node``.
        tell: is told of the progress, in messages.
    """

    def __init__(
        self, api: Api, facts: ClusterFacts, partitions: Collection[int], by: str, tell: Callable[[float, float], None]
    ) -> None:
        self._api = api
        self._facts = facts
        self._by = by
        self._tell = tell
        self._silent = False
        self._all = [_Partition(api, partition) for partition in partitions]

    async def run(self, limit_s: float, *, seal: bool = True) -> FlushReport:
        """Waits for it for `limit_s` at most, saying who holds it up included; with `seal` not only for the commits.

        Raises:
            TopologyError: the streams are not there.
            WireFormatError: receipts or seal records of a version that this build cannot read.
            ClusterUnavailableError: the connection was closed.
        """
        now_s = asyncio.get_running_loop().time
        begun_s = now_s()
        explain_s = min(FLUSH_EXPLAIN.s, EXPLAIN_SHARE * limit_s)
        waiting = asyncio.create_task(self._wait(seal=seal))
        holdups: tuple[Holdup, ...] = ()
        try:
            await asyncio.wait((waiting,), timeout=limit_s - explain_s)
            if not waiting.done():
                # Asked before the time is up, for a cluster that is silent takes all the time it is given.
                holdups = await self._explain()
                await asyncio.wait((waiting,), timeout=max(0.0, begun_s + limit_s - now_s()))
            if waiting.done():
                waiting.result()
        finally:
            await end_tasks(waiting)
        if not self._silent:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_EXPLAIN.s):
                    await some_at_a_time(one.count for one in self._all)
        for one in self._all:
            one.report.done = one.report.done if seal else one.report.committed
        left = {one.report.partition for one in self._all if not one.report.done}
        return FlushReport(
            done=not left,
            partitions=tuple(one.report for one in self._all),
            holdups=tuple(holdup for holdup in holdups if left.intersection(holdup.partitions)),
            elapsed_s=now_s() - begun_s,
        )

    async def _wait(self, *, seal: bool) -> None:
        """Until everything is done."""
        await some_at_a_time(one.begin for one in self._all)
        await self._until_committed()
        if seal:
            await self._until_sealed()

    async def _until_committed(self) -> None:
        total = sum(one.report.waiting for one in self._all)
        while True:
            await some_at_a_time(one.look_at_commits for one in self._all if not one.report.committed)
            self._tell(sum(one.share * one.report.waiting for one in self._all), total)
            if all(one.report.committed for one in self._all):
                return
            await asyncio.sleep(FLUSH_POLL.s)

    async def _until_sealed(self) -> None:
        asked = False
        while True:
            await some_at_a_time(one.look_at_seals for one in self._all if not one.report.done)
            left = [one.report for one in self._all if not one.report.done]
            if not left:
                return
            if not asked:
                await self._ask({report.partition: report.target for report in left})
                asked = True
            await asyncio.sleep(FLUSH_POLL.s)

    async def _ask(self, targets: dict[int, int]) -> None:
        """Stores what is asked for, and with it what others asked for."""
        flush = Flush(cluster=self._facts.cluster_id, targets=targets, since_ns=time.time_ns(), by=self._by)

        def merged(last: StoredMessage | None) -> bytes:
            before = None
            if last is not None and last.data:
                with contextlib.suppress(WireFormatError):
                    before = decode_flush(last.data)
            return encode_flush(flush.merged(before))

        await replace_last(self._api, CONTROL, FLUSH_SUBJECT, merged, f"flush-{secrets.token_hex(6)}")

    async def _explain(self) -> tuple[Holdup, ...]:
        """Who holds up what is not done."""
        waiting: dict[tuple[Stage, str], list[int]] = {}
        try:
            async with asyncio.timeout(FLUSH_EXPLAIN.s):
                members = await look(self._api)
                full = await self._full_streams()
                for one in self._all:
                    if not one.report.done:
                        partition = one.report.partition
                        stage = await self._waits_for(one.report)
                        why = _why(stage, partition, members, full)
                        waiting.setdefault((stage, why), []).append(partition)
        except (TimeoutError, FiError) as error:
            self._silent = True
            every = [one.report.partition for one in self._all if not one.report.done]
            waiting = {("persist", f"the cluster does not answer ({error!r}); see `fictl cluster status`"): every}
        return tuple(Holdup(stage=s, why=why, partitions=tuple(found)) for (s, why), found in waiting.items())

    async def _waits_for(self, report: PartitionFlush) -> Stage:
        """The first stage that has not finished what is meant."""
        for stage in STAGES:
            if await output_reaches(self._api, stage, report.partition) < report.target:
                return stage
        return "persist"

    async def _full_streams(self) -> set[str]:
        full = set()
        for stream in OUTPUT_STREAM.values():
            info = await self._api.client.jetstream(timeout=FLUSH_EXPLAIN.s).stream_info(stream)
            limit = info.config.max_bytes or 0
            if limit > 0 and info.state.bytes >= FULL_SHARE * limit:
                full.add(stream)
        return full


def _why(stage: Stage, partition: int, members: MembersReport, full: Collection[str]) -> str:
    for unheld in members.unheld:
        if (unheld.stage, unheld.partition) == (stage, partition):
            return unheld.why
    held = next((m for m in members.members if m.stage == stage and partition in m.partitions), None)
    if held is not None and held.holding:
        return (
            f"the dead-letter breaker of {held.name} on {held.node} is open; its log says why, and runbook "
            "FiBreakerOpen what to do"
        )
    if OUTPUT_STREAM[stage] in full:
        return f"{OUTPUT_STREAM[stage]} is full, and {stage} is held"
    name = f"{held.name} on {held.node}" if held is not None else stage
    return f"{name} is still at work, or its partition stopped: see `fictl health` and its log"
