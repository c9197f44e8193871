"""Running side by side, ending for certain, and leaving threads their files."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Final, TypeVar

from contracts.budgets import CANCEL_REPEAT

T = TypeVar("T")

REQUESTS_AT_ONCE: Final = 16
"""Under way for one command: as many as hide the network, and few for the servers."""


async def side_by_side(*jobs: Coroutine[Any, Any, T]) -> list[T]:
    """What `jobs` give, in their order, once all have ended; the first failure cancels the others and is raised.

    `asyncio.gather` would leave the others running, owned by nobody.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def some_at_a_time(calls: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
    """As `side_by_side`, with `REQUESTS_AT_ONCE` of them under way."""
    limit = asyncio.Semaphore(REQUESTS_AT_ONCE)

    async def one(call: Callable[[], Awaitable[T]]) -> T:
        async with limit:
            return await call()

    return await side_by_side(*map(one, calls))


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancels `tasks` and returns when all have ended. What they raised is dropped: look at them before.

    Cancels again while a task goes on: `asyncio.wait_for` of Python 3.11, which every nats-py request stands on,
    swallows a cancellation that comes together with the answer. Cancelled itself, it ends them all the same.
    """
    ended = None
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        try:
            await asyncio.wait(pending, timeout=CANCEL_REPEAT.s)
        except asyncio.CancelledError as error:
            ended = error
    for task in tasks:
        if not task.cancelled():
            task.exception()
    if ended is not None:
        raise ended


async def run_blocking(call: Callable[..., T], *arguments: object, undo: Callable[[T], None] | None = None) -> T:
    """Runs `call` in a thread. Cancelled, it still waits for the thread: files must not be closed under it.

    Args:
        call, arguments: what to run.
        undo: lets go of what `call` gave, when a cancellation keeps it from the caller.
    """
    future = asyncio.get_running_loop().run_in_executor(None, lambda: call(*arguments))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((future,))
        if future.exception() is None and undo is not None:
            undo(future.result())
        raise
