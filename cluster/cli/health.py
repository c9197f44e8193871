"""`fictl health`: how every process of a run is."""

from __future__ import annotations

import typer

from cluster.cli.common import (
    DEFAULT_DIRECTORY,
    NOT_READY,
    DirectoryOption,
    JsonOption,
    console,
    make_table,
    print_json,
    progress_bar,
    run_async,
    say,
)


def health(directory: DirectoryOption = DEFAULT_DIRECTORY, as_json: JsonOption = False) -> None:
    """Asks every process of the run in DIR whether it does its work, one line each. Exits 3 unless all do.

    A stage is ready when it is connected, its streams have leaders, its lanes have found their place, its disk has
    room, and it is not draining.

    Example: fictl health --dir /var/lib/fi
    """
    from cluster.health import look

    with progress_bar("asking"):
        found = run_async(look(directory))
    ready = bool(found) and all(process.ready for process in found)
    if as_json:
        print_json({"ready": ready, "processes": found})
    else:
        table = make_table("process", "kind", "pid", "ready", "why not", "health port")
        for process in found:
            cells = (process.name, process.kind, str(process.pid or "-"), "yes" if process.ready else "NO")
            table.add_row(*cells, process.why, process.url if process.kind != "server" else "")
        console().print(table)
    if not ready:
        waiting = ", ".join(process.name for process in found if not process.ready) or "nothing runs yet"
        say(f"not ready: {waiting}; the logs are in {directory / 'logs'}")
        raise typer.Exit(NOT_READY)
