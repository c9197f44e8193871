"""The commit row and the group's blob: how one commit lies on disk, in live and in sealed shards.

A blob is, for each record in order, its length as little-endian u32 and its bytes (`contracts.events.encode_event`). A
row is nine little-endian i64 (`ROW_COLUMNS`); its CRC-32 covers the other eight and then the blob, so a row whose bytes
or blob did not reach the disk whole is never taken for a commit.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from isal import isal_zlib

_ROW = struct.Struct("<9q")
_COVERED = struct.Struct("<8q")
_LENGTH = struct.Struct("<I")

ROW_BYTES = _ROW.size
LENGTH_BYTES = _LENGTH.size


class CommitRow(NamedTuple):
    """One commit.

    Attributes:
        ordinal: its place in the shard, from 1; 0 means that the row is empty.
        end_bytes: where its blob ends in the shard's frames; it starts where the previous row's ends.
        crc32: see the module.
        prev_origin: origin the commit before it reached.
        origin: origin it reaches.
        events: events stored by it.
        duplicates, dead_lettered: events it settles without storing them.
        committed_ns: when, nanoseconds since the epoch.
    """

    ordinal: int
    end_bytes: int
    crc32: int
    prev_origin: int
    origin: int
    events: int
    duplicates: int
    dead_lettered: int
    committed_ns: int


ROW_COLUMNS = CommitRow._fields


def row_crc32(row: CommitRow, blob: bytes) -> int:
    """What `row.crc32` must be."""
    return isal_zlib.crc32(blob, isal_zlib.crc32(_COVERED.pack(row.ordinal, row.end_bytes, *row[3:])))


def encode_row(row: CommitRow) -> bytes:
    """The row's `ROW_BYTES` bytes."""
    return _ROW.pack(*row)


def decode_rows(data: bytes) -> list[CommitRow]:
    """The rows in `data`, whose length is a multiple of `ROW_BYTES`."""
    return [CommitRow(*values) for values in _ROW.iter_unpack(data)]


def blob_bytes(records: Sequence[bytes]) -> int:
    """How long `pack_blob` makes these records."""
    return sum(map(len, records)) + LENGTH_BYTES * len(records)


def pack_blob(records: Sequence[bytes]) -> bytes:
    """The blob of a group's records."""
    return b"".join([part for record in records for part in (_LENGTH.pack(len(record)), record)])


def split_blob(blob: bytes) -> list[bytes]:
    """Inverse of `pack_blob`.

    Raises:
        ValueError: a length points beyond the blob.
    """
    records = []
    at, end = 0, len(blob)
    length_at = _LENGTH.unpack_from
    while at < end:
        start = at + LENGTH_BYTES
        if start > end:
            raise ValueError("a record's length is cut short")
        at = start + length_at(blob, at)[0]
        if at > end:
            raise ValueError("a record reaches beyond its commit")
        records.append(blob[start:at])
    return records
