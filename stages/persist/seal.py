"""Sealing: a live shard's committed rows become an immutable, compressed, verified HDF5 file.

Blocking and CPU-bound: run it in a thread or a process. It reads the live file on its own descriptor and keeps the
records of one commit and a compressed chunk in memory. The same live rows and arguments give the same bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from isal import isal_zlib

from contracts.errors import ShardCorruptError, ShardError, WireFormatError
from contracts.events import decode_event, format_rfc3339
from contracts.hashing import HASH_BYTES, MerkleFrontier
from stages.persist.agreement import areas_of, check_agreement
from stages.persist.columns import COMPRESSED, DESCRIPTIONS, Array, ColumnsBuilder
from stages.persist.files import is_lost, publish_file, sync_file, write_all_at
from stages.persist.hdf5 import new_hdf5, read_back
from stages.persist.header import HEADER_BYTES, SealedHeader, encode_header, read_sealed_header
from stages.persist.live import LiveReader
from stages.persist.names import list_shards, sealed_name, tmp_path
from stages.persist.opening import check_committed, sealed_rows
from stages.persist.rows import ROW_COLUMNS, CommitRow
from stages.persist.sealed import SealedReader

log = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 1024

_GZIP_LEVEL = 1
_ALIGN_BYTES = 8
_READ_BYTES = 1024 * 1024


class SealJob(NamedTuple):
    """A full live shard that waits to be sealed: its file, number, commits, the tree before its first event, and the
    digest of its rows (as `StoreEnd.rows`).
    """

    path: Path
    shard: int
    commits: int
    frontier: MerkleFrontier
    rows: str


@dataclass(frozen=True, slots=True)
class SealedInfo:
    """A sealed shard: what a `SealRecord` says of it, and what the next shard goes on from.

    Attributes:
        path: the file.
        header: its facts.
        sha256: of the whole file, hex.
        bytes: its size.
    """

    path: Path
    header: SealedHeader
    sha256: str
    bytes: int

    @property
    def frontier(self) -> MerkleFrontier:
        """The partition's Merkle tree after the shard's last event."""
        return MerkleFrontier.from_bytes(self.header.tree_size, self.header.frontier)


def seal(
    live_path: Path,
    *,
    commits: int,
    frontier: MerkleFrontier,
    sealed_ns: int,
    committed: tuple[int, str, str] | None = None,
) -> SealedInfo:
    """Writes the sealed form of the first `commits` rows of a live shard beside it, durable before it has its name.

    The live file is left; the caller removes it once nothing needs it. A sealed file that is already
    there and whole is given back as it is; a damaged one is written again from the live rows.

    If the process dies or the power fails here: the live file, and perhaps a `.tmp` file that nobody reads; or both the
    live and the sealed file, whole.

    Args:
        live_path: the live shard.
        commits: how many rows are committed; at least 1.
        frontier: the partition's Merkle tree before this shard; not changed.
        sealed_ns: now.
        committed: size and root of the tree after it, and the digest of the rows, as they were committed: what somebody
            changed on disk since, and its checksums with it, must not get a seal record. None: nobody knows.

    Raises:
        ShardCorruptError: committed rows are damaged or changed, an event cannot be decoded, or the file does not read
            back.
        ShardError: nothing to seal, or another sealed file has this shard's number.
        OSError: the disk refused.
    """
    if commits < 1:
        raise ShardError(f"{live_path}: has no commit to seal")
    with LiveReader(live_path) as live:
        first, last = _span(live, commits)
        header = live.header
        final = live_path.with_name(sealed_name(header.partition, header.shard, first, last))
        if final.exists() and (there := _already_sealed(final, commits, frontier)) is not None:
            check_committed(final, header.shard, there.frontier, sealed_rows(final), committed)
            return there
        for shard in list_shards(live_path.parent).get(header.partition, ()):
            if shard.shard == header.shard and shard.sealed and shard.path != final:
                raise ShardError(f"{shard.path}: has the number of {live_path}, covering other origins; move one away")
        tmp = tmp_path(final)
        written = _write_body(live, tmp, commits, frontier, sealed_ns)
        digest = sha256(written.datasets["commits"].tobytes()).hexdigest()
        check_committed(live_path, header.shard, written.frontier, digest, committed)
        _check_body(tmp, written)
        return _finish(live, tmp, final, written, (first, last), frontier, sealed_ns)


def sealed_info(path: Path) -> SealedInfo:
    """What a sealed file says it is, after checking every byte against its own checksum.

    Raises:
        ShardCorruptError: damaged.
        ShardError: not a sealed shard of a known format.
        OSError: it cannot be read.
    """
    header = read_sealed_header(path)
    body, whole = sha256(), sha256()
    with path.open("rb") as file:
        whole.update(file.read(HEADER_BYTES))
        while data := file.read(_READ_BYTES):
            body.update(data)
            whole.update(data)
    if body.hexdigest() != header.body_sha256:
        raise ShardCorruptError(f"{path}: its bytes are not those that were sealed; rebuild it from the stream")
    return SealedInfo(path, header, whole.hexdigest(), header.file_bytes)


def events_of_sealed(path: Path) -> SealedInfo:
    """As `sealed_info`, of a file whose events are those under the root that its header says, and give all else in it.

    Its own checksums do not show that: whoever changes the file makes them anew, and leaves the root as it is.
    Raises as `sealed_info` and `check_agreement`.
    """
    info = sealed_info(path)
    with closing(SealedReader(path)) as reader:
        check_agreement(reader)
    return info


def whole_sealed(path: Path) -> SealedInfo | None:
    """As `events_of_sealed`; None where it is damaged or on a bad sector, to be sealed again from its live form.

    Raises:
        ShardError: not a sealed shard of a known format.
        OSError: nothing is known of it.
    """
    try:
        return events_of_sealed(path)
    except (ShardCorruptError, OSError) as error:
        if isinstance(error, OSError) and not is_lost(error):
            raise
        log.warning("%s: %s; it is sealed again from its live form", path.name, error)
        return None


@dataclass(slots=True)
class _Written:
    """What went into the file, for reading it back."""

    datasets: dict[str, Array]
    record_bytes: int
    records_sha256: str
    frontier: MerkleFrontier


def _span(live: LiveReader, commits: int) -> tuple[int, int]:
    if commits > live.rows_max:
        raise ShardCorruptError(f"{live.path}: has room for {live.rows_max} commits, so {commits} cannot be sealed")
    return live.read_rows(0, 1)[0].prev_origin + 1, live.read_rows(commits - 1, commits)[0].origin


def _already_sealed(path: Path, commits: int, frontier: MerkleFrontier) -> SealedInfo | None:
    """The sealed file at `path`; None when it is damaged (the live rows are still there to make it again)."""
    info = whole_sealed(path)
    if info is None:
        return None
    header = info.header
    if (header.commits, header.tree_size_before, header.frontier_before) != (
        commits,
        frontier.size,
        frontier.to_bytes(),
    ):
        raise ShardError(f"{path}: does not hold the {commits} commits of the live shard beside it; move one away")
    return info


class _RecordsWriter:
    """Packs records into gzip chunks of `CHUNK_BYTES` and writes each once, when it is full."""

    def __init__(self, file: h5py.File) -> None:
        self._dataset = file.create_dataset(
            "records",
            (0,),
            "u1",
            maxshape=(None,),
            chunks=(CHUNK_BYTES,),
            compression="gzip",
            compression_opts=_GZIP_LEVEL,
        )
        self._pending = bytearray()
        self._chunks = 0
        self.length = 0
        self.digest = sha256()

    def add(self, records: bytes) -> None:
        self.digest.update(records)
        self._pending += records
        self.length += len(records)
        while len(self._pending) >= CHUNK_BYTES:
            self._write(bytes(self._pending[:CHUNK_BYTES]))
            del self._pending[:CHUNK_BYTES]

    def finish(self) -> None:
        if self._pending:
            self._write(bytes(self._pending).ljust(CHUNK_BYTES, b"\0"))
        self._dataset.resize((self.length,))

    def _write(self, chunk: bytes) -> None:
        start = self._chunks * CHUNK_BYTES
        self._dataset.resize((start + CHUNK_BYTES,))
        self._dataset.id.write_direct_chunk((start,), isal_zlib.compress(chunk, _GZIP_LEVEL))
        self._chunks += 1


def _write_body(live: LiveReader, tmp: Path, commits: int, frontier: MerkleFrontier, sealed_ns: int) -> _Written:
    after = frontier.copy()
    columns = ColumnsBuilder()
    rows: list[CommitRow] = []
    # Aligned so that what reads the contiguous arrays by pages reads no page twice.
    with new_hdf5(tmp, align_from_bytes=1, align_to_bytes=_ALIGN_BYTES) as file:
        records = _RecordsWriter(file)
        for group in _groups(live, commits, rows):
            try:
                columns.extend([decode_event(record) for record in group], group)
            except (WireFormatError, ValueError) as error:
                raise ShardCorruptError(f"{live.path}: commit {len(rows)} holds what is no event: {error}") from error
            after.extend(group)
            records.add(b"".join(group))
        records.finish()
        datasets = columns.finish(live.header.store)
        datasets["commits"] = np.array(rows, "<i8")
        datasets["merkle/before"] = _hashes(frontier)
        datasets["merkle/after"] = _hashes(after)
        for name, array in datasets.items():
            write_dataset(file, name, array)
        for name, about in DESCRIPTIONS.items():
            file[name].attrs["about"] = about
        file["commits"].attrs["columns"] = ",".join(ROW_COLUMNS)
        file.attrs.update(
            {
                "about": "Sealed shard: immutable. Every dataset says in its attribute 'about' what it holds.",
                "format": "fi.sealed.1",
                "partition": live.header.partition,
                "shard": live.header.shard,
                "store": live.header.store,
                "cluster": live.header.cluster,
                "first_origin": rows[0].prev_origin + 1,
                "last_origin": rows[-1].origin,
                "events": after.size - frontier.size,
                "tree_size": after.size,
                "root": after.root().hex(),
                "created": format_rfc3339(sealed_ns),
            }
        )
    return _Written(datasets, records.length, records.digest.hexdigest(), after)


def _groups(live: LiveReader, commits: int, rows: list[CommitRow]) -> Iterator[list[bytes]]:
    """The records of each of the first `commits` rows; the rows themselves are put into `rows`."""
    for row, records in live.scan(commits):
        if len(records) != row.events:
            raise ShardCorruptError(f"{live.path}: commit {row.ordinal} holds {len(records)} events, not {row.events}")
        rows.append(row)
        yield records
    if len(rows) != commits:
        raise ShardCorruptError(
            f"{live.path}: only {len(rows)} of {commits} committed rows are whole; rebuild it from the stream"
        )


def _hashes(frontier: MerkleFrontier) -> Array:
    return np.frombuffer(frontier.to_bytes(), np.uint8).reshape(-1, HASH_BYTES)


def write_dataset(file: h5py.File, name: str, array: Array) -> None:
    """Writes one array: chunked and compressed where that pays, else contiguous (and so readable in place)."""
    if name not in COMPRESSED or not len(array):
        file.create_dataset(name, data=array)
        return
    row_bytes = array.nbytes // len(array)
    chunk_rows = min(len(array), max(1, CHUNK_BYTES // row_bytes))
    dataset = file.create_dataset(
        name,
        array.shape,
        array.dtype,
        chunks=(chunk_rows, *array.shape[1:]),
        compression="gzip",
        compression_opts=_GZIP_LEVEL,
    )
    for start in range(0, len(array), chunk_rows):
        chunk = np.ascontiguousarray(array[start : start + chunk_rows]).tobytes().ljust(chunk_rows * row_bytes, b"\0")
        at = (start, *[0] * (array.ndim - 1))
        dataset.id.write_direct_chunk(at, isal_zlib.compress(chunk, _GZIP_LEVEL))


def _check_body(tmp: Path, written: _Written) -> None:
    """Reads every dataset back through HDF5's own filters and compares."""
    with read_back(tmp), h5py.File(tmp, "r", locking=False) as file:
        records = file["records"]
        digest = sha256()
        for start in range(0, written.record_bytes, _READ_BYTES):
            digest.update(records[start : start + _READ_BYTES])
        wrong = [name for name, array in written.datasets.items() if not np.array_equal(file[name][()], array)]
        if len(records) != written.record_bytes or digest.hexdigest() != written.records_sha256:
            wrong.append("records")
    if wrong:
        raise ShardCorruptError(f"{tmp}: {', '.join(wrong)} did not read back as written; check disk and memory")


def _finish(
    live: LiveReader,
    tmp: Path,
    final: Path,
    written: _Written,
    span: tuple[int, int],
    frontier: MerkleFrontier,
    sealed_ns: int,
) -> SealedInfo:
    """Puts the header before the body, syncs, checks, and publishes."""
    with read_back(tmp):
        areas = areas_of(tmp)
    timestamps = written.datasets["timestamp_ns"]
    body = sha256()
    with tmp.open("rb") as file:
        file.seek(HEADER_BYTES)
        while data := file.read(_READ_BYTES):
            body.update(data)
    header = SealedHeader(
        partition=live.header.partition,
        shard=live.header.shard,
        store=live.header.store,
        cluster=live.header.cluster,
        first_origin=span[0],
        last_origin=span[1],
        commits=len(written.datasets["commits"]),
        events=len(timestamps),
        record_bytes=written.record_bytes,
        timestamp_ns_min=int(timestamps.min()) if len(timestamps) else 0,
        timestamp_ns_max=int(timestamps.max()) if len(timestamps) else 0,
        sealed_ns=sealed_ns,
        tree_size_before=frontier.size,
        frontier_before=frontier.to_bytes(),
        tree_size=written.frontier.size,
        frontier=written.frontier.to_bytes(),
        root=written.frontier.root().hex(),
        areas=areas,
        file_bytes=tmp.stat().st_size,
        body_sha256=body.hexdigest(),
        begins=live.header.begins,
    )
    fd = os.open(tmp, os.O_RDWR)
    try:
        write_all_at(fd, encode_header(header), 0)
        sync_file(fd)
    finally:
        os.close(fd)
    info = sealed_info(tmp)
    publish_file(tmp, final)
    return SealedInfo(final, info.header, info.sha256, info.bytes)
