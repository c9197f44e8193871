"""A gateway's calls for one consultation: what becomes of the others when one is cancelled, given up or refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from nats.aio.msg import Msg
from turns import turns

from cluster.gateway import Accepted, Gateway, RefusedError
from contracts.errors import ClusterUnavailableError
from contracts.subjects import EVENTS


class SlowClient:
    """A connection to a stream that answers when the test says so. `asked`: the bodies it was asked to store."""

    is_connected = True
    loop = None
    max_payload = 8 * 1024 * 1024

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._answers: list[asyncio.Future[Msg]] = []

    async def request(self, subject: str, body: bytes, **_: Any) -> Msg:
        self.asked.append(body)
        self._answers.append(asyncio.get_running_loop().create_future())
        return await self._answers[-1]

    def note_stream(self, *, answers: bool) -> None:
        """There is no other server."""

    def answer(self, **changes: Any) -> None:
        """To what was asked last."""
        data = json.dumps({"stream": EVENTS, "seq": len(self.asked), **changes}).encode()
        self._answers[-1].set_result(Msg(_client=None, data=data))  # type: ignore[arg-type]


class Lane:
    """Calls for one consultation over a `SlowClient`, by their numbers."""

    def __init__(self) -> None:
        self.client = SlowClient()
        self.gateway = Gateway(self.client)  # type: ignore[arg-type]

    @property
    def asked(self) -> list[int]:
        return [int(body) for body in self.client.asked]

    async def publish(self, *numbers: int) -> list[asyncio.Task[Accepted]]:
        calls = [
            asyncio.create_task(self.gateway.publish(b"%d" % number, "a", "c", f"id-{number}")) for number in numbers
        ]
        await turns()
        return calls

    async def answer(self, **changes: Any) -> None:
        self.client.answer(**changes)
        await turns()

    async def untried(self, call: asyncio.Task[Accepted], because_of: int) -> None:
        with pytest.raises(ClusterUnavailableError, match=f"not tried, because id-{because_of} before it"):
            await call


async def test_a_cancelled_call_takes_those_behind_it_along_and_what_comes_next_is_first() -> None:
    lane = Lane()
    first, second, third = await lane.publish(1, 2, 3)
    first.cancel()
    # Before the cancelled one has ended: behind the others still.
    with pytest.raises(ClusterUnavailableError, match="not tried, because id-1 before it"):
        await lane.gateway.publish(b"1", "a", "c", "id-1")
    await lane.untried(second, 1)
    await lane.untried(third, 1)
    again, second = await lane.publish(1, 2)
    assert lane.asked == [1, 1]
    await lane.answer()
    await lane.answer()
    assert [(await again).origin, (await second).origin] == [2, 3]
    assert lane.asked == [1, 1, 2]
    assert not lane.gateway._lanes


async def test_a_call_that_is_cancelled_while_it_waits_leaves_the_one_under_way_alone() -> None:
    lane = Lane()
    first, second, third = await lane.publish(1, 2, 3)
    second.cancel()
    await lane.untried(third, 2)
    again = await lane.publish(2, 3)
    assert lane.asked == [1]
    for _ in range(3):
        await lane.answer()
    assert [(await call).origin for call in (first, *again)] == [1, 2, 3]
    assert lane.asked == [1, 2, 3]
    assert not lane.gateway._lanes


async def test_a_call_that_is_cancelled_together_with_the_answer_before_it_is_not_passed_over() -> None:
    for cancelled_first in (True, False):
        lane = Lane()
        first, second, third = await lane.publish(1, 2, 3)
        if cancelled_first:
            second.cancel()
            await lane.answer()
        else:
            lane.client.answer()
            # The first call's own turn: its place is the second's now, who has not gone yet.
            await turns(1)
            second.cancel()
        await lane.untried(third, 2)
        assert (await first).origin == 1
        assert lane.asked == [1]
        assert not lane.gateway._lanes


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["first to last", "last to first"])
async def test_all_calls_cancelled_at_once_leave_a_free_lane(order: tuple[int, ...]) -> None:
    lane = Lane()
    calls = await lane.publish(1, 2, 3)
    for call in (calls[place] for place in order):
        call.cancel()
    await asyncio.wait(calls)
    assert all(call.cancelled() for call in calls)
    assert not lane.gateway._lanes
    (again,) = await lane.publish(1)
    await lane.answer()
    assert (await again).origin == 2


async def test_a_refused_message_holds_nobody_up() -> None:
    lane = Lane()
    first, second = await lane.publish(1, 2)
    await lane.answer(error={"code": 400, "err_code": 10054, "description": "message size exceeds maximum allowed"})
    with pytest.raises(RefusedError):
        await first
    await lane.answer()
    assert (await second).origin == 2
