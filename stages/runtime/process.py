"""The life of a stage process: connect, run the lanes that fall to it, drain on SIGTERM, exit.

Exit codes: 0 drained; 1 failed. The process prints ``READY`` on stdout once every lane of its first share has found its
place; at once when it has none.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Protocol, TypeVar

import msgspec

from contracts.errors import SettingsError
from contracts.membership import Member
from contracts.settings import Settings
from contracts.subjects import INPUT_STREAM, MEMBERS, OUTPUT_STREAM, Stage, is_token, pause_subject
from stages.runtime.access import Access, Servers
from stages.runtime.api import REMADE, Api
from stages.runtime.client import GuardedClient
from stages.runtime.connection import connect_near
from stages.runtime.control import Control
from stages.runtime.facts import ClusterFacts, read_cluster
from stages.runtime.lanes import LaneSet, RunnableLane
from stages.runtime.membership import Membership
from stages.runtime.remake import Remaker
from stages.runtime.tasks import end_tasks
from stages.runtime.watch import Watch

log = logging.getLogger(__name__)

T = TypeVar("T")


class Actor(Protocol):
    """What the stages differ in; one for each process."""

    async def arrive(self, api: Api, facts: ClusterFacts, control: Control, nonce: str) -> str:
        """What the process does before it takes part. Gives the id of its store (persist; else empty)."""

    def make_lane(
        self, api: Api, facts: ClusterFacts, partition: int, nonce: str, on_open: Callable[[int], None]
    ) -> RunnableLane:
        """The lane of a partition. It calls `on_open` each time it has found its place; `nonce` is no other lane's."""

    def describe(self, me: Member) -> Member:
        """The process's announcement, with what the stage itself has to say."""


class Connector(Protocol):
    """Opens the process's connection."""

    def __call__(
        self,
        urls: Sequence[str],
        stream: str,
        name: str,
        *,
        access: Access,
        reconnected: Callable[[], None] | None = None,
    ) -> Awaitable[GuardedClient]:
        """As `stages.runtime.connection.connect_near`."""


class Machine:
    """What a process takes from the machine it runs on. A simulated run gives it another."""

    def __init__(self) -> None:
        self.connect: Connector = connect_near
        self.node = socket.gethostname()
        self.pid = os.getpid()
        self.clock_ns: Callable[[], int] = time.time_ns
        self.jitter: Callable[[], float] = random.random
        self.token: Callable[[], str] = lambda: secrets.token_hex(6)
        """Gives 12 hex digits that nobody had before."""

    def on_terminate(self, stop: Callable[[], None]) -> None:
        """From now on `stop` is called when the process is asked to end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)


class StageProcess:
    """One process of a stage: the lanes that fall to it, for as long as they do.

    Args:
        stage: which stage.
        servers: NATS servers.
        settings: this process's settings; how the cluster is partitioned is for the cluster to say.
        actor: the stage's own part.
        partitions: which lanes, whatever other processes there are; None for its share.
        name: shown in logs and by the servers; unique for the stage and node.
        on_ready: called once, when every lane of the first share reads.
        watch: shows the process to others; None: it is not watched.
        machine: what it runs on; None: this one.
    """

    def __init__(
        self,
        stage: Stage,
        servers: Servers,
        settings: Settings,
        actor: Actor,
        *,
        partitions: Sequence[int] | None,
        name: str,
        on_ready: Callable[[], None],
        watch: Watch | None = None,
        machine: Machine | None = None,
    ) -> None:
        self._machine = machine or Machine()
        self._stage: Stage = stage
        self._servers = servers
        self._settings = settings
        self._actor = actor
        self._partitions = partitions
        self._name = name
        self._on_ready = on_ready
        self._watch = watch or Watch(stage, name, Settings(), {})
        # Part of consumer names, which are subject tokens.
        self._nonce = f"{name if is_token(name) else stage}-{self._machine.token()}"
        self._api: Api | None = None
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
        """Works until `stop`, then drains within the limit. Stopped before it works, it gives up what it waits for.

        Raises:
            ClusterUnavailableError: no server answers at the start.
            TopologyError: the streams are not there.
            SettingsError: a partition that the cluster does not have.
            FiError: a lane cannot go on.
        """
        machine = self._machine
        machine.on_terminate(self.stop)
        urls, access = self._servers
        client = await self._unless_stopped(
            machine.connect(urls, OUTPUT_STREAM[self._stage], self._name, access=access, reconnected=self._nudge)
        )
        if client is None:
            return
        try:
            facts = await self._unless_stopped(read_cluster(client))
            if facts is None:
                return
            settings = msgspec.structs.replace(
                self._settings, partitions=facts.partitions, partition_by=facts.partition_by
            )
            api = self._api = Api(client, settings, machine.jitter, self._watch.telemetry)
            control = Control(api, self._changed)
            self._watch.connected(api, control, self._servers)
            listening = asyncio.create_task(control.run(), name="control")
            try:
                arrival = self._actor.arrive(api, facts, control, f"{self._nonce}_0")
                store = await self._unless_stopped(arrival, listening)
                if store is not None:
                    await self._take_part(api, facts, store, control, listening)
            finally:
                await end_tasks(listening)
        finally:
            await _close(client, self._settings.publish_timeout_s)

    async def _unless_stopped(self, arrival: Awaitable[T], listening: asyncio.Task[None] | None = None) -> T | None:
        """What `arrival` gives; None when told to stop before it was done. Raises what `listening` failed with."""
        arriving = asyncio.ensure_future(arrival)
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        others = (stopping,) if listening is None else (stopping, listening)
        try:
            await asyncio.wait((arriving, *others), return_when=asyncio.FIRST_COMPLETED)
            if listening is not None and listening.done():
                listening.result()
            return arriving.result() if arriving.done() else None
        finally:
            await end_tasks(arriving, stopping)

    async def _take_part(
        self, api: Api, facts: ClusterFacts, store: str, control: Control, listening: asyncio.Task[None]
    ) -> None:
        me = Member(
            stage=self._stage,
            node=self._machine.node,
            name=self._name,
            nonce=self._nonce,
            pid=self._machine.pid,
            started_ns=self._machine.clock_ns(),
            store=store,
            pinned=self._pinned(facts),
        )
        number = count(1)

        def make(partition: int, on_open: Callable[[int], None]) -> RunnableLane:
            # A lane of a partition that was here before must not be taken for that one: names and message ids
            # are made of the nonce.
            return self._actor.make_lane(api, facts, partition, f"{self._nonce}_{next(number)}", on_open)

        lanes = LaneSet(make, self._changed)
        membership = Membership(api, me, facts.partitions, lanes, self._changed, self._actor.describe)
        self._lanes, self._membership = lanes, membership
        self._watch.takes_part(membership)
        hearing = control.listen(pause_subject(self._stage), membership.pause)
        await self._unless_stopped(hearing, listening)
        if not self._stop.is_set():
            await self._work(api, lanes, membership, listening)

    async def _work(self, api: Api, lanes: LaneSet, membership: Membership, listening: asyncio.Task[None]) -> None:
        sharing = asyncio.create_task(membership.run(), name="membership")
        # A hop is looked at from both its ends: either may be down, and not know what it was like.
        streams = {INPUT_STREAM[self._stage], OUTPUT_STREAM[self._stage], MEMBERS} & REMADE
        remaking = asyncio.create_task(Remaker(api, sorted(streams)).run(), name="remaking")
        failing = asyncio.create_task(lanes.failed(), name="lane failure")
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        try:
            working = (failing, sharing, listening, remaking)
            await asyncio.wait((*working, stopping), return_when=asyncio.FIRST_COMPLETED)
            for task in working:
                if task.done():
                    task.result()
            membership.leave()
            await lanes.drain(self._settings.drain_s, handing_over=membership.heirs)
        finally:
            await end_tasks(sharing, remaking, failing, stopping)
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
        if self._api is not None:
            self._api.poke()
        if self._lanes is not None:
            self._lanes.nudge()


async def _close(client: GuardedClient, limit_s: float) -> None:
    try:
        await asyncio.wait_for(client.close(), limit_s)
    except TimeoutError:
        log.warning("the connection did not close in time")
