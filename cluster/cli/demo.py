"""`fictl demo`: the main job, start to finish, on this machine."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.common import (
    FAILED,
    JsonOption,
    SetOption,
    check_directory,
    console,
    finite,
    given_settings,
    print_json,
    run_async,
)
from cluster.cli.up import unless_interrupted
from contracts.settings import MIB, Settings
from contracts.telemetry import DURABLE_BUDGET_MS_P95, STAGE_BUDGET_MS_P95
from contracts.wire import plain
from stages.persist.names import SHARDS

if TYPE_CHECKING:
    from cluster.demo import DemoResult, OnStep

DEMO_SHARD_BYTES = 16 * MIB
SHOWN_REFUSALS = 5


def demo(
    source: Annotated[
        Path | None, typer.Option("--input", help="NDJSON file of events. Default: made-up consultations.")
    ] = None,
    events: Annotated[int, typer.Option(min=1, help="How many to make up without --input.")] = 5000,
    rate: Annotated[
        float | None, typer.Option(min=0.1, callback=finite, help="Events a second. Default: as fast as accepted.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where cluster and shards live. Default: a new one below .fi.")
    ] = None,
    chosen: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Carries events through four processes and a 3-node cluster into HDF5 shards, and proves that all arrived once.

    Everything is started for it and stopped after it; the shards stay. Exit code 0 only if nothing was lost and
    verification passed. A second run with the same --dir publishes the same events again: all are duplicates.

    Example: fictl demo --input consultations.ndjson --dir demo
    """
    where = directory or Path(".fi") / time.strftime("demo-%Y%m%d-%H%M%S")
    check_directory("--dir", where)
    settings = given_settings(chosen, defaults=Settings(shard_bytes=DEMO_SHARD_BYTES)).settings

    if source is None:
        result = run_async(_run(where, settings, None, events, rate))
    else:
        with source.open("rb") as file:
            result = run_async(_run(where, settings, file.fileno(), events, rate))
    if as_json:
        print_json(result.headline())
    else:
        _show(result)
    if not result.ok:
        raise typer.Exit(FAILED)


async def _run(where: Path, settings: Settings, source: int | None, events: int, rate: float | None) -> DemoResult:
    from cluster.demo import run_demo
    from cluster.supervisor import Supervisor

    supervisor = Supervisor(where, settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # The first asks for an orderly stop, the second kills at once.
        loop.add_signal_handler(number, supervisor.request_stop)
    with _progress() as on_step:
        try:
            on_step("starting 3 servers and 4 stages", 0, None)
            await unless_interrupted(supervisor, supervisor.start())
            run = await unless_interrupted(
                supervisor, run_demo(supervisor, source=source, events=events, rate_per_s=rate, on_step=on_step)
            )
            on_step("stopping", 0, None)
        finally:
            await supervisor.stop()
        return await asyncio.to_thread(run.examine, where / SHARDS)


@contextmanager
def _progress() -> Iterator[OnStep]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def on_step(what: str, done: int, of: int | None) -> None:
            if what not in tasks:
                for task in tasks.values():
                    progress.stop_task(task)
                tasks[what] = progress.add_task(what, total=of)
            progress.update(tasks[what], completed=done, total=of)

        yield on_step


def _show(result: DemoResult) -> None:
    from rich.table import Table

    out = console()
    counts = Table(title="Events", show_header=False)
    for name in ("published", "accepted", "persisted", "duplicates", "dead_lettered", "lost"):
        counts.add_row(name.replace("_", "-"), f"{getattr(result, name):,}")
    counts.add_row("a second", f"{result.events_per_s:,.0f}")
    out.print(counts)

    latency = Table(title="Latency, ms")
    for column in ("", "p50", "p95", "p99", "budget p95"):
        latency.add_column(column, justify="left" if not column else "right")
    budgets = {"durable": DURABLE_BUDGET_MS_P95, **STAGE_BUDGET_MS_P95}
    rows = {name: result.latency_ms[name] for name in ("accepted", "durable")} | result.latency_ms["stages"]
    for name, row in rows.items():
        budget = budgets.get(name)
        verdict = "" if budget is None else f"{budget:,}"
        if budget is not None and row["p95"] is not None:
            verdict += " met" if row["p95"] <= budget else " MISSED"
        found = (row[p] for p in ("p50", "p95", "p99"))
        latency.add_row(name, *("-" if value is None else f"{value:,.1f}" for value in found), verdict)
    out.print(latency)

    if result.consultation:
        out.print(f"\nConsultation {result.consultation[0]['consultation_id']}, read back:")
        for event in result.consultation:
            text = plain(bytes(event["payload"]).decode())
            line = f"  {event['timestamp']}  {event['event_type']:<24} {event['audit_hash'][:12]}…  {text}"
            out.print(line[: out.width], soft_wrap=True)
    for line in result.refused[:SHOWN_REFUSALS]:
        out.print(f"refused: {line}")
    for line in result.problems:
        out.print(f"PROBLEM: {line}")
    out.print(f"\n{len(result.shards)} shards in {result.store}; open one with h5py or h5dump, or try:")
    called = sys.argv[0] if Path(sys.argv[0]).name in ("fi", "fictl") else "fictl"
    out.print(f"  {called} verify {result.store}", soft_wrap=True)
    out.print(f"  {called} export {result.store} | head -3", soft_wrap=True)
    out.print("verified: nothing lost, nothing doubled" if result.ok else "NOT VERIFIED", style="bold")
