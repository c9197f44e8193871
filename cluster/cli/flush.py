"""`fictl flush`: has what is pending committed and sealed, and says how much that was."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.common import (
    DEFAULT_DIRECTORY,
    NOT_READY,
    DirectoryOption,
    JsonOption,
    NatsOption,
    check_partitions,
    connected,
    console,
    find_servers,
    finite,
    login_place,
    make_table,
    print_json,
    progress_bar,
    run_async,
    say,
)
from cluster.cli.run import parse_partitions
from contracts.budgets import COMMAND_CONNECT, FLUSH, FLUSH_EXPLAIN
from contracts.errors import SettingsError
from contracts.settings import Settings

if TYPE_CHECKING:
    from cluster.flush import FlushReport, PartitionFlush


def flush(
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    nats: NatsOption = None,
    partitions: Annotated[str | None, typer.Option("--partition", help="Only these, e.g. 0,2,5-7.")] = None,
    limit_s: Annotated[
        float, typer.Option("--timeout", min=0, callback=finite, help="Seconds to wait at most.")
    ] = FLUSH.s,
    seal: Annotated[bool, typer.Option("--seal/--no-seal", help="Seal too, or commit only.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Waits until everything accepted so far is committed, has persist seal it, and says how much that was.

    What is accepted after it began is not waited for. Refused events count as done: they lie in FI_DLQ. Where nothing
    is pending nothing is done. Exits 3 when the time is up, and says who holds it up; nothing is lost by that.

    Example: fictl flush --dir .fi && fictl verify .fi
    """
    given = None if partitions is None else parse_partitions("--partition", partitions)
    if given == []:
        raise SettingsError(f"--partition {partitions!r}: names no partition; leave it out for all")

    async def work() -> FlushReport:
        from cluster.flush import Flusher
        from stages.runtime.api import Api
        from stages.runtime.facts import read_cluster

        begun_s = time.monotonic()
        async with connected(find_servers(directory, nats)) as client:
            facts = await read_cluster(client, wait_s=min(COMMAND_CONNECT.s, limit_s))
            chosen = range(facts.partitions) if given is None else given
            check_partitions("--partition", chosen, facts.partitions)
            by = login_place()
            with progress_bar("flushing") as tell:
                # What it asks is asked until its own time is up.
                api = Api(client, Settings(), give_up_s=limit_s + FLUSH_EXPLAIN.s)
                left_s = max(0.0, begun_s + limit_s - time.monotonic())
                return await Flusher(api, facts, chosen, by, tell).run(left_s, seal=seal)

    report = run_async(work())
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not report.done:
        for holdup in report.holdups:
            say(f"partitions {', '.join(map(str, holdup.partitions))} wait for {holdup.stage}: {holdup.why}")
        say(
            f"fi: not done after {report.elapsed_s:.1f} s; what was accepted is safe, and `fictl flush` can be repeated"
        )
        raise typer.Exit(NOT_READY)


def _show(report: FlushReport) -> None:
    table = make_table("partition", "committed", "duplicates", "refused", "sealed", "shards", "bytes", "")
    for row in report.partitions:
        table.add_row(str(row.partition), *_numbers([row]), _state(row))
    table.add_row("all", *_numbers(report.partitions), f"{report.elapsed_s:.1f} s")
    console().print(table)


def _numbers(rows: tuple[PartitionFlush, ...] | list[PartitionFlush]) -> list[str]:
    names = ("events", "duplicates", "dead_lettered", "sealed", "shards", "bytes")
    return [f"{sum(getattr(row, name) for row in rows):,}" for name in names]


def _state(row: PartitionFlush) -> str:
    if not row.done:
        return "not sealed" if row.committed else "not committed"
    return "done" if row.pending else "nothing was pending"
