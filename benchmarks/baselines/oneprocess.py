"""One process: the gateway's side puts events into an asyncio queue, a task stores them. No network, no second copy."""

from __future__ import annotations

import asyncio
import time

from benchmarks.baselines.arrivals import Arrivals
from benchmarks.baselines.work import everything
from benchmarks.load import Message
from benchmarks.storage.classic import ClassicFile


async def store_from(queue: asyncio.Queue[Message], file: ClassicFile, arrivals: Arrivals) -> None:
    """Stores what is put into `queue` until cancelled."""
    number = 0
    while True:
        message = await queue.get()
        number += 1
        row = everything(message.data, message.site, message.consultation, number, time.time_ns())
        file.append(row, sync=False)
        arrivals.note([row.event_id])
        # The queue is never empty at full speed, so that nobody else would get a turn.
        await asyncio.sleep(0)
