"""Latency at fixed rates: one event a message, three servers, R3, sync always. Open loop."""

from __future__ import annotations

from typing import Any

from benchmarks.load import Pipeline, make_messages, open_loop
from cluster.track import percentiles_ms

RATES_PER_S = (200, 500, 2000)
WARM_UP_RATE_PER_S, WARM_UP_S = 500, 8


async def measure_latency(pipeline: Pipeline, seconds: int, repetitions: int) -> list[dict[str, Any]]:
    """Rows of ``{"rate_per_s", "accepted_ms", "durable_ms"}``; rates are interleaved over the repetitions."""
    async with pipeline.tracked() as tracker:
        warm_up = make_messages(1000, WARM_UP_RATE_PER_S * WARM_UP_S, 1)
        await open_loop(pipeline, tracker, warm_up, WARM_UP_RATE_PER_S)
    rows = []
    for repetition in range(repetitions):
        for rate in RATES_PER_S:
            messages = make_messages(1001 + 100 * repetition + RATES_PER_S.index(rate), rate * seconds, 1)
            async with pipeline.tracked() as tracker:
                accepted_ns = await open_loop(pipeline, tracker, messages, rate)
                rows.append(
                    {
                        "rate_per_s": rate,
                        "accepted_ms": percentiles_ms(accepted_ns),
                        "durable_ms": percentiles_ms(tracker.durable_ns()),
                    }
                )
    return rows
