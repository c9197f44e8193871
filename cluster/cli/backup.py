"""`fictl backup`: copies of sealed shards on another disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.common import (
    CORRUPT,
    JsonOption,
    StoreArgument,
    check_directory,
    given_settings,
    print_json,
    progress_bar,
    say,
)


def backup(
    directory: StoreArgument,
    target: Annotated[
        Path, typer.Argument(metavar="TO", help="Where copies go, on another disk: one directory for each store.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Copies sealed shards, and the records beside them, to another disk: those that are not there yet.

    A store lies on one disk. What is not sealed, FI_EVENTS has too; of what is sealed it keeps the newest
    FI_SEALED_KEPT shards of each partition. So run this so often that no more are sealed in between; it says when
    more were.

    Works while the pipeline writes. Every byte is held against its check sum on the way, and nothing is deleted. The
    copy is a store that can be read: `fictl verify TO`, `fictl events --dir TO`. Exits 4 if a shard is damaged.

    After the disk was lost: copy TO to where the store was, start persist there, and `fictl rebuild` makes what is
    newer again from FI_EVENTS.

    Example: fictl backup /var/lib/fi/shards /mnt/backup/node1
    """
    from stages.persist.backup import back_up

    check_directory("TO", target)
    kept = given_settings().settings.sealed_kept
    with progress_bar("copying shards") as progress:
        done = back_up(directory, target, now_ns=time.time_ns(), on_progress=progress)
    if as_json:
        print_json(done)
    else:
        for problem in done.problems:
            print(f"{problem.shard}: {problem.why}")
        for name in done.aside:
            print(f"moved aside: {name}")
        print(
            f"{done.copied} shards copied, {done.bytes} bytes; {target} has {done.shards} sealed shards of store "
            f"{done.store}"
        )
    if done.same_disk:
        say(f"fi: {target} is on the disk of the store, and is lost with it; is the other disk mounted there?")
    elif done.unmarked and not done.problems:
        say(f"fi: all is copied, but persist cannot tell so as fi.backup.age: {done.unmarked}")
    for partition, count in done.new.items():
        if count > kept:
            say(
                f"fi: partition {partition}: {count} shards were sealed since the last backup, and FI_EVENTS keeps "
                f"{kept}: for a while some were on one disk alone. Run it more often, or raise FI_SEALED_KEPT"
            )
    if done.problems:
        raise typer.Exit(CORRUPT)
