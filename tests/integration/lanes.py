"""Lanes in a test's own process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from stages.persist.disk import LOCAL, Disk
from stages.persist.partition import PartitionFiles
from stages.persist.seal import SealedInfo
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


def sealing_at(moment: threading.Event) -> Disk:
    """Real files, which are sealed no sooner."""

    class SlowDisk(PartitionFiles):
        def seal(self, *arguments: Any) -> SealedInfo:
            assert moment.wait(60)
            return super().seal(*arguments)

    return LOCAL._replace(open=SlowDisk.open)
