"""`fictl publish`: what an edge gateway does, for a file or a pipe of events."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.common import (
    DEFAULT_DIRECTORY,
    FAILED,
    DirectoryOption,
    JsonOption,
    NatsOption,
    connected,
    console,
    find_servers,
    finite,
    given_settings,
    make_table,
    print_json,
    progress_bar,
    run_async,
    say,
)
from contracts.budgets import COMMAND_READY, PROGRESS_REFRESH
from stages.runtime.access import Servers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.publish import PublishReport
    from contracts.settings import Settings

REFUSED_SHOWN_MAX = 20


def publish(
    file: Annotated[Path, typer.Argument(help="One event a line (NDJSON), or - for stdin.", show_default=False)],
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    nats: NatsOption = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, callback=finite, metavar="PER_S", help="Events a second at most.")
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, max=4096, help="Up to so many waiting events of a consultation go in one message.")
    ] = 1,
    in_flight: Annotated[int, typer.Option(min=1, max=65536, help="Messages on their way at once.")] = 256,
    site: Annotated[str | None, typer.Option(help="Site of events without metadata.site_id.")] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            min=0.001, callback=finite, metavar="S", help="Give up on a message after so long. Default: never."
        ),
    ] = None,
    check_only: Annotated[bool, typer.Option("--check-only", help="Check the lines, publish nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Publishes events as an edge gateway does: in order for each consultation, retried until accepted, held when full.

    Publishing the same file twice adds nothing. A line that breaks the contract is refused with its number, field and
    reason; everything else is published. Exits 1 when a line was refused. --check-only also holds payloads to the rules
    that segment refuses by, those of the built-in policy; published, such an event becomes a dead letter.

    Example: fictl publish day.ndjson --rate 500 --json
    """
    from cluster.publish import check_lines

    descriptor = sys.stdin.fileno() if str(file) == "-" else os.open(file, os.O_RDONLY)
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        if check_only:
            with progress_bar("checking"):
                report = run_async(check_lines(_lines(descriptor), site=site))
        else:
            servers = find_servers(directory, nats)
            settings = given_settings().settings
            work = _publish(
                descriptor, servers, settings, in_flight, site=site, batch=batch, rate_per_s=rate, deadline_s=deadline
            )
            report = run_async(work)
    except KeyboardInterrupt:
        say("fi: interrupted; publish the same file again to be sure of it: what was accepted is not stored twice")
        raise
    finally:
        if descriptor != 0:
            os.close(descriptor)
    _show_refused(report)
    if as_json:
        print_json(summary(report))
    else:
        _show(report, check_only)
    if report.refused_count:
        raise typer.Exit(FAILED)


def summary(report: PublishReport) -> dict[str, Any]:
    """The report as `fictl publish --json` prints it."""
    return {
        "lines": report.lines,
        "published": report.published,
        "accepted": report.accepted,
        "duplicates": report.duplicates,
        "refused": report.refused_count,
        "refused_lines": report.refused,
        "retries": report.retries,
        "held_s": round(report.held_s, 3),
        "elapsed_s": round(report.elapsed_s, 3),
        "events_per_s": round(report.accepted / report.elapsed_s, 1) if report.elapsed_s else 0.0,
        "latency_ms": {"accepted": report.latency_ms()},
    }


def _lines(descriptor: int) -> Any:
    from cluster.feed import read_lines

    return read_lines(descriptor)


async def _publish(
    descriptor: int, servers: Servers, settings: Settings, in_flight: int, **options: Any
) -> PublishReport:
    from cluster.gateway import Gateway
    from cluster.publish import LinePublisher
    from contracts.subjects import EVENTS
    from stages.runtime.facts import read_cluster
    from stages.runtime.observing import observing
    from stages.runtime.tasks import end_tasks

    async with (
        observing(settings, "fi-gateway", "publish", os.environ) as telemetry,
        connected(servers, beside=EVENTS) as client,
    ):
        await read_cluster(client, wait_s=COMMAND_READY.s)
        publisher = LinePublisher(Gateway(client, in_flight=in_flight, telemetry=telemetry), **options)
        with _progress(descriptor) as refresh:
            showing = asyncio.create_task(_repeat(lambda: refresh(publisher.report)))
            try:
                return await publisher.run(_lines(descriptor))
            finally:
                await end_tasks(showing)
                refresh(publisher.report)


async def _repeat(refresh: Callable[[], None]) -> None:
    while True:
        refresh()
        await asyncio.sleep(PROGRESS_REFRESH.s)


@contextmanager
def _progress(descriptor: int) -> Iterator[Callable[[PublishReport], None]]:
    """A progress bar on a terminal's stderr: by bytes read of a file, a pulse for a pipe."""
    if not sys.stderr.isatty():
        yield lambda report: None
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("publishing"), BarColumn(), TextColumn("{task.fields[counts]}"))
    size_bytes = os.fstat(descriptor).st_size
    with Progress(*columns, TimeElapsedColumn(), console=console(stderr=True)) as bar:
        task = bar.add_task("", total=size_bytes or None, counts="")

        def refresh(report: PublishReport) -> None:
            counts = f"{report.accepted} accepted, {report.refused_count} refused"
            done = os.lseek(descriptor, 0, os.SEEK_CUR) if size_bytes else None
            bar.update(task, completed=done, counts=counts)

        yield refresh


def _show_refused(report: PublishReport) -> None:
    for line in report.refused[:REFUSED_SHOWN_MAX]:
        say(f"line {line.line}: {line.field or 'whole line'}: {line.detail} [{line.reason}]")
    if report.refused_count > REFUSED_SHOWN_MAX:
        say(f"… and {report.refused_count - REFUSED_SHOWN_MAX} more lines; --json lists them")


def _show(report: PublishReport, check_only: bool) -> None:
    table = make_table("", "events", title="checked" if check_only else "published")
    rows = {"lines": report.lines}
    if not check_only:
        rows |= {"accepted": report.accepted, "of these known before": report.duplicates}
    for name, count in {**rows, "refused": report.refused_count}.items():
        table.add_row(name, str(count))
    screen = console()
    screen.print(table)
    if not check_only:
        figures = summary(report)
        found = report.latency_ms().items()
        latency = "  ".join(f"{name} {'-' if value is None else format(value, '.1f')}" for name, value in found)
        screen.print(f"{figures['events_per_s']} events/s; accepted latency ms: {latency}; held {report.held_s:.1f} s")
