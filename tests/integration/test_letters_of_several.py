"""A dead letter of several events of one message, and several letters at once, on real streams."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from nats.aio.client import Client
from test_graveyard import buried, everything, ready, refused

from cluster.dlq import DeadLetters
from cluster.gateway import RefusedError
from contracts.errors import ClusterUnavailableError, InvalidEventError
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


async def test_a_letter_goes_only_once_its_event_was_published_again(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await ready(client)
    dead = DeadLetters(api, "c")
    names = ["no-uuid", *(str(UUID(int=number, version=4)) for number in range(3))]
    for name in names:
        await client.jetstream(timeout=30).publish(f"fi.events.clinic-1.{name}", b"x")
    await Graveyard(api, "ingest", 0, "first").bury([refused(origin) for origin in range(1, 5)])
    publish = dead._gateway.publish
    failures = {names[1]: RefusedError("too large"), names[2]: ClusterUnavailableError("not heard of")}

    async def some_fail(data: bytes, site: str, consultation: str, *others: Any, **given: Any) -> Any:
        if consultation in failures:
            raise failures[consultation]
        return await publish(data, site, consultation, *others, **given)

    with monkeypatch.context() as patch:
        patch.setattr(dead._gateway, "publish", some_fail)
        with pytest.raises(ClusterUnavailableError, match="not heard of"):
            await dead.replay(await everything(dead))
        assert await buried(dead) == [(1, 0), (2, 0), (3, 0)]
        del failures[names[2]]
        outcomes = await dead.replay([letter for letter in await everything(dead) if not letter.handled])
    assert [(bool(outcome.refusal), outcome.origin) for outcome in outcomes] == [(True, 0), (True, 0), (False, 6)]
    assert await buried(dead) == [(1, 0), (2, 0)]
