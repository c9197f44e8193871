"""Reading one sealed shard: by row, by event id, by consultation, and by column.

Whether a shard holds an id is asked of its sorted ids, a page at a time; HDF5 opens the file only for what is in it,
and only the chunks that hold a wanted event are unpacked. Nothing is mapped: where the disk cannot give a page of a
mapping, or the file was cut short, the process that touches it dies.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import h5py
import numpy as np
from isal import isal_zlib

from contracts.errors import ShardCorruptError, ShardLostError, WireFormatError
from contracts.events import Event, decode_event
from stages.persist.columns import Array
from stages.persist.files import close_file, is_lost, read_all_at
from stages.persist.hdf5 import READ_ERRORS, refused
from stages.persist.header import HEADER_BYTES, Area, read_sealed_header
from stages.persist.idfilter import ID_BYTES

_BLOCK_BYTES = 4 * 1024 * 1024
_OFFSET_BYTES = 8
_OFFSETS_AT_ONCE = 32 * 1024
_ID_TEXT = f"S{ID_BYTES}"
_IDS_AT_ONCE = 1024
# isal's type stub calls this class an instance.
_DECOMPRESS_ERROR = cast(type[Exception], isal_zlib.error)
_NO_ROWS: Array = np.empty(0, "<u4")
_READ_ERRORS = (*READ_ERRORS, WireFormatError, _DECOMPRESS_ERROR)
"""What reading a damaged file raises, by h5py, numpy and ourselves; not always because it is damaged."""
_NOT_THE_FILES_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ESTALE)
_CHUNK_BYTES_MAX = 1024 * 1024
"""We write chunks of a quarter of that."""
_LAYOUTS = (h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED)
_KINDS = "iuSV"
"""Integers, texts of one length, and raw bytes. Text of any length lies elsewhere in the file."""
_PACKED_MAX = 1100
"""Deflate makes nothing smaller by more: a dataset that claims to be larger is not in the file."""


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


class _Chunked:
    """The bytes of a compressed dataset in one row of chunks. Its methods raise one of `_READ_ERRORS`.

    Unpacked here: several times faster than by HDF5's filter. The chunk unpacked last is kept.
    """

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._id = dataset.id
        self._chunk_items = int(dataset.chunks[0])
        self._chunk_bytes = self._chunk_items * dataset.dtype.itemsize
        if self._chunk_bytes > _CHUNK_BYTES_MAX:
            raise ValueError(f"its chunks are of {self._chunk_bytes} bytes")
        self._bytes = int(dataset.nbytes)
        self._number = -1
        self._chunk = b""

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end)."""
        if not 0 <= start <= end <= self._bytes:
            raise ValueError(f"bytes {start} to {end} are not in it")
        parts = []
        while start < end:
            number, at = divmod(start, self._chunk_bytes)
            part = self._unpack(number)[at : at + end - start]
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _unpack(self, number: int) -> bytes:
        if self._number != number:
            _, packed = self._id.read_direct_chunk((number * self._chunk_items,))
            unpacking = isal_zlib.decompressobj()
            chunk = unpacking.decompress(packed, self._chunk_bytes + 1)
            if len(chunk) != self._chunk_bytes or not unpacking.eof:
                raise ValueError(f"chunk {number} holds {len(chunk)} bytes, not {self._chunk_bytes}")
            self._number, self._chunk = number, chunk
        return self._chunk


class _OpenFile:
    """A file as it was when it was opened, whatever has its name since; closed when nobody has this any more."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            close_file(self.fd)


class SealedReader:
    """One sealed shard, opened without a lock.

    Its methods raise `ShardCorruptError` where the file cannot be read, and `OSError` where the system does not let us.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header; the rest of the file is opened when it is first needed.

        Raises:
            ShardCorruptError, ShardError: not a whole sealed shard of a known format.
            OSError: it cannot be read.
        """
        self.path = path
        self.header = read_sealed_header(path)
        self._file: h5py.File | None = None
        self._chunked: dict[str, _Chunked] = {}
        self._offsets: Array | None = None
        self._opened: _OpenFile | None = None

    def close(self) -> None:
        """Closes the file. It opens again when it is used again."""
        self.close_hdf5()
        self._opened = None

    def close_hdf5(self) -> None:
        """Gives back what reading events and columns took; what looking for ids needs stays open."""
        self._chunked.clear()
        self._offsets = None
        if self._file is not None:
            # Nothing was written to it: what goes wrong now is of no consequence.
            with suppress(*READ_ERRORS):
                self._file.close()
            self._file = None

    def read(self, name: str) -> Array:
        """A whole dataset, by HDF5 path."""
        with self._reading(name):
            dataset = self._dataset(name)
            if dataset.nbytes > _PACKED_MAX * self.header.file_bytes:
                raise ValueError(f"claims to hold {dataset.nbytes} bytes")
            values: Array = dataset[()]
            return values

    def records(self, first: int = 0, last: int | None = None) -> Iterator[bytes]:
        """The records of events [first, last), counted from 0, in order; a few MB are held at a time."""
        offsets = self._record_offsets()
        end = self.header.events if last is None else last
        while first < end:
            stop = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _BLOCK_BYTES, "right")) - 1)
            stop = min(stop, end)
            data = self._bytes_of("records", int(offsets[first]), int(offsets[stop]))
            base = int(offsets[first])
            bounds = offsets[first : stop + 1].tolist()
            for start, after in pairwise(bounds):
                yield data[start - base : after - base]
            first = stop

    def events(self) -> Iterator[tuple[int, Event]]:
        """(row, event) for all events in order."""
        for row, record in enumerate(self.records()):
            yield row, self._event(record)

    def find(self, event_id: bytes) -> tuple[int, Event] | None:
        """(row, event) of an event id (16 bytes), or None."""
        at = self._search("by_event_id/ids", event_id)
        if at is None:
            return None
        row, event = next(self._events_at(self._index("by_event_id/rows", at, at + 1)))
        if event.event_id != event_id:
            raise self._unreadable("by_event_id", ValueError(f"event {row} has another id"))
        return row, event

    def consultation(self, consultation_id: bytes) -> Iterator[tuple[int, Event]]:
        """(row, event) of a consultation's events (16 bytes), in stored order."""
        for row, event in self._events_at(self._consultation_rows(consultation_id)):
            if event.consultation_id != consultation_id:
                raise self._unreadable("by_consultation", ValueError(f"event {row} is of another consultation"))
            yield row, event

    def select(self, wanted: Selection) -> Iterator[tuple[int, Event]]:
        """(row, event) of the events that `wanted` describes, in stored order."""
        yield from self.events() if wanted == Selection() else self._events_at(self._rows_of(wanted))

    def _events_at(self, rows: Array) -> Iterator[tuple[int, Event]]:
        """The events in ascending `rows`."""
        if not len(rows):
            return
        # A row and the one after it: where its record begins and ends.
        bounds = self._offsets_at(np.concatenate([rows, rows + 1]).astype("<i8"))
        for row, start, end in zip(rows.tolist(), *bounds.reshape(2, -1).tolist(), strict=True):
            yield row, self._event(self._bytes_of("records", start, end))

    def _event(self, record: bytes) -> Event:
        with self._reading("records"):
            return decode_event(record)

    def _offsets_at(self, rows: Array) -> Array:
        """`offset` at `rows`."""
        if int(rows.max()) > self.header.events:
            raise self._unreadable("its index", ValueError(f"it has {self.header.events} events, not {rows.max()}"))
        offsets = np.empty(len(rows), "<i8")
        blocks = rows // _OFFSETS_AT_ONCE
        for block in np.unique(blocks).tolist():
            first = block * _OFFSETS_AT_ONCE
            last = min(first + _OFFSETS_AT_ONCE, self.header.events + 1)
            values = np.frombuffer(self._bytes_of("offset", first * _OFFSET_BYTES, last * _OFFSET_BYTES), "<i8")
            chosen = blocks == block
            offsets[chosen] = values[rows[chosen] - first]
        return offsets

    def _rows_of(self, wanted: Selection) -> Array:
        site, event_type, since_ns, until_ns = wanted.site, wanted.event_type, wanted.since_ns, wanted.until_ns
        header = self.header
        if header.events == 0 or (since_ns is not None and header.timestamp_ns_max < since_ns):
            return _NO_ROWS
        if until_ns is not None and header.timestamp_ns_min >= until_ns:
            return _NO_ROWS
        chosen = np.ones(header.events, bool)
        if wanted.consultation_id is not None:
            rows = self._consultation_rows(wanted.consultation_id)
            if not len(rows):
                return _NO_ROWS
            chosen[:] = False
            chosen[rows] = True
        for column, name in (("site", site), ("event_type", event_type)):
            if name is not None:
                codes = np.flatnonzero(self._names(column) == name)
                if not len(codes):
                    return _NO_ROWS
                chosen &= self._per_event(column) == codes[0]
        if since_ns is not None:
            chosen &= self._per_event("timestamp_ns") >= since_ns
        if until_ns is not None:
            chosen &= self._per_event("timestamp_ns") < until_ns
        return np.flatnonzero(chosen)

    def _per_event(self, name: str) -> Array:
        """A column that has one number for each event."""
        values = self.read(name)
        if values.shape != (self.header.events,) or values.dtype.kind not in "iu":
            raise self._unreadable(name, ValueError(f"is {values.dtype} of shape {values.shape}"))
        return values

    def _consultation_rows(self, consultation_id: bytes) -> Array:
        at = self._search("by_consultation/ids", consultation_id)
        if at is None:
            return _NO_ROWS
        with self._reading("by_consultation"):
            start, end = self._index("by_consultation/start", at, at + 2).tolist()
            rows = self._index("by_consultation/rows", start, end)
            if len(rows) and int(rows.max()) >= self.header.events:
                raise ValueError(f"it speaks of event {rows.max()}")
            return rows

    def column(self, name: str) -> Array:
        """A column of n values; `site` and `event_type` as text."""
        if name in ("site", "event_type"):
            with self._reading(name):
                texts: Array = self._names(name)[self._per_event(name)]
                return texts
        values = self.read(name)
        if values.shape[:1] != (self.header.events,) or values.dtype.kind not in "iu":
            raise self._unreadable(name, ValueError(f"is {values.dtype} of shape {values.shape}"))
        return values

    def _names(self, column: str) -> Array:
        with self._reading(f"names/{column}"):
            return self.read(f"names/{column}").astype("U")

    def _open(self) -> h5py.File:
        if self._file is None:
            self._file = h5py.File(self.path, "r", locking=False)
        return self._file

    def _dataset(self, name: str) -> h5py.Dataset:
        """A dataset whose values lie in this file: links that lead out, or in circles, crash or hang the library."""
        file = self._open()
        parts = name.split("/")
        for depth in range(1, len(parts) + 1):
            place = "/".join(parts[:depth])
            if file.id.links.get_info(place.encode()).type != h5py.h5l.TYPE_HARD:
                raise ValueError(f"{place} is a link to somewhere else")
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset):
            raise ValueError("it is not a dataset")
        made = dataset.id.get_create_plist()
        if made.get_layout() not in _LAYOUTS or made.get_external_count():
            raise ValueError("its values are somewhere else")
        if dataset.dtype.kind not in _KINDS:
            raise ValueError(f"its type is {dataset.dtype}")
        return dataset

    def _record_offsets(self) -> Array:
        if self._offsets is None:
            offsets = self.read("offset")
            if offsets.shape != (self.header.events + 1,) or np.any(offsets[1:] < offsets[:-1]):
                raise self._unreadable("offset", ValueError("it does not grow from event to event"))
            self._offsets = offsets
        return self._offsets

    def _bytes_of(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a compressed dataset in one row of chunks."""
        with self._reading(name):
            if name not in self._chunked:
                self._chunked[name] = _Chunked(self._dataset(name))
            return self._chunked[name].read(start, end)

    def _search(self, name: str, wanted: bytes) -> int | None:
        """Where `wanted` (16 bytes) is in the sorted ids `name`."""
        text = np.frombuffer(wanted, _ID_TEXT)
        low, high = 0, self._place(name).bytes // ID_BYTES
        # Where it is likely to be, as most ids are random; then in the middle of what is left.
        at = int.from_bytes(wanted[:4], "big") * high >> 32
        while low < high:
            first = max(low, min(at, high) - _IDS_AT_ONCE // 2)
            ids = self._index(name, first, min(first + _IDS_AT_ONCE, high))
            at = int(ids.searchsorted(text)[0])
            # As a string numpy drops an id's zero bytes at the end.
            if at < len(ids) and bytes(ids[at]).ljust(ID_BYTES, b"\0") == wanted:
                return first + at
            if 0 < at < len(ids):
                return None
            low, high = (first + at, high) if at else (low, first)
            at = (low + high) // 2
        return None

    def _index(self, name: str, first: int, last: int) -> Array:
        """Items [first, last) of a contiguous dataset, as many of them as there are."""
        kind, area = np.dtype(_INDEXES[name]), self._place(name)
        last = min(last, area.bytes // kind.itemsize)
        if first >= last:
            return np.empty(0, kind)
        with self._reading(name):
            if self._opened is None:
                self._opened = _OpenFile(self.path)
            start, end = first * kind.itemsize, last * kind.itemsize
            return np.frombuffer(read_all_at(self._opened.fd, end - start, area.offset + start, self.path), kind)

    def _place(self, name: str) -> Area:
        header = self.header
        area = header.areas.get(name)
        if area is None or (area.bytes and not HEADER_BYTES <= area.offset <= header.file_bytes - area.bytes):
            raise ShardCorruptError(f"{self.path}: its header does not place {name}; rebuild it from the stream")
        return area

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Whatever goes wrong in the block is the file's fault, but for what the system refuses."""
        try:
            yield
        except _READ_ERRORS as error:
            why = refused(error, self.path)
            if why is not None and why.errno in _NOT_THE_FILES_FAULT:
                raise why from error
            if why is not None and is_lost(why):
                what = f"{self.path}: {name} cannot be read ({why.strerror}); rebuild the shard from the stream"
                raise ShardLostError(what) from why
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: str, error: Exception) -> ShardCorruptError:
        return ShardCorruptError(f"{self.path}: {name} cannot be read ({error}); rebuild the shard from the stream")


_INDEXES = {
    "by_event_id/ids": _ID_TEXT,
    "by_event_id/rows": "<u4",
    "by_consultation/ids": _ID_TEXT,
    "by_consultation/start": "<u4",
    "by_consultation/rows": "<u4",
}
