"""``python -m benchmarks.baselines DESIGN STAGE --url … --dir … --port …``: one process of a baseline; says READY."""

from __future__ import annotations

import argparse
from pathlib import Path

import uvloop

from benchmarks.baselines import jetstream
from benchmarks.baselines.jetstream import Line
from contracts.subjects import STAGES


def main() -> None:
    """Runs until it is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("design", choices=("chain", "tuned", "faststream", "faststream-batched", "redis"))
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--url", action="append", required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    line = Line(given.url, given.stage, given.dir, given.port)
    if given.design == "redis":
        from benchmarks.baselines import redisstream

        uvloop.run(redisstream.run_consumer(line, _ready))
    elif given.design.startswith("faststream"):
        from benchmarks.baselines import fast

        uvloop.run(fast.run_stage(line, batched=given.design.endswith("batched"), ready=_ready))
    else:
        uvloop.run(jetstream.run_stage(line, tuned=given.design == "tuned", ready=_ready))


def _ready() -> None:
    print("READY", flush=True)


if __name__ == "__main__":
    main()
