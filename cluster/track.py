"""Measuring a run from outside: what was accepted when, and when the receipts said that it was durable.

Receipts are read from the stream, so what is measured includes the way back to the observer. All times are the wall
clock of this machine; stage times are taken on the machines that stages run on.
"""

from __future__ import annotations

import asyncio
import secrets
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from contracts.errors import FiError
from contracts.events import Event
from contracts.receipts import Receipt, decode_receipt
from contracts.subjects import RECEIPTS, receipt_subject
from contracts.telemetry import STAGE_BUDGET_MS_P95
from stages.runtime.api import Api
from stages.runtime.checkpoint import last_receipt
from stages.runtime.reader import OrderedReader
from stages.runtime.tasks import end_tasks

PERCENTILES = (50, 95, 99)


class Totals(NamedTuple):
    """Running totals over all partitions, in events."""

    persisted: int = 0
    duplicates: int = 0
    dead_lettered: int = 0

    @property
    def settled(self) -> int:
        """Events that reached their end."""
        return sum(self)


class _Partition:
    """What one partition's receipts said, in order."""

    def __init__(self, receipt: Receipt | None) -> None:
        self.base = self.last = _totals(receipt)
        self.base_origin = self.origin = receipt.origin if receipt is not None else 0
        self.origins = array("q")
        self.seen_ns = array("q")
        self.committed_ns = array("q")

    def note(self, receipt: Receipt, now_ns: int) -> None:
        if receipt.takeover or receipt.origin <= self.origin:
            return
        self.origin = receipt.origin
        self.last = _totals(receipt)
        self.origins.append(receipt.origin)
        self.seen_ns.append(now_ns)
        self.committed_ns.append(receipt.committed_ns)

    def commit_of(self, origin: int) -> int | None:
        at = bisect_left(self.origins, origin)
        return at if at < len(self.origins) else None


class Tracker:
    """Follows a cluster's receipts while something is published.

    Args:
        api: a connection of its own is best, so that measuring does not wait behind publishing.
        partitions: P.
        clock_ns: wall clock.
    """

    def __init__(self, api: Api, partitions: int, clock_ns: Callable[[], int]) -> None:
        self._api = api
        self._clock_ns = clock_ns
        self._count = partitions
        self._nonce = f"tracker-{secrets.token_hex(6)}"
        self._partitions: list[_Partition] = []
        self._reader: OrderedReader | None = None
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._accepted: list[tuple[array[int], array[int], array[int]]] = [
            (array("q"), array("q"), array("q")) for _ in range(partitions)
        ]

    async def start(self) -> None:
        """Notes where every partition stands and begins to follow.

        Raises:
            TopologyError: the streams are missing.
        """
        last = 0
        for partition in range(self._count):
            receipt, seq = await last_receipt(self._api, partition)
            self._partitions.append(_Partition(receipt))
            last = max(last, seq)

        async def locate() -> int:
            return last + 1

        self._reader = OrderedReader(
            self._api, RECEIPTS, "fi.receipts.*", batch=self._api.settings.pull_batch, locate=locate, nonce=self._nonce
        )
        self._reader.start()
        self._task = asyncio.create_task(self._follow(self._reader), name="follow receipts")

    async def close(self) -> None:
        """Stops following."""
        if self._task is not None and self._reader is not None:
            await end_tasks(self._task)
            await self._reader.close()

    async def _follow(self, reader: OrderedReader) -> None:
        by_subject = {receipt_subject(partition): self._partitions[partition] for partition in range(self._count)}
        try:
            while True:
                await reader.wait()
                now_ns = self._clock_ns()
                for message in reader.take(1024, 1 << 30):
                    partition = by_subject.get(message.subject)
                    if partition is not None:
                        partition.note(decode_receipt(message.data), now_ns)
                self._news.set()
        finally:
            self._news.set()

    def accepted(self, partition: int, origin: int, sent_ns: int, events: int) -> None:
        """A message was accepted, with `events` in it; it was first sent at `sent_ns`."""
        origins, sent, counts = self._accepted[partition]
        origins.append(origin)
        sent.append(sent_ns)
        counts.append(events)

    def totals(self) -> Totals:
        """What was settled since `start`."""
        sums = [sum(p.last[i] - p.base[i] for p in self._partitions) for i in range(3)]
        return Totals(*sums)

    def goals(self) -> list[int]:
        """The last accepted origin of each partition, 0 where there is none."""
        return [max(origins, default=0) for origins, _, _ in self._accepted]

    async def settled(self, on_progress: Callable[[Totals], None], *, silent_s_max: float) -> bool:
        """Waits until receipts cover everything that was accepted.

        Args:
            on_progress: told the totals whenever they change.
            silent_s_max: give up when no receipt came for so long.

        Returns:
            False when given up.

        Raises:
            FiError: the receipts can no longer be read.
        """
        goals = self.goals()
        while True:
            self._news.clear()
            on_progress(self.totals())
            if all(p.origin >= goal for p, goal in zip(self._partitions, goals, strict=True)):
                return True
            if self._task is not None and self._task.done():
                self._task.result()
                raise FiError("the receipts can no longer be followed")
            try:
                async with asyncio.timeout(silent_s_max):
                    await self._news.wait()
            except TimeoutError:
                return False

    def durable_ns(self) -> npt.NDArray[np.int64]:
        """For every accepted and settled event: from its first try to its receipt seen here, in ns."""
        latencies = array("q")
        for partition, (origins, sent, counts) in zip(self._partitions, self._accepted, strict=True):
            for origin, sent_ns, events in zip(origins, sent, counts, strict=True):
                at = partition.commit_of(origin)
                if at is not None and origin > partition.base_origin:
                    latencies.extend([partition.seen_ns[at] - sent_ns] * events)
        return np.frombuffer(latencies, np.int64)

    def span_s(self) -> float:
        """Seconds from the first send to the last receipt."""
        sent = [column[0] for _, column, _ in self._accepted if column]
        seen = [p.seen_ns[-1] for p in self._partitions if p.seen_ns]
        return (max(seen) - min(sent)) / 1e9 if sent and seen else 0.0

    def is_ours(self, partition: int, origin: int) -> bool:
        """True when the event came after `start`."""
        return origin > self._partitions[partition].base_origin

    def committed_ns(self, partition: int, origin: int) -> int | None:
        """When the event was durable on the persister's disk; None when that was before `start` or is not yet."""
        p = self._partitions[partition]
        at = p.commit_of(origin)
        return p.committed_ns[at] if at is not None else None


class StageTimes:
    """Collects how long each stage took, event by event."""

    def __init__(self) -> None:
        self._times: dict[str, array[int]] = {stage: array("q") for stage in STAGE_BUDGET_MS_P95}

    def note(self, event: Event, committed_ns: int) -> None:
        """One stored event, and when it was durable."""
        marks = (event.accepted_ns, event.ingest_ns, event.segment_ns, event.hash_ns, committed_ns)
        for times, start_ns, end_ns in zip(self._times.values(), marks, marks[1:], strict=False):
            times.append(end_ns - start_ns)

    def summary_ms(self) -> dict[str, dict[str, float | None]]:
        """Percentiles for each stage; as `measured_ms`."""
        return {stage: measured_ms(np.frombuffer(times, np.int64)) for stage, times in self._times.items()}


def measured_ms(latencies_ns: Sequence[int] | npt.NDArray[np.int64]) -> dict[str, float | None]:
    """``{"p50", "p95", "p99"}`` in milliseconds; None where nothing was measured, which is no zero."""
    if len(latencies_ns) == 0:
        return dict.fromkeys(f"p{percent}" for percent in PERCENTILES)
    return {**percentiles_ms(latencies_ns)}


def percentiles_ms(latencies_ns: Sequence[int] | npt.NDArray[np.int64]) -> dict[str, float]:
    """``{"p50", "p95", "p99"}`` in milliseconds; all 0 for nothing."""
    if len(latencies_ns) == 0:
        return {f"p{percent}": 0.0 for percent in PERCENTILES}
    values = np.percentile(np.asarray(latencies_ns), PERCENTILES) / 1e6
    return {f"p{percent}": round(float(value), 3) for percent, value in zip(PERCENTILES, values, strict=True)}


def _totals(receipt: Receipt | None) -> Totals:
    return Totals() if receipt is None else Totals(receipt.persisted, receipt.duplicates, receipt.dead_lettered)
