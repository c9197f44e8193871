"""`fictl top`: `fictl status`, live."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cluster.cli.common import NatsOption, console, finite, run_async
from cluster.cli.status import RunOption, find_run, title
from contracts.budgets import TOP_INTERVAL
from contracts.errors import SettingsError


def top(
    directory: RunOption = None,
    nats: NatsOption = None,
    interval_s: Annotated[
        float, typer.Option("--interval", min=0.2, max=60, callback=finite, help="Seconds from one look to the next.")
    ] = TOP_INTERVAL.s,
) -> None:
    """Shows what `fictl status` shows, live, with sparklines: what is wrong first, and what to do about it.

    Rates are over two seconds, latencies over ten. Keys: q quits, p shows partitions in place of streams, space
    freezes. It goes on when servers are gone and come back. See `fictl status --help` for what the numbers count and
    what a look asks of the servers.

    Example: fictl top --dir /var/lib/fi
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise SettingsError("fictl top needs a terminal; elsewhere use `fictl status`, or `fictl status --json`")
    servers, run = find_run(directory, nats)

    async def work() -> None:
        from cluster.overview import Looker
        from cluster.top import Top

        looker = Looker(servers, run)
        try:
            await Top(looker, interval_s, title(servers.urls, run), console()).run()
        finally:
            await looker.close()

    run_async(work())
