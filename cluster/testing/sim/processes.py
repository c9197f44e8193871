"""Simulated stage processes: the real `StageProcess` on a machine of the run's, killed, frozen and started again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from cluster.testing.sim.broker import Broker
from cluster.testing.sim.disk import MemoryDisk
from cluster.testing.sim.loop import Host
from cluster.testing.sim.network import Network, SimClient
from contracts.errors import FiError
from contracts.membership import Member
from contracts.settings import Settings
from contracts.subjects import FLUSH_SUBJECT, Stage
from stages.actors import actor
from stages.persist.actor import PersistLane
from stages.persist.disk import Turns
from stages.persist.flush import Flushes
from stages.persist.lost import keep_places
from stages.persist.room import EventsRoom
from stages.runtime.access import Access, Servers
from stages.runtime.api import Api
from stages.runtime.client import GuardedClient
from stages.runtime.control import Control
from stages.runtime.facts import ClusterFacts
from stages.runtime.lanes import RunnableLane
from stages.runtime.process import Actor, Machine, StageProcess
from stages.runtime.telemetry import Feed, LaneProbe, Telemetry
from stages.runtime.watch import Watch

RESTART_S_MIN, RESTART_S_MAX = 0.3, 1.5
STOP_S_MAX: Final = 60.0


class Shown(Telemetry):
    """What a process shows at `/readyz` of its input."""

    def __init__(self) -> None:
        self.feeds: dict[int, Feed] = {}

    def lane(self, stage: Stage, partition: int) -> LaneProbe:
        """See `Telemetry.lane`."""
        return _ShownLane(self.feeds, partition)


class _ShownLane(LaneProbe):
    def __init__(self, feeds: dict[int, Feed], partition: int) -> None:
        self._feeds = feeds
        self._partition = partition

    def opened(self, feed: Feed) -> None:
        self._feeds[self._partition] = feed

    def closed(self, error: BaseException | None) -> None:
        self._feeds.pop(self._partition, None)


class SimMachine(Machine):
    """What one incarnation of a process runs on."""

    def __init__(self, process: SimProcess, host: Host) -> None:
        self.client: SimClient | None = None
        self.node = process.node
        self.pid = process.starts
        self.clock_ns = process.clock_ns
        self.jitter = process.rng.random
        self.token = lambda: f"{process.rng.getrandbits(48):012x}"
        self.connect = self._connect
        self.stop: Callable[[], None] = lambda: None
        self._process = process
        self._host = host

    async def _connect(
        self,
        urls: Sequence[str],
        stream: str,
        name: str,
        *,
        access: Access,
        reconnected: Callable[[], None] | None = None,
    ) -> GuardedClient:
        process = self._process
        await process.network.is_up()
        self.client = process.network.connect(f"{name}.{process.starts}", self._host, reconnected)
        return self.client

    def on_terminate(self, stop: Callable[[], None]) -> None:
        """See `Machine.on_terminate`."""
        self.stop = stop


class SimProcess:
    """One process that is started again when it ends, like the supervisor does.

    Args:
        stage, name: which.
        disk: its node's, for persist.
        pinned: partitions it holds whatever others do; None for its share.

    Attributes:
        starts: incarnations so far.
        clock_skew_ns: of its wall clock.
        pinned: for its next incarnation.
        failure: what an incarnation ended with that no fault explains.
    """

    def __init__(
        self,
        stage: Stage,
        name: str,
        *,
        broker: Broker,
        network: Network,
        rng: random.Random,
        settings: Settings,
        disk: MemoryDisk,
        pinned: tuple[int, ...] | None,
    ) -> None:
        self.stage: Stage = stage
        self.name = name
        self.node = disk.store.store_id
        self.network = network
        self.rng = rng
        self.disk = disk
        self.starts = 0
        self.clock_skew_ns = 0
        self.failure: BaseException | None = None
        self.host = Host(name)
        self._broker = broker
        self._settings = settings
        self.pinned = pinned
        self._machine: SimMachine | None = None
        self._task: asyncio.Task[None] | None = None
        self._dying: list[asyncio.Task[None]] = []
        self._wanted = False
        self._shown = Shown()

    def clock_ns(self) -> int:
        """The process's wall clock."""
        return self._broker.now_ns() + self.clock_skew_ns

    @property
    def client(self) -> SimClient | None:
        """The connection of the present incarnation."""
        return None if self._machine is None else self._machine.client

    def start(self) -> None:
        """Runs an incarnation, and others after it."""
        self.starts += 1
        self._wanted = True
        self.host = Host(f"{self.name}.{self.starts}")
        self._machine = SimMachine(self, self.host)
        watch = Watch(self.stage, self.name, Settings(), {})
        watch.telemetry = self._shown = Shown()
        process = StageProcess(
            self.stage,
            Servers(()),
            self._settings,
            self._actor(),
            partitions=self.pinned,
            name=self.name,
            on_ready=lambda: self._broker.say(f"{self.name} is ready"),
            watch=watch,
            machine=self._machine,
        )
        self._broker.say(f"{self.host.name} starts")
        self._task = self._broker.loop.create_task(process.run(), name=self.host.name, context=self.host.context)
        self._task.add_done_callback(self._ended, context=self._broker.context)

    @property
    def refused(self) -> bool:
        """A lane of its present incarnation says that its input must not be read."""
        return not self.host.dead and any(feed.reader.refused for feed in self._shown.feeds.values())

    def kill(self) -> None:
        """SIGKILL: from now on nothing it does has an effect. It is started again."""
        if self._task is None or self.host.dead:
            return
        self._broker.say(f"{self.host.name} is killed")
        self.host.dead = True
        self._broker.loop.thaw(self.host)
        self._task.cancel()
        self._dying.append(self._task)

    def freeze(self) -> None:
        """SIGSTOP."""
        self.host.frozen = not self.host.dead

    def thaw(self) -> None:
        """SIGCONT."""
        if self.host.frozen:
            self._broker.loop.thaw(self.host)

    async def stop(self) -> None:
        """SIGTERM; returns when it has ended.

        Raises:
            TimeoutError: it has not.
        """
        self._wanted = False
        if self._task is None:
            return
        if self._machine is not None:
            self._machine.stop()
        _, late = await asyncio.wait((self._task, *self._dying), timeout=STOP_S_MAX)
        if late:
            raise TimeoutError(f"{self.name} did not end within {STOP_S_MAX:.0f} s of SIGTERM")

    def abandon(self) -> None:
        """Kills it for good."""
        self._wanted = False
        self.kill()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self.host.dead:
            self._broker.say(f"{self.host.name} ends: {error!r}")
            if not isinstance(error, FiError):
                self.failure = self.failure or error
        if task in self._dying:
            self._dying.remove(task)
        if self._wanted and task is self._task:
            self._broker.later(self.rng.uniform(RESTART_S_MIN, RESTART_S_MAX), self._start_again)

    def _start_again(self) -> None:
        if self._wanted:
            self.start()

    def _actor(self) -> Actor:
        return SimPersistActor(self) if self.stage == "persist" else actor(self.stage, Path(), self.clock_ns)


class SimPersistActor:
    """Persist on the disk of a simulated node. No store is ever moved away there."""

    def __init__(self, process: SimProcess) -> None:
        self._process = process
        self._flushes = Flushes(process.disk.store.cluster_id)
        self._room: EventsRoom
        self._turns = Turns()

    async def arrive(self, api: Api, facts: ClusterFacts, control: Control, nonce: str) -> str:
        """See `Actor.arrive`."""
        self._room = EventsRoom(api)
        await control.listen(FLUSH_SUBJECT, self._flushes.take)
        await keep_places(api, facts.partitions, facts.cluster_id, nonce)
        return self._process.disk.store.store_id

    def make_lane(
        self, api: Api, facts: ClusterFacts, partition: int, nonce: str, on_open: Callable[[int], None]
    ) -> RunnableLane:
        """See `Actor.make_lane`."""
        process = self._process
        return PersistLane(
            api,
            process.disk.store,
            partition,
            nonce,
            on_open,
            process.clock_ns,
            flushes=self._flushes,
            room=self._room,
            turns=self._turns,
            node=process.node,
            disk=process.disk.as_disk(),
        )

    def describe(self, me: Member) -> Member:
        """See `Actor.describe`. Nothing is added."""
        return me
