"""Files of a partition that are given up: they are moved aside, never deleted.

A receipt gives them up. It comes between two steps: `prepare_aside` needs room and rights and changes nothing that
counts, `set_aside` only gives names. What is interrupted between them is found again by `given_up`, from the receipt
and the files alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from contracts.errors import ShardCorruptError, ShardError, StoreFailedError
from contracts.hashing import MerkleFrontier
from contracts.receipts import SealRecord, StoreEnd
from stages.persist.files import is_lost, publish_file, sync_dir, write_new_file
from stages.persist.live import LiveReader, LiveShard
from stages.persist.names import ShardFile, list_leftovers, list_shards, parse_name, tmp_path
from stages.persist.newlive import create_live
from stages.persist.records import record_path
from stages.persist.storedir import Store

ASIDE = "superseded"
"""The directory in a store for files that were given up."""

_READ_BYTES = 1024 * 1024


def read_through(path: Path) -> None:
    """Reads every byte. Raises `OSError` where the disk cannot give one."""
    fd = os.open(path, os.O_RDONLY)
    try:
        at = 0
        while piece := os.pread(fd, _READ_BYTES, at):
            at += len(piece)
    finally:
        os.close(fd)


def given_up(
    store: Store, partition: int, end: StoreEnd, seals: Sequence[SealRecord] = (), *, unseen: bool = False
) -> list[ShardFile]:
    """The partition's files in `store` that go aside when it is taken back to `end`; none if it is only planned.

    That is what holds nothing of what `end` accepts; the live shard that holds more than that, whose accepted commits
    `set_aside` keeps in a new file; and what is of a shard that another store has sealed.

    Args:
        store: which.
        partition: lane.
        end: how far the store's files are accepted.
        seals: the records in force.
        unseen: a live shard holds more also where no reader was shown it, or where it cannot be read to its end.
            Without, an owner that was killed leaves such a tail, and the next one cuts it.

    Raises:
        OSError: the store cannot be read.
    """
    if not store.directory.exists():
        return []
    owners = {seal.shard: seal.store for seal in seals}
    current, others = [], []
    for file in _forms(store, partition):
        if file.shard == end.shard:
            current.append(file)
        elif file.shard > end.shard or (
            file.shard < end.first and owners.get(file.shard, store.store_id) != store.store_id
        ):
            others.append(file)
    if end.commits:
        # A sealed form beside such a live one is damaged, or holds what the live one holds too much.
        beyond = current if any(_holds_more(file, end.commits, unseen) for file in current) else []
    else:
        beyond = [file for file in current if _holds_more(file, 0, unseen)]
    return [*beyond, *others]


def _forms(store: Store, partition: int) -> list[ShardFile]:
    """Every form of every shard, also the live one of a sealed shard."""
    hidden = (parse_name(path) for path in list_leftovers(store.directory, partition))
    return [
        *list_shards(store.directory).get(partition, ()),
        *(file for file in hidden if file is not None),
    ]


def _holds_more(file: ShardFile, commits: int, unseen: bool) -> bool:
    """Whether there is more in a shard than its first `commits` commits. `unseen`: as for `given_up`."""
    if file.sealed:
        return not commits
    try:
        with LiveReader(file.path) as reader:
            if commits < reader.watermark() <= reader.rows_max:
                return True
            if commits and not unseen:
                return False
            if unseen:
                read_through(file.path)
            return any(map(any, reader.read_rows(commits, reader.rows_max)))
    except (ShardError, OSError) as error:
        if isinstance(error, OSError) and not is_lost(error):
            raise
        return unseen or not commits


def prepare_aside(store: Store, files: Sequence[ShardFile], end: StoreEnd) -> None:
    """Does all of `set_aside` that needs room or rights. To be called before the receipt that gives the files up.

    If the process dies or the power fails here: the directory `ASIDE`, and `.tmp` files that nobody reads.

    Args:
        store: which. The partition's lock must be held, until `set_aside` is done.
        files: as `given_up` says.
        end: how far they are accepted.

    Raises:
        ShardError: the live shard has fewer whole commits than `end` keeps.
        StoreFailedError: nothing can be moved to `ASIDE`.
        OSError: the disk refused.
    """
    if not files:
        return
    aside, tmp = store.directory / ASIDE, tmp_path(files[0].path)
    try:
        _make(aside)
        write_new_file(tmp, b"")
        tmp.rename(aside / tmp.name)
        (aside / tmp.name).unlink()
    except OSError as error:
        raise StoreFailedError(
            f"{files[0].path}: is given up and cannot be moved to {aside} ({error}), so nothing was begun. Make that a "
            "directory on the same disk that this user may write to"
        ) from error
    for file in files:
        if _is_kept(file, end):
            _write_kept(store, file.path, tmp_path(file.path), end.commits)


def _is_kept(file: ShardFile, end: StoreEnd) -> bool:
    """True for the live shard of which commits are accepted."""
    return not file.sealed and file.shard == end.shard and end.commits > 0


def _write_kept(store: Store, path: Path, kept: Path, commits: int) -> None:
    """Writes `kept`: the live shard `path` with its first `commits` commits only, shown to readers, and durable.

    A file of its own, in blocks of its own: what the disk cannot give of the old one is not read again, and a reader
    that has the old one open sees that its name leads to another.
    """
    with LiveReader(path) as old:
        header = old.header
        create_live(
            kept,
            store=store,
            partition=header.partition,
            shard=header.shard,
            capacity_bytes=header.frames.bytes,
            rows=old.rows_max,
            created_ns=header.created_ns,
            begins_after=MerkleFrontier.from_bytes(header.tree_size_before, header.frontier_before)
            if header.begins
            else None,
        )
        with closing(LiveShard(kept)) as new:
            for row, records in old.scan(commits):
                new.append(
                    records,
                    prev_origin=row.prev_origin,
                    origin=row.origin,
                    duplicates=row.duplicates,
                    dead_lettered=row.dead_lettered,
                    committed_ns=row.committed_ns,
                )
            if new.commits < commits:
                raise ShardCorruptError(f"{path}: only {new.commits} of {commits} committed rows are whole")
            new.set_watermark(commits)
            new.sync()


def set_aside(store: Store, files: Sequence[ShardFile], end: StoreEnd, now_ns: int) -> list[Path]:
    """Moves `files` to `ASIDE`, once a receipt gives them up; `end.commits` of the live one stay, in a new file.

    If the process dies or the power fails here: some are moved, others are not. `given_up` names those, so that the
    same can be done again. The live shard always has its name, and is the old one or the new one.

    Args:
        store, files, end: as `prepare_aside` was given them, by the same holder of the lock.
        now_ns: goes into the names.

    Returns:
        where the files are now.

    Raises:
        OSError: the disk refused.
    """
    aside = store.directory / ASIDE
    moved = move_aside([file for file in files if not _is_kept(file, end)], aside, now_ns)
    for file in files:
        if _is_kept(file, end):
            final = _name_aside(file.path, aside, now_ns)
            try:
                os.link(file.path, final)
            except OSError:
                # Not every file system has links. Without, there is a moment with neither file: it counts as missing.
                file.path.rename(final)
            sync_dir(aside)
            publish_file(tmp_path(file.path), file.path)
            moved.append(final)
    return moved


def move_aside(files: Sequence[ShardFile], aside: Path, now_ns: int) -> list[Path]:
    """Moves files, and the records beside them, into the directory `aside`. Interrupted as `set_aside`."""
    moved = []
    for file in files:
        _make(aside)
        for path in (file.path, record_path(file.path)):
            if path.exists():
                path.rename(_name_aside(path, aside, now_ns))
        moved.append(_name_aside(file.path, aside, now_ns))
        sync_dir(aside)
        sync_dir(file.path.parent)
    return moved


def _make(aside: Path) -> None:
    if not aside.is_dir():
        aside.mkdir(exist_ok=True)
        sync_dir(aside.parent)


def _name_aside(path: Path, aside: Path, now_ns: int) -> Path:
    return aside / f"{path.name}.{now_ns}"
