"""``python -m cluster.testing.chaos``: a line for each fault, a verdict at the end, exit code 1 when it convicts."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

import typer

from cluster.testing.chaos.ground import Ground
from cluster.testing.chaos.report import markdown, read_outcomes, summary, write_outcomes
from cluster.testing.chaos.run import Chaos, Outcome, Played
from cluster.testing.errors import NotSupportedError
from cluster.testing.ficluster import FiCluster
from contracts.settings import MIB, Settings
from contracts.subjects import STAGES

SETTINGS = Settings(
    partitions=4,
    shard_bytes=16 * MIB,
    shard_age_s_max=20,
    trim_s=0.5,
    seal_on_drain=False,
    hop_bytes_max=8 * MIB,
    frame_deflate_bytes_min=1024,
)
"""Small shards that are sealed often, and hops that fill."""
PROCESSES_EACH = 2
DISK_BYTES = 1024 * MIB
"""A file system in memory: room for the shards of an hour."""


def main(
    minutes: Annotated[float, typer.Option(help="How long faults go on.", min=0.05)] = 10.0,
    seed: Annotated[int, typer.Option(help="Decides the schedule and the load.")] = 1,
    rate: Annotated[float, typer.Option(help="Events a second of all gateways together.")] = 150.0,
    gateways: Annotated[int, typer.Option(help="How many gateways publish.", min=3)] = 3,
    directory: Annotated[Path | None, typer.Option("--dir", help="Where cluster and shards go; they are kept.")] = None,
    results: Annotated[Path | None, typer.Option(help="JSON file that the outcome is added to.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Only print the outcomes in RESULTS as Markdown.")] = False,
) -> None:
    """Hurts a pipeline of two processes for each stage on three servers, and judges what it stored.

    Example: python -m cluster.testing.chaos --minutes 10 --seed 7
    """
    if table:
        print(markdown(read_outcomes(results) if results is not None else []))
        return
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="chaos: %(message)s")
    home = directory or Path(tempfile.mkdtemp(prefix="fi-chaos-"))
    outcome = asyncio.run(run(home, minutes, seed, rate, gateways))
    print(summary(outcome))
    if results is not None:
        write_outcomes(results, [*read_outcomes(results), outcome])
    if not outcome.ok:
        print(f"shards and logs are in {home}; again: --seed {seed} --minutes {minutes:g}", file=sys.stderr)
        raise typer.Exit(1)
    if directory is None:
        shutil.rmtree(home)


async def run(directory: Path, minutes: float, seed: int, rate_per_s: float, gateways: int) -> Outcome:
    """One run in `directory`. Raises as `Chaos.run`."""
    async with AsyncExitStack() as stack:
        try:
            cluster = await stack.enter_async_context(_cluster(directory, DISK_BYTES))
        except NotSupportedError as error:
            print(f"the disk will not be filled: {error}", file=sys.stderr)
            cluster = await stack.enter_async_context(_cluster(directory, None))
        ground = Ground(cluster, disk_is_small=cluster.disk_bytes is not None)
        return await Chaos(ground, seed, rate_per_s=rate_per_s, gateways=gateways, on_step=_show).run(minutes)


def _cluster(directory: Path, disk_bytes: int | None) -> FiCluster:
    return FiCluster(
        directory,
        backend="embedded",
        scale=dict.fromkeys(STAGES, PROCESSES_EACH),
        settings=SETTINGS,
        links=True,
        clocks=True,
        disk_bytes=disk_bytes,
    )


def _show(step: Played) -> None:
    minutes, seconds = divmod(step.at_s, 60)
    came = f"whole {step.whole_s:.2f} s later" if step.whole_s is not None else f"passed over: {step.skipped}"
    print(f"{int(minutes):3d}:{seconds:04.1f} {step.number:4d}  {' + '.join(step.faults)}: {came}", flush=True)


if __name__ == "__main__":
    typer.run(main)
