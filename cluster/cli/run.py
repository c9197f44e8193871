"""`fictl run`: one actor of one stage, against any cluster."""

from __future__ import annotations

import gc
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from cluster.cli.common import (
    DEFAULT_DIRECTORY,
    DirectoryOption,
    NatsOption,
    SetOption,
    check_directory,
    find_servers,
    given_settings,
    named_stage,
    run_async,
)
from contracts.budgets import SWITCH_INTERVAL
from contracts.errors import SettingsError
from contracts.settings import PARTITIONS_MAX
from contracts.subjects import STAGES, is_token
from stages.persist.names import SHARDS

LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)


def run(
    stage: Annotated[str, typer.Argument(help=f"One of {', '.join(STAGES)}.", show_default=False)],
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    nats: NatsOption = None,
    partitions: Annotated[
        str | None, typer.Option(help="Lanes to hold whoever else runs, e.g. 0,2,5-7. Default: a share.")
    ] = None,
    shards: Annotated[
        Path | None, typer.Option(help="Store directory on local disk (persist). Default: DIR/shards.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Unique for stage and node; kept over restarts. Default: stage and process id.")
    ] = None,
    chosen_settings: SetOption = None,
    log_level: Annotated[str, typer.Option(help=f"One of {', '.join(LOG_LEVELS)}.")] = "INFO",
) -> None:
    """Runs one process of STAGE until SIGTERM, then drains and exits 0.

    All processes of a stage, on any node, share the partitions; `fictl members` shows who has which. A process that is
    started again under its old name gets its old share.

    Prints READY on stdout once every lane of its share has found its place; logs go to stderr as JSON lines.
    `fictl config show` shows the settings it would get.

    Example: fictl run segment --nats nats://10.0.0.1:4222 --nats nats://10.0.0.2:4222 --name segment-a
    """
    chosen = named_stage(stage)
    own_name = f"{stage}-{os.getpid()}" if name is None else name
    if not is_token(own_name):
        raise SettingsError(f"--name {own_name}: a name is 1 to 64 of A-Z a-z 0-9 _ -, e.g. {stage}-a")
    if log_level not in LOG_LEVELS:
        raise SettingsError(f"--log-level {log_level}: use one of {', '.join(LOG_LEVELS)}")
    lanes = None if partitions is None else parse_partitions("--partitions", partitions)
    settings = given_settings(chosen_settings).settings
    servers = find_servers(directory, nats, chosen_settings)
    if shards is None and nats and chosen == "persist":
        raise SettingsError("persist needs a store: give --shards DIR, a directory on this node's own disk")
    store = shards or directory / SHARDS
    if shards is not None:
        check_directory("--shards", shards)

    from stages.actors import actor
    from stages.runtime.allocator import share_arena
    from stages.runtime.logs import configure_logging
    from stages.runtime.process import StageProcess
    from stages.runtime.watch import Watch

    configure_logging(own_name, log_level)

    async def serve() -> None:
        async with Watch(
            chosen,
            own_name,
            settings,
            os.environ,
            directory=None if nats else directory,
            store=store if chosen == "persist" else None,
        ) as watch:
            await StageProcess(
                chosen,
                servers,
                settings,
                actor(chosen, store),
                partitions=lanes,
                name=own_name,
                on_ready=lambda: print("READY", flush=True),
                watch=watch,
            ).run()

    # What was imported lives as long as the process: no collection needs to look at it again.
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_INTERVAL.s)
    share_arena()
    run_async(serve())


def parse_partitions(option: str, text: str) -> list[int]:
    """``0,2,5-7``, given for `option` → [0, 2, 5, 6, 7], each once; empty text is no partition.

    Raises:
        SettingsError: not of that form, or more than a cluster can have.
    """
    chosen: set[int] = set()
    for part in filter(None, text.split(",")):
        found = _RANGE.fullmatch(part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < PARTITIONS_MAX:
            raise SettingsError(
                f"{option} {text}: {part!r} is neither a number up to {PARTITIONS_MAX - 1} nor a range such as 0-3"
            )
        chosen.update(range(first, last + 1))
    return sorted(chosen)
