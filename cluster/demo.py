"""The whole pipeline in one go: start it, publish, follow every event to its shard, verify, and report."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from cluster.feed import Line, read_lines
from cluster.gateway import Accepted, Gateway
from cluster.publish import LinePublisher, PublishReport
from cluster.supervisor import Supervisor
from cluster.track import StageTimes, Totals, Tracker, measured_ms
from cluster.workload import consultations
from contracts.budgets import DEMO_SILENT
from contracts.events import event_to_dict
from contracts.subjects import EVENTS, partition_of
from stages.persist.store import EventStore
from stages.persist.verify import VerifyReport, verify_store
from stages.runtime.api import Api
from stages.runtime.connection import connect, connect_beside
from stages.runtime.facts import read_cluster

SEED = 57
SHOWN_EVENTS = 8

OnStep = Callable[[str, int, int | None], None]
"""(what is being done, done, of how many or None): for progress bars."""


class DemoResult(msgspec.Struct, kw_only=True):
    """What came of it. The fields up to `verified` are what ``--json`` prints.

    Attributes:
        published: valid events handed to the gateway.
        accepted: of these, acknowledged by the cluster.
        duplicates: of these, already there: said by the servers at once or found by persist.
        persisted: stored now.
        dead_lettered: refused by a stage and kept in `FI_DLQ`.
        lost: accepted and nowhere.
        events_per_s: persisted, from the first send to the last receipt.
        latency_ms: ``accepted``, ``durable`` and each stage: p50, p95, p99; None where nothing new was stored.
        shards: paths.
        verified: the store passed `fictl verify` and every accepted event is in it once.
        refused: lines that were not published, with reasons.
        problems: what verification found.
        consultation: one, read back.
        store: directory of the shards.
    """

    published: int
    accepted: int
    duplicates: int
    persisted: int
    dead_lettered: int
    lost: int
    events_per_s: float
    latency_ms: dict[str, Any]
    shards: list[str]
    verified: bool
    refused: list[str]
    problems: list[str]
    consultation: list[dict[str, Any]]
    store: str

    @property
    def ok(self) -> bool:
        """Nothing lost, everything verified."""
        return self.lost == 0 and self.verified

    def headline(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        names = self.__struct_fields__
        return {name: getattr(self, name) for name in names[: names.index("verified") + 1]}


async def run_demo(
    supervisor: Supervisor, *, source: int | None, events: int, rate_per_s: float | None, on_step: OnStep
) -> DemoRun:
    """Publishes to a started pipeline and follows every event until receipts cover it.

    Args:
        supervisor: started.
        source: file descriptor of NDJSON; None: `events` made-up events.
        events: how many to make up.
        rate_per_s: events a second at most; None: as fast as they are accepted.
        on_step: told of progress.

    Returns:
        the run, to be examined once the pipeline was stopped.

    Raises:
        FiError: the cluster cannot be used.
    """
    lines = _made_up(events) if source is None else read_lines(source)
    async with AsyncExitStack() as stack:
        run = await DemoRun.open(stack, supervisor, rate_per_s, None if source is not None else events, on_step)
        await run.publish(lines)
    return run


class DemoRun:
    """One publishing run against a started pipeline."""

    def __init__(
        self,
        gateway: Gateway,
        tracker: Tracker,
        partition: Callable[[Line], int],
        rate_per_s: float | None,
        total: int | None,
        on_step: OnStep,
    ) -> None:
        self._tracker = tracker
        self._partition = partition
        self._publisher = LinePublisher(gateway, rate_per_s=rate_per_s, on_accepted=self._accepted)
        self._ids: set[bytes] = set()
        self._settled = False
        self._total = total
        self._on_step = on_step

    @classmethod
    async def open(
        cls,
        stack: AsyncExitStack,
        supervisor: Supervisor,
        rate_per_s: float | None,
        total: int | None,
        on_step: OnStep,
    ) -> DemoRun:
        """Connects to the pipeline and begins to follow its receipts. `stack` closes both."""
        publisher = await connect_beside(supervisor.urls, EVENTS, "demo-gateway")
        stack.push_async_callback(publisher.close)
        observer = await connect(supervisor.urls, "demo-observer")
        stack.push_async_callback(observer.close)
        facts = await read_cluster(observer)
        tracker = Tracker(Api(observer, supervisor.settings), facts.partitions, time.time_ns)
        await tracker.start()
        stack.push_async_callback(tracker.close)

        def partition(line: Line) -> int:
            return partition_of(line.site, line.consultation, facts.partitions, facts.partition_by)

        return cls(Gateway(publisher), tracker, partition, rate_per_s, total, on_step)

    def _accepted(self, accepted: Accepted, lines: Sequence[Line]) -> None:
        for line in lines:
            self._ids.add(UUID(line.event_id).bytes)
        if not accepted.duplicate:
            self._tracker.accepted(self._partition(lines[0]), accepted.origin, accepted.sent_ns, len(lines))
        self._on_step("publishing", self._publisher.report.accepted, self._total)

    async def publish(self, lines: AsyncIterator[bytes]) -> None:
        """Publishes everything and waits until receipts cover it."""
        report = await self._publisher.run(lines)
        goal = report.accepted - report.duplicates

        def progress(totals: Totals) -> None:
            self._on_step("persisting", totals.settled, goal)

        self._settled = await self._tracker.settled(progress, silent_s_max=DEMO_SILENT.s)

    def examine(self, directory: Path) -> DemoResult:
        """Reads the store back and verifies it. Blocking."""
        report = self._publisher.report
        totals = self._tracker.totals()
        times = StageTimes()
        missing = set(self._ids)
        doubled = 0
        sample: bytes | None = None
        with EventStore(directory) as store:
            for number, stored in enumerate(store.iterate()):
                event = stored.event
                if event.event_id in self._ids:
                    doubled += event.event_id not in missing
                    missing.discard(event.event_id)
                    sample = sample or event.consultation_id
                committed_ns = self._tracker.committed_ns(stored.partition, event.origin)
                if committed_ns is not None and self._tracker.is_ours(stored.partition, event.origin):
                    times.note(event, committed_ns)
                if number % 1000 == 0:
                    self._on_step("reading back", number, None)
            shards = [str(info.path) for info in store.shards()]
            found = [] if sample is None else store.consultation(sample)[:SHOWN_EVENTS]
            consultation = [event_to_dict(row.event, partition=row.partition, leaf=row.leaf) for row in found]
        checked = verify_store(directory, on_progress=lambda done, of: self._on_step("verifying", done, of))
        problems = _problems(checked, doubled, self._settled)
        span_s = self._tracker.span_s()
        return DemoResult(
            published=report.published,
            accepted=report.accepted,
            duplicates=report.duplicates + totals.duplicates,
            persisted=totals.persisted,
            dead_lettered=totals.dead_lettered,
            lost=max(0, len(missing) - totals.dead_lettered),
            events_per_s=round(totals.persisted / span_s, 1) if span_s else 0.0,
            latency_ms={
                "accepted": report.latency_ms(),
                "durable": measured_ms(self._tracker.durable_ns()),
                "stages": times.summary_ms(),
            },
            shards=shards,
            verified=not problems,
            refused=_refusals(report),
            problems=problems,
            consultation=consultation,
            store=str(directory),
        )


def _refusals(report: PublishReport) -> list[str]:
    return [f"line {row.line}: {row.field}: {row.detail} [{row.reason}]" for row in report.refused]


def _problems(checked: VerifyReport, doubled: int, settled: bool) -> list[str]:
    problems = [f"{problem.shard}: {problem.where}: {problem.what}" for problem in checked.problems]
    if doubled:
        problems.append(f"{doubled} events are stored more than once")
    if not settled:
        problems.append(f"no receipt came for {DEMO_SILENT.s:.0f} s; see the logs of the stages")
    return problems


async def _made_up(events: int) -> AsyncIterator[bytes]:
    for number, event in enumerate(consultations(SEED, events)):
        if number % 256 == 0:
            await asyncio.sleep(0)
        yield msgspec.json.encode(event)
