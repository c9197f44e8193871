"""`fi run`: one actor of one stage, against any cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.common import DEFAULT_DIRECTORY, DirectoryOption, NatsOption, find_servers, run_async
from contracts.errors import SettingsError
from contracts.settings import load_settings
from contracts.subjects import STAGES, Stage

SHARDS = "shards"


def run(
    stage: Annotated[str, typer.Argument(help=f"One of {', '.join(STAGES)}.", show_default=False)],
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    nats: NatsOption = None,
    partitions: Annotated[
        str | None, typer.Option(help="Lanes to hold, e.g. 0,2,5-7. Default: all of the cluster's.")
    ] = None,
    shards: Annotated[
        Path | None, typer.Option(help="Store directory on local disk (persist). Default: DIR/shards.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Shown in logs and by the servers. Default: the stage.")] = None,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
) -> None:
    """Runs one process of STAGE until SIGTERM, then drains and exits 0.

    Prints READY on stdout once every lane has found its place; logs go to stderr as JSON lines. Settings come from FI_
    environment variables.

    Example: fi run segment --nats nats://10.0.0.1:4222 --nats nats://10.0.0.2:4222 --partitions 0-3
    """
    if stage not in STAGES:
        raise SettingsError(f"no stage is called {stage!r}; use one of {', '.join(STAGES)}")
    chosen: Stage = stage
    settings = load_settings(os.environ)
    urls = find_servers(directory, nats)
    if shards is None and nats and chosen == "persist":
        raise SettingsError("persist needs a store: give --shards DIR, a directory on this node's own disk")
    store = shards or directory / SHARDS

    from stages.actors import lane_maker
    from stages.runtime.logs import configure_logging
    from stages.runtime.process import StageProcess
    from stages.runtime.watch import Watch

    configure_logging(name or stage, log_level)

    async def serve() -> None:
        async with Watch(
            chosen,
            name or stage,
            settings,
            os.environ,
            directory=None if nats else directory,
            store=store if chosen == "persist" else None,
        ) as watch:
            await StageProcess(
                chosen,
                urls,
                settings,
                lane_maker(chosen, store),
                partitions=None if partitions is None else parse_partitions(partitions),
                name=name or stage,
                on_ready=lambda: print("READY", flush=True),
                watch=watch,
            ).run()

    run_async(serve())


def parse_partitions(text: str) -> list[int]:
    """``0,2,5-7`` → [0, 2, 5, 6, 7]; empty text is no partition.

    Raises:
        SettingsError: not of that form.
    """
    chosen: list[int] = []
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise SettingsError(f"--partitions {text}: {part!r} is neither a number nor a range such as 0-3")
        chosen += range(int(first), int(last if dash else first) + 1)
    return chosen
