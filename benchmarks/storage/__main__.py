"""``python -m benchmarks.storage``: what the store costs, beside the classic HDF5 designs.

Writes a table, all figures and a picture to ``results/storage.*``. Nothing here needs a cluster: commits, seals,
opening and reading are persist's own code on real files, each commit with its own fdatasync.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import h5py
import msgspec
import typer

from benchmarks.report import RESULTS, Say, machine, write_json
from benchmarks.storage.classic import ClassicEffort, fill_classics
from benchmarks.storage.ours import Effort, measure_ours
from benchmarks.storage.plain import Writer, open_many
from benchmarks.storage.plot import plot_append
from benchmarks.storage.samples import DATA_SET, Samples
from benchmarks.storage.tables import as_markdown, headline

DEFAULT_DATA = DATA_SET if DATA_SET.exists() else None
QUICK = Effort(80_000, repetitions=2, long_repetitions=1, commits=50, ids=300_000, look_ups=50, shard_bytes=16 << 20)
QUICK_CLASSIC = ClassicEffort((0, 100, 1000), appends=25, cpu_s_max=10.0)
PLAIN_OPENS = 1000
QUICK_PLAIN_OPENS = 100
QUIET_EVENTS = 50_000
"""Written before plain readers come, to measure the writer alone."""


def main(
    events: Annotated[int, typer.Option(min=1000, help="Events in the large store.")] = 1_000_000,
    quick: Annotated[bool, typer.Option("--quick", help="A try of under a minute; writes no results.")] = False,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where the files go; default: a temporary directory in this one.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="NDJSON of gateway events; made-up ones without it.")
    ] = DEFAULT_DATA,
    output: Annotated[Path, typer.Option(help="Where storage.md, .json and .png go.")] = RESULTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON instead of the tables.")] = False,
) -> None:
    """Measures the store on this machine, about ten minutes. Example: python -m benchmarks.storage --quick"""
    start_s = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - start_s:6.1f} s  {text}", file=sys.stderr)

    effort, classic = (QUICK, QUICK_CLASSIC) if quick else (Effort(events), ClassicEffort())
    with tempfile.TemporaryDirectory(prefix=".fi-bench-", dir=directory or Path.cwd()) as scratch:
        result = measure(Path(scratch), data, effort, classic, QUICK_PLAIN_OPENS if quick else PLAIN_OPENS, say)
    text = as_markdown(result)
    if not quick:
        write_results(result, text, output)
    print(msgspec.json.format(msgspec.json.encode(result)).decode() if as_json else text)


def measure(
    scratch: Path, data: Path | None, effort: Effort, classic: ClassicEffort, opens: int, say: Say
) -> dict[str, Any]:
    """Everything, in `scratch`.

    Args:
        scratch: an empty directory on the disk to be measured.
        data: NDJSON of gateway events; None: made-up ones.
        effort, classic: how much.
        opens: plain opens beside the writer.
        say: told what is being done.
    """
    samples = Samples(data)
    environment = machine(scratch) | {"h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version}
    result: dict[str, Any] = {
        "environment": environment,
        "effort": {**effort._asdict(), "classic_sizes": classic.sizes, "classic_cpu_s_max": classic.cpu_s_max},
        "samples": {
            "source": samples.source,
            "round_events": samples.round_events,
            "consultations": samples.consultations,
        },
    }
    classics = fill_classics(scratch, samples, classic, say)
    result["ours"] = measure_ours(scratch, samples, effort, classics, say)
    result["classic"] = [run.finish() for run in classics]
    say(f"{opens:,} plain h5py opens beside a writer at full speed")
    result["plain"] = _plain_opens(scratch / "plain", data, samples, effort, opens)
    return {"headline": headline(result), **result}


def _plain_opens(directory: Path, data: Path | None, samples: Samples, effort: Effort, opens: int) -> dict[str, Any]:
    # Small shards, so that many are rolled and sealed meanwhile.
    with Writer(directory, effort.shard_bytes // 8, data) as writer:
        writer.wait_until(min(effort.events, QUIET_EVENTS))
        writer.mark()
        tally = open_many(writer, samples, opens)
        return {"readers": tally._asdict(), "writer": writer.finish()}


def write_results(result: dict[str, Any], text: str, directory: Path) -> None:
    """Writes table, figures and picture into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "storage.md").write_text(text)
    write_json(directory / "storage.json", result)
    plot_append(result, directory / "storage.png")


if __name__ == "__main__":
    typer.run(main)
