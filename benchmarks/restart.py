"""``python -m benchmarks.restart``: what a rolling restart of all stages under load costs; ``results/restart.json``.

One pipeline is loaded at a fixed rate (open loop, one event a message) in windows that take turns: left alone; every
stage process replaced, the new one ready before the old one drains (what `fictl restart` does); every stage stopped and
started again in place, for comparison. All events of a window count, those sent before and after the restart too. At
the end the checker holds everything published against the shards.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from benchmarks.judging import judge
from benchmarks.load import Message, Pipeline, make_messages, open_loop, running_pipeline
from benchmarks.report import RESULTS, environment_of, markdown_table, spread, write_json
from cluster.track import percentiles_ms
from contracts.settings import load_settings
from contracts.subjects import STAGES
from stages.persist.names import SHARDS

PARTITIONS = 4
WARM_UP_S = 5
WINDOW_S_MAX = 120
SETTLE_IN_S = 2.0
"""A restart begins so long after its window."""
ALONE, REPLACED, IN_PLACE = "left alone", "each process replaced", "each stage stopped, then started"


def main(
    seconds: Annotated[int, typer.Option(help="Of each window at least; it lasts until a restart is over.")] = 20,
    rounds: Annotated[int, typer.Option(help="Times that all is measured; medians are reported.")] = 3,
    rate: Annotated[int, typer.Option(help="Events a second.")] = 200,
    directory: Annotated[Path | None, typer.Option("--dir", help="Where to put cluster and shards.")] = None,
) -> None:
    """Measures what a rolling restart costs on this machine."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        result = uvloop.run(_measure(Path(scratch), seconds, rounds, rate))
    write_json(RESULTS / "restart.json", result)
    print(table(result), end="")
    print(f"\n{result['checked']}\n{result['environment']}")


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: medians of the rounds (spread)."""
    rows = []
    for variant in (ALONE, REPLACED, IN_PLACE):
        ours = [row for row in result["rows"] if row["variant"] == variant]
        cells = [spread([row["durable_ms"][p] for row in ours], 0) for p in ("p50", "p95", "p99", "max")]
        took = "" if variant == ALONE else spread([row["restart_s"] for row in ours])
        rows.append([variant, *cells, took])
    head = ("stages", "durable p50, ms", "p95", "p99", "longest", "restart took, s")
    return markdown_table(head, rows)


async def _measure(scratch: Path, seconds: int, rounds: int, rate: int) -> dict[str, Any]:
    settings = load_settings({"FI_PARTITIONS": str(PARTITIONS), **os.environ})
    environment = await asyncio.to_thread(environment_of, scratch)
    rows: list[dict[str, Any]] = []
    sent: list[Message] = make_messages(8999, rate * WARM_UP_S, 1)
    async with running_pipeline(scratch / "run", settings) as pipeline:
        async with pipeline.tracked() as tracker:
            await open_loop(pipeline, tracker, sent, rate)
        for number in range(rounds):
            for variant in (ALONE, REPLACED, IN_PLACE):
                messages = make_messages(9000 + len(rows), rate * max(seconds, WINDOW_S_MAX), 1)
                row = await _one(pipeline, messages, rate, seconds, variant)
                sent += messages[: row["events"]]
                rows.append({"variant": variant, "round": number, **row, "load_1_min": round(os.getloadavg()[0], 2)})
        checked = await asyncio.to_thread(judge, sent, scratch / "run" / SHARDS)
    p99 = {
        variant: statistics.median(row["durable_ms"]["p99"] for row in rows if row["variant"] == variant)
        for variant in (ALONE, REPLACED, IN_PLACE)
    }
    environment |= {"partitions": settings.partitions, "rate_per_s": rate, "seconds": seconds}
    return {"environment": environment, "durable_p99_ms": p99, "checked": checked, "rows": rows}


async def _one(pipeline: Pipeline, messages: list[Message], rate: int, seconds: int, variant: str) -> dict[str, Any]:
    async with pipeline.tracked() as tracker, asyncio.TaskGroup() as tasks:
        restarting = tasks.create_task(_restart(pipeline, variant))
        offered = await open_loop(
            pipeline, tracker, messages, rate, lambda number: number >= rate * seconds and restarting.done()
        )
        restart_s = await restarting
        durable_ns = tracker.durable_ns()
    durable_ms = {**percentiles_ms(durable_ns), "max": round(float(max(durable_ns)) / 1e6, 1)}
    return {"events": len(offered), "durable_ms": durable_ms, "restart_s": restart_s}


async def _restart(pipeline: Pipeline, variant: str) -> float:
    """Seconds that it took; 0 for none."""
    if variant == ALONE:
        return 0.0
    await asyncio.sleep(SETTLE_IN_S)
    begun_s = time.monotonic()
    if variant == REPLACED:
        # Against the flow, as `fictl restart` does.
        for stage in reversed(STAGES):
            await pipeline.supervisor.restart(stage)
    else:
        for stage in STAGES:
            await pipeline.supervisor.stop_stage(stage)
            await pipeline.supervisor.start_stage(stage)
    return round(time.monotonic() - begun_s, 1)


if __name__ == "__main__":
    typer.run(main)
