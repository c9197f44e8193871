"""One run of everything: our pipeline, its ceiling and the alternatives, in turns on the same three servers.

Turns, so that what else the machine does falls on all alike. While a baseline is measured our stages are stopped; while
ours is measured no baseline runs.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.baselines.designs import DESIGNS, Ground
from benchmarks.baselines.measure import RATES_PER_S as BASELINE_RATES_PER_S
from benchmarks.baselines.measure import visit
from benchmarks.costs import costs, snapshot
from benchmarks.drain import EVENTS as DRAIN_EVENTS
from benchmarks.drain import measure_drain
from benchmarks.headline import headline, ratios
from benchmarks.latency import measure_latency, warm_up
from benchmarks.load import Message, Pipeline, make_messages, running_pipeline
from benchmarks.report import Say, cpu_ticks, environment_of
from benchmarks.throughput import MESSAGES, measure_throughput
from contracts.settings import Settings, load_settings
from contracts.subjects import STAGES

PARTITIONS = 1
"""As many lanes as two cores can use; ``FI_PARTITIONS`` chooses others."""
BASELINE_MESSAGES = 30_000
IDLE_S = 5.0


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure.

    Attributes:
        repetitions: turns of ours.
        latency_s: of each rate in each turn; 0: none.
        throughput: events a message → messages in each turn.
        warm_up_s: at the start, and again after the stages were stopped for half as long.
        baselines: which ones.
        baseline_s: of each measurement of a baseline.
        baseline_rounds: visits to each; the first one measures latency too, unless `latency_s` is 0.
        drains: backlogs.
        drain_events: in each.
    """

    repetitions: int = 3
    latency_s: float = 5.0
    throughput: Mapping[int, int] = field(default_factory=lambda: dict(MESSAGES))
    warm_up_s: float = 5.0
    baselines: tuple[str, ...] = tuple(DESIGNS)
    baseline_s: float = 3.0
    baseline_rounds: int = 2
    drains: int = 2
    drain_events: int = DRAIN_EVENTS


BENCH = Effort()
CHECK = Effort(
    latency_s=0,
    baselines=("chain", "tuned", "faststream", "faststream-batched", "redis"),
    drains=0,
)


async def run(scratch: Path, effort: Effort, say: Say) -> dict[str, Any]:
    """Everything in `scratch`, which must be empty.

    Returns:
        ``{"environment", "headline", "ratios", "latency", "throughput", "drain", "baselines", "idle", "took_s"}``.

    Raises:
        RuntimeError: events were lost or harmed somewhere.
    """
    begun_s = time.monotonic()
    # What was written before, by an installation perhaps, is not to reach the disk while we measure.
    await asyncio.to_thread(os.sync)
    settings = load_settings({"FI_PARTITIONS": str(PARTITIONS), **os.environ})
    environment = await asyncio.to_thread(environment_of, scratch)
    environment |= {"partitions": settings.partitions, "hop_storage": settings.hop_storage}
    ticks = cpu_ticks()
    say("starting three servers and four stages")
    async with running_pipeline(scratch / "run", settings) as pipeline:
        found = await _turns(pipeline, scratch, settings, effort, say)
    environment["load_1_min_after"] = round(os.getloadavg()[0], 2)
    ticks_after = cpu_ticks()
    if ticks is not None and ticks_after is not None:
        total, stolen = (after - before for before, after in zip(ticks, ticks_after, strict=True))
        environment["cpu_stolen_by_host"] = round(stolen / total, 3)
    measured = (found["latency"], found["throughput"], found["drain"], found["baselines"])
    return {
        "environment": environment,
        "headline": headline(*measured),
        "ratios": ratios(found["throughput"], found["baselines"]),
        **found,
        "took_s": round(time.monotonic() - begun_s, 1),
    }


async def _turns(
    pipeline: Pipeline, scratch: Path, settings: Settings, effort: Effort, say: Say
) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {"latency": [], "throughput": [], "drain": [], "baselines": [], "idle": []}
    offered = make_messages(900, BASELINE_MESSAGES, 1) if effort.baselines else []
    say("warming up")
    await warm_up(pipeline, 1000, effort.warm_up_s)
    if effort.latency_s:
        found["idle"].append(await _idle(pipeline))
    for turn in range(max(effort.repetitions, effort.baseline_rounds)):
        if turn < effort.repetitions:
            say(f"ours, turn {turn + 1} of {effort.repetitions}")
            seed = 2000 + 100 * turn
            if effort.latency_s:
                found["latency"] += await measure_latency(pipeline, seed, effort.latency_s)
            found["throughput"] += await measure_throughput(
                pipeline, seed + 50, ceiling_first=turn % 2 == 1, counts=effort.throughput
            )
        if effort.baselines and turn < effort.baseline_rounds:
            rates = BASELINE_RATES_PER_S if effort.latency_s and turn == 0 else ()
            found["baselines"] += await _alternatives(pipeline, scratch, settings, effort, offered, rates, say)
            await warm_up(pipeline, 1001 + turn, effort.warm_up_s / 2)
    for number in range(effort.drains):
        say(f"a backlog of {effort.drain_events:,} events, {number + 1} of {effort.drains}")
        found["drain"].append(await measure_drain(pipeline, 9000 + number, effort.drain_events))
    return found


async def _alternatives(
    pipeline: Pipeline,
    scratch: Path,
    settings: Settings,
    effort: Effort,
    offered: list[Message],
    rates: tuple[int, ...],
    say: Say,
) -> list[dict[str, Any]]:
    """One visit to each baseline, with our stages stopped."""
    for stage in STAGES:
        await pipeline.supervisor.stop_stage(stage)
    ground = Ground(scratch, pipeline.supervisor.urls, settings.replicas)
    rows = [
        await visit(name, ground, offered, rates=rates, seconds=effort.baseline_s, say=say) for name in effort.baselines
    ]
    # What they left in the kernel's cache would be written to the disk while ours is measured.
    await asyncio.to_thread(os.sync)
    async with asyncio.TaskGroup() as tasks:
        for stage in STAGES:
            tasks.create_task(pipeline.supervisor.start_stage(stage))
    return rows


async def _idle(pipeline: Pipeline) -> dict[str, Any]:
    """What the pipeline costs while nothing is published: the floor under every rate's costs."""
    before = await snapshot(pipeline)
    await asyncio.sleep(IDLE_S)
    shared = costs(before, await snapshot(pipeline), round(1000 * IDLE_S))
    return {"per_second": {name: shared[name] for name in ("cpu_s", "disk_bytes", "raft_entries")}}
