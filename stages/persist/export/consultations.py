"""The classic layout: ``/consultations/{id}/events``, the events of each consultation together.

In the store a consultation's events are scattered in time. They are sorted outside of memory: runs of bounded size go
to a nameless temporary file and are merged from there, so each consultation is written once, and memory does not grow
with the export. The disk needs room for the events twice.
"""

from __future__ import annotations

import errno
import heapq
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple
from uuid import UUID

import h5py

from contracts.events import format_rfc3339
from stages.persist.export.formats import encode_line
from stages.persist.hdf5 import new_hdf5

if TYPE_CHECKING:
    from stages.persist.store import StoredEvent

ABOUT = (
    "Events by consultation: /consultations/{id}/events holds one JSON object (UTF-8) an event in stored order; the "
    "group's created_at and updated_at are the times of its earliest and latest event, RFC 3339 in UTC."
)

_RUN_BYTES = 32 * 1024 * 1024
_READ_BYTES = 64 * 1024
_BATCH_BYTES = 4 * 1024 * 1024
_EVENT_BYTES = 256
"""What HDF5 adds to an event, generously (measured: 140)."""
_HEAD = struct.Struct("<16sqI")
_TEXT = h5py.string_dtype("utf-8")


class _Entry(NamedTuple):
    consultation_id: bytes
    timestamp_ns: int
    line: bytes


_by_consultation = itemgetter(0)


def write_consultations(
    found: Iterable[StoredEvent], path: Path, *, on_written: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Writes the events to the HDF5 file `path`, which every reader from HDF5 1.8 on opens.

    Args:
        found: the events; within a consultation they keep their order.
        path: a temporary name; the disk it is on also holds what does not fit in memory.
        on_written: told how many events of how many are written, once all of them are read.

    Returns:
        the number of events.

    Raises:
        OSError: the disk refused.
    """
    done = 0
    with tempfile.TemporaryFile(dir=path.parent) as spill:
        sorter = _Sorter(spill)
        sorter.take(found)
        _check_room(path, sorter)
        with new_hdf5(path, user_block_bytes=0) as file:
            file.attrs["about"] = ABOUT
            consultations = file.create_group("consultations")
            for consultation_id, entries in groupby(sorter.sorted(), key=_by_consultation):
                done += _write_one(consultations.create_group(str(UUID(bytes=consultation_id))), entries)
                on_written(done, sorter.events)
    return done


def _check_room(path: Path, sorter: _Sorter) -> None:
    """Finds a disk that is too small before HDF5 does: it may crash the process on its way out after a failed write."""
    need_bytes = sorter.line_bytes * 5 // 4 + sorter.events * _EVENT_BYTES
    if shutil.disk_usage(path.parent).free < need_bytes:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, it needs about {need_bytes} bytes", str(path))


def _write_one(group: h5py.Group, entries: Iterator[_Entry]) -> int:
    """Writes a consultation's events and attributes; gives the number of events."""
    batches = _batches(entries)
    batch = next(batches)
    more = next(batches, None)
    lines = [entry.line for entry in batch]
    first_ns, last_ns = _span(batch)
    count = len(batch)
    # Contiguous when it is written at once, as most are: chunks cost some KB each.
    chunked = {} if more is None else {"maxshape": (None,), "chunks": (count,)}
    dataset = group.create_dataset("events", data=lines, dtype=_TEXT, **chunked)
    for batch in chain([] if more is None else [more], batches):
        dataset.resize((count + len(batch),))
        dataset[count:] = [entry.line for entry in batch]
        count += len(batch)
        earliest, latest = _span(batch)
        first_ns, last_ns = min(first_ns, earliest), max(last_ns, latest)
    group.attrs["event_count"] = count
    group.attrs["created_at"] = format_rfc3339(first_ns)
    group.attrs["updated_at"] = format_rfc3339(last_ns)
    return count


def _batches(entries: Iterator[_Entry]) -> Iterator[list[_Entry]]:
    batch: list[_Entry] = []
    size_bytes = 0
    for entry in entries:
        batch.append(entry)
        size_bytes += len(entry.line)
        if size_bytes >= _BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def _span(batch: list[_Entry]) -> tuple[int, int]:
    times = [entry.timestamp_ns for entry in batch]
    return min(times), max(times)


class _Sorter:
    """Brings events into order of consultation, keeping their order within each. Holds one run in memory.

    Attributes:
        events: how many it took.
        line_bytes: length of their lines.
    """

    def __init__(self, spill: BinaryIO) -> None:
        """`spill` is an empty file, for all runs but the last."""
        self._file = spill
        self._runs: list[tuple[int, int]] = []
        self._last: list[_Entry] = []
        self.events = 0
        self.line_bytes = 0

    def take(self, found: Iterable[StoredEvent]) -> None:
        """Takes all events."""
        size_bytes = 0
        for stored in found:
            event = stored.event
            entry = _Entry(event.consultation_id, event.timestamp_ns, encode_line(stored))
            if size_bytes >= _RUN_BYTES:
                self._spill()
                size_bytes = 0
            self._last.append(entry)
            size_bytes += len(entry.line)
            self.events += 1
            self.line_bytes += len(entry.line)
        self._last.sort(key=_by_consultation)

    def sorted(self) -> Iterator[_Entry]:
        """The events in order."""
        return heapq.merge(*(self._read(*run) for run in self._runs), self._last, key=_by_consultation)

    def _spill(self) -> None:
        self._last.sort(key=_by_consultation)
        start = self._file.tell()
        for entry in self._last:
            self._file.write(_HEAD.pack(entry.consultation_id, entry.timestamp_ns, len(entry.line)))
            self._file.write(entry.line)
        self._file.flush()
        self._runs.append((start, self._file.tell()))
        self._last.clear()

    def _read(self, start: int, end: int) -> Iterator[_Entry]:
        data = b""
        at = 0
        while at < len(data) or start < end:
            need = _HEAD.size
            if len(data) - at >= need:
                consultation_id, timestamp_ns, length = _HEAD.unpack_from(data, at)
                need += length
                if len(data) - at >= need:
                    yield _Entry(consultation_id, timestamp_ns, data[at + _HEAD.size : at + need])
                    at += need
                    continue
            piece = os.pread(self._file.fileno(), min(max(_READ_BYTES, need), end - start), start)
            data, at, start = data[at:] + piece, 0, start + len(piece)
