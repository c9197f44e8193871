"""Edge gateways that never stop: each publishes its consultations, keeps what is not acknowledged, and may be killed.

What was sent and what was acknowledged is kept here, for the checker. Of one consultation at most one message is under
way, also across a gateway's death: its successor begins with what was not acknowledged.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final
from uuid import UUID

import msgspec

from cluster.gateway import Accepted, Gateway, batch_id
from cluster.testing.checker import Attempt, defined_hash
from cluster.workload import consultations
from contracts.subjects import PartitionBy, partition_of
from stages.runtime.client import GuardedClient
from stages.runtime.connection import connect
from stages.runtime.tasks import end_tasks

BATCH_MAX: Final = 8
WAITING_MAX: Final = 2000
"""Events that a gateway holds unacknowledged before it stops making new ones."""
REPEATED: Final = 300
"""How many of its last acknowledged events a gateway publishes again when it repeats."""
BAD_SHARE: Final = 0.005
CONNECT_S: Final = 60.0


class Sent(msgspec.Struct, frozen=True):
    """One event as a gateway has it. `bad`: the pipeline must refuse it."""

    event_id: str
    site: str
    consultation: str
    data: bytes
    bad: bool


@dataclass
class Book:
    """What all gateways sent, and what was acknowledged of it.

    Attributes:
        attempts: event id → what the checker is told of it, but for `acknowledged`.
        acknowledged: ids.
        bad: ids of the events that must be dead-lettered.
        events_of: origin → events in that message.
        newest: partition → (origin, monotonic time of the acknowledgement) of the newest message.
        repeats: events published again on purpose.
    """

    attempts: dict[bytes, Attempt] = field(default_factory=dict)
    acknowledged: set[bytes] = field(default_factory=set)
    bad: set[bytes] = field(default_factory=set)
    events_of: dict[int, int] = field(default_factory=dict)
    newest: dict[int, tuple[int, float]] = field(default_factory=dict)
    repeats: int = 0

    def judged(self) -> list[Attempt]:
        """For `cluster.testing.checker.check`."""
        return [
            replace(attempt, acknowledged=event_id in self.acknowledged) for event_id, attempt in self.attempts.items()
        ]


class EdgeGateway:
    """One gateway, over all its lives.

    Args:
        name: of its connections.
        urls: servers.
        seed: of its events.
        rate_per_s: events it makes.
        partitions, by: of the cluster.
        book: shared by all.
    """

    def __init__(
        self,
        name: str,
        urls: Sequence[str],
        seed: int,
        rate_per_s: float,
        partitions: int,
        by: PartitionBy,
        book: Book,
    ) -> None:
        self.name = name
        self._urls = urls
        self._rate_per_s = rate_per_s
        self._partitions = partitions
        self._by: PartitionBy = by
        self._book = book
        self._events = _events(seed)
        self._lanes: dict[str, deque[Sent]] = {}
        self._places: dict[str, int] = {}
        self._waiting = 0
        self._last: deque[Sent] = deque(maxlen=REPEATED)
        self._making = True
        self._killed = asyncio.Event()
        self._repeat = asyncio.Event()
        self._life: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Publishes until `finish`; returns when everything is acknowledged."""
        while True:
            self._killed.clear()
            self._life = asyncio.create_task(self._live(), name=self.name)
            killed = asyncio.create_task(self._killed.wait())
            try:
                await asyncio.wait((self._life, killed), return_when=asyncio.FIRST_COMPLETED)
                if self._life.done():
                    return self._life.result()
            finally:
                await end_tasks(self._life, killed)

    def kill(self) -> None:
        """Everything under way is forgotten, outcomes unknown; the next life begins with what is not acknowledged.

        Servers see what they see of a process that is killed: perhaps the beginning of a message, and the end.
        """
        self._killed.set()

    def repeat(self) -> None:
        """It publishes its last events once more, as one does that has lost its notes."""
        self._repeat.set()

    def finish(self) -> None:
        """It makes no more events."""
        self._making = False

    async def _live(self) -> None:
        client = await connect(self._urls, self.name, wait_s=CONNECT_S)
        gateway = Gateway(client, in_flight=64)
        try:
            async with asyncio.TaskGroup() as tasks:
                for consultation in self._lanes:
                    tasks.create_task(self._drain(gateway, consultation))
                await self._make(gateway, tasks)
        finally:
            if self._killed.is_set():
                _cut_off(client)
            await _close(client)

    async def _make(self, gateway: Gateway, tasks: asyncio.TaskGroup) -> None:
        due_s = time.monotonic()
        while self._making:
            due_s = max(due_s + 1 / self._rate_per_s, time.monotonic() - 1)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            if self._repeat.is_set():
                self._repeat.clear()
                tasks.create_task(self._publish_again(gateway, list(self._last)))
            if self._waiting >= WAITING_MAX:
                continue
            sent = next(self._events)
            self._note(sent)
            lane = self._lanes.get(sent.consultation)
            if lane is None:
                lane = self._lanes[sent.consultation] = deque()
                tasks.create_task(self._drain(gateway, sent.consultation))
            lane.append(sent)

    def _note(self, sent: Sent) -> None:
        key = UUID(sent.event_id).bytes
        self._waiting += 1
        if sent.bad:
            self._book.bad.add(key)
        place = self._places.get(sent.consultation, 0)
        self._places[sent.consultation] = place + 1
        payload = bytes(msgspec.json.decode(sent.data, type=dict[str, msgspec.Raw])["payload"])
        self._book.attempts[key] = Attempt(key, UUID(sent.consultation).bytes, place, defined_hash(payload))

    async def _drain(self, gateway: Gateway, consultation: str) -> None:
        """Publishes what waits of a consultation, a few events a message, until nothing does."""
        lane = self._lanes[consultation]
        while lane:
            group = [lane[i] for i in range(min(BATCH_MAX, len(lane)))]
            await self._publish(gateway, group)
            for sent in group:
                lane.popleft()
                self._waiting -= 1
                self._last.append(sent)
        del self._lanes[consultation]

    async def _publish_again(self, gateway: Gateway, events: Sequence[Sent]) -> None:
        for sent in events:
            await self._publish(gateway, [sent])
            self._book.repeats += 1

    async def _publish(self, gateway: Gateway, group: Sequence[Sent]) -> None:
        body = b"\n".join(sent.data for sent in group)
        first = group[0]
        accepted: Accepted = await gateway.publish(
            body, first.site, first.consultation, batch_id([sent.event_id for sent in group])
        )
        book = self._book
        book.events_of[accepted.origin] = len(group)
        book.acknowledged.update(UUID(sent.event_id).bytes for sent in group)
        partition = partition_of(first.site, first.consultation, self._partitions, self._by)
        if accepted.origin > book.newest.get(partition, (0, 0.0))[0]:
            book.newest[partition] = (accepted.origin, time.monotonic())


def _cut_off(client: GuardedClient) -> None:
    """Closes the socket; what the kernel was not handed yet is never sent."""
    client._pending = []
    client._pending_data_size = 0
    writer = getattr(client._transport, "_io_writer", None)
    if writer is not None:
        writer.transport.abort()


async def _close(client: GuardedClient) -> None:
    try:
        async with asyncio.timeout(CONNECT_S):
            await client.close()
    except TimeoutError:
        return


def _events(seed: int) -> Iterator[Sent]:
    """Valid events, and among them a few that have to be refused."""
    rng = random.Random(seed)
    for event in consultations(seed, 1 << 40):
        bad = rng.random() < BAD_SHARE
        if bad:
            _spoil(rng, event)
        site: str = event["metadata"]["site_id"]
        yield Sent(event["event_id"], site, event["consultation_id"], msgspec.json.encode(event), bad)


def _spoil(rng: random.Random, event: dict[str, Any]) -> None:
    """Makes an event that ingest or segment refuses; its id stays readable."""
    if rng.random() < 0.5:
        event["event_type"] = "NO_SUCH_TYPE"
    else:
        event["event_type"], event["payload"] = "MESSAGE_RECEIVED", {"message_content": 7, "message_role": "nobody"}
