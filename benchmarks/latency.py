"""Latency at fixed rates: one event a message, three servers, R3, sync always. Open loop."""

from __future__ import annotations

from typing import Any

from benchmarks.costs import costs, snapshot
from benchmarks.load import Pipeline, make_messages, open_loop
from cluster.track import percentiles_ms

RATES_PER_S = (200, 500, 2000)
WARM_UP_RATE_PER_S = 500


async def warm_up(pipeline: Pipeline, seed: int, seconds: float) -> None:
    """Some load that nothing is measured of."""
    async with pipeline.tracked() as tracker:
        messages = make_messages(seed, int(WARM_UP_RATE_PER_S * seconds), 1)
        await open_loop(pipeline, tracker, messages, WARM_UP_RATE_PER_S)


async def measure_latency(pipeline: Pipeline, seed: int, seconds: float) -> list[dict[str, Any]]:
    """Each rate once: rows of ``{"rate_per_s", "accepted_ms", "durable_ms", "costs"}``."""
    rows = []
    for number, rate in enumerate(RATES_PER_S):
        messages = make_messages(seed + number, int(rate * seconds), 1)
        before = await snapshot(pipeline)
        async with pipeline.tracked() as tracker:
            accepted_ns = await open_loop(pipeline, tracker, messages, rate)
        rows.append(
            {
                "rate_per_s": rate,
                "accepted_ms": percentiles_ms(accepted_ns),
                "durable_ms": percentiles_ms(tracker.durable_ns()),
                "costs": costs(before, await snapshot(pipeline), len(messages)),
            }
        )
    return rows
