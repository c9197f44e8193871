"""Which events of a live shard have an id: an index in the reader's memory that grows with the shard.

It holds 12 bytes an event. Ids are folded to 32 bits, so an answer means "perhaps": the caller looks at the event. Only
the first bytes of each record are read for it, and only once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from stages.persist.columns import Array
from stages.persist.idfilter import ID_BYTES
from stages.persist.rows import LENGTH_BYTES

IdColumn = Literal["event_id", "consultation_id"]

_HEAD_BYTES = 64
"""A record's length, msgpack's array header, tag, origin, index and both ids take no more; a record is longer."""
_READ_BYTES = 4 * 1024 * 1024
_SIDE_BY_SIDE_MIN = 32
_BIN8_OF_ID = int.from_bytes(bytes([0xC4, ID_BYTES]), "little")
_FOLD = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


def _sizes(sizes: dict[int, int]) -> Array:
    table = np.zeros(256, "<i8")
    for first_byte, size in sizes.items():
        table[first_byte] = size
    return table


_ARRAY_HEADER_BYTES = _sizes({**dict.fromkeys(range(0x90, 0xA0), 1), 0xDC: 3, 0xDD: 5})
_TAG_BYTES = _sizes(dict.fromkeys(range(0x80), 1))
_UNSIGNED_BYTES = _sizes({**dict.fromkeys(range(0x80), 1), 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9})
"""Length by its first byte of a msgpack array header, a version tag below 128, an unsigned integer; 0: it is none."""


class LiveIndex:
    """Over a shard's blobs, of which `read` gives the bytes [start, end)."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read
        self._starts = np.empty(0, "<u4")
        self._keys: dict[IdColumn, Array] = {"event_id": np.empty(0, "<u4"), "consultation_id": np.empty(0, "<u4")}

    def extend(self, starts: Array, ends: Array, events: Array) -> int | None:
        """Takes in commits that follow those taken before, and each other.

        Args:
            starts, ends: where each commit's blob lies, in bytes.
            events: how many each holds.

        Returns:
            None; or which of them is not whole, counted from 0, and nothing was taken in.

        Raises:
            ShardCorruptError, OSError: as `read`.
        """
        begins: list[Array] = [self._starts]
        keys: dict[IdColumn, list[Array]] = {name: [column] for name, column in self._keys.items()}
        first = 0
        while first < len(ends):
            # At least one commit, else as many as are no more than that.
            last = max(first + 1, int(np.searchsorted(ends, starts[first] + _READ_BYTES, "right")))
            blobs = _Blobs(self._read(int(starts[first]), int(ends[last - 1])), int(starts[first]))
            some = slice(first, last)
            found, damaged = blobs.walk(starts[some], ends[some], events[some])
            if damaged is not None:
                return first + damaged
            heads = blobs.heads(found)
            at, wrong = _ids_at(heads)
            if wrong is not None:
                return int(np.searchsorted(ends, found[wrong], "right"))
            begins.append(found.astype("<u4"))
            keys["event_id"].append(_fold(heads, at))
            keys["consultation_id"].append(_fold(heads, at + ID_BYTES + 2))
            first = last
        self._keys = {name: np.concatenate(columns) for name, columns in keys.items()}
        self._starts = np.concatenate(begins)
        return None

    def find(self, column: IdColumn, wanted: bytes) -> Array:
        """The events, counted from 0 in stored order, that perhaps have the id `wanted` (16 bytes) in `column`."""
        key = _fold(np.frombuffer(wanted, "u1"), np.zeros(1, "<i8"))
        return np.flatnonzero(self._keys[column] == key[0])

    def start_of(self, event: int) -> int:
        """Where in the frames the event's record begins with its length."""
        return int(self._starts[event])


class _Blobs:
    """Blobs that follow one another, `data`, of which the first begins at byte `base` of all."""

    def __init__(self, data: bytes, base: int) -> None:
        self._data = data
        self._base = base
        # As overlapping items, so that numpy can pick a record's beginning at any byte; the last ones need room.
        padded = np.frombuffer(data + bytes(_HEAD_BYTES), "u1")
        self._heads = _overlapping(padded, f"V{_HEAD_BYTES}")
        self._lengths = _overlapping(padded, "<u4")

    def heads(self, begins: Array) -> Array:
        """The first `_HEAD_BYTES` of the records that begin at `begins`, one after the other (u1)."""
        heads: Array = self._heads[begins - self._base].view("u1")
        return heads

    def walk(self, starts: Array, ends: Array, events: Array) -> tuple[Array, int | None]:
        """Where each record of the commits begins, and None; or anything, and the first commit that is not whole."""
        numbers = np.cumsum(events) - events
        found = np.zeros(int(events.sum()), "<i8")
        at, left = starts.copy(), events.copy()
        alive = np.flatnonzero(left > 0)
        # All commits side by side, a record of each in a step; the last few longest ones by themselves.
        while len(alive) >= _SIDE_BY_SIDE_MIN:
            here = at[alive]
            found[numbers[alive] + events[alive] - left[alive]] = here
            at[alive] = here + LENGTH_BYTES + self._lengths[here - self._base]
            left[alive] -= 1
            alive = alive[(left[alive] > 0) & (at[alive] < ends[alive])]
        for commit in alive.tolist():
            begin, end, remaining = int(at[commit]), int(ends[commit]), int(left[commit])
            after = int(numbers[commit] + events[commit])
            while remaining and begin < end:
                found[after - remaining] = begin
                place = begin - self._base
                begin += LENGTH_BYTES + int.from_bytes(self._data[place : place + LENGTH_BYTES], "little")
                remaining -= 1
            at[commit], left[commit] = begin, remaining
        whole = (left == 0) & (at == ends)
        return found, None if whole.all() else int(np.argmin(whole))


def _overlapping(data: Array, kind: str) -> Array:
    """An item of `kind` at each byte of `data` (u1) that has room for one; a view."""
    size = np.dtype(kind).itemsize
    view: Array = np.ndarray((max(0, len(data) - size + 1),), kind, data, strides=(1,))
    return view


def _ids_at(heads: Array) -> tuple[Array, int | None]:
    """Where in `heads` (n*`_HEAD_BYTES` u1) each record's event id begins; and which is no event, if one is not."""
    begin = np.arange(0, len(heads), _HEAD_BYTES)
    at = begin + LENGTH_BYTES
    sizes: list[Array] = []
    for table in (_ARRAY_HEADER_BYTES, _TAG_BYTES, _UNSIGNED_BYTES, _UNSIGNED_BYTES):
        sizes.append(table[heads[at]])
        at = at + sizes[-1]
    pairs = _overlapping(heads, "<u2")
    good = (pairs[at] == _BIN8_OF_ID) & (pairs[at + 2 + ID_BYTES] == _BIN8_OF_ID)
    for size in sizes:
        good &= size > 0
    return at + 2, None if good.all() else int(np.argmin(good))


def _fold(data: Array, at: Array) -> Array:
    """The 16 bytes of `data` (u1) at each of `at` as 32 bits, every byte of an id moving some of them."""
    halves: Array = _overlapping(data, f"V{ID_BYTES}")[at].view("<u8").reshape(-1, 2)
    folded: Any = ((halves[:, 0] ^ (halves[:, 1] * _FOLD)) * _FOLD) >> _HALF
    return np.asarray(folded, "<u4")
