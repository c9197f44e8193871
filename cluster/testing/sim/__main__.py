"""``python -m cluster.testing.sim``: runs seeds, or replays one. Exit codes: 0 all is well, 1 a run convicts."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.testing.sim.faults import FAULTS
from cluster.testing.sim.run import Outcome, simulate

AT_ONCE: Final = 25
"""Seeds that a worker is handed together."""


class Summary(msgspec.Struct, kw_only=True):
    """What many runs came to.

    Attributes:
        runs, convicted: how many, and which seeds found something.
        events: sent in all runs.
        virtual_s, took_s: on the runs' own clocks, and on this one.
        drained_s_max: the longest time from healing until all was committed, virtual seconds.
        faults: kind → how often it struck.
    """

    runs: int = 0
    convicted: list[int] = msgspec.field(default_factory=list)
    events: int = 0
    virtual_s: float = 0.0
    took_s: float = 0.0
    drained_s_max: float = 0.0
    faults: dict[str, int] = msgspec.field(default_factory=dict)


def main(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to run.")] = 1000,
    start: Annotated[int, typer.Option(help="The first of them.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Run this one alone.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="With --seed: print everything that happens.")] = False,
    among: Annotated[
        list[str] | None, typer.Option(help="A kind of fault to strike in each run, and few others; may be repeated.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes to share the work.")] = 1,
    first: Annotated[bool, typer.Option("--first", help="Stop at the first run that convicts.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Runs the pipeline's protocol against a model of JetStream, and tries to make it lose, double or reorder events.

    Example: python -m cluster.testing.sim --seeds 1000 --start 1
    """
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    kinds = tuple(among or ())
    if unknown := [kind for kind in kinds if kind not in FAULTS]:
        raise typer.BadParameter(f"{unknown} is none of: {'; '.join(FAULTS)}", param_hint="--among")
    if seed is not None:
        raise typer.Exit(_replay(seed, kinds, trace, errors))
    if trace:
        raise typer.BadParameter("there is one trace for one seed: give --seed too", param_hint="--trace")
    summary = _run_all(range(start, start + seeds), kinds, jobs, first, errors)
    if as_json:
        typer.echo(msgspec.json.encode(summary))
    else:
        typer.echo(
            f"{summary.runs} runs, {summary.events} events, {sum(summary.faults.values())} faults of "
            f"{len(summary.faults)} kinds: {len(summary.convicted)} convict. Drained at most "
            f"{summary.drained_s_max:.1f} s after healing (virtual). {summary.took_s:.1f} s, "
            f"{60 * summary.runs / summary.took_s:.0f} runs a minute"
        )
    raise typer.Exit(1 if summary.convicted else 0)


def _run_all(chosen: range, among: tuple[str, ...], jobs: int, first: bool, errors: Console) -> Summary:
    summary = Summary()
    faults: Counter[str] = Counter()
    begun_s = time.monotonic()
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=len(chosen))
        for outcome in _outcomes(chosen, among, jobs):
            progress.advance(task)
            summary.runs += 1
            summary.events += outcome.events
            summary.virtual_s += outcome.virtual_s
            faults.update(fault.kind for fault in outcome.faults)
            if outcome.ok:
                summary.drained_s_max = max(summary.drained_s_max, outcome.drained_s)
            else:
                summary.convicted.append(outcome.seed)
                errors.print(_words(outcome), markup=False)
                if first:
                    break
    summary.took_s = time.monotonic() - begun_s
    summary.faults = dict(sorted(faults.items()))
    return summary


def _outcomes(chosen: range, among: tuple[str, ...], jobs: int) -> Iterator[Outcome]:
    packs = [chosen[at : at + AT_ONCE] for at in range(0, len(chosen), AT_ONCE)]
    if jobs == 1:
        for pack in packs:
            yield from _run_pack(pack, among)
        return
    with ProcessPoolExecutor(jobs) as pool:
        try:
            for outcomes in pool.map(partial(_run_some, among=among), packs):
                yield from outcomes
        finally:
            pool.shutdown(cancel_futures=True)


def _run_some(pack: range, among: tuple[str, ...]) -> list[Outcome]:
    return list(_run_pack(pack, among))


def _run_pack(pack: range, among: tuple[str, ...]) -> Iterator[Outcome]:
    # Tasks and their exceptions are cycles: collected between runs, not within.
    gc.disable()
    try:
        for seed in pack:
            yield simulate(seed, among=among)
    finally:
        gc.enable()
        gc.collect()


def _replay(seed: int, among: tuple[str, ...], trace: bool, errors: Console) -> int:
    lines: list[str] = []
    outcome = simulate(seed, among=among, trace=lines)
    if trace:
        for line in lines:
            typer.echo(line)
    for fault in outcome.faults:
        errors.print(str(fault), markup=False)
    errors.print(_words(outcome) if not outcome.ok else f"seed {seed}: {outcome.verdict}", markup=False)
    errors.print(f"trace {outcome.fingerprint}", markup=False)
    return 0 if outcome.ok else 1


def _words(outcome: Outcome) -> str:
    struck = ", ".join(fault.kind for fault in outcome.faults)
    among = "".join(f' --among "{kind}"' for kind in outcome.among)
    return (
        f"seed {outcome.seed}: {outcome.problems[0]}\n  after: {struck}\n"
        f"  replay: python -m cluster.testing.sim --seed {outcome.seed}{among} --trace"
    )


if __name__ == "__main__":
    typer.run(main)
