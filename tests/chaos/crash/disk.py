"""A disk that only keeps what was synced: disk operations as values, and what a power cut may leave of them.

The model: an fsync or fdatasync makes a file's content at that moment durable, an fsync of the directory makes its
names durable. Of everything later any part may be there: of each page (or sector) the state after any number of the
writes to it, of the renames, removals and creations any prefix, or, on a disk that reorders them, any subset.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

PAGE_BYTES = 4096
SECTOR_BYTES = 512

Image = dict[str, bytes]
"""The files of a directory, by name."""


class Wrote(NamedTuple):
    """`data` was written to file `file` at `offset`."""

    file: int
    offset: int
    data: bytes


class Synced(NamedTuple):
    """File `file` was synced; `content` is all of it where it was also written by other means than `Wrote`."""

    file: int
    content: bytes | None


class Named(NamedTuple):
    """Names came to stand for other files, at once (None: for no file): a creation, a rename or a removal."""

    names: dict[str, int | None]


class DirectorySynced(NamedTuple):
    """The directory was synced."""


Operation = Wrote | Synced | Named | DirectorySynced


@dataclass(slots=True)
class Log:
    """What happened in one directory.

    Attributes:
        start: its durable state before the first operation. Files are numbered as in it, then in order of creation.
        operations: in order.
    """

    start: Image
    operations: list[Operation] = field(default_factory=list)


def after_power_cut(log: Log, cut: int, rng: random.Random) -> Image:
    """A state in which a power cut just before operation number `cut` may leave the directory."""
    content: dict[int, bytes] = dict(enumerate(log.start.values()))
    names: dict[str, int | None] = {name: number for number, name in enumerate(log.start)}
    written: dict[int, list[Wrote]] = defaultdict(list)
    named: list[Named] = []
    for operation in log.operations[:cut]:
        match operation:
            case Wrote():
                written[operation.file].append(operation)
            case Synced():
                whole = operation.content
                content[operation.file] = (
                    _apply(content.get(operation.file, b""), written[operation.file]) if whole is None else whole
                )
                written[operation.file].clear()
            case Named():
                named.append(operation)
            case DirectorySynced():
                for change in named:
                    names.update(change.names)
                named.clear()
    for change in _survivors(named, rng):
        names.update(change.names)
    unit_bytes = rng.choice((PAGE_BYTES, PAGE_BYTES, SECTOR_BYTES))
    kept = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    image: Image = {}
    for name, number in names.items():
        if number is not None:
            writes = written[number] if number in content else _never_synced(log, number)
            image[name] = _apply(content.get(number, b""), _partly(writes, unit_bytes, kept, rng))
    return image


def everything(log: Log) -> dict[str, bytes]:
    """The directory after all operations, with nothing lost: what the page cache holds."""
    content: dict[int, bytes] = dict(enumerate(log.start.values()))
    names: dict[str, int | None] = {name: number for number, name in enumerate(log.start)}
    for operation in log.operations:
        match operation:
            case Wrote(number, offset, data):
                content[number] = _apply(content.get(number, b""), [Wrote(number, offset, data)])
            case Synced(number, bytes() as whole):
                content[number] = whole
            case Named(changed):
                names.update(changed)
            case _:
                pass
    return {name: content.get(number, b"") for name, number in names.items() if number is not None}


def _survivors(named: Sequence[Named], rng: random.Random) -> Sequence[Named]:
    """Those of the name changes since the last sync of the directory that reached the disk."""
    if rng.random() < 0.5:
        return named[: rng.randint(0, len(named))]
    return [change for change in named if rng.random() < 0.5]


def _never_synced(log: Log, file: int) -> list[Wrote]:
    """All that was ever to be written to a file, as one write that nothing has made durable."""
    bodies = (
        operation.content for operation in log.operations if isinstance(operation, Synced) and operation.file == file
    )
    return [Wrote(file, 0, next(bodies, None) or b"")]


def _partly(writes: Sequence[Wrote], unit_bytes: int, kept: float, rng: random.Random) -> list[Wrote]:
    """Of each unit of the file the first few pieces written to it: all of them with probability `kept`."""
    units: dict[int, list[Wrote]] = defaultdict(list)
    for file, offset, data in writes:
        end = offset + len(data)
        at = offset
        while at < end:
            stop = min(end, (at // unit_bytes + 1) * unit_bytes)
            units[at // unit_bytes].append(Wrote(file, at, data[at - offset : stop - offset]))
            at = stop
    survivors: list[Wrote] = []
    for pieces in units.values():
        count = len(pieces) if rng.random() < kept else rng.randint(0, len(pieces) - 1)
        survivors += pieces[:count]
    return survivors


def _apply(content: bytes, writes: Sequence[Wrote]) -> bytes:
    if not writes:
        return content
    size = max(len(content), *(offset + len(data) for _, offset, data in writes))
    result = bytearray(content.ljust(size, b"\0"))
    for _, offset, data in writes:
        result[offset : offset + len(data)] = data
    return bytes(result)
