"""``python -m benchmarks``: ours, the ceiling and the alternatives in one run.

Writes ``results/latest.json``, ``latest.md`` and ``latest.png``, and shows what became of every headline figure since
the result that was kept before. Costs are read from ``/proc``: Linux only.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import uvloop

from benchmarks.headline import compare
from benchmarks.report import LATEST, RESULTS, tell, write_json
from benchmarks.speedplot import plot
from benchmarks.speedreport import as_markdown
from benchmarks.suite import BENCH, run


def main(
    seconds: Annotated[float, typer.Option(help="Length of each latency measurement.")] = BENCH.latency_s,
    repetitions: Annotated[int, typer.Option(help="Turns of ours; medians are reported.")] = BENCH.repetitions,
    baselines: Annotated[bool, typer.Option(help="Measure the alternatives too.")] = True,
    directory: Annotated[Path | None, typer.Option("--dir", help="Where to put cluster and shards.")] = None,
    results: Annotated[Path, typer.Option(help="Where results are kept.")] = RESULTS,
) -> None:
    """Measures the pipeline on this machine, beside the alternatives."""
    effort = replace(BENCH, latency_s=seconds, repetitions=repetitions, baselines=BENCH.baselines if baselines else ())
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        result = uvloop.run(run(Path(scratch), effort, tell))
    print(write(result, results))


def write(result: dict[str, Any], results: Path) -> str:
    """Keeps a result, with its comparison with the one kept before; gives the report."""
    results.mkdir(exist_ok=True)
    path = results / f"{LATEST}.json"
    kept: dict[str, Any] = msgspec.json.decode(path.read_bytes()) if path.exists() else {}
    result["before"] = {
        "environment": kept.get("environment", {}),
        "compared": compare(kept.get("headline", {}), result["headline"]),
    }
    text = as_markdown(result)
    plot(result, results / f"{LATEST}.png")
    (results / f"{LATEST}.md").write_text(text)
    write_json(path, result)
    return text


if __name__ == "__main__":
    typer.run(main)
