"""``python -m benchmarks``: latency and throughput in one run, as tables and as ``results/latest.json``."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.latency import RATES_PER_S, measure_latency
from benchmarks.load import running_pipeline
from benchmarks.report import RESULTS, environment_of, spread
from benchmarks.throughput import MESSAGES, measure_throughput
from contracts.settings import load_settings

LATENCY_TARGET_MS_P95 = {500: 50.0}
THROUGHPUT_TARGET_PER_S = 5000
PARTITIONS = 4
"""As many lanes as two cores can use; ``FI_PARTITIONS`` chooses others."""


def main(
    seconds: Annotated[int, typer.Option(help="Length of each latency measurement.")] = 6,
    repetitions: Annotated[int, typer.Option(help="Times that all is measured; medians are reported.")] = 3,
    directory: Annotated[Path | None, typer.Option("--dir", help="Where to put cluster and shards.")] = None,
) -> None:
    """Measures the pipeline on this machine."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        result = uvloop.run(_measure(Path(scratch), seconds, repetitions))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "latest.json").write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    _show(result)


async def _measure(scratch: Path, seconds: int, repetitions: int) -> dict[str, Any]:
    settings = load_settings({"FI_PARTITIONS": str(PARTITIONS), **os.environ})
    environment = await asyncio.to_thread(environment_of, scratch)
    environment |= {"partitions": settings.partitions, "hop_storage": settings.hop_storage}
    async with running_pipeline(scratch / "run", settings) as pipeline:
        latency = await measure_latency(pipeline, seconds, repetitions)
        throughput = await measure_throughput(pipeline, repetitions)
    return {
        "environment": environment,
        "headline": {
            "durable_p95_ms": {str(rate): _median(latency, rate, "durable_ms", "p95") for rate in RATES_PER_S},
            "accepted_p95_ms": {str(rate): _median(latency, rate, "accepted_ms", "p95") for rate in RATES_PER_S},
            **{f"events_per_s_batch_{batch}": _rate(throughput, batch, "events_per_s") for batch in MESSAGES},
            **{
                f"vs_ceiling_batch_{batch}": round(
                    statistics.median(
                        row["events_per_s"] / row["ceiling_events_per_s"] for row in throughput if row["batch"] == batch
                    ),
                    3,
                )
                for batch in MESSAGES
            },
        },
        "latency": latency,
        "throughput": throughput,
    }


def _median(rows: list[dict[str, Any]], rate: int, kind: str, percentile: str) -> float:
    values: list[float] = [row[kind][percentile] for row in rows if row["rate_per_s"] == rate]
    return round(statistics.median(values), 2)


def _rate(rows: list[dict[str, Any]], batch: int, kind: str) -> int:
    values: list[float] = [row[kind] for row in rows if row["batch"] == batch]
    return round(statistics.median(values))


def _show(result: dict[str, Any]) -> None:
    out = Console(width=max(Console().width, 130))
    latency = Table(title="Latency at a fixed rate, one event a message, ms: median of the repetitions (spread)")
    for column in ("events/s", "accepted p50", "p95", "p99", "durable p50", "p95", "p99", "target p95"):
        latency.add_column(column, justify="right")
    for rate in RATES_PER_S:
        rows = [row for row in result["latency"] if row["rate_per_s"] == rate]
        cells = [
            spread([row[kind][p] for row in rows])
            for kind in ("accepted_ms", "durable_ms")
            for p in ("p50", "p95", "p99")
        ]
        target = LATENCY_TARGET_MS_P95.get(rate)
        latency.add_row(str(rate), *cells, "" if target is None else f"{target:.0f}")
    out.print(latency)
    throughput = Table(title=f"Sustained events/s, send to receipt (target: more than {THROUGHPUT_TARGET_PER_S:,})")
    for column in ("events a message", "events/s", "bare publish, events/s", "ratio"):
        throughput.add_column(column, justify="right")
    for batch in MESSAGES:
        rows = [row for row in result["throughput"] if row["batch"] == batch]
        throughput.add_row(
            str(batch),
            spread([row["events_per_s"] for row in rows], 0),
            spread([row["ceiling_events_per_s"] for row in rows], 0),
            f"{result['headline'][f'vs_ceiling_batch_{batch}']:.2f}",
        )
    out.print(throughput)
    out.print(f"{result['environment']}", markup=False)


if __name__ == "__main__":
    typer.run(main)
