"""Lanes in a test's own process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from stages.runtime.base import LaneBase
from stages.runtime.tasks import end_tasks


@asynccontextmanager
async def going(*lanes: LaneBase) -> AsyncIterator[list[asyncio.Task[None]]]:
    """The lanes, working until the block ends; then told to stop, and awaited. Gives their tasks."""
    tasks = [asyncio.create_task(lane.run()) for lane in lanes]
    try:
        yield tasks
        for lane in lanes:
            lane.stop()
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks)
    finally:
        await end_tasks(*tasks)
