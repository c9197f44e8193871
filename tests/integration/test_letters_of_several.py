"""A dead letter of several events of one message, on real streams."""

from __future__ import annotations

import pytest
from nats.aio.client import Client
from test_graveyard import everything, ready

from cluster.dlq import DeadLetters
from contracts.errors import InvalidEventError
from stages.runtime.graveyard import Graveyard
from stages.runtime.work import DeadLetter

pytestmark = pytest.mark.cluster


async def test_a_letter_of_several_events_stands_for_those_only(client: Client) -> None:
    """Judged again by other rules, neighbours that passed may be refused with them."""
    api = await ready(client)
    dead = DeadLetters(api, "c")
    lines = [b'{"n":%d}' % n for n in range(9)]
    origin = (await client.jetstream(timeout=30).publish("fi.events.clinic-1.c", b"\n\n".join(lines))).seq

    def several(index: int, count: int) -> DeadLetter:
        return DeadLetter(origin, index, InvalidEventError("payload.value", "", "bad"), None, lines=count)

    async def texts() -> list[list[bytes]]:
        return [letter.data.split(b"\n") for letter in await everything(dead) if not letter.handled]

    await Graveyard(api, "segment", 0, "first").bury([several(0, 1), several(1, 4)])
    assert await texts() == [lines[:1], lines[1:5]]
    await Graveyard(api, "segment", 0, "second").bury([several(0, 1), several(1, 4)])
    assert await texts() == [lines[:1], lines[1:5]]
    # The mark that stands for the last one stands for as many.
    assert await dead.remove((await everything(dead))[1:]) == 1
    await Graveyard(api, "segment", 0, "third").bury([several(0, 1), several(1, 3)])
    assert await texts() == [lines[:1]]
    await Graveyard(api, "segment", 0, "fourth").bury([several(0, 1), several(1, 6)])
    assert await texts() == [lines[:1], lines[1:7]]
