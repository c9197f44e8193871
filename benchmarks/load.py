"""Load for the benchmarks: made-up events, offered open-loop (at fixed times) or closed-loop (as fast as accepted).

Open-loop latency counts from the time a message was *due*, so that a stalled system cannot hide its stall by
slowing the generator down (coordinated omission).
"""

from __future__ import annotations

import asyncio
import gc
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from cluster.gateway import Accepted, Gateway, batch_id
from cluster.supervisor import Supervisor
from cluster.track import Tracker
from cluster.workload import consultations
from contracts.settings import Settings
from contracts.subjects import EVENTS, partition_of
from stages.runtime.api import Api
from stages.runtime.client import GuardedClient
from stages.runtime.connection import connect, connect_beside
from stages.runtime.facts import ClusterFacts, read_cluster

IN_FLIGHT = 512
CONNECTIONS = 2
SETTLE_S_MAX = 60.0


class Message(NamedTuple):
    """One message ready to be published."""

    site: str
    consultation: str
    message_id: str
    data: bytes
    events: int


def make_messages(seed: int, messages: int, batch: int) -> list[Message]:
    """`messages` messages of `batch` events of one consultation each, consultations taking turns.

    Each consultation's events stay in order; turns are taken so that many are open at once, as on a busy day.
    """
    lanes: dict[str, list[dict[str, Any]]] = {}
    whole = 0
    for event in consultations(seed, 64 * messages * batch + 100_000):
        lane = lanes.setdefault(event["consultation_id"], [])
        lane.append(event)
        whole += len(lane) % batch == 0
        if whole == messages:
            break
    turns = zip_longest(*([lane[i : i + batch] for i in range(0, len(lane), batch)] for lane in lanes.values()))
    return [_message(part) for turn in turns for part in turn if part is not None and len(part) == batch]


def _message(events: list[dict[str, Any]]) -> Message:
    first = events[0]
    data = b"\n".join(msgspec.json.encode(event) for event in events)
    message_id = batch_id([str(event["event_id"]) for event in events])
    return Message(first["metadata"]["site_id"], first["consultation_id"], message_id, data, len(events))


class Pipeline(NamedTuple):
    """A running pipeline and connections to load and to watch it."""

    supervisor: Supervisor
    gateways: list[Gateway]
    observer: GuardedClient
    facts: ClusterFacts

    def gateway(self, message: Message) -> Gateway:
        """Always the same one for a consultation, which keeps its order."""
        return self.gateways[hash(message.consultation) % len(self.gateways)]

    def note(self, tracker: Tracker, message: Message, accepted: Accepted, sent_ns: int) -> None:
        """Tells the tracker of an accepted message."""
        partition = partition_of(message.site, message.consultation, self.facts.partitions, self.facts.partition_by)
        tracker.accepted(partition, accepted.origin, sent_ns, message.events)

    @asynccontextmanager
    async def tracked(self) -> AsyncIterator[Tracker]:
        """A tracker of what happens from now on."""
        tracker = Tracker(Api(self.observer, self.supervisor.settings), self.facts.partitions, time.time_ns)
        await tracker.start()
        try:
            yield tracker
        finally:
            await tracker.close()


@asynccontextmanager
async def running_pipeline(directory: Path, settings: Settings) -> AsyncIterator[Pipeline]:
    """Three servers and four stages in `directory`, with load connections; all stopped at the end."""
    async with Supervisor(directory, settings) as supervisor, connected(supervisor) as pipeline:
        yield pipeline


@asynccontextmanager
async def connected(supervisor: Supervisor, connections: int = CONNECTIONS) -> AsyncIterator[Pipeline]:
    """What a started supervisor runs, with so many load connections and an observer's, closed at the end."""
    async with AsyncExitStack() as stack:
        clients = []
        for number in range(connections + 1):
            clients.append(await _connection(supervisor.urls, number))
            stack.push_async_callback(clients[-1].close)
        gateways = [Gateway(client, in_flight=IN_FLIGHT) for client in clients[1:]]
        yield Pipeline(supervisor, gateways, clients[0], await read_cluster(clients[0]))


async def _connection(urls: Sequence[str], number: int) -> GuardedClient:
    """The observer's connection for 0; else a gateway's, as `fictl publish` has it."""
    name = f"bench-{number}"
    return await (connect_beside(urls, EVENTS, name) if number else connect(urls, name))


async def open_loop(
    pipeline: Pipeline,
    tracker: Tracker,
    messages: Sequence[Message],
    rate_per_s: float,
    enough: Callable[[int], bool] = lambda number: False,
) -> array[int]:
    """Offers messages at fixed times, all or until `enough` of how many; returns accepted latencies, in ns.

    These count from due times. There are as many as messages were offered.
    """
    latencies = array("q")
    # The generator shares the cores with what it measures; its own collections would show as latency.
    gc.collect()
    gc.freeze()
    start_ns = time.time_ns() + 50_000_000

    async def one(message: Message, due_ns: int) -> None:
        accepted = await pipeline.gateway(message).publish(
            message.data, message.site, message.consultation, message.message_id
        )
        latencies.append(time.time_ns() - due_ns)
        pipeline.note(tracker, message, accepted, due_ns)

    async with asyncio.TaskGroup() as tasks:
        for number, message in enumerate(messages):
            if enough(number):
                break
            due_ns = start_ns + int(number * 1e9 / rate_per_s)
            wait_s = (due_ns - time.time_ns()) / 1e9
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.create_task(one(message, due_ns))
    await settle(tracker)
    return latencies


async def closed_loop(pipeline: Pipeline, tracker: Tracker, messages: Sequence[Message]) -> None:
    """Publishes everything as fast as it is accepted, and waits for the last receipt."""
    await fill(pipeline, tracker, messages)
    await settle(tracker)


async def fill(pipeline: Pipeline, tracker: Tracker, messages: Sequence[Message]) -> None:
    """Publishes everything as fast as it is accepted, whatever becomes of it."""
    lanes: dict[str, list[Message]] = {}
    for message in messages:
        lanes.setdefault(message.consultation, []).append(message)
    queue = iter(lanes.values())

    async def worker() -> None:
        for lane in queue:
            for message in lane:
                accepted = await pipeline.gateway(message).publish(
                    message.data, message.site, message.consultation, message.message_id
                )
                pipeline.note(tracker, message, accepted, accepted.sent_ns)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(IN_FLIGHT):
            tasks.create_task(worker())


async def settle(tracker: Tracker) -> None:
    """Waits until receipts cover everything accepted.

    Raises:
        RuntimeError: none came for `SETTLE_S_MAX`.
    """
    if not await tracker.settled(lambda _: None, silent_s_max=SETTLE_S_MAX):
        raise RuntimeError(f"no receipt for {SETTLE_S_MAX:.0f} s: see the stages' logs")
