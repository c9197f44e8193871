"""A backlog that waits for a paused persist, and how fast it drains.

What is measured: events are published while persist is paused (``fictl pause persist``), until all of them wait in
front of it, worked on by the other stages. The clock runs from the command to resume until the observer has the last
receipt. No process starts meanwhile; `benchmarks.backlog` measures that too.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.judging import judge
from benchmarks.load import Pipeline, fill, make_messages, settle
from cluster.members import look_until, pause, resume
from contracts.frames import decode_frame_head
from contracts.membership import Pause
from contracts.subjects import PERSIST, Stage, input_filter
from stages.persist.names import SHARDS
from stages.runtime.api import Api

EVENTS, BATCH = 100_000, 16
PAUSED: Stage = "persist"
PAUSE_S = 20.0
GATHER_S = 60.0
_POLL_S = 0.1


async def measure_drain(pipeline: Pipeline, seed: int, events: int = EVENTS) -> dict[str, Any]:
    """One backlog: ``{"events", "batch", "gathered_per_s", "drained_s", "drained_per_s", "checked"}``.

    Raises:
        RuntimeError: persist did not pause, or events were harmed.
    """
    messages = make_messages(seed, events // BATCH, BATCH)
    api = Api(pipeline.observer, pipeline.supervisor.settings)
    await pause(api, PAUSED, Pause(since_ns=time.time_ns(), by="benchmarks.drain"))
    seen = await look_until(api, lambda seen: PAUSED in seen.paused and PAUSED not in seen.moving, PAUSE_S)
    if PAUSED in seen.moving:
        raise RuntimeError(f"{PAUSED} is not paused after {PAUSE_S:.0f} s")
    async with pipeline.tracked() as tracker:
        begun_s = time.monotonic()
        await fill(pipeline, tracker, messages)
        async with asyncio.timeout(GATHER_S):
            await _until_framed(pipeline, api, tracker.goals())
        gathered_s = time.monotonic() - begun_s
        if tracker.totals().settled:
            raise RuntimeError("events were committed while persist was paused")
        begun_s = time.monotonic()
        await resume(api, PAUSED)
        await settle(tracker)
        drained_s = time.monotonic() - begun_s
    checked = await asyncio.to_thread(judge, messages, pipeline.supervisor.directory / SHARDS)
    count = len(messages) * BATCH
    return {
        "events": count,
        "batch": BATCH,
        "gathered_per_s": round(count / gathered_s, 1),
        "drained_s": round(drained_s, 3),
        "drained_per_s": round(count / drained_s, 1),
        "checked": checked,
    }


async def _until_framed(pipeline: Pipeline, api: Api, goals: list[int]) -> None:
    """Waits until persist's input covers the last accepted origin of every partition."""
    for partition in range(pipeline.facts.partitions):
        while True:
            message = await api.last_message(PERSIST, input_filter(PAUSED, partition))
            if message is not None and decode_frame_head(message.data).last >= goals[partition]:
                break
            await asyncio.sleep(_POLL_S)
