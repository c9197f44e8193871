"""A file of events → the cluster, through a gateway: checked, paced, in order for each consultation, memory bounded."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from cluster.feed import Line, LineChecker
from cluster.gateway import Accepted, Gateway, RefusedError, batch_id
from contracts.errors import InvalidEventError

REFUSED_KEPT_MAX = 1000
WAITING_BYTES_MAX = 64 * 1024 * 1024
"""Read and not yet accepted; one message more than that at most."""
WAITING_PER_IN_FLIGHT = 4


class RefusedLine(msgspec.Struct, frozen=True):
    """A line that was not published, or that the cluster would not take.

    Attributes:
        line: its number, from 1.
        field: path of the offending field; empty for the whole line.
        reason: short token, as in `InvalidEventError`; ``message.refused`` when the cluster said no.
        detail: one sentence.
    """

    line: int
    field: str
    reason: str
    detail: str


@dataclass
class PublishReport:
    """What became of a file, so far.

    Attributes:
        lines: read, without blank ones; published + refused_count once all are checked.
        published: valid events handed to the gateway.
        accepted: of these, acknowledged by `FI_EVENTS`, duplicates among them.
        duplicates: of these, events the servers had before and did not store again. They remember for a while only;
            what they have forgotten is dropped by persist, and counted there.
        refused: the first `REFUSED_KEPT_MAX` refused lines.
        refused_count: all of them.
        retries: publishes repeated.
        held_s: seconds lost to back-pressure.
        elapsed_s: from the first line read to the last acceptance.
        latencies_ns: for each message, from its first try to its acceptance.
    """

    lines: int = 0
    published: int = 0
    accepted: int = 0
    duplicates: int = 0
    refused: list[RefusedLine] = field(default_factory=list)
    refused_count: int = 0
    retries: int = 0
    held_s: float = 0.0
    elapsed_s: float = 0.0
    latencies_ns: array[int] = field(default_factory=lambda: array("q"))

    def refuse(self, line: int, error: InvalidEventError) -> None:
        """Counts a refused line, and keeps it while there is room."""
        self.refused_count += 1
        if len(self.refused) < REFUSED_KEPT_MAX:
            self.refused.append(RefusedLine(line, error.field, error.reason, error.detail))

    def latency_ms(self) -> dict[str, float | None]:
        """Accepted latency: ``{"p50", "p95", "p99"}`` in milliseconds (nearest rank); None without messages."""
        ordered = sorted(self.latencies_ns)
        return {
            f"p{percent}": round(ordered[(len(ordered) * percent + 99) // 100 - 1] / 1e6, 3) if ordered else None
            for percent in (50, 95, 99)
        }


OnAccepted = Callable[[Accepted, Sequence[Line]], None]


class LinePublisher:
    """Publishes the lines of one source once.

    Attributes:
        report: grows while `run` is under way.
    """

    def __init__(
        self,
        gateway: Gateway,
        *,
        site: str | None = None,
        batch: int = 1,
        rate_per_s: float | None = None,
        deadline_s: float | None = None,
        on_accepted: OnAccepted | None = None,
    ) -> None:
        """
        Args:
            gateway: what publishes.
            site: for events without `metadata.site_id`.
            batch: up to so many *waiting* events of a consultation go in one message; nothing waits to fill one.
            rate_per_s: events a second at most; None: as fast as they are taken.
            deadline_s: how long to try each message; None: for ever.
            on_accepted: told of each message, with the lines in it.
        """
        self.report = PublishReport()
        self._on_accepted = on_accepted
        self._gateway = gateway
        self._site = site
        self._batch = batch
        self._rate_per_s = rate_per_s
        self._deadline_s = deadline_s
        self._lanes: dict[str, deque[Line]] = {}
        self._waiting_lines = 0
        self._waiting_bytes = 0
        self._room = asyncio.Event()

    async def run(self, lines: AsyncIterable[bytes]) -> PublishReport:
        """Publishes every valid line and returns once each is accepted or refused.

        Raises:
            ClusterUnavailableError: the deadline passed or the connection was closed. Publish the same source again:
                what was accepted is not stored twice.
            TopologyError: the cluster does not store events.
            OSError: `lines` could not be read.
        """
        start_s = time.monotonic()
        try:
            async with asyncio.TaskGroup() as tasks:
                async for line in _valid_lines(lines, LineChecker(self._site), self.report):
                    await self._wait_turn(start_s)
                    await self._wait_room(len(line.data))
                    self.report.published += 1
                    lane = self._lanes.get(line.consultation)
                    if lane is None:
                        lane = self._lanes[line.consultation] = deque()
                        tasks.create_task(self._drain(line.consultation, lane))
                    lane.append(line)
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        finally:
            self.report.elapsed_s = time.monotonic() - start_s
            self.report.held_s = self._gateway.held_s
            self.report.retries = self._gateway.retries
        return self.report

    async def _wait_turn(self, start_s: float) -> None:
        if self._rate_per_s is not None:
            early_s = start_s + self.report.published / self._rate_per_s - time.monotonic()
            if early_s > 0:
                await asyncio.sleep(early_s)

    async def _wait_room(self, size_bytes: int) -> None:
        lines_max = WAITING_PER_IN_FLIGHT * self._gateway.in_flight
        while self._waiting_lines >= lines_max or self._waiting_bytes >= WAITING_BYTES_MAX:
            self._room.clear()
            await self._room.wait()
        self._waiting_lines += 1
        self._waiting_bytes += size_bytes

    async def _drain(self, consultation: str, lane: deque[Line]) -> None:
        while lane:
            group = self._next_group(lane)
            await self._publish(group)
            self._waiting_lines -= len(group)
            self._waiting_bytes -= sum(len(line.data) for line in group)
            self._room.set()
        del self._lanes[consultation]

    def _next_group(self, lane: deque[Line]) -> list[Line]:
        group = [lane.popleft()]
        size_bytes = len(group[0].data)
        while lane and len(group) < self._batch and lane[0].site == group[0].site:
            size_bytes += 1 + len(lane[0].data)
            if size_bytes > self._gateway.message_bytes_max:
                break
            group.append(lane.popleft())
        return group

    async def _publish(self, group: list[Line]) -> None:
        first = group[0]
        try:
            accepted = await self._gateway.publish(
                b"\n".join([line.data for line in group]),
                first.site,
                first.consultation,
                batch_id([line.event_id for line in group]),
                deadline_s=self._deadline_s,
            )
        except RefusedError as error:
            self.report.published -= len(group)
            for line in group:
                self.report.refuse(line.number, InvalidEventError("message.refused", "", str(error)))
            return
        self.report.accepted += len(group)
        if accepted.duplicate:
            self.report.duplicates += len(group)
        self.report.latencies_ns.append(accepted.latency_ns)
        if self._on_accepted is not None:
            self._on_accepted(accepted, group)


async def check_lines(lines: AsyncIterable[bytes], *, site: str | None = None) -> PublishReport:
    """Checks a source as `LinePublisher` would, and payloads by the built-in policy, without publishing.

    Raises:
        OSError: it cannot be read.
    """
    report = PublishReport()
    start_s = time.monotonic()
    async for _ in _valid_lines(lines, LineChecker(site, payload_rules=True), report):
        pass
    report.elapsed_s = time.monotonic() - start_s
    return report


async def _valid_lines(lines: AsyncIterable[bytes], checker: LineChecker, report: PublishReport) -> AsyncIterator[Line]:
    number = 0
    async for raw in lines:
        number += 1
        try:
            line = checker.check(number, raw)
        except InvalidEventError as error:
            report.lines += 1
            report.refuse(number, error)
            continue
        if line is not None:
            report.lines += 1
            yield line


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
