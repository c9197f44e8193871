"""Which event ids a partition has stored, for ever, in little memory.

Ids of live shards are a set each. Of a sealed shard only its filter (`idfilter`, 1.5 bytes an event) is resident; its
"perhaps" is settled in the file's sorted ids, of which a page is read. Answers are exact. Nothing stays open or mapped:
a store grows to thousands of shards, and where a disk cannot read a page, a mapping ends the process without a word.

Asking every shard's filter would cost more with each shard, most of it for wrong answers: one shard in a hundred says
"perhaps" of any id. So each full group of shards has a summary, a filter over all their ids (2 bytes an event), and
only where that says "perhaps" the group is asked. A summary is made in the background (`unsummarized`); until then its
group is asked each time.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from contracts.errors import ShardCorruptError
from stages.persist.columns import as_rows, as_text
from stages.persist.files import read_all_at
from stages.persist.header import Area, SealedHeader, read_sealed_header
from stages.persist.idfilter import ID_BYTES, Bytes2D, Filters, Words, add_to_filter, empty_filter, hash_ids

Text = np.ndarray[Any, Any]
Flags = np.ndarray[Any, np.dtype[np.bool_]]

_WORD_BYTES: Final = 8
PAGE_IDS: Final = 256
"""Of so many sorted ids that were asked before, the first is kept in memory."""
FEW_IDS: Final = 32
"""For more ids than these all of a shard's are read: 0.4 ms for 100,000, against 12 µs for a page."""
GROUP_SHARDS: Final = 64
"""Shards in a group. Adding a shard copies the filters of the last group."""
SUMMARY_BITS_PER_ID: Final = 16
"""About one wrong "perhaps" in two hundred."""


class SeenIds:
    """The event ids of one partition. Not for use from several threads at once.

    Args:
        group_shards: shards in a group.
    """

    def __init__(self, group_shards: int = GROUP_SHARDS) -> None:
        self._group_shards = group_shards
        self._live: dict[int, set[bytes]] = {}
        self._groups: list[IdGroup] = []
        self._summaries = Filters()
        self._summarized: list[IdGroup] = []
        self._key = os.urandom(ID_BYTES).hex()

    def add(self, shard: int, ids: Iterable[bytes]) -> None:
        """Notes ids (16 bytes each) as stored in live shard number `shard`."""
        self._live.setdefault(shard, set()).update(ids)

    def seen(self, ids: Sequence[bytes]) -> list[bool]:
        """For each id (16 bytes), whether it was noted before. Repeats *within* `ids` are the caller's to find.

        Raises:
            ShardCorruptError: a sealed shard was removed or cut short.
            OSError: the disk refused, or a sealed shard is not the file any more that was added.
        """
        live = self._live.values()
        answers = [any(event_id in noted for noted in live) for event_id in ids]
        rows = as_rows(list(ids), ID_BYTES)
        text = as_text(rows)
        for group in self._groups:
            for needle in group.find(rows, text):
                answers[needle] = True
        for group, needles in self._perhaps_in(rows):
            for needle in group.find(rows[needles], text[needles]):
                answers[needles[needle]] = True
        return answers

    def _perhaps_in(self, rows: Bytes2D) -> Iterator[tuple[IdGroup, Words]]:
        """The groups whose summary says "perhaps", each with the positions in `rows` of which it does."""
        if not self._summarized:
            return
        groups, needles = self._summaries.perhaps(hash_ids(rows, self._key))
        for group in np.unique(groups):
            yield self._summarized[int(group)], needles[groups == group]

    def unsummarized(self) -> IdSummary | None:
        """The next full group that has no summary yet."""
        full = (group for group in self._groups if group.shards == self._group_shards)
        group = next(full, None)
        return None if group is None else IdSummary(self, group)

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
        if last is None or last.store_id != header.store or last.shards == self._group_shards:
            last = IdGroup(header.store)
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
        groups = [*self._groups, *self._summarized]
        return self._summaries.nbytes + sum(group.filters.nbytes for group in groups)


class IdSummary:
    """The summary of a full group: see `stages.persist.disk.Summary`."""

    def __init__(self, seen: SeenIds, group: IdGroup) -> None:
        self._seen = seen
        self._group = group
        self.shards = group.shards
        self._words = empty_filter(group.events, SUMMARY_BITS_PER_ID)

    def make(self) -> None:
        """Reads all ids of the group: a tenth of a second for a million."""
        for ids in self._group.ids():
            add_to_filter(self._words, hash_ids(ids, self._seen._key))

    def take(self) -> None:
        """From now on the group is asked only where this says "perhaps"."""
        self._seen._groups.remove(self._group)
        self._seen._summaries.add(self._words)
        self._seen._summarized.append(self._group)


class IdGroup:
    """Sealed shards of one store whose filters lie in one array."""

    def __init__(self, store_id: str) -> None:
        self.store_id = store_id
        self.filters = Filters()
        self._sorted: list[_SortedIds] = []

    @property
    def shards(self) -> int:
        """How many."""
        return len(self._sorted)

    @property
    def events(self) -> int:
        """In all of its shards."""
        return sum(place.events for place in self._sorted)

    def ids(self) -> Iterator[Bytes2D]:
        """The ids of each shard (n×16 u1), read. Raises as `SeenIds.seen`."""
        for place in self._sorted:
            yield place.read()

    def add(self, path: Path, header: SealedHeader) -> None:
        """Takes a sealed shard in; raises `ShardCorruptError` where its header contradicts itself."""
        words, ids = (_area(path, header, f"by_event_id/{name}") for name in ("filter", "ids"))
        if ids.bytes != header.events * ID_BYTES or not words.bytes or words.bytes % _WORD_BYTES:
            raise ShardCorruptError(f"{path}: its header contradicts itself; rebuild it from the stream")
        with _opened(path) as fd:
            self.filters.add(np.frombuffer(read_all_at(fd, words.bytes, words.offset, path), "<u8"))
            self._sorted.append(_SortedIds(path, _state(fd), ids.offset, header.events))

    def find(self, rows: Bytes2D, text: Text) -> list[int]:
        """Positions in `rows` (n×16 u1; `text` is the same as strings) of ids that are in one of the shards."""
        shards, needles = self.filters.perhaps(hash_ids(rows, self.store_id))
        found: list[int] = []
        for shard in np.unique(shards):
            candidates = needles[shards == shard]
            found.extend(candidates[self._sorted[int(shard)].hold(text[candidates])].tolist())
        return found


class _SortedIds:
    """A sealed shard's sorted ids, where they lie, in a file that stays what it was: in another they lie elsewhere."""

    def __init__(self, path: Path, state: tuple[int, int], offset: int, events: int) -> None:
        self.events = events
        self._path = path
        self._state = state
        self._offset = offset
        self._firsts: Text | None = None
        """Of each page, once it was asked."""

    def read(self) -> Bytes2D:
        """All of them (n×16 u1). Raises as `SeenIds.seen`."""
        with self._opened() as fd:
            return np.frombuffer(self._ids(fd, 0, self.events), np.uint8).reshape(self.events, ID_BYTES)

    def hold(self, wanted: Text) -> Flags:
        """For each id, whether it is one of these. Raises as `SeenIds.seen`."""
        if self._firsts is None or len(wanted) > FEW_IDS:
            stored = as_text(self.read())
            self._firsts = stored[::PAGE_IDS].copy()
            at = np.minimum(np.searchsorted(stored, wanted), len(stored) - 1)
            found: Flags = stored[at] == wanted
            return found
        pages = np.searchsorted(self._firsts, wanted, "right") - 1
        with self._opened() as fd:
            asked = zip(pages.tolist(), wanted.tolist(), strict=True)
            return np.array([page >= 0 and self._page_holds(fd, page, one) for page, one in asked])

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        with _opened(self._path) as fd:
            if _state(fd) != self._state:
                raise OSError(errno.ESTALE, "was replaced or written to while in use", str(self._path))
            yield fd

    def _page_holds(self, fd: int, page: int, wanted: bytes) -> bool:
        first = page * PAGE_IDS
        stored = self._ids(fd, first, min(PAGE_IDS, self.events - first))
        # numpy's text has lost the zeros at its end.
        wanted = wanted.ljust(ID_BYTES, b"\0")
        at = stored.find(wanted)
        while at % ID_BYTES and at >= 0:
            at = stored.find(wanted, at + 1)
        return at >= 0

    def _ids(self, fd: int, first: int, count: int) -> bytes:
        return read_all_at(fd, count * ID_BYTES, self._offset + first * ID_BYTES, self._path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise ShardCorruptError(f"{path}: was removed while in use; run `fictl verify`") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _state(fd: int) -> tuple[int, int]:
    # Not the inode's number: on some file systems a file that nobody has open comes back with another.
    found = os.fstat(fd)
    return found.st_size, found.st_mtime_ns


def _area(path: Path, header: SealedHeader, name: str) -> Area:
    area = header.areas.get(name)
    if area is None or area.offset + area.bytes > header.file_bytes:
        raise ShardCorruptError(f"{path}: its header does not place {name}; rebuild it from the stream")
    return area
