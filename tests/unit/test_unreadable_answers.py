"""What nobody can read answers nothing where a look may go without: it must not end who looks again and again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest

from contracts.settings import Settings
from stages.persist.room import EventsRoom
from stages.runtime.access import Servers
from stages.runtime.messages import StoredMessage
from stages.runtime.meters import Meters
from stages.runtime.reader import OrderedReader
from stages.runtime.telemetry import OFF
from stages.runtime.watch import Watch


class Answer(NamedTuple):
    data: bytes


class Garbled:
    """An API, and its client, whose every answer is nested deeper than anybody reads."""

    settings = Settings()
    telemetry = OFF
    is_connected = True

    def __init__(self) -> None:
        self.client = self

    def gate(self, stream: str) -> None:
        return None

    async def request(self, subject: str, body: bytes, timeout: float) -> Answer:
        return Answer(b'{"deeper": ' + b"[" * 1_000_000)


async def look_at_room(api: Any) -> None:
    room = EventsRoom(api)
    await room.look()
    assert (room.short, room.spare) == (False, True)


async def count_pending(api: Any) -> None:
    async def locate() -> int:
        return 1

    reader = OrderedReader(api, "FI_HASH", "fi.hash.0", batch=1, locate=locate, nonce="n")
    reader._consumer = "consumer"
    reader.put_back([StoredMessage("fi.hash.0", 1, 0, b"", {})])
    await reader.count_pending()
    assert reader.pending == 0


async def look_for_health(api: Any) -> None:
    meters = Meters()
    watch = Watch("hash", "hash-0", Settings(), {})
    watch.connected(api, api, Servers(()))
    await watch._look(meters)
    assert all(problem.startswith("no answer") for problem in watch._streams.values())


@pytest.mark.parametrize("look", [look_at_room, count_pending, look_for_health])
async def test_a_look_at_what_nobody_can_read_is_one_in_vain(look: Callable[[Any], Awaitable[None]]) -> None:
    await look(Garbled())
