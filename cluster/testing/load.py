"""Events to publish, and the memory of what became of each: what the checker judges by.

Always true: events go through the same `Gateway` and `LinePublisher` that an edge gateway of ours uses; what counts as
acknowledged is what they were told, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence, Set
from itertools import islice
from typing import Any, Final
from uuid import UUID

import msgspec

from cluster.feed import Line
from cluster.gateway import Accepted, Gateway
from cluster.publish import LinePublisher, PublishReport
from cluster.testing.checker import Attempt, defined_hash
from cluster.testing.waiting import SETTLED_LIMIT_S
from cluster.workload import consultations
from contracts.wire import UNREADABLE
from stages.runtime.client import GuardedClient

_IDS: Final = ("event_id", "consultation_id")
LINES_AFTER: Final = 100
"""What still comes once a block under load is over, so that what it did last meets events too."""


def workload(seed: int, events: int, padding_bytes: int = 0) -> list[bytes]:
    """Lines of believable consultations, the same for the same arguments.

    Args:
        seed: decides everything.
        events: how many.
        padding_bytes: added to each payload, as text that does not compress away.
    """
    rng = random.Random(seed)
    lines = []
    for event in consultations(seed, events):
        if padding_bytes:
            event["payload"]["attachment"] = rng.randbytes(padding_bytes // 2).hex()
        lines.append(msgspec.json.encode(event))
    return lines


class Load:
    """Events being published, and what was acknowledged of them.

    Attributes:
        lines: one event each, as JSON.
        gateway: what publishes them; None before `publish`.
    """

    def __init__(self, lines: Sequence[bytes]) -> None:
        """
        Args:
            lines: events with ids of their own; those of a consultation in the order they are to keep.

        Raises:
            ValueError: a line is no event with its ids, or its id is that of an earlier one; names the line.
        """
        self.lines = list(lines)
        self.gateway: Gateway | None = None
        self._sent: dict[bytes, tuple[bytes, int, bytes]] = {}
        self._acknowledged: set[bytes] = set()
        self._news = asyncio.Event()
        self._begun = 0
        places: Counter[bytes] = Counter()
        for number, line in enumerate(self.lines, 1):
            try:
                event = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
                event_id, consultation = (UUID(msgspec.json.decode(event[key])).bytes for key in _IDS)
                digest = defined_hash(bytes(event["payload"]))
            except (*UNREADABLE, KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"line {number} of the load: no event with its ids and payload ({error!r})") from error
            if event_id in self._sent:
                raise ValueError(f"line {number} of the load: event {UUID(bytes=event_id)} is there already")
            self._sent[event_id] = (consultation, places[consultation], digest)
            places[consultation] += 1

    @property
    def accepted(self) -> int:
        """How many events were acknowledged so far."""
        return len(self._acknowledged)

    @property
    def acknowledged(self) -> Set[bytes]:
        """Ids (16 bytes) of the events that were."""
        return self._acknowledged

    @property
    def attempts(self) -> list[Attempt]:
        """For the checker: the lines that `publish` began, or all if it began none."""
        begun = islice(self._sent.items(), self._begun or None)
        return [Attempt(key, *sent, acknowledged=key in self._acknowledged) for key, sent in begun]

    def acknowledge(self, event_ids: Iterable[bytes]) -> None:
        """Notes events (ids of 16 bytes) as accepted: for a gateway of your own that publishes `lines` itself.

        Raises:
            ValueError: an id that is none of `lines`. The checker would not ask for what was acknowledged so.
        """
        for event_id in event_ids:
            if event_id not in self._sent:
                raise ValueError(f"acknowledged {event_id!r}: no event of this load; an id is UUID(text).bytes")
            self._acknowledged.add(event_id)
        self._news.set()

    async def reached(self, accepted: int) -> None:
        """Returns when so many events were acknowledged.

        Raises:
            ValueError: the load has fewer.
            AssertionError: it did not come to that within `SETTLED_LIMIT_S`.
        """
        if accepted > len(self.lines):
            raise ValueError(f"{accepted} events can never be acknowledged: the load has {len(self.lines)}")
        try:
            async with asyncio.timeout(SETTLED_LIMIT_S):
                while self.accepted < accepted:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(
                f"not within {SETTLED_LIMIT_S:.0f} s: {accepted} events acknowledged; {self.accepted} are"
            ) from None

    async def publish(
        self,
        client: GuardedClient,
        *,
        rate_per_s: float | None = None,
        batch: int = 4,
        enough: asyncio.Event | None = None,
    ) -> PublishReport:
        """Publishes the lines, as our gateway does: all, or `LINES_AFTER` more at most once `enough` is set.

        See `LinePublisher` for the other arguments and errors.
        """

        def note(_: Accepted, lines: Sequence[Line]) -> None:
            self.acknowledge(UUID(line.event_id).bytes for line in lines)

        self.gateway = Gateway(client, in_flight=64)
        publisher = LinePublisher(self.gateway, rate_per_s=rate_per_s, batch=batch, on_accepted=note)
        return await publisher.run(self._until(enough or asyncio.Event()))

    async def _until(self, enough: asyncio.Event) -> AsyncIterator[bytes]:
        left = LINES_AFTER
        for number, line in enumerate(self.lines, 1):
            if enough.is_set():
                if not left:
                    return
                left -= 1
            self._begun = max(self._begun, number)
            yield line


@contextlib.asynccontextmanager
async def under_load(
    load: Load, client: GuardedClient, rate_per_s: float | None = None
) -> AsyncIterator[asyncio.Task[Any]]:
    """Publishes `load` beside the block, and ends `LINES_AFTER` lines after it; cancelled when the block failed.

    For a block that may take long, give it more lines than can be needed: those not begun are not published, and the
    checker does not ask for them. The task that publishes is for blocks that wait for all of them.
    """
    enough = asyncio.Event()
    task = asyncio.create_task(load.publish(client, rate_per_s=rate_per_s, enough=enough))
    try:
        yield task
        enough.set()
        async with asyncio.timeout(SETTLED_LIMIT_S):
            await task
    finally:
        task.cancel()
        await asyncio.wait((task,))
