"""Servers in virtual time, and what talks to them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

from cluster.testing.sim.broker import Broker
from cluster.testing.sim.loop import Host, VirtualLoop
from cluster.testing.sim.network import Network
from cluster.testing.sim.world import CLUSTER
from cluster.topology import streams
from contracts.events import Event
from contracts.frames import decode_frame
from contracts.settings import Settings
from contracts.subjects import DLQ
from contracts.telemetry import DEAD_INDEX, DEAD_ORIGIN
from stages.runtime.api import Api
from stages.runtime.tasks import end_tasks


class Ground:
    """The servers, and one process's connection to them."""

    def __init__(self, loop: VirtualLoop, **changes: Any) -> None:
        self.rng = random.Random(1)
        self.settings = Settings(**{"partitions": 1, **changes})
        self.broker = Broker(loop, self.rng, streams(self.settings, CLUSTER))
        self.network = Network(self.broker, self.rng)
        self.host = Host("stage")
        self.api = self.connect("stage")

    def connect(self, name: str) -> Api:
        return Api(self.network.connect(name, self.host), self.settings, self.rng.random)

    async def publish(self, subject: str, data: bytes) -> None:
        await self.api.client.request(subject, data, timeout=5)

    def events(self, stream: str) -> list[Event]:
        """All that is in the frames of a hop, in order."""
        stored = self.broker.streams[stream].messages.values()
        return [event for message in stored for event in decode_frame(message.data).events]

    def buried(self) -> list[tuple[int, int]]:
        """Origin and index of every dead letter, in order."""
        letters = [message.headers for message in self.broker.streams[DLQ].messages.values()]
        return [(int(headers[DEAD_ORIGIN]), int(headers[DEAD_INDEX])) for headers in letters]


def in_virtual_time(job: Callable[[Ground], Awaitable[None]], **changes: Any) -> None:
    """Runs it on servers with such settings, and ends what it left."""
    with contextlib.closing(VirtualLoop(lambda: 0.001)) as loop:
        ground = Ground(loop, **changes)

        async def all_of_it() -> None:
            try:
                await job(ground)
            finally:
                await end_tasks(*asyncio.all_tasks() - {asyncio.current_task()})  # type: ignore[arg-type]

        loop.run_until_complete(asyncio.Task(all_of_it(), loop=loop, context=ground.host.context))
