"""``python -m benchmarks.experiments [NAME ...]``: measures experiments and keeps them in ``results/full.*``."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import uvloop

from benchmarks.experiments.catalogue import EXPERIMENTS, as_markdown, picture_of
from benchmarks.experiments.harness import Bench, new_seeds
from benchmarks.report import RESULTS, environment_of, write_json

JSON, MARKDOWN = "full.json", "full.md"


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Some of: {', '.join(EXPERIMENTS)}. Default: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds for each; keeps nothing unless --output.")] = False,
    repetitions: Annotated[int, typer.Option(min=1, help="Times that all is measured; medians are reported.")] = 3,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where clusters and shards go; default: a temporary directory here.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where full.* go. Default: benchmarks/results.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the sections as JSON instead of the report.")] = False,
) -> None:
    """Runs experiments; each replaces its own section of what is kept.

    Example: python -m benchmarks.experiments hashes
    """
    unknown = [name for name in names or () if name not in EXPERIMENTS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(EXPERIMENTS)}")
    chosen = [name for name in EXPERIMENTS if not names or name in names]
    target = output or (None if quick else RESULTS)
    kept = read_kept(target or RESULTS)
    measured = uvloop.run(run(chosen, kept, 1 if quick else repetitions, quick, directory or Path.cwd(), target))
    print(msgspec.json.encode(measured).decode() if as_json else as_markdown(measured))


async def run(
    names: Sequence[str], kept: dict[str, Any], repetitions: int, quick: bool, directory: Path, target: Path | None
) -> dict[str, Any]:
    """Measures experiments one after the other; each is written into `target` as soon as it is there.

    Args:
        names: which, of `EXPERIMENTS`.
        kept: sections of earlier runs, which these replace.
        repetitions: of each measurement.
        quick: seconds instead of minutes.
        directory: scratch files go into a temporary directory in it.
        target: where results go; None: nowhere.

    Returns:
        The sections that were measured, by name.
    """
    begun_s = time.perf_counter()
    measured: dict[str, Any] = {}
    for number, name in enumerate(names, 1):

        def say(text: str, place: str = f"{number}/{len(names)} {name}") -> None:
            print(f"{time.perf_counter() - begun_s:7.1f} s  {place}: {text}", file=sys.stderr, flush=True)

        with tempfile.TemporaryDirectory(prefix=".fi-bench-", dir=directory) as scratch:
            environment = await asyncio.to_thread(environment_of, Path(scratch))
            bench = Bench(Path(scratch), quick, repetitions, say, kept | measured, new_seeds())
            start_s = time.perf_counter()
            say("begins")
            rows = await EXPERIMENTS[name].measure(bench)
        measured[name] = {
            "environment": environment,
            "quick": quick,
            "repetitions": repetitions,
            "took_s": round(time.perf_counter() - start_s, 1),
            "rows": rows,
        }
        if target is not None:
            await asyncio.to_thread(write_results, kept | measured, [name], target)
    return measured


def read_kept(directory: Path) -> dict[str, Any]:
    """Sections kept in `directory`, by name; none when there is no file."""
    path = directory / JSON
    return dict(msgspec.json.decode(path.read_bytes())) if path.exists() else {}


def write_results(sections: dict[str, Any], drawn: Sequence[str], directory: Path) -> None:
    """Writes all sections, the report, and the pictures of those `drawn`."""
    directory.mkdir(parents=True, exist_ok=True)
    ordered = {name: sections[name] for name in EXPERIMENTS if name in sections}
    write_json(directory / JSON, ordered)
    (directory / MARKDOWN).write_text(as_markdown(ordered))
    for name in drawn:
        plot = EXPERIMENTS[name].plot
        if plot is not None:
            plot(sections[name]["rows"], directory / picture_of(name))


if __name__ == "__main__":
    typer.run(main)
