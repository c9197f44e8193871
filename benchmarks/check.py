"""``python -m benchmarks.check``: whether the headline's ratios are clearly worse than the kept ones; two minutes.

Exits 1 when one is, and says which, by how much and what to do; 3 where none are kept, or one that is kept could not be
measured now: what was not measured did not pass. Measures ratios only: sustained rates of ours, of the ceiling and of
the alternatives, in turns.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import uvloop

from benchmarks.headline import RIVALS
from benchmarks.regression import judge_ratios
from benchmarks.report import LATEST, RESULTS, tell
from benchmarks.suite import CHECK, run

_NOT_READY = 3


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON.")] = False,
    directory: Annotated[Path | None, typer.Option("--dir", help="Where to put cluster and shards.")] = None,
    kept: Annotated[Path, typer.Option(help="What `make bench` wrote.")] = RESULTS / f"{LATEST}.json",
) -> None:
    """Compares today's ratios with the kept ones."""
    before: dict[str, Any] = msgspec.json.decode(kept.read_bytes()) if kept.exists() else {}
    if not before.get("ratios"):
        print(f"{kept} holds no ratios to compare with; run `make bench` on a quiet machine first", file=sys.stderr)
        raise typer.Exit(_NOT_READY)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        result = uvloop.run(run(Path(scratch), CHECK, tell))
    asked = {name: values for name, values in result["ratios"].items() if _is_asked(name)}
    rows = judge_ratios(before["ratios"], asked)
    if as_json:
        print(msgspec.json.encode({"verdicts": rows, "environment": result["environment"]}).decode())
    else:
        print("\n".join(f"{row['verdict']:>7}  {row['words']}" for row in rows))
    if any(row["verdict"] == "worse" for row in rows):
        raise typer.Exit(1)
    if any(row["verdict"] == "unknown" and before["ratios"].get(row["figure"]) for row in rows):
        raise typer.Exit(_NOT_READY)


def _is_asked(ratio: str) -> bool:
    """False for a rival that a check never visits."""
    return ratio not in RIVALS or any(design in CHECK.baselines for design in RIVALS[ratio])


if __name__ == "__main__":
    typer.run(main)
