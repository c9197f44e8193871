"""What runs side by side ends together, and what is to end ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from typing import Any

import pytest
from turns import turns

from stages.runtime.tasks import end_tasks, run_blocking, side_by_side


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


@pytest.mark.parametrize("cancelled_times", [1, 3])
async def test_what_a_thread_gives_to_nobody_is_undone(cancelled_times: int) -> None:
    began, go_on, undone = threading.Event(), threading.Event(), []

    def call(what: str) -> str:
        began.set()
        assert go_on.wait(60)
        return what

    task = asyncio.create_task(run_blocking(call, "a lock", undo=undone.append))
    await asyncio.to_thread(began.wait, 60)
    for _ in range(cancelled_times):
        task.cancel()
        await turns()
    assert not task.done()
    assert undone == []
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone == ["a lock"]


async def test_what_a_thread_raises_to_nobody_is_not_reported_and_nothing_is_undone() -> None:
    began, go_on, undone, reported = threading.Event(), threading.Event(), [], []

    def call() -> None:
        began.set()
        assert go_on.wait(60)
        raise OSError("no space left")

    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    task = asyncio.create_task(run_blocking(call, undo=undone.append))
    await asyncio.to_thread(began.wait, 60)
    task.cancel()
    await turns()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    gc.collect()
    assert (undone, reported) == ([], [])


async def test_whoever_ends_tasks_ends_them_all_though_it_is_cancelled_itself() -> None:
    unheard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    ending, may_end = asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            while not may_end.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await may_end.wait()
            raise OSError("on its way out")

    async def owner() -> None:
        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        await end_tasks(task)

    owning = asyncio.create_task(owner())
    await ending.wait()
    try:
        for _ in range(3):
            owning.cancel()
            await asyncio.sleep(0)
            assert not owning.done()
    finally:
        may_end.set()
        await asyncio.wait((owning,))
    assert owning.cancelled()
    del owning
    gc.collect()
    assert unheard == []
