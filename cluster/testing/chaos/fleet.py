"""Edge gateways that never stop: each publishes its consultations, keeps what is not acknowledged, and may be killed.

What publishes is a process (`edge`). What was made and what was acknowledged is kept here, for its successor and for
the checker. Of one consultation at most one message is under way; a successor begins with what was not acknowledged, in
the same order, for what a dead one had sent may still arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import msgspec
from msgspec.structs import replace

from cluster.process import ManagedProcess
from cluster.testing.chaos import edge
from cluster.testing.chaos.edge import Order, Told
from cluster.testing.checker import Attempt, defined_hash
from cluster.workload import consultations
from contracts.subjects import PartitionBy, partition_of
from stages.runtime.tasks import side_by_side

WAITING_MAX: Final = 2000
"""Events that a gateway holds unacknowledged before it stops making new ones."""
REPEATED: Final = 300
"""How many of its last acknowledged events a gateway publishes again when it repeats."""
BAD_SHARE: Final = 0.005
ALIVE_S_MAX: Final = 60.0


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
            dataclasses.replace(attempt, acknowledged=event_id in self.acknowledged)
            for event_id, attempt in self.attempts.items()
        ]


class _EdgeProcess(ManagedProcess):
    """The process that publishes for a gateway now. It serves from its start: what it is told waits until it connects.

    Attributes:
        reader, writer: what it tells, and what it is told.
    """

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def __init__(self, name: str, log: Path, urls: Sequence[str]) -> None:
        super().__init__(name, log)
        self._urls = urls

    def command(self) -> list[str]:
        """See `cluster.testing.chaos.edge`."""
        (descriptor,) = self._inherited_fds
        return [sys.executable, "-P", "-m", edge.__name__, str(descriptor), self.name, *self._urls]

    async def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        self._inherited_fds = (theirs.fileno(),)
        with theirs:
            self.reader, self.writer = await asyncio.open_connection(sock=ours)
            try:
                await super()._spawn()
            except BaseException:
                self.writer.close()
                raise

    async def lines(self) -> AsyncIterator[bytes]:
        """What it tells, until it ends. What it was about to tell when it was killed may be lost."""
        # It is a reset where the process had not read all it was told.
        with contextlib.suppress(ConnectionError):
            while (line := await self.reader.readline()).endswith(b"\n"):
                yield line

    async def _wait_serving(self) -> None:
        return


class EdgeGateway:
    """One gateway, over all its lives: its events, its notes of what is not acknowledged, and a process that publishes.

    Args:
        name: of its connections.
        log: what its processes say is appended to this file.
        urls: servers.
        seed: of its events.
        rate_per_s: events it makes.
        partitions, by: of the cluster.
        book: shared by all.
    """

    def __init__(
        self,
        name: str,
        log: Path,
        urls: Sequence[str],
        seed: int,
        rate_per_s: float,
        partitions: int,
        by: PartitionBy,
        book: Book,
    ) -> None:
        self._rate_per_s = rate_per_s
        self._partitions = partitions
        self._by: PartitionBy = by
        self._book = book
        self._events = _events(seed)
        self._places: dict[str, int] = {}
        self._waiting: dict[str, Order] = {}
        """What is not acknowledged, by id, in the order in which it was made."""
        self._last: deque[Order] = deque(maxlen=REPEATED)
        self._making = True
        self._made = False
        self._process = _EdgeProcess(name, log, urls)
        self._alive = asyncio.Event()
        self._killed = False

    @property
    def pid(self) -> int | None:
        """Of the process that publishes now."""
        return self._process.pid

    async def run(self) -> None:
        """Publishes until `finish`; returns when everything is acknowledged.

        Raises:
            ProcessError: its process ended and nobody had killed it.
        """
        await side_by_side(self._make(), self._lives())

    async def kill(self) -> None:
        """SIGKILL: outcomes of what is under way stay unknown; the next life begins with what is not acknowledged.

        Raises:
            TimeoutError: it does not live, for `ALIVE_S_MAX`; `run` tells why.
        """
        await self._until_alive()
        self._killed = True
        self._alive.clear()
        await self._process.kill()

    async def repeat(self) -> None:
        """It publishes its last events once more, as one does that has lost its notes. Raises as `kill`."""
        await self._until_alive()
        for order in self._last:
            self._tell(replace(order, again=True))

    async def _until_alive(self) -> None:
        async with asyncio.timeout(ALIVE_S_MAX):
            await self._alive.wait()

    def finish(self) -> None:
        """It makes no more events."""
        self._making = False

    async def _lives(self) -> None:
        while not await self._live():
            continue

    async def _live(self) -> bool:
        """One process, until it has published everything (True) or is killed (False)."""
        self._killed = False
        await self._process.start()
        try:
            for order in self._waiting.values():
                self._tell(order)
            if self._made:
                self._process.writer.write_eof()
            self._alive.set()
            async for line in self._process.lines():
                self._note_accepted(msgspec.json.decode(line, type=Told))
            code = await self._process.wait()
        finally:
            self._alive.clear()
            self._process.writer.close()
            await self._process.kill()
        if code and not self._killed:
            raise self._process.died(code)
        return code == 0

    def _tell(self, order: Order) -> None:
        self._process.writer.write(msgspec.json.encode(order) + b"\n")

    async def _make(self) -> None:
        due_s = time.monotonic()
        while self._making:
            due_s = max(due_s + 1 / self._rate_per_s, time.monotonic() - 1)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            if len(self._waiting) >= WAITING_MAX:
                continue
            order, bad = next(self._events)
            self._note_made(order, bad)
            if self._alive.is_set():
                self._tell(order)
        self._made = True
        if self._alive.is_set():
            self._process.writer.write_eof()

    def _note_made(self, order: Order, bad: bool) -> None:
        key = UUID(order.event_id).bytes
        self._waiting[order.event_id] = order
        if bad:
            self._book.bad.add(key)
        place = self._places.get(order.consultation, 0)
        self._places[order.consultation] = place + 1
        payload = bytes(msgspec.json.decode(order.data, type=dict[str, msgspec.Raw])["payload"])
        self._book.attempts[key] = Attempt(key, UUID(order.consultation).bytes, place, defined_hash(payload))

    def _note_accepted(self, told: Told) -> None:
        book = self._book
        book.events_of[told.origin] = len(told.event_ids)
        book.acknowledged.update(UUID(event_id).bytes for event_id in told.event_ids)
        book.repeats += told.again
        for event_id in told.event_ids:
            if (order := self._waiting.pop(event_id, None)) is not None:
                self._last.append(order)
        partition = partition_of(told.site, told.consultation, self._partitions, self._by)
        if told.origin > book.newest.get(partition, (0, 0.0))[0]:
            book.newest[partition] = (told.origin, time.monotonic())


def _events(seed: int) -> Iterator[tuple[Order, bool]]:
    """Valid events, and among them a few that have to be refused (True)."""
    rng = random.Random(seed)
    for event in consultations(seed, 1 << 40):
        bad = rng.random() < BAD_SHARE
        if bad:
            _spoil(rng, event)
        site: str = event["metadata"]["site_id"]
        yield Order(event["event_id"], site, event["consultation_id"], msgspec.json.encode(event)), bad


def _spoil(rng: random.Random, event: dict[str, Any]) -> None:
    """Makes an event that ingest or segment refuses; its id stays readable."""
    if rng.random() < 0.5:
        event["event_type"] = "NO_SUCH_TYPE"
    else:
        event["event_type"], event["payload"] = "MESSAGE_RECEIVED", {"message_content": 7, "message_role": "nobody"}
