"""``python -m benchmarks.telemetry``: what telemetry costs, in one run, as Markdown and as ``results/telemetry.json``.

Three pipelines run side by side and are loaded in turns of a few seconds, so that what else the machine does falls on
all alike: telemetry off; metrics (health port and OTLP); metrics and 1 % of the messages traced. Measured of each: CPU
time of the four stage processes at a fixed rate with one event a message, which is the worst case (telemetry costs by
the frame, and frames are smallest then), and the rate that one event a message sustains. Ratios are taken within a
round. The collector is a sink in this process, whose CPU time is not counted; the servers' is not either.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from benchmarks.costs import read_process
from benchmarks.load import Pipeline, closed_loop, make_messages, open_loop, running_pipeline
from benchmarks.report import RESULTS, markdown_table, write_json
from cluster.track import percentiles_ms
from contracts.settings import load_settings

RATE_PER_S = 150
"""Low enough that nearly every frame holds one event, however busy the machine is."""
WARM_UP_S = 3
MESSAGES = 3_000
PARTITIONS = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "off": {},
    "metrics": {"health_port": 0},
    "metrics and 1 % traces": {"health_port": 0, "trace_share": 0.01},
}


def main(
    seconds: Annotated[int, typer.Option(help="Of each fixed rate; as long as an export's interval.")] = 10,
    rounds: Annotated[int, typer.Option(help="Times that all is measured; medians are reported.")] = 12,
    directory: Annotated[Path | None, typer.Option("--dir", help="Where to put clusters and shards.")] = None,
) -> None:
    """Measures what telemetry costs on this machine."""
    rows = uvloop.run(_measure(directory, seconds, rounds))
    summary = {variant: _summary(rows, variant) for variant in VARIANTS}
    result = {
        "environment": {
            "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "cpus": os.cpu_count(),
            "partitions": PARTITIONS,
            "rate_per_s": RATE_PER_S,
            "seconds": seconds,
        },
        "summary": summary,
        "rows": rows,
    }
    write_json(RESULTS / "telemetry.json", result)
    head = ("telemetry", "stage CPU, ms per 1,000 events", "ratio", "durable p95, ms", "events/s", "ratio")
    lines = [
        [
            variant,
            f"{found['cpu_ms_per_1000']:.0f}",
            f"{found['cpu_ratio']:.3f}",
            f"{found['durable_ms_p95']:.1f}",
            f"{found['events_per_s']:,.0f}",
            f"{found['rate_ratio']:.3f}",
        ]
        for variant, found in summary.items()
    ]
    print(markdown_table(head, lines), end="")


async def _measure(directory: Path | None, seconds: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    async with AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(_sink())
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory)))
        pipelines = []
        for number, (variant, changes) in enumerate(VARIANTS.items()):
            extra = {**changes, "otlp_endpoint": endpoint} if changes else {}
            settings = load_settings({"FI_PARTITIONS": str(PARTITIONS), **os.environ}, extra)
            pipeline = await stack.enter_async_context(running_pipeline(scratch / str(number), settings))
            pipelines.append((variant, pipeline))
            async with pipeline.tracked() as tracker:
                await open_loop(pipeline, tracker, make_messages(6999, RATE_PER_S * WARM_UP_S, 1), RATE_PER_S)
        for number in range(rounds):
            # The order changes, so that no variant always comes after the same one.
            turn = number % len(pipelines)
            for variant, pipeline in pipelines[turn:] + pipelines[:turn]:
                row = await _one(pipeline, seconds, 7000 + 2 * number)
                rows.append({"variant": variant, "round": number, **row})
    return rows


async def _one(pipeline: Pipeline, seconds: int, seed: int) -> dict[str, float]:
    messages = make_messages(seed, RATE_PER_S * seconds, 1)
    async with pipeline.tracked() as tracker:
        before_s = _stage_cpu_s(pipeline)
        await open_loop(pipeline, tracker, messages, RATE_PER_S)
        cpu_s = _stage_cpu_s(pipeline) - before_s
        durable = percentiles_ms(tracker.durable_ns())
    load = make_messages(seed + 1, MESSAGES, 1)
    async with pipeline.tracked() as tracker:
        await closed_loop(pipeline, tracker, load)
        rate = tracker.totals().settled / tracker.span_s()
    return {
        "cpu_ms_per_1000": round(cpu_s * 1e6 / len(messages), 1),
        "durable_ms_p95": durable["p95"],
        "events_per_s": round(rate, 1),
    }


def _stage_cpu_s(pipeline: Pipeline) -> float:
    """User and system time of all stage processes so far."""
    return sum(
        read_process(process.pid).cpu_s
        for process in pipeline.supervisor.processes
        if process.kind != "server" and process.pid is not None
    )


def _summary(rows: list[dict[str, Any]], variant: str) -> dict[str, float]:
    """Medians over the rounds; a ratio is the median of the ratios within each round."""
    ours = [row for row in rows if row["variant"] == variant]
    off = {row["round"]: row for row in rows if row["variant"] == "off"}
    found = {
        name: statistics.median(row[name] for row in ours)
        for name in ("cpu_ms_per_1000", "durable_ms_p95", "events_per_s")
    }
    for ratio, name in (("cpu_ratio", "cpu_ms_per_1000"), ("rate_ratio", "events_per_s")):
        found[ratio] = round(statistics.median(row[name] / off[row["round"]][name] for row in ours), 4)
    return found


@asynccontextmanager
async def _sink() -> AsyncIterator[str]:
    """A collector that takes everything and keeps nothing: its URL."""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


if __name__ == "__main__":
    typer.run(main)
