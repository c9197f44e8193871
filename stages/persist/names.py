"""Names of the files in a store: they sort by partition and shard and say what a file holds.

    p003-00000007.live.h5                                        being appended to
    p003-00000008.next.h5                                        prepared, holds nothing yet
    p003-00000007-0000000000000120-0000000000004711.h5           sealed; covers these origins, both inclusive
    *.tmp                                                        unfinished, to be ignored or removed
    p003.lock, store.json                                        the partition's lock, the store's identity

Shards of a partition are numbered from `FIRST_SHARD` without gaps.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

FIRST_SHARD = 1
SHARDS = "shards"
"""Where the directory of a run has its store."""
TMP_SUFFIX = ".tmp"

_LIVE = re.compile(r"p(\d{3,4})-(\d{8})\.live\.h5", re.ASCII)
_NEXT = re.compile(r"p(\d{3,4})-(\d{8})\.next\.h5", re.ASCII)
_UNFINISHED = re.compile(r"p(\d{3,4})[-.].*" + re.escape(TMP_SUFFIX), re.ASCII)
_SEALED = re.compile(r"p(\d{3,4})-(\d{8})-(\d{16})-(\d{16})\.h5", re.ASCII)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A shard as its file name tells it.

    Attributes:
        path: the file.
        partition: lane.
        shard: its number in the store and partition.
        sealed: immutable; else live.
        first_origin, last_origin: what a sealed shard covers, both inclusive; None when live.
    """

    path: Path
    partition: int
    shard: int
    sealed: bool
    first_origin: int | None = None
    last_origin: int | None = None


def live_name(partition: int, shard: int) -> str:
    """Name of a live shard."""
    return f"p{partition:03d}-{shard:08d}.live.h5"


def next_name(partition: int, shard: int) -> str:
    """Name of a shard that is prepared but not yet in use."""
    return f"p{partition:03d}-{shard:08d}.next.h5"


def sealed_name(partition: int, shard: int, first_origin: int, last_origin: int) -> str:
    """Name of a sealed shard covering these origins, both inclusive."""
    return f"p{partition:03d}-{shard:08d}-{first_origin:016d}-{last_origin:016d}.h5"


def lock_name(partition: int) -> str:
    """Name of a partition's lock file."""
    return f"p{partition:03d}.lock"


def probe_name(partition: int) -> str:
    """Name of the file that a stopped partition tries the disk with."""
    return f"p{partition:03d}.probe{TMP_SUFFIX}"


def tmp_path(final: Path) -> Path:
    """Where the unfinished form of `final` is written."""
    return final.with_name(final.name + TMP_SUFFIX)


def parse_name(path: Path) -> ShardFile | None:
    """What the name of a live or sealed shard says; None for every other file."""
    if match := _LIVE.fullmatch(path.name):
        return ShardFile(path, int(match[1]), int(match[2]), sealed=False)
    if match := _SEALED.fullmatch(path.name):
        partition, shard, first, last = map(int, match.groups())
        return ShardFile(path, partition, shard, True, first, last)
    return None


def parse_prepared(path: Path) -> tuple[int, int] | None:
    """(partition, shard) of a prepared shard's name; None for every other file."""
    match = _NEXT.fullmatch(path.name)
    return None if match is None else (int(match[1]), int(match[2]))


def list_shards(directory: Path) -> dict[int, list[ShardFile]]:
    """The live and sealed shards in `directory`: for each partition in order, by shard number.

    Files with other names are passed over. Where the sealed form of a live shard is there, it alone is given: the
    process died between sealing and removing the live file. Several sealed files of one number are all given, so that
    the caller sees the conflict.

    Raises:
        OSError: the directory cannot be read.
    """
    found = [shard for name in os.listdir(directory) if (shard := parse_name(directory / name)) is not None]
    sealed = {(shard.partition, shard.shard) for shard in found if shard.sealed}
    grouped: dict[int, list[ShardFile]] = {}
    for shard in sorted(found, key=lambda shard: (shard.partition, shard.shard, shard.path.name)):
        if shard.sealed or (shard.partition, shard.shard) not in sealed:
            grouped.setdefault(shard.partition, []).append(shard)
    return grouped


def list_leftovers(directory: Path, partition: int) -> list[Path]:
    """Files of one partition that a stopped process left: unfinished ones, prepared shards, live forms of sealed ones.

    All may be removed by the partition's owner (who holds its lock), in any order; live forms once the sealed ones are
    known to hold what was committed. Raises as `list_shards`.
    """
    shown = {shard.path for shard in list_shards(directory).get(partition, ())}
    leftovers = []
    for name in sorted(os.listdir(directory)):
        path = directory / name
        match = _NEXT.fullmatch(name) or _UNFINISHED.fullmatch(name)
        shard = parse_name(path)
        if (match is not None and int(match[1]) == partition) or (
            shard is not None and shard.partition == partition and path not in shown
        ):
            leftovers.append(path)
    return leftovers


def partition_state(directory: Path, partition: int) -> list[tuple[str, int, int, int, int]]:
    """(name, inode, bytes, mtime, ctime in ns) of each shard of a partition: differs when somebody has changed one.

    Name, bytes and mtime alone do not where `cp -p` or a restore brings back what a disk has damaged. Raises as
    `list_shards`.
    """
    states = []
    for shard in list_shards(directory).get(partition, ()):
        with contextlib.suppress(FileNotFoundError):
            found = shard.path.stat()
            states.append((shard.path.name, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    return states
