"""What runs side by side ends together."""

from __future__ import annotations

import asyncio

import pytest
from turns import turns

from stages.runtime.tasks import side_by_side


async def test_what_jobs_give_comes_in_their_order() -> None:
    first_goes_on = asyncio.Event()

    async def first() -> int:
        await first_goes_on.wait()
        return 1

    async def second() -> int:
        first_goes_on.set()
        return 2

    assert await side_by_side(first(), second()) == [1, 2]


async def test_when_one_fails_the_others_have_ended_before_it_is_told() -> None:
    ended = []

    async def fails() -> None:
        raise ValueError("the first")

    async def goes_on() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            # An end that takes its time is waited for as well.
            await turns()
            ended.append(True)

    with pytest.raises(ValueError, match="the first"):
        await side_by_side(goes_on(), fails(), goes_on())
    assert ended == [True, True]


async def test_a_cancellation_reaches_every_job() -> None:
    began, cancelled = asyncio.Event(), []

    async def goes_on() -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    task = asyncio.create_task(side_by_side(goes_on(), goes_on()))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled == [True, True]
