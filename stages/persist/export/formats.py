"""The formats of an export, and those of them that are streams of text: NDJSON and CSV.

Both hold what `event_to_dict` gives. CSV cells are not altered against formula injection, so that they read back as
they were stored, and need not be: what a spreadsheet takes for a formula begins with one of ``= + - @``, a tab or a
return. Ids, times, hashes, numbers and trace contexts begin with a digit or letter, payload and metadata with ``{``. A
site may begin with ``-``, but a formula without ``(``, ``!``, ``|`` or ``:`` calls nothing and reaches no other file.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from contracts.events import event_to_dict

if TYPE_CHECKING:
    from stages.persist.store import StoredEvent

CSV_COLUMNS = (
    "event_id",
    "consultation_id",
    "timestamp",
    "event_type",
    "site",
    "payload",
    "metadata",
    "audit_hash",
    "partition",
    "origin",
    "index",
    "leaf",
    "group",
    "criticality",
    "policy_version",
    "accepted",
    "ingest",
    "segment",
    "hash",
    "traceparent",
)
"""The header row: the fields of `event_to_dict`, its `times` each as a column. What an event has not is empty."""

_BUFFER_BYTES = 256 * 1024
_encoder = msgspec.json.Encoder()


class ExportFormat(StrEnum):
    """What an export can be."""

    NDJSON = "ndjson"
    CSV = "csv"
    HDF5_CONSULTATIONS = "hdf5-consultations"


def encode_line(stored: StoredEvent) -> bytes:
    """The event as one JSON object in UTF-8, without a line break."""
    line = _encoder.encode(_fields(stored))
    # A gateway may lay out its payload in lines. Within JSON strings they are escaped, so these are mere spaces.
    return line.replace(b"\n", b" ").replace(b"\r", b" ") if b"\n" in line or b"\r" in line else line


def write_ndjson(found: Iterable[StoredEvent], file: BinaryIO) -> int:
    """Writes one JSON object a line; gives the number of events. Raises `OSError`."""
    buffer = bytearray()
    count = 0
    for stored in found:
        buffer += encode_line(stored)
        buffer += b"\n"
        count += 1
        if len(buffer) >= _BUFFER_BYTES:
            file.write(buffer)
            buffer.clear()
    file.write(buffer)
    file.flush()
    return count


def write_csv(found: Iterable[StoredEvent], file: BinaryIO) -> int:
    """Writes RFC 4180 in UTF-8, a header row and one row an event; gives the number of events. Raises `OSError`."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(CSV_COLUMNS)
    count = 0
    for stored in found:
        writer.writerow(_row(stored))
        count += 1
        if buffer.tell() >= _BUFFER_BYTES:
            _drain(buffer, file)
    _drain(buffer, file)
    file.flush()
    return count


def _fields(stored: StoredEvent) -> dict[str, Any]:
    return event_to_dict(stored.event, partition=stored.partition, leaf=stored.leaf)


def _row(stored: StoredEvent) -> list[Any]:
    fields = _fields(stored)
    fields |= fields.pop("times")
    fields["payload"], fields["metadata"] = stored.event.payload.decode(), stored.event.metadata.decode()
    return [fields.get(name) for name in CSV_COLUMNS]


def _drain(buffer: io.StringIO, file: BinaryIO) -> None:
    file.write(buffer.getvalue().encode())
    buffer.seek(0)
    buffer.truncate()
