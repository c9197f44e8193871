"""Reads a partition back with h5py, numpy and zlib alone, by what the shards say of themselves, and judges it.

Shares no code with persist: what it finds is what a stranger with stock tools would find.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import h5py

from contracts.receipts import Receipt, SealRecord

from .source import Source

_LIVE = re.compile(r"p\d+-(\d{8})\.live\.h5")
_SEALED = re.compile(r"p\d+-(\d{8})-\d{16}-\d{16}\.h5")
_COVERED = struct.Struct("<8q")


@dataclass(slots=True)
class Verdict:
    """What is wrong, in events (`lost`, `changed`) and files or attempts (`unreadable`), with a word on each."""

    lost: int = 0
    changed: int = 0
    unreadable: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not (self.lost or self.changed or self.unreadable)

    def add(self, other: Verdict) -> None:
        """Takes another's findings in."""
        self.lost += other.lost
        self.changed += other.changed
        self.unreadable += other.unreadable
        self.notes += other.notes


@dataclass(slots=True)
class _Shard:
    sealed: bool
    commits: list[list[bytes]]
    watermark: int


def judge(
    directory: Path, receipt: Receipt | None, seals: list[SealRecord], source: Source, *, recovered: bool = False
) -> Verdict:
    """Holds the files against what was sent and accepted.

    Args:
        directory: the store, which nobody writes now.
        receipt: the last accepted one.
        seals: every accepted seal record.
        source: what was sent.
        recovered: the files were opened since the crash: readers must see exactly what is accepted, by the watermark.

    Returns:
        events of accepted receipts that are not there, events that are there otherwise than sent (in bytes, place or
        number, or shown before they were accepted), and files that do not open.
    """
    verdict = Verdict()
    shards: dict[int, list[_Shard]] = {}
    for path in sorted(directory.glob("*.h5")):
        try:
            _read_all(path)
            for pattern, read in ((_LIVE, _read_live), (_SEALED, _read_sealed)):
                if match := pattern.fullmatch(path.name):
                    shards.setdefault(int(match[1]), []).append(read(path))
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            verdict.unreadable += 1
            verdict.notes.append(f"{path.name}: {type(error).__name__}: {error}")
    if receipt is not None:
        _judge_receipt(shards, receipt, source, recovered, verdict)
    for seal in seals:
        path = directory / seal.file
        if not path.exists() or sha256(path.read_bytes()).hexdigest() != seal.sha256:
            verdict.changed += 1
            verdict.notes.append(f"{seal.file}: is not there as its seal record says")
    return verdict


def _judge_receipt(
    shards: dict[int, list[_Shard]], receipt: Receipt, source: Source, recovered: bool, verdict: Verdict
) -> None:
    end = receipt.ends.get(receipt.store)
    found: list[bytes] = []
    for number, forms in sorted(shards.items()):
        accepted = 0 if end is None or number > end.shard else end.commits if number == end.shard else None
        for form in forms:
            commits = form.commits[:accepted]
            shown = form.watermark
            if shown > len(commits) or (recovered and not form.sealed and shown != len(commits)):
                verdict.changed += 1
                verdict.notes.append(f"shard {number}: {len(commits)} commits are accepted, readers are shown {shown}")
        versions = [form.commits[:accepted] for form in forms]
        if any(version != versions[0] for version in versions):
            verdict.changed += 1
            verdict.notes.append(f"shard {number}: its live and its sealed form differ")
        found += [record for commit in versions[0] for record in commit]
    expected = source.stored(receipt.origin)
    totals = source.totals(receipt.origin)
    if (receipt.persisted, receipt.duplicates, receipt.dead_lettered) != totals:
        verdict.changed += 1
        verdict.notes.append(f"the receipt at origin {receipt.origin} counts otherwise than {totals}: {receipt}")
    if found != expected:
        missing, surplus = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
        verdict.lost += missing.total()
        verdict.changed += surplus.total() or (not missing)
        verdict.notes.append(
            f"{len(expected)} events are accepted, {len(found)} found: {missing.total()} missing, "
            f"{surplus.total()} changed or repeated"
        )


def _read_all(path: Path) -> None:
    """Reads every dataset and attribute of the file."""

    def read(_: str, item: h5py.Dataset | h5py.Group) -> None:
        dict(item.attrs)
        if isinstance(item, h5py.Dataset):
            item[()]

    with h5py.File(path, "r", locking=False) as file:
        dict(file.attrs)
        file.visititems(read)


def _read_live(path: Path) -> _Shard:
    """The commits up to the first empty or torn row, as the file's attribute `about` describes them."""
    with h5py.File(path, "r", locking=False) as file:
        rows, frames, watermark = file["index"][()].tolist(), file["frames"][()].tobytes(), int(file["watermark"][0])
    commits: list[list[bytes]] = []
    start = 0
    for ordinal, end, crc32, *rest in rows:
        blob = frames[start:end]
        if ordinal != len(commits) + 1 or zlib.crc32(blob, zlib.crc32(_COVERED.pack(ordinal, end, *rest))) != crc32:
            break
        commits.append(list(_split(blob)))
        start = end
    return _Shard(False, commits, watermark)


def _split(blob: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(blob):
        length = int.from_bytes(blob[at : at + 4], "little")
        yield blob[at + 4 : at + 4 + length]
        at += 4 + length


def _read_sealed(path: Path) -> _Shard:
    with h5py.File(path, "r", locking=False) as file:
        records, offsets = file["records"][()].tobytes(), file["offset"][()].tolist()
        column = file["commits"].attrs["columns"].split(",").index("events")
        counts = file["commits"][()][:, column].tolist()
    events = [records[start:end] for start, end in pairwise(offsets)]
    commits = []
    for count in counts:
        commits.append(events[:count])
        del events[:count]
    return _Shard(True, commits, 0)
