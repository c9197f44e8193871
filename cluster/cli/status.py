"""`fictl status`: the whole pipeline on one screen, and what is wrong with it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from cluster.cli.common import (
    DEFAULT_DIRECTORY,
    NOT_READY,
    JsonOption,
    NatsOption,
    console,
    find_servers,
    finite,
    print_json,
    progress_bar,
    run_async,
)
from cluster.state import NotRunningError
from contracts.budgets import STATUS_FIRST_LOOK, STATUS_WINDOW
from contracts.settings import hide_credentials
from stages.runtime.access import Servers

if TYPE_CHECKING:
    from cluster.overview import Overview
    from cluster.problem import Problem
    from cluster.summary import Summary

RunOption = Annotated[
    Path | None,
    typer.Option("--dir", help="A run on this machine: its processes and disk are shown too. Default .fi, or none."),
]
PartitionsOption = Annotated[bool, typer.Option("--partitions", help="Show each partition in place of the streams.")]


def find_run(directory: Path | None, nats: list[str] | None) -> tuple[Servers, Path | None]:
    """Servers to ask, and the run on this machine to look at: the one in `directory`, else the default without `nats`.

    Raises as `find_servers`.
    """
    if directory is None and not nats:
        directory = DEFAULT_DIRECTORY
    return find_servers(directory or DEFAULT_DIRECTORY, nats), directory


def title(urls: tuple[str, ...], run: Path | None) -> str:
    """What the screen calls the pipeline."""
    return hide_credentials(urls[0]) if run is None else str(run)


def status(
    directory: RunOption = None,
    nats: NatsOption = None,
    window_s: Annotated[
        float,
        typer.Option(
            "--window", min=0.1, max=60, callback=finite, help="Seconds between the two looks that rates are from."
        ),
    ] = STATUS_WINDOW.s,
    by_partition: PartitionsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Shows what is wrong and what to do, then stages, streams, shards, dead letters and processes, on one screen.

    Exits 0 when all is well and 3 when something is not. It takes about two seconds, and no more than about five
    whatever is down; what could not be read is a ? and named. With --json: `well`, `problems`, and every number, of
    which there is none where nothing runs.

    Waiting counts accepted messages (of FI_EVENTS) that the stage before has finished and this one has not; accepted is
    in messages a second, persisted in events. Latencies are percentiles over the window, from the processes of the run
    in --dir, against their budgets; ! marks a p95 over its budget. Events and shards are what receipts and seal records
    say; shards 3+1 are three sealed and a live one.

    A look asks the servers for eight streams, two buckets and six messages for each partition, and where something
    waits, a count and a message for each stage.

    Example: fictl status --dir /var/lib/fi
    """
    from cluster.problem import Problem
    from cluster.screen import Page, render
    from cluster.summary import summarize
    from cluster.verdict import judge

    try:
        servers, run = find_run(directory, nats)
    except NotRunningError as error:
        if as_json:
            start = f"`fictl up --dir {directory or DEFAULT_DIRECTORY}`"
            problem = Problem(urgency=1, kind="not_running", what=str(error), next=start)
            print_json({"well": False, "problems": (problem,)})
        raise
    with progress_bar("looking"):
        summary = summarize(run_async(_look_twice(servers, run, window_s)))
    problems = judge(summary)
    if as_json:
        print_json(as_values(summary, problems))
    else:
        screen = console()
        # On a terminal the verdict must not scroll away; below it is the prompt.
        height = screen.height - 1 if screen.is_terminal else None
        page = Page(width=screen.width, height=height, title=title(servers.urls, run), by_partition=by_partition)
        for line in render(summary, problems, page):
            screen.print(line, no_wrap=True, crop=True)
    if problems:
        raise typer.Exit(NOT_READY)


def as_values(summary: Summary, problems: tuple[Problem, ...]) -> dict[str, Any]:
    """What `--json` prints."""
    return {"well": not problems, "problems": problems, **msgspec.structs.asdict(summary), "waiting": summary.waiting}


async def _look_twice(servers: Servers, run: Path | None, window_s: float) -> list[Overview]:
    from cluster.overview import Looker

    looker = Looker(servers, run)
    try:
        began_s = asyncio.get_running_loop().time()
        first = await looker.look(STATUS_FIRST_LOOK.s)
        await asyncio.sleep(began_s + window_s - asyncio.get_running_loop().time())
        return [first, await looker.look()]
    finally:
        await looker.close()
