"""Which event ids a partition has stored, for ever, in little memory.

Ids of live shards are a set each. Of a sealed shard only its filter (`idfilter`, 1.5 bytes an event) is resident; its
"perhaps" is settled by binary search in the file's sorted ids, mapped and not read. Answers are exact. Only so
many shards stay mapped: each mapping holds a file descriptor, and a store grows to thousands of shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from mmap import mmap
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit
from typing import Any, NamedTuple

import numpy as np

from contracts.errors import ShardCorruptError
from stages.persist.columns import as_rows, as_text
from stages.persist.header import Area, SealedHeader, read_sealed_header
from stages.persist.idfilter import ID_BYTES, Words, hash_ids, masks_of, word_indices

Text = np.ndarray[Any, Any]

MAPPED_MAX = max(16, getrlimit(RLIMIT_NOFILE)[0] // 32)
"""Sealed shards of a partition that stay mapped; others are mapped for the moment (70 µs), which never thrashes."""
_GROUP_SHARDS_MAX = 64
"""Filters are joined in groups, so that one numpy operation asks many; adding a shard copies only the last group."""


class SeenIds:
    """The event ids of one partition. Not for use from several threads at once."""

    def __init__(self) -> None:
        self._live: dict[int, set[bytes]] = {}
        self._groups: list[_Group] = []
        self._mapped = _Mapped()

    def add(self, shard: int, ids: Iterable[bytes]) -> None:
        """Notes ids (16 bytes each) as stored in live shard number `shard`."""
        self._live.setdefault(shard, set()).update(ids)

    def seen(self, ids: Sequence[bytes]) -> list[bool]:
        """For each id (16 bytes), whether it was noted before. Repeats *within* `ids` are the caller's to find."""
        if not ids:
            return []
        live = self._live.values()
        answers = [any(event_id in noted for noted in live) for event_id in ids]
        if self._groups:
            rows = as_rows(list(ids), ID_BYTES)
            text = as_text(rows)
            for group in self._groups:
                for needle in group.find(rows, text):
                    answers[needle] = True
        return answers

    def add_sealed(self, path: Path) -> None:
        """Notes all ids of a sealed shard. Reads its filter, about 100 KB; its length is checked, its content is not.

        Raises:
            ShardCorruptError, ShardError: not a whole sealed shard of a known format.
            OSError: it cannot be read.
        """
        header = read_sealed_header(path)
        if header.events == 0:
            return
        last = self._groups[-1] if self._groups else None
        if last is None or last.store_id != header.store or last.shards == _GROUP_SHARDS_MAX:
            last = _Group(header.store, self._mapped)
            self._groups.append(last)
        last.add(path, header)

    def replace_live(self, shard: int, path: Path) -> None:
        """Live shard number `shard` was sealed as `path`: as `add_sealed`, and lets go of its set. Raises likewise."""
        self.add_sealed(path)
        self.forget_live(shard)

    def forget_live(self, shard: int) -> None:
        """Forgets what was noted for live shard number `shard` (it was cut, and is to be noted again)."""
        self._live.pop(shard, None)

    @property
    def filter_bytes(self) -> int:
        """Resident bytes held for sealed shards."""
        return sum(group.words.nbytes for group in self._groups)


class _Group:
    """Sealed shards of one store whose filters lie in one array."""

    def __init__(self, store_id: str, mapped: _Mapped) -> None:
        self.store_id = store_id
        self.words: Words = np.empty(0, np.uint64)
        self._first: Words = np.empty(0, np.uint64)
        self._count: Words = np.empty(0, np.uint64)
        self._sorted: list[_SortedIds] = []
        self._mapped = mapped

    @property
    def shards(self) -> int:
        return len(self._sorted)

    def add(self, path: Path, header: SealedHeader) -> None:
        words = np.fromfile(path, "<u8", _area(path, header, "by_event_id/filter").bytes // 8, offset=_at(header))
        ids = _area(path, header, "by_event_id/ids")
        if ids.bytes != header.events * ID_BYTES or not len(words):
            raise ShardCorruptError(f"{path}: its header contradicts itself; rebuild it from the stream")
        self._first = np.append(self._first, np.uint64(len(self.words)))
        self._count = np.append(self._count, np.uint64(len(words)))
        self.words = _joined(self.words, words)
        self._sorted.append(_SortedIds(path, ids.offset, header.events))

    def find(self, rows: np.ndarray[Any, np.dtype[np.uint8]], text: Text) -> list[int]:
        """Positions in `rows` (n×16 u1; `text` is the same as strings) of ids that are in one of the shards."""
        hashes = hash_ids(rows, self.store_id)[None, :]
        masks = masks_of(hashes)
        places = self._first[:, None] + word_indices(hashes, self._count[:, None])
        shards, needles = np.nonzero((self.words[places] & masks) == masks)
        found: list[int] = []
        for shard in np.unique(shards):
            candidates = needles[shards == shard]
            stored = self._mapped.ids_of(self._sorted[shard])
            wanted = text[candidates]
            at = np.minimum(np.searchsorted(stored, wanted), len(stored) - 1)
            found.extend(candidates[stored[at] == wanted].tolist())
        return found


class _SortedIds(NamedTuple):
    """Where a sealed shard's sorted ids lie."""

    path: Path
    offset: int
    events: int


class _Mapped:
    """The sorted ids of shards that were asked before."""

    def __init__(self) -> None:
        self._ids: dict[_SortedIds, Text] = {}

    def ids_of(self, place: _SortedIds) -> Text:
        """The shard's ids, mapped. Raises `ShardCorruptError` where the file is no longer what it was."""
        ids = self._ids.get(place)
        if ids is None:
            try:
                ids = np.memmap(place.path, f"S{ID_BYTES}", "r", place.offset, (place.events,))
            except (FileNotFoundError, ValueError) as error:
                raise ShardCorruptError(f"{place.path}: was removed or cut short while in use: {error}") from error
            if len(self._ids) < MAPPED_MAX:
                self._ids[place] = ids
        return ids


def _joined(first: Words, second: Words) -> Words:
    """Both, in memory of their own that is given back whole: the heap would keep what each former array took."""
    words = np.frombuffer(mmap(-1, first.nbytes + second.nbytes), np.uint64)
    np.concatenate([first, second], out=words)
    return words


def _area(path: Path, header: SealedHeader, name: str) -> Area:
    area = header.areas.get(name)
    if area is None or area.offset + area.bytes > header.file_bytes:
        raise ShardCorruptError(f"{path}: its header does not place {name}; rebuild it from the stream")
    return area


def _at(header: SealedHeader) -> int:
    return header.areas["by_event_id/filter"].offset
