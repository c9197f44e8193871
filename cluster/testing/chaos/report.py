"""Outcomes of chaos in words, as a file, and as a table of how long the pipeline took to become whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cluster.testing.chaos.run import Outcome


def read_outcomes(path: Path) -> list[Outcome]:
    """The outcomes kept in a file; none when there is no file. Raises `msgspec.MsgspecError` for another file."""
    return msgspec.json.decode(path.read_bytes(), type=list[Outcome]) if path.exists() else []


def write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Inverse of `read_outcomes`."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(outcomes)) + b"\n")


def summary(outcome: Outcome) -> str:
    """What came of a run, in a few lines."""
    played = [step for step in outcome.steps if step.whole_s is not None]
    faults = ", ".join(f"{count} {kind}" for kind, count in outcome.faults.items())
    lines = [
        f"seed {outcome.seed}: {sum(len(step.kinds) for step in played)} faults in {outcome.minutes:g} minutes, "
        f"{len(outcome.steps) - len(played)} steps passed over",
        f"{outcome.attempted} events sent, {outcome.acknowledged} acknowledged, {outcome.repeated} sent again on "
        f"purpose, {outcome.stored} stored, {outcome.dead_lettered} dead letters",
        f"{faults}; {outcome.recovered} recovered, {outcome.unknown} unknown; drained in {outcome.drained_s:.1f} s",
        *(f"PROBLEM: {problem}" for problem in (*outcome.problems, *outcome.counter_examples)),
        "nothing convicts the pipeline" if outcome.ok else "CONVICTED",
    ]
    return "\n".join(lines)


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Two tables: the runs, and for each kind of fault how long it took to become whole again.

    A pair counts for both of its kinds.
    """
    rows = ["| seed | minutes | faults | events | lost | duplicated | reordered | altered |", "|" + "---|" * 8]
    times: defaultdict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        count = 0
        for step in outcome.steps:
            if step.whole_s is not None:
                count += len(step.kinds)
                for kind in step.kinds:
                    times[kind].append(step.whole_s)
        found = " | ".join(str(outcome.faults[kind]) for kind in ("lost", "duplicated", "reordered", "altered"))
        rows.append(f"| {outcome.seed} | {outcome.minutes:g} | {count} | {outcome.acknowledged} | {found} |")
    rows += ["", "| fault | times | median s | longest s |", "|" + "---|" * 4]
    for kind, seconds in sorted(times.items()):
        middle = sorted(seconds)[len(seconds) // 2]
        rows.append(f"| {kind} | {len(seconds)} | {middle:.1f} | {max(seconds):.1f} |")
    return "\n".join(rows)
