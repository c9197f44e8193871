"""Reading one sealed shard: by row, by event id, by consultation, and by column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
from isal import isal_zlib

from contracts.errors import ShardCorruptError
from contracts.events import Event, decode_event
from stages.persist.columns import Array, as_text
from stages.persist.header import HEADER_BYTES, read_sealed_header

_BLOCK_BYTES = 4 * 1024 * 1024
_TOGETHER_BYTES = 1024 * 1024
# isal's type stub calls this class an instance.
_DECOMPRESS_ERROR = cast(type[Exception], isal_zlib.error)
_READ_ERRORS = (OSError, KeyError, ValueError, RuntimeError, _DECOMPRESS_ERROR)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which events are wanted; None: any.

    Attributes:
        site, event_type: exactly these.
        since_ns, until_ns: since_ns <= timestamp_ns < until_ns.
        consultation_id: 16 bytes.
    """

    site: str | None = None
    event_type: str | None = None
    since_ns: int | None = None
    until_ns: int | None = None
    consultation_id: bytes | None = None

    def takes(self, event: Event) -> bool:
        """True when the event is wanted."""
        return (
            (self.site is None or event.site == self.site)
            and (self.event_type is None or event.event_type == self.event_type)
            and (self.since_ns is None or event.timestamp_ns >= self.since_ns)
            and (self.until_ns is None or event.timestamp_ns < self.until_ns)
            and (self.consultation_id is None or event.consultation_id == self.consultation_id)
        )


class SealedReader:
    """One sealed shard, opened without a lock. Its methods raise `ShardCorruptError` where it cannot be read."""

    def __init__(self, path: Path) -> None:
        """Reads the header; HDF5 opens the file when it is first needed.

        Raises:
            ShardCorruptError, ShardError: not a whole sealed shard of a known format.
            OSError: it cannot be read.
        """
        self.path = path
        self.header = read_sealed_header(path)
        self._file: h5py.File | None = None
        self._offsets: Array | None = None
        self._last_chunk = (-1, b"")

    def close(self) -> None:
        """Closes the file. It opens again when it is used again."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._offsets = None
        self._last_chunk = (-1, b"")

    def read(self, name: str) -> Array:
        """A whole dataset, by HDF5 path."""
        try:
            values: Array = self._open()[name][()]
        except _READ_ERRORS as error:
            raise self._unreadable(name, error) from error
        return values

    def attributes(self) -> dict[str, Any]:
        """The file's HDF5 attributes."""
        try:
            return dict(self._open().attrs)
        except _READ_ERRORS as error:
            raise self._unreadable("its attributes", error) from error

    def records(self, first: int = 0, last: int | None = None) -> Iterator[bytes]:
        """The records of events [first, last), counted from 0, in order; a few MB are held at a time."""
        offsets = self._record_offsets()
        end = self.header.events if last is None else last
        while first < end:
            stop = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _BLOCK_BYTES, "right")) - 1)
            stop = min(stop, end)
            data = self._record_bytes(int(offsets[first]), int(offsets[stop]))
            base = int(offsets[first])
            bounds = offsets[first : stop + 1].tolist()
            for start, after in pairwise(bounds):
                yield data[start - base : after - base]
            first = stop

    def events(self) -> Iterator[tuple[int, Event]]:
        """(row, event) for all events in order."""
        for row, record in enumerate(self.records()):
            yield row, decode_event(record)

    def find(self, event_id: bytes) -> tuple[int, Event] | None:
        """(row, event) of an event id (16 bytes), or None."""
        at = _search(self._mapped("by_event_id/ids"), event_id)
        if at is None:
            return None
        return next(self._events_at([int(self._mapped("by_event_id/rows")[at])]))

    def consultation(self, consultation_id: bytes) -> Iterator[tuple[int, Event]]:
        """(row, event) of a consultation's events (16 bytes), in stored order."""
        yield from self._events_at(self._consultation_rows(consultation_id).tolist())

    def select(self, wanted: Selection) -> Iterator[tuple[int, Event]]:
        """(row, event) of the events that `wanted` describes, in stored order."""
        yield from self.events() if wanted == Selection() else self._events_at(self._rows_of(wanted))

    def _events_at(self, rows: Sequence[int]) -> Iterator[tuple[int, Event]]:
        """Reads the events in ascending `rows`, neighbours together."""
        offsets = self._record_offsets()
        at = 0
        while at < len(rows):
            base = int(offsets[rows[at]])
            end = at + 1
            while end < len(rows) and offsets[rows[end] + 1] - base <= _TOGETHER_BYTES:
                end += 1
            data = self._record_bytes(base, int(offsets[rows[end - 1] + 1]))
            for row in rows[at:end]:
                yield row, decode_event(data[int(offsets[row]) - base : int(offsets[row + 1]) - base])
            at = end

    def _rows_of(self, wanted: Selection) -> Sequence[int]:
        site, event_type, since_ns, until_ns = wanted.site, wanted.event_type, wanted.since_ns, wanted.until_ns
        header = self.header
        if header.events == 0 or (since_ns is not None and header.timestamp_ns_max < since_ns):
            return []
        if until_ns is not None and header.timestamp_ns_min >= until_ns:
            return []
        chosen = np.ones(header.events, bool)
        if wanted.consultation_id is not None:
            rows = self._consultation_rows(wanted.consultation_id)
            if not len(rows):
                return []
            chosen[:] = False
            chosen[rows] = True
        for column, name in (("site", site), ("event_type", event_type)):
            if name is not None:
                codes = np.flatnonzero(self._names(column) == name)
                if not len(codes):
                    return []
                chosen &= self.read(column) == codes[0]
        if since_ns is not None:
            chosen &= self.read("timestamp_ns") >= since_ns
        if until_ns is not None:
            chosen &= self.read("timestamp_ns") < until_ns
        found: list[int] = np.flatnonzero(chosen).tolist()
        return found

    def _consultation_rows(self, consultation_id: bytes) -> Array:
        at = _search(self._mapped("by_consultation/ids"), consultation_id)
        if at is None:
            return np.empty(0, "<u4")
        start, end = self._mapped("by_consultation/start")[at : at + 2].tolist()
        return self._mapped("by_consultation/rows")[start:end]

    def column(self, name: str) -> Array:
        """A column of n values; `site` and `event_type` as text."""
        if name in ("site", "event_type"):
            texts: Array = self._names(name)[self.read(name)]
            return texts
        return self.read(name)

    def _names(self, column: str) -> Array:
        return self.read(f"names/{column}").astype("U")

    def _open(self) -> h5py.File:
        if self._file is None:
            self._file = h5py.File(self.path, "r", locking=False)
        return self._file

    def _record_offsets(self) -> Array:
        if self._offsets is None:
            self._offsets = self.read("offset")
        return self._offsets

    def _record_bytes(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of the records. Decompressed here: several times faster than by HDF5's filter."""
        try:
            records = self._open()["records"]
            size = records.chunks[0]
            if not 0 <= start <= end <= len(records):
                raise ValueError(f"bytes {start} to {end} are not in it")
            first, last = start // size, -(-end // size)
            data = b"".join([self._chunk(records, number, size) for number in range(first, last)])
        except _READ_ERRORS as error:
            raise self._unreadable("records", error) from error
        return data[start - first * size : end - first * size]

    def _chunk(self, records: h5py.Dataset, number: int, size: int) -> bytes:
        if self._last_chunk[0] != number:
            _, packed = records.id.read_direct_chunk((number * size,))
            chunk = isal_zlib.decompress(packed, bufsize=size)
            if len(chunk) != size:
                raise ValueError(f"chunk {number} holds {len(chunk)} bytes, not {size}")
            self._last_chunk = (number, chunk)
        return self._last_chunk[1]

    def _mapped(self, name: str) -> Array:
        """A contiguous dataset, mapped: only the pages that are touched are read."""
        kind, width = _MAPPED[name]
        area = self.header.areas.get(name)
        if area is None or (area.bytes and not HEADER_BYTES <= area.offset <= self.header.file_bytes - area.bytes):
            raise ShardCorruptError(f"{self.path}: its header does not place {name}; rebuild it from the stream")
        if area.bytes == 0:
            return np.empty((0, width) if width > 1 else 0, kind)
        shape = (area.bytes // width, width) if width > 1 else (area.bytes // np.dtype(kind).itemsize,)
        return np.memmap(self.path, kind, "r", area.offset, shape)

    def _unreadable(self, name: str, error: Exception) -> ShardCorruptError:
        return ShardCorruptError(f"{self.path}: {name} cannot be read ({error}); rebuild the shard from the stream")


_MAPPED: dict[str, tuple[str, int]] = {
    "by_event_id/ids": ("u1", 16),
    "by_event_id/rows": ("<u4", 1),
    "by_consultation/ids": ("u1", 16),
    "by_consultation/start": ("<u4", 1),
    "by_consultation/rows": ("<u4", 1),
}


def _search(rows: Array, wanted: bytes) -> int | None:
    """Where `wanted` (16 bytes) is in the sorted n×16 u1 `rows`."""
    if not len(rows):
        return None
    text = as_text(rows)
    at = int(np.searchsorted(text, np.frombuffer(wanted, "S16"))[0])
    return at if at < len(text) and rows[at].tobytes() == wanted else None
