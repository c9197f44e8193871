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
    print_json,
    print_lines,
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

    A store lies on one disk. What is not sealed, FI_EVENTS has too; and from the first complete run of this on, what
    is sealed and not copied yet, while it is at most half full. So run this every few minutes.

    Works while the pipeline writes. Every byte is held against its check sum on the way, and nothing is deleted. The
    copy is a store that can be read: `fictl verify TO`, `fictl events --dir TO`. Exits 4 if a shard or its record is
    damaged.

    After the disk was lost: copy TO to where the store was, start persist there, and `fictl rebuild` makes what is
    newer again from FI_EVENTS.

    Example: fictl backup /var/lib/fi/shards /mnt/backup/node1
    """
    from stages.persist.backup import back_up

    check_directory("TO", target)
    with progress_bar("copying shards") as progress:
        done = back_up(directory, target, now_ns=time.time_ns(), on_progress=progress)
    if as_json:
        print_json(done)
    else:
        for problem in done.problems:
            print_lines(f"{problem.shard}: {problem.why}")
        for name in done.aside:
            print_lines(f"moved aside: {name}")
        print_lines(
            f"{done.copied} shards copied, {done.bytes} bytes; {target} has {done.shards} sealed shards of store "
            f"{done.store}"
        )
    if done.same_disk:
        say(f"fi: {target} is on the disk of the store, and is lost with it; is the other disk mounted there?")
    elif done.unmarked and not done.problems:
        say(
            f"fi: all is copied, but persist does not know: {done.unmarked}; so fi.backup.age does not tell it, nor "
            "does FI_EVENTS keep what is not copied yet. Let this user write there"
        )
    if done.problems:
        raise typer.Exit(CORRUPT)
