"""Ending tasks for certain."""

from __future__ import annotations

import asyncio
from typing import Any, Final

REPEAT_S: Final = 0.5


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancels `tasks` and returns when all have ended. What they raised is dropped: look at them before.

    Cancels again while a task goes on: `asyncio.wait_for` of Python 3.11, which every nats-py request stands on,
    swallows a cancellation that comes together with the answer.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=REPEAT_S)
    await asyncio.gather(*tasks, return_exceptions=True)
