"""The life of a stage process: connect, run the lanes that fall to it, drain on SIGTERM, exit.

Exit codes: 0 drained; 1 failed. The process prints ``READY`` on stdout once every lane of its first share has found its
place; at once when it has none.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from itertools import count
from typing import Any

from nats.aio.client import Client

from contracts.errors import SettingsError
from contracts.membership import Member
from contracts.settings import Settings
from contracts.subjects import OUTPUT_STREAM, Stage, is_token
from stages.runtime.api import Api
from stages.runtime.connection import connect_near
from stages.runtime.facts import ClusterFacts, read_cluster
from stages.runtime.lanes import LaneSet, RunnableLane
from stages.runtime.membership import Membership
from stages.runtime.tasks import end_tasks
from stages.runtime.watch import Watch

log = logging.getLogger(__name__)


LaneMaker = Callable[[Api, ClusterFacts, int, str, Callable[[int], None]], RunnableLane]
"""(api, cluster, partition, nonce of the lane, on_open) → lane."""

Arrival = Callable[[Api, ClusterFacts, str], Coroutine[Any, Any, str]]
"""(api, cluster, nonce) → id of this process's store (persist; else empty): what it does before it takes part."""


class StageProcess:
    """One process of a stage: the lanes that fall to it, for as long as they do.

    Args:
        stage: which stage.
        urls: NATS servers.
        settings: this process's settings.
        make_lane: builds a lane of this stage.
        arrive: what it does before it takes part.
        partitions: which lanes, whatever other processes there are; None for its share.
        name: shown in logs and by the servers; unique for the stage and node.
        on_ready: called once, when every lane of the first share reads.
        watch: shows the process to others; None: it is not watched.
    """

    def __init__(
        self,
        stage: Stage,
        urls: Sequence[str],
        settings: Settings,
        make_lane: LaneMaker,
        *,
        arrive: Arrival,
        partitions: Sequence[int] | None,
        name: str,
        on_ready: Callable[[], None],
        watch: Watch | None = None,
    ) -> None:
        self._stage: Stage = stage
        self._urls = urls
        self._settings = settings
        self._make_lane = make_lane
        self._arrive = arrive
        self._partitions = partitions
        self._name = name
        self._on_ready = on_ready
        self._watch = watch or Watch(stage, name, Settings(), {})
        # Part of consumer names, which are subject tokens.
        self._nonce = f"{name if is_token(name) else stage}-{secrets.token_hex(6)}"
        self._lanes: LaneSet | None = None
        self._membership: Membership | None = None
        self._ready = False
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Drain: every lane finishes what it has in hand."""
        if not self._stop.is_set():
            log.info("draining", extra={"stage": self._stage})
        self._stop.set()
        self._watch.drain()

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
            api = Api(client, self._settings, telemetry=self._watch.telemetry)
            self._watch.connected(api)
            store = await self._arrived(api, facts)
            if store is None:
                return
            me = Member(
                stage=self._stage,
                node=socket.gethostname(),
                name=self._name,
                nonce=self._nonce,
                pid=os.getpid(),
                started_ns=time.time_ns(),
                store=store,
                pinned=self._pinned(facts),
            )

            lanes = count(1)

            def make(partition: int, on_open: Callable[[int], None]) -> RunnableLane:
                # A lane of a partition that was here before must not be taken for that one: names and message ids
                # are made of the nonce.
                return self._make_lane(api, facts, partition, f"{self._nonce}_{next(lanes)}", on_open)

            self._lanes = LaneSet(make, self._changed)
            self._membership = Membership(api, me, facts.partitions, self._lanes, self._changed)
            await self._work(self._lanes, self._membership)
        finally:
            await _close(client, self._settings.publish_timeout_s)

    async def _arrived(self, api: Api, facts: ClusterFacts) -> str | None:
        """What `arrive` gives; None when told to stop before it was done."""
        arriving = asyncio.create_task(self._arrive(api, facts, f"{self._nonce}_0"), name="arrival")
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        try:
            await asyncio.wait((arriving, stopping), return_when=asyncio.FIRST_COMPLETED)
            return arriving.result() if arriving.done() else None
        finally:
            await end_tasks(arriving, stopping)

    async def _work(self, lanes: LaneSet, membership: Membership) -> None:
        sharing = asyncio.create_task(membership.run(), name="membership")
        failing = asyncio.create_task(lanes.failed(), name="lane failure")
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        try:
            await asyncio.wait((sharing, failing, stopping), return_when=asyncio.FIRST_COMPLETED)
            for task in (failing, sharing):
                if task.done():
                    task.result()
            membership.leave()
            await lanes.drain(self._settings.drain_s, handing_over=membership.heirs)
        finally:
            await end_tasks(sharing, failing, stopping)
            await lanes.close()
            await membership.say_goodbye()

    def _pinned(self, facts: ClusterFacts) -> tuple[int, ...] | None:
        if self._partitions is None:
            return None
        unknown = [p for p in self._partitions if not 0 <= p < facts.partitions]
        if unknown:
            raise SettingsError(
                f"partitions {unknown}: the cluster has 0 to {facts.partitions - 1}; see `fictl cluster status`"
            )
        return tuple(sorted(set(self._partitions)))

    def _changed(self) -> None:
        """A lane came, found its place or went, or the first share is known."""
        if self._lanes is None or self._membership is None:
            return
        self._membership.poke()
        if self._membership.planned:
            self._watch.planned()
        if self._membership.planned and not self._lanes.opening and not self._ready:
            self._ready = True
            self._on_ready()

    def _nudge(self) -> None:
        self._watch.reconnected()
        if self._lanes is not None:
            self._lanes.nudge()


async def _close(client: Client, limit_s: float) -> None:
    try:
        await asyncio.wait_for(client.close(), limit_s)
    except TimeoutError:
        log.warning("the connection did not close in time")
