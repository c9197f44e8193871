"""Sustained throughput, end to end, beside the ceiling: nothing but publishing the same messages to one R3 stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.ceiling import LIBRARY, measure_ceiling, measure_library
from benchmarks.costs import costs, snapshot
from benchmarks.load import Pipeline, closed_loop, make_messages

MESSAGES = {1: 30_000, 16: 8_000}
"""Events a message → messages published in one turn: three seconds, so that the way of the last ones hardly counts."""


async def measure_throughput(
    pipeline: Pipeline, seed: int, *, ceiling_first: bool, counts: Mapping[int, int] = MESSAGES
) -> list[dict[str, Any]]:
    """Each size once, beside its ceiling: ``{"batch", "events_per_s", "ceiling_events_per_s", "costs"}``.

    One event a message has ``"library_events_per_s"`` besides: what nats-py's own ways to publish have accepted, each.

    Args:
        ceiling_first: whose turn it is to come first, so that what the machine does meanwhile falls on both alike.
        counts: events a message → messages.

    Raises:
        RuntimeError: events did not come out.
    """
    rows = []
    for batch, count in counts.items():
        messages = make_messages(seed + batch, count, batch)
        ceiling = await measure_ceiling(pipeline, messages) if ceiling_first else 0.0
        before = await snapshot(pipeline)
        async with pipeline.tracked() as tracker:
            await closed_loop(pipeline, tracker, messages)
        settled = tracker.totals().settled
        if settled != count * batch:
            raise RuntimeError(f"{settled} of {count * batch} events came out")
        shared = costs(before, await snapshot(pipeline), settled)
        if not ceiling_first:
            ceiling = await measure_ceiling(pipeline, messages)
        row = {
            "batch": batch,
            "events_per_s": round(settled / tracker.span_s()),
            "ceiling_events_per_s": round(ceiling),
            "costs": shared,
        }
        if batch == 1:
            row["library_events_per_s"] = {
                way: round(await measure_library(way, pipeline, messages)) for way in LIBRARY
            }
        rows.append(row)
    return rows
