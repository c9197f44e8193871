"""Requests under one timer: each fails in its own time, and none that was answered."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.msg import Msg
from nats.errors import TimeoutError as NatsTimeoutError

from cluster.testing.sim.loop import VirtualLoop
from stages.runtime.answers import Answers

STEP_S = 0.004
LONG_S = 3600.0


def message() -> Msg:
    return Msg(_client=None)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.sets(st.integers(0, 19)))
def test_each_fails_in_its_own_time_whatever_order_they_were_asked_in(steps: list[int], answered: set[int]) -> None:
    failed_at: dict[int, float] = {}

    async def run() -> None:
        answers, loop = Answers(), asyncio.get_running_loop()
        began = loop.time()

        async def one(number: int, timeout: float) -> None:
            future = answers.expect(str(number), timeout)
            if number in answered:
                future.set_result(message())
            try:
                await future
            except NatsTimeoutError:
                failed_at[number] = loop.time() - began
            finally:
                answers.forget(str(number))

        async with asyncio.TaskGroup() as tasks:
            for number, step in enumerate(steps):
                tasks.create_task(one(number, step * STEP_S))
        assert len(answers) == 0

    with contextlib.closing(VirtualLoop(lambda: 0.0)) as loop:
        loop.run_until_complete(run())
    due = {number: step * STEP_S for number, step in enumerate(steps) if number not in answered}
    assert failed_at == pytest.approx(due, abs=0.001)


async def test_a_thousand_requests_have_one_timer() -> None:
    answers = Answers()
    first = answers.expect("0", LONG_S)
    timer = answers._timer
    assert timer is not None
    for number in range(1, 1000):
        answers.expect(str(number), LONG_S)
    assert answers._timer is timer
    answers.expect("sooner", LONG_S / 2)
    assert timer.cancelled()
    assert not first.done()


async def test_what_comes_too_late_or_was_never_asked_for_is_given_to_nobody() -> None:
    answers = Answers()
    future = answers.expect("1", 0.0)
    assert answers.awaited("1") is future
    with pytest.raises(NatsTimeoutError):
        await future
    assert answers.awaited("1") is None
    answers.forget("1")
    assert answers.awaited("1") is None


async def test_the_next_request_after_all_were_answered_fails_in_time_too() -> None:
    answers = Answers()
    answers.expect("1", LONG_S).set_result(message())
    answers.forget("1")
    late = answers.expect("2", STEP_S)
    async with asyncio.timeout(30):
        with pytest.raises(NatsTimeoutError):
            await late


def test_the_time_of_what_is_still_on_its_way_begins_anew() -> None:
    async def run() -> list[float]:
        answers, loop = Answers(), asyncio.get_running_loop()
        began = loop.time()
        ends: list[float] = []

        async def one(end: int) -> None:
            with contextlib.suppress(NatsTimeoutError):
                await answers.expect(str(end), 2.0, end=end)
            ends.append(loop.time() - began)

        async with asyncio.TaskGroup() as tasks:
            for end in (10, 20, 30):
                tasks.create_task(one(end))
            await asyncio.sleep(1.0)
            answers.place("30", 40)
            answers.put_off(10)
            await asyncio.sleep(1.5)
            answers.put_off(30)
        return ends

    with contextlib.closing(VirtualLoop(lambda: 0.0)) as loop:
        assert loop.run_until_complete(run()) == pytest.approx([2.0, 3.0, 4.5], abs=0.01)
