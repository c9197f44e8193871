"""``python -m benchmarks.backlog``: events that wait while a stage is stopped, and how fast they drain.

10K, 50K and 100K events are accepted with persist stopped; then an hour's input with all stages but ingest stopped.
Draining counts from the command to start the stages until the last receipt, their start included. The checker holds
everything against the shards. Writes ``results/backlog.json``.

The hour: DOMAIN's largest day is 10,000 sessions of 20 events, 200,000 events, 8,333 in the mean hour. Taken is
`PEAK_FACTOR` times that: half of the day in one hour.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from benchmarks.judging import judge
from benchmarks.load import Pipeline, fill, make_messages, running_pipeline, settle
from benchmarks.report import RESULTS, environment_of, markdown_table, write_json
from cluster.capacity import EVENTS_PER_SESSION
from contracts.settings import load_settings
from contracts.subjects import STAGES, Stage
from stages.persist.names import SHARDS

PARTITIONS = 4
SESSIONS_PER_DAY = 10_000
PEAK_FACTOR = 12
HOUR_EVENTS = SESSIONS_PER_DAY * EVENTS_PER_SESSION * PEAK_FACTOR // 24
DRAIN_S_MAX = 120.0
"""DOMAIN: an hour's backlog is drained in two minutes."""
CASES: tuple[tuple[str, int, tuple[Stage, ...]], ...] = (
    ("10K", 10_000, ("persist",)),
    ("50K", 50_000, ("persist",)),
    ("100K", 100_000, ("persist",)),
    ("an hour", HOUR_EVENTS, STAGES[1:]),
)


def main(
    directory: Annotated[Path | None, typer.Option("--dir", help="Where to put clusters and shards.")] = None,
) -> None:
    """Measures how fast a backlog drains on this machine."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        result = uvloop.run(_measure(Path(scratch)))
    write_json(RESULTS / "backlog.json", result)
    print(table(result), end="")
    print(f"\n{result['environment']}")
    slow = [row["case"] for row in result["rows"] if row["drained_s"] > DRAIN_S_MAX]
    if slow:
        print(f"not drained within {DRAIN_S_MAX:.0f} s: {', '.join(slow)}")
        raise typer.Exit(1)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = [
        [
            f"{row['events']:,} ({row['case']})",
            ", ".join(row["stopped"]),
            f"{row['accepted_per_s']:,.0f}",
            f"{row['drained_s']:.1f}",
            f"{row['drained_per_s']:,.0f}",
            f"{row['checked']['lost']}, {row['checked']['duplicated']}, {row['checked']['reordered']}",
        ]
        for row in result["rows"]
    ]
    head = ("events", "stopped", "accepted, events/s", "drained in, s", "events/s", "lost, doubled, reordered")
    return markdown_table(head, rows)


async def _measure(scratch: Path) -> dict[str, Any]:
    settings = load_settings({"FI_PARTITIONS": str(PARTITIONS), **os.environ})
    environment = await asyncio.to_thread(environment_of, scratch)
    rows = []
    for number, (case, events, stopped) in enumerate(CASES):
        directory = scratch / str(number)
        async with running_pipeline(directory, settings) as pipeline:
            rows.append({"case": case, **await _one(pipeline, 11_000 + number, events, stopped)})
    environment |= {"partitions": settings.partitions, "hour_events": HOUR_EVENTS, "peak_factor": PEAK_FACTOR}
    return {"environment": environment, "rows": rows}


async def _one(pipeline: Pipeline, seed: int, events: int, stopped: tuple[Stage, ...]) -> dict[str, Any]:
    messages = make_messages(seed, events, 1)
    supervisor = pipeline.supervisor
    for stage in stopped:
        await supervisor.stop_stage(stage)
    async with pipeline.tracked() as tracker:
        begun_s = time.monotonic()
        await fill(pipeline, tracker, messages)
        filled_s = time.monotonic() - begun_s
        if tracker.totals().settled:
            raise RuntimeError("events were committed while persist was stopped")
        begun_s = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for stage in stopped:
                tasks.create_task(supervisor.start_stage(stage))
        started_s = time.monotonic() - begun_s
        await settle(tracker)
        drained_s = time.monotonic() - begun_s
    checked = await asyncio.to_thread(judge, messages, supervisor.directory / SHARDS)
    return {
        "events": events,
        "stopped": list(stopped),
        "accepted_per_s": round(events / filled_s, 1),
        "stages_ready_s": round(started_s, 1),
        "drained_s": round(drained_s, 1),
        "drained_per_s": round(events / drained_s, 1),
        "checked": checked,
        "load_1_min": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    typer.run(main)
