"""The long run: ``python -m tests.chaos.crash --runs 1000 --seed 1``. A line every 50 runs, JSON at the end."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .cuts import run_cuts
from .kills import run_kills
from .reader import Verdict

_LINE_EVERY = 50


def main() -> int:
    """Exit code 0 when nothing was lost, changed or unreadable; 1 otherwise."""
    parser = argparse.ArgumentParser(prog="tests.chaos.crash", description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="kills, and as many power cuts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="where stores are made; default: the temporary directory")
    options = parser.parse_args()
    total = Verdict()
    events = 0
    moments: dict[str, Counter[str]] = {}
    for name, run in (("kills", run_kills), ("cuts", run_cuts)):
        scratch = Path(tempfile.mkdtemp(prefix="crash-", dir=options.scratch))
        moments[name], committed = _count(name, run(options.runs, options.seed, scratch), total)
        events += committed
        if total.ok:
            shutil.rmtree(scratch)
    summary = {
        "kills": moments["kills"].total(),
        "cuts": moments["cuts"].total(),
        "events": events,
        "lost": total.lost,
        "changed": total.changed,
        "unreadable": total.unreadable,
        "seed": options.seed,
        "moments": moments,
    }
    print(json.dumps(summary))
    return 0 if total.ok else 1


def _count(name: str, runs: Iterator[tuple[str, int, Verdict]], total: Verdict) -> tuple[Counter[str], int]:
    """Adds every run's verdict to `total`; gives how many runs hit each step, and the events committed."""
    moments: Counter[str] = Counter()
    events = 0
    began = time.monotonic()
    for number, (moment, committed, verdict) in enumerate(runs, 1):
        moments[moment] += 1
        events += committed
        for note in verdict.notes:
            print(note, file=sys.stderr, flush=True)
        total.add(verdict)
        if number % _LINE_EVERY == 0:
            print(
                f"{number} {name}, {events} events, {total.lost} lost, {total.changed} changed, "
                f"{total.unreadable} unreadable, {time.monotonic() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return moments, events


if __name__ == "__main__":
    sys.exit(main())
