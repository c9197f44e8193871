"""The life of a stage process: connect, run its lanes, drain on SIGTERM, exit.

Exit codes: 0 drained; 1 failed. The process prints ``READY`` on stdout once every lane has found its place.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from collections.abc import Callable, Sequence
from typing import Protocol

from nats.aio.client import Client

from contracts.errors import SettingsError
from contracts.settings import Settings
from contracts.subjects import OUTPUT_STREAM, Stage, is_token
from stages.runtime.api import Api
from stages.runtime.connection import connect_near
from stages.runtime.facts import ClusterFacts, read_cluster
from stages.runtime.tasks import end_tasks
from stages.runtime.watch import Watch

log = logging.getLogger(__name__)


class RunnableLane(Protocol):
    """One partition of any stage."""

    async def run(self) -> None:
        """Works until `stop`; raises only what the process cannot go on with."""

    def stop(self) -> None:
        """Finish what is in hand and return from `run`."""

    def nudge(self) -> None:
        """The connection came back: look again."""


LaneMaker = Callable[[Api, ClusterFacts, int, str, Callable[[int], None]], RunnableLane]
"""(api, cluster, partition, process nonce, on_open) → lane."""


class StageProcess:
    """All lanes of one process.

    Args:
        stage: which stage.
        urls: NATS servers.
        settings: this process's settings.
        make_lane: builds a lane of this stage.
        partitions: which lanes; None for all of them.
        name: shown in logs and by the servers.
        on_ready: called once when every lane reads.
        watch: shows the process to others; None: it is not watched.
    """

    def __init__(
        self,
        stage: Stage,
        urls: Sequence[str],
        settings: Settings,
        make_lane: LaneMaker,
        *,
        partitions: Sequence[int] | None,
        name: str,
        on_ready: Callable[[], None],
        watch: Watch | None = None,
    ) -> None:
        self._stage: Stage = stage
        self._urls = urls
        self._settings = settings
        self._make_lane = make_lane
        self._partitions = partitions
        self._name = name
        self._on_ready = on_ready
        self._watch = watch or Watch(stage, name, Settings(), {})
        # Part of consumer names, which are subject tokens.
        self._nonce = f"{name if is_token(name) else stage}-{secrets.token_hex(6)}"
        self._waiting: set[int] = set()
        self._lanes: list[RunnableLane] = []
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Drain: every lane finishes what it has in hand."""
        if not self._stop.is_set():
            log.info("draining", extra={"stage": self._stage})
        self._stop.set()
        self._watch.drain()
        for lane in self._lanes:
            lane.stop()

    async def run(self) -> None:
        """Works until `stop`, then drains within the limit.

        Raises:
            ClusterUnavailableError: no server answers at the start.
            TopologyError: the streams are not there.
            SettingsError: a partition that the cluster does not have.
            FiError: a lane cannot go on.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        client = await connect_near(self._urls, OUTPUT_STREAM[self._stage], self._name, reconnected=self._nudge)
        try:
            facts = await read_cluster(client)
            partitions = self._chosen(facts)
            self._waiting = set(partitions)
            api = Api(client, self._settings, telemetry=self._watch.telemetry)
            self._lanes = [self._make_lane(api, facts, p, self._nonce, self._opened) for p in partitions]
            self._watch.connected(api)
            if self._stop.is_set():
                return
            if not partitions:
                self._on_ready()
                await self._stop.wait()
                return
            await self._run_lanes()
        finally:
            await _close(client, self._settings.publish_timeout_s)

    async def _run_lanes(self) -> None:
        tasks = [asyncio.create_task(lane.run(), name=f"lane {i}") for i, lane in enumerate(self._lanes)]
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        try:
            await asyncio.wait((*tasks, stopping), return_when=asyncio.FIRST_COMPLETED)
            failed = _first_failure(tasks)
            if failed is None:
                pending = {task for task in tasks if not task.done()}
                if pending:
                    _, pending = await asyncio.wait(pending, timeout=self._settings.drain_s)
                if pending:
                    log.error("%d lanes did not drain within %.0f s", len(pending), self._settings.drain_s)
                failed = _first_failure(tasks)
            if failed is not None:
                raise failed
        finally:
            await end_tasks(*tasks, stopping)

    def _chosen(self, facts: ClusterFacts) -> list[int]:
        if self._partitions is None:
            return list(range(facts.partitions))
        unknown = [p for p in self._partitions if not 0 <= p < facts.partitions]
        if unknown:
            raise SettingsError(
                f"partitions {unknown}: the cluster has 0 to {facts.partitions - 1}; see `fi cluster status`"
            )
        return sorted(set(self._partitions))

    def _opened(self, partition: int) -> None:
        if partition in self._waiting:
            self._waiting.discard(partition)
            if not self._waiting:
                self._on_ready()

    def _nudge(self) -> None:
        self._watch.reconnected()
        for lane in self._lanes:
            lane.nudge()


def _first_failure(tasks: Sequence[asyncio.Task[None]]) -> BaseException | None:
    for task in tasks:
        if task.done() and not task.cancelled() and task.exception() is not None:
            return task.exception()
    return None


async def _close(client: Client, limit_s: float) -> None:
    try:
        await asyncio.wait_for(client.close(), limit_s)
    except TimeoutError:
        log.warning("the connection did not close in time")
