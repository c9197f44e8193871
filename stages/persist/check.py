"""Checks one shard down to each byte, in a process (`reading`) that it may hang or crash."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from uuid import UUID

import msgspec
import numpy as np

from contracts.errors import ShardError, WireFormatError
from contracts.events import Event, decode_event, decode_event_key
from contracts.hashing import INCREMENTAL_BYTES_MIN, MerkleFrontier, audit_hash, audit_hash_incremental, leaf_hash
from stages.persist.agreement import commit_problems, content_problems, place_problems
from stages.persist.columns import ColumnsBuilder
from stages.persist.header import LiveHeader, SealedHeader, is_padding
from stages.persist.live import LiveReader
from stages.persist.names import parse_name
from stages.persist.rows import CommitRow, blob_bytes, encode_row, pack_blob, row_crc32, split_blob
from stages.persist.seal import sealed_info
from stages.persist.sealed import SealedReader
from stages.persist.structure import structure_problems

PROBLEMS_MAX = 100
"""No more are reported of one shard."""

_BATCH_BYTES = 1024 * 1024
_SETTLED = struct.Struct("<4q")


class Finding(msgspec.Struct, frozen=True):
    """One thing wrong in a shard.

    Attributes:
        where: the commit and event, as far as known.
        what: what is wrong with it.
    """

    where: str
    what: str


class ShardCheck(msgspec.Struct, kw_only=True):
    """What is in a shard, for holding it against its neighbours, and what is wrong with it.

    Attributes:
        findings: everything wrong in it.
        missing: the file is not there (any more).
        store, cluster: ids it says it belongs to.
        commits, events: that may be seen.
        unseen: whole commits after a live shard's watermark.
        unseen_ids, unseen_leaves: their events' ids and leaf hashes, each joined.
        unseen_origin: where the last of them ends; 0 without any.
        prev_origin, last_origin: where its first commit begins and its last one ends; None without commits.
        begins: the store says it took the partition over with this shard.
        tree_size_before, frontier_before: the Merkle tree it says it goes on from; None where it does not say.
        settled: for each commit, its origin, events, duplicates and dead-lettered events, as little-endian i64.
        leaves: its events' leaf hashes, joined.
        ids: its events' ids, joined.
        rows: for each commit, SHA-256 of the index rows up to its own, joined.
        sha256: of a sealed file's bytes, hex; empty where it is damaged.
    """

    findings: list[Finding] = msgspec.field(default_factory=list)
    missing: bool = False
    store: str = ""
    cluster: str = ""
    commits: int = 0
    events: int = 0
    unseen: int = 0
    unseen_ids: bytes = b""
    unseen_leaves: bytes = b""
    unseen_origin: int = 0
    prev_origin: int | None = None
    last_origin: int | None = None
    begins: bool = False
    tree_size_before: int | None = None
    frontier_before: bytes = b""
    settled: bytes = b""
    leaves: bytes = b""
    ids: bytes = b""
    rows: bytes = b""
    sha256: str = ""

    def report(self, where: str, what: str) -> None:
        """Adds a finding, up to `PROBLEMS_MAX`."""
        if len(self.findings) < PROBLEMS_MAX:
            self.findings.append(Finding(where, what))


def check_shard(path: Path) -> ShardCheck:
    """Reads and checks every byte of a live or sealed shard. Whatever is wrong is a finding, not an exception."""
    check = ShardCheck()
    try:
        shard = parse_name(path)
        if shard is None:
            check.report("file name", "is not the name of a shard")
        elif shard.sealed:
            _check_sealed(path, check)
        else:
            _check_live(path, check)
    except FileNotFoundError:
        check.missing = True
    except (ShardError, OSError) as error:
        check.report("file", str(error))
    except MemoryError:
        check.report("file", "takes more memory to read than any shard of its length; it was forged")
    except Exception as error:
        # A damaged file can make no sense in more ways than can be listed; each is a finding.
        check.report("file", f"cannot be understood: {type(error).__name__}: {error}")
    return check


class _Contents:
    """Checks the commits of a shard in order, and collects what follows from them."""

    def __init__(self, check: ShardCheck) -> None:
        self._check = check
        self._last_key = (-1, -1)
        self._settled: list[bytes] = []
        self._leaves: list[bytes] = []
        self._ids: list[bytes] = []
        self._rows: list[bytes] = []
        self._rows_so_far = sha256()
        self.columns: ColumnsBuilder | None = ColumnsBuilder()
        """None once a record was found that gives no columns."""

    def take(self, row: CommitRow, records: list[bytes]) -> None:
        check = self._check
        where = f"commit {row.ordinal}"
        if check.last_origin is None:
            check.prev_origin = row.prev_origin
        elif row.prev_origin != check.last_origin:
            check.report(
                where, f"goes on from origin {row.prev_origin}, but the one before ends at {check.last_origin}"
            )
        if row.prev_origin >= row.origin:
            check.report(where, f"covers origins after {row.prev_origin} up to {row.origin}, which is nothing")
        if len(records) != row.events or min(row.events, row.duplicates, row.dead_lettered) < 0:
            check.report(where, f"says it holds {row.events} events, but holds {len(records)}")
        check.last_origin = row.origin
        check.commits += 1
        self._rows_so_far.update(encode_row(row))
        self._rows.append(self._rows_so_far.digest())
        self._settled.append(_SETTLED.pack(row.origin, len(records), row.duplicates, row.dead_lettered))
        events = [event for record in records if (event := self._take_record(row, record)) is not None]
        if self.columns is not None and len(events) == len(records):
            try:
                self.columns.extend(events, records)
            except ValueError as error:
                check.report(where, f"holds what no column holds: {error}")
                self.columns = None

    def finish(self) -> None:
        self._check.settled = b"".join(self._settled)
        self._check.leaves = b"".join(self._leaves)
        self._check.ids = b"".join(self._ids)
        self._check.rows = b"".join(self._rows)
        self._check.events = len(self._leaves)

    def _take_record(self, row: CommitRow, record: bytes) -> Event | None:
        """The record's event, with everything that is wrong with it reported; None when it is none."""
        self._leaves.append(leaf_hash(record))
        where = f"commit {row.ordinal}, event {len(self._leaves)} of the shard"
        try:
            event = decode_event(record)
        except WireFormatError as error:
            self._check.report(where, f"is not an event: {error}")
            self.columns = None
            return None
        where = f"commit {row.ordinal}, event {UUID(bytes=event.event_id)}"
        self._ids.append(event.event_id)
        key = (event.origin, event.index)
        if key <= self._last_key:
            self._check.report(where, f"has origin and index {key} after {self._last_key}")
        if not row.prev_origin < event.origin <= row.origin:
            self._check.report(
                where, f"has origin {event.origin}, outside of its commit's {row.prev_origin}-{row.origin}"
            )
        self._last_key = key
        if (wrong := _wrong_hash(event)) is not None:
            self._check.report(where, wrong)
        return event


def _wrong_hash(event: Event) -> str | None:
    compute = audit_hash_incremental if len(event.payload) > INCREMENTAL_BYTES_MIN else audit_hash
    try:
        found = compute(json.loads(event.payload))
    except (ValueError, RecursionError) as error:
        return f"its payload is not JSON that can be hashed: {error}"
    if found != event.audit_hash:
        return f"its payload hashes to {found.hex()}, not to its audit hash {event.audit_hash.hex()}"
    return None


def _check_name(path: Path, header: LiveHeader | SealedHeader, check: ShardCheck) -> None:
    check.store, check.cluster, check.begins = header.store, header.cluster, header.begins
    shard = parse_name(path)
    assert shard is not None
    told = (shard.partition, shard.shard)
    if told != (header.partition, header.shard):
        check.report("header", f"is shard {header.shard} of partition {header.partition}, but its name says another")
    if isinstance(header, SealedHeader) and (shard.first_origin, shard.last_origin) != (
        header.first_origin,
        header.last_origin,
    ):
        check.report("header", f"covers origins {header.first_origin}-{header.last_origin}, but its name says others")


def _check_live(path: Path, check: ShardCheck) -> None:
    with LiveReader(path) as reader:
        header = reader.header
        _check_name(path, header, check)
        if header.begins:
            check.tree_size_before, check.frontier_before = header.tree_size_before, header.frontier_before
        shown = reader.watermark()
        if not 0 <= shown <= reader.rows_max:
            check.report("watermark", f"is {shown}, but there is room for {reader.rows_max} commits")
            shown = 0
        contents = _Contents(check)
        unseen_ids: list[bytes] = []
        unseen_leaves: list[bytes] = []
        for row, blob in reader.blobs():
            if row.ordinal > shown:
                check.unseen += 1
                check.unseen_origin = row.origin
                records = split_blob(blob)
                unseen_ids += [decode_event_key(record).event_id for record in records]
                unseen_leaves += map(leaf_hash, records)
                continue
            contents.take(row, _split(row, blob, check))
        contents.finish()
        check.unseen_ids = b"".join(unseen_ids)
        check.unseen_leaves = b"".join(unseen_leaves)
        if check.commits < shown:
            check.report(
                f"commit {check.commits + 1}",
                f"is empty or fails its checksum, though commits up to {shown} were accepted",
            )
        _check_structure(path, header, check)


def _split(row: CommitRow, blob: bytes, check: ShardCheck) -> list[bytes]:
    try:
        return split_blob(blob)
    except ValueError as error:
        check.report(f"commit {row.ordinal}", str(error))
        return []


def _check_sealed(path: Path, check: ShardCheck) -> None:
    reader = SealedReader(path)
    header = reader.header
    _check_name(path, header, check)
    check.tree_size_before, check.frontier_before = header.tree_size_before, header.frontier_before
    try:
        check.sha256 = sealed_info(path).sha256
    except ShardError as error:
        check.report("file", str(error))
    try:
        rows = [CommitRow(*row) for row in reader.read("commits").tolist()]
        contents = _Contents(check)
        readable = True
        start_bytes = 0
        for row, records in _commits(reader, rows, check):
            if records is None:
                readable = False
            else:
                _check_row(row, records, start_bytes, check)
                contents.take(row, records)
            start_bytes = row.end_bytes
        contents.finish()
        for where, what in commit_problems(header, rows):
            check.report(where, what)
        if readable and contents.columns is not None:
            tree = MerkleFrontier.from_bytes(header.tree_size_before, header.frontier_before)
            for leaf in np.frombuffer(check.leaves, "V32"):
                tree.append(leaf.tobytes())
            for where, what in content_problems(reader, contents.columns.finish(header.store), tree):
                check.report(where, what)
        _check_structure(path, header, check)
        for where, what in place_problems(path, header):
            check.report(where, what)
    finally:
        reader.close()


def _commits(
    reader: SealedReader, rows: list[CommitRow], check: ShardCheck
) -> Iterator[tuple[CommitRow, list[bytes] | None]]:
    """Each commit with its records; None where they cannot be read, which is reported."""
    if sum(row.events for row in rows) != reader.header.events or any(row.events < 0 for row in rows):
        check.report("commits", f"count {sum(row.events for row in rows)} events, the header {reader.header.events}")
        return
    at = done = 0
    while done < len(rows):
        batch, size = [rows[done]], 0
        while done + len(batch) < len(rows) and size < _BATCH_BYTES:
            size += rows[done + len(batch)].end_bytes - batch[-1].end_bytes
            batch.append(rows[done + len(batch)])
        total = sum(row.events for row in batch)
        try:
            records = list(reader.records(at, at + total))
            taken = 0
            for row in batch:
                yield row, records[taken : taken + row.events]
                taken += row.events
        except ShardError:
            yield from _commits_one_by_one(reader, batch, at, check)
        at += total
        done += len(batch)


def _commits_one_by_one(
    reader: SealedReader, rows: list[CommitRow], at: int, check: ShardCheck
) -> Iterator[tuple[CommitRow, list[bytes] | None]]:
    for row in rows:
        try:
            yield row, list(reader.records(at, at + row.events))
        except ShardError as error:
            check.report(f"commit {row.ordinal}, {_name_events(reader, at, row.events)}", str(error))
            yield row, None
        at += row.events


def _name_events(reader: SealedReader, at: int, count: int) -> str:
    try:
        ids = [str(UUID(bytes=row.tobytes())) for row in reader.read("event_id")[at : at + count]]
    except ShardError:
        return f"events {at + 1} to {at + count} of the shard"
    return f"event {ids[0]}" if count == 1 else f"events {ids[0]} to {ids[-1]}"


def _check_row(row: CommitRow, records: list[bytes], start_bytes: int, check: ShardCheck) -> None:
    if row.end_bytes != start_bytes + blob_bytes(records) or row_crc32(row, pack_blob(records)) != row.crc32:
        ids = ", ".join(_id_of(record) for record in records[:3]) + (", …" if len(records) > 3 else "")
        check.report(f"commit {row.ordinal}, events {ids}", "its events do not match its checksum")


def _id_of(record: bytes) -> str:
    try:
        return str(UUID(bytes=decode_event(record).event_id))
    except (WireFormatError, ValueError):
        return "(not an event)"


def _check_structure(path: Path, header: LiveHeader | SealedHeader, check: ShardCheck) -> None:
    """What HDF5 itself says of the file, for other programs; and the rest of the block that the header is in."""
    for where, what in structure_problems(path, header):
        check.report(where, what)
    if not is_padding(path):
        check.report("header", "is followed by something, where nothing but spaces may be")
