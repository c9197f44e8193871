"""``python -m benchmarks.experiments.soak``: full speed for an hour, and whether memory stays flat; ``results/soak.*``.

Load comes in windows, one right after the other's last receipt: the same texts under new ids, so that the generator's
own memory stays flat too. Nothing is deleted: sealed shards are what the store answers duplicates from. Disk use is
bounded by ending early instead. Servers hold events until they are sealed, a few gigabytes that stay as they are.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from benchmarks.costs import read_process
from benchmarks.experiments.costs import LOAD
from benchmarks.experiments.fit import fit_slope
from benchmarks.experiments.harness import Setup, closed, running
from benchmarks.experiments.messages import renewed
from benchmarks.experiments.plots import plot_soak
from benchmarks.load import Message, Pipeline, make_messages
from benchmarks.report import RESULTS, Say, environment_of, markdown_table, write_json
from stages.runtime.tasks import end_tasks

WINDOW_EVENTS = 50_000
QUICK_WINDOW_EVENTS = 200
REFUSED_IN_WINDOW = 20
"""Events that are refused, by ingest and segment in turn: what these leave behind shows as well."""
SAMPLES = 720
BLOCKS = 20
"""Samples are taken together in so many medians before a line is fitted: live shards fill and are sealed in between."""
WARM_UP_SHARE = 0.25
"""Of the run, that is left out of the fit: caches and the first shards fill."""
FLAT_SHARE_PER_H = 0.02
"""A process that grows by less of its memory in an hour is flat."""
FILTER_BYTES_PER_EVENT = 3.54
"""Of persist: a duplicate is found however old it is (`results/storage.json`, resident_bytes_per_event)."""
_SEED = 90_000
_QUICK_S = 3


def main(
    minutes: Annotated[float, typer.Option(help="How long; the first quarter is left out of the verdict.")] = 80.0,
    batch: Annotated[int, typer.Option(help="Events a message.")] = 1,
    disk_gb_max: Annotated[float, typer.Option(help="Ends early when shards and streams take more.")] = 40.0,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where cluster and shards go; default: a temporary directory here.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where soak.json and soak.png go.")] = RESULTS,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes; the figures mean nothing.")
    ] = False,
) -> None:
    """Loads the pipeline at full speed for long. Exits with 1 when a stage's or server's memory was not flat."""
    begun_s = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - begun_s:7.1f} s  {text}", file=sys.stderr, flush=True)

    seconds, window = (_QUICK_S, QUICK_WINDOW_EVENTS) if quick else (minutes * 60, WINDOW_EVENTS)
    with tempfile.TemporaryDirectory(prefix=".fi-bench-", dir=directory or Path.cwd()) as scratch:
        result = uvloop.run(soak(Path(scratch), seconds, window, batch, disk_gb_max * 1e9, say))
    write_results(result, output)
    print(as_markdown(result))
    if not all(verdict["flat"] for name, verdict in result["verdicts"].items() if name != LOAD):
        raise typer.Exit(1)


async def soak(
    scratch: Path, seconds: float, window_events: int, batch: int, disk_bytes_max: float, say: Say
) -> dict[str, Any]:
    """Windows of load for `seconds`, with samples of memory beside it; see `judge` for the verdicts."""
    environment = await asyncio.to_thread(environment_of, scratch)
    template = _with_refused(make_messages(_SEED, window_events // batch, batch))
    samples: list[dict[str, Any]] = []
    windows: list[dict[str, Any]] = []
    async with running(scratch / "pipeline", Setup()) as pipeline:
        pids = _pids(pipeline)
        begun_s = time.monotonic()
        sampling = asyncio.create_task(_sample(pipeline, scratch, seconds / SAMPLES, begun_s, samples), name="samples")
        ended = "time is over"
        try:
            while time.monotonic() - begun_s < seconds:
                row = await closed(pipeline, renewed(template, len(windows)))
                windows.append({"end_s": round(time.monotonic() - begun_s, 1), **row})
                used = samples[-1]["disk_bytes"] if samples else 0
                say(f"{sum(w['events'] for w in windows):,} events, {row['events_per_s']:,.0f}/s, {used / 1e9:.1f} GB")
                if sampling.done():
                    sampling.result()
                if used > disk_bytes_max:
                    ended = f"{used / 1e9:.1f} GB of disk are in use"
                    break
        finally:
            await end_tasks(sampling)
        replaced = sorted(name for name, pid in _pids(pipeline).items() if pids[name] != pid)
    events = sum(window["events"] for window in windows)
    return {
        "environment": environment,
        "batch": batch,
        "events": events,
        "seconds": windows[-1]["end_s"],
        "ended": ended,
        "replaced": replaced,
        "verdicts": judge(samples, events / windows[-1]["end_s"]),
        "windows": windows,
        "samples": samples,
    }


def _with_refused(messages: Sequence[Message]) -> list[Message]:
    """The same messages, but for some of which the events are refused."""
    made = list(messages)
    by_ingest = b'"event_type":"', b'"event_type":"NO_'
    by_segment = b'"message_role":"user"', b'"message_role":"nobody"'
    for number in range(REFUSED_IN_WINDOW):
        good, bad = (by_ingest, by_segment)[number % 2]
        start = number * len(made) // REFUSED_IN_WINDOW
        at = next(at for at in range(start, len(made)) if good in made[at].data)
        made[at] = made[at]._replace(data=made[at].data.replace(good, bad))
    return made


def _pids(pipeline: Pipeline) -> dict[str, int | None]:
    return {process.name: process.pid for process in pipeline.supervisor.processes}


async def _sample(
    pipeline: Pipeline, scratch: Path, pause_s: float, begun_s: float, samples: list[dict[str, Any]]
) -> None:
    """Memory of every process, and disk use, again and again until cancelled."""
    while True:
        pids = {**_pids(pipeline), LOAD: os.getpid()}
        readings = {name: read_process(pid) for name, pid in pids.items() if pid is not None}
        used = await asyncio.to_thread(_disk_bytes, scratch)
        samples.append(
            {
                "at_s": round(time.monotonic() - begun_s, 2),
                "disk_bytes": used,
                # Pages of sealed shards' ids, 16 bytes an event, stay mapped until the kernel wants the room.
                "resident_bytes": {name: now.resident_bytes - now.mapped_bytes for name, now in readings.items()},
                "mapped_bytes": {name: now.mapped_bytes for name, now in readings.items()},
            }
        )
        await asyncio.sleep(pause_s)


def _disk_bytes(directory: Path) -> int:
    """What the files in `directory` take; those that go meanwhile are left out."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def judge(samples: Sequence[dict[str, Any]], events_per_s: float) -> dict[str, dict[str, Any]]:
    """For each process: the fitted slope of its memory in bytes an hour, and whether that is flat.

    Flat: the slope, less two standard errors and what is known to grow with the events (persist's id filters), is
    below `FLAT_SHARE_PER_H` of its memory. Too few samples for a line are not flat.
    """
    kept = samples[int(len(samples) * WARM_UP_SHARE) :]
    size = max(1, len(kept) // BLOCKS)
    blocks = [kept[start : start + size] for start in range(0, len(kept), size)]
    hours = [statistics.fmean(sample["at_s"] for sample in block) / 3600 for block in blocks]
    verdicts = {}
    for name in samples[0]["resident_bytes"]:
        levels = [statistics.median(sample["resident_bytes"].get(name, 0) for sample in block) for block in blocks]
        known = FILTER_BYTES_PER_EVENT * events_per_s * 3600 if name.startswith("persist") else 0.0
        mean = statistics.fmean(levels)
        try:
            slope, error = fit_slope(hours, levels)
        except ValueError:
            verdicts[name] = {"mean_bytes": mean, "flat": False}
            continue
        verdicts[name] = {
            "mean_bytes": round(mean),
            "slope_bytes_per_h": round(slope),
            "error_bytes_per_h": round(error),
            "known_bytes_per_h": round(known),
            "flat": slope - 2 * error - known <= FLAT_SHARE_PER_H * mean,
        }
    return verdicts


def as_markdown(result: dict[str, Any]) -> str:
    """The verdicts as a table, and what was done."""
    lines = []
    for name, verdict in result["verdicts"].items():
        cells = ["–", "–"]
        if "slope_bytes_per_h" in verdict:
            slope, error, known = (verdict[f"{part}_bytes_per_h"] / 1e6 for part in ("slope", "error", "known"))
            cells = [f"{slope:+,.2f} ± {error:.2f}", f"{known:,.2f}" if known else "–"]
        lines.append([name, f"{verdict['mean_bytes'] / 1e6:,.0f}", *cells, "flat" if verdict["flat"] else "**grows**"])
    rates = [window["events_per_s"] for window in result["windows"]]
    quarter = max(1, len(rates) // 4)
    early, late = statistics.median(rates[:quarter]), statistics.median(rates[-quarter:])
    text = (
        f"{result['events']:,} events in {result['seconds'] / 60:,.1f} minutes, {result['batch']} a message; ended: "
        f"{result['ended']}. Events/s in the first and last quarter: {early:,.0f}, {late:,.0f}. Processes that were "
        f"replaced: {', '.join(result['replaced']) or 'none'}.\n"
    )
    head = ["process", "resident without mapped files, MB", "slope, MB/hour", "known to grow, MB/hour", "verdict"]
    return markdown_table(head, lines) + "\n" + text


def write_results(result: dict[str, Any], directory: Path) -> None:
    """Writes figures and picture into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "soak.json", result)
    plot_soak(result, directory / "soak.png")


if __name__ == "__main__":
    typer.run(main)
