"""The live shard: an HDF5 file that is its own journal.

HDF5 lays it out once (`stages.persist.newlive`) and never writes it again: commits go with `pwrite` into its contiguous
arrays, so the file's structure cannot tear and any HDF5 reader can open it at any moment. Always true of a live shard:

* row *k* of `index` is written after its blob, and both are on disk once `sync` has returned;
* a row that is not whole, or whose blob is not, fails its CRC-32: rows count up to the first that is empty or fails;
* `watermark` is never more than the rows that were synced *and* whose receipt was accepted. Readers stop there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from contracts.errors import ShardCorruptError, ShardError, StoreFailedError
from stages.persist.files import (
    Window,
    close_file,
    has_hole,
    is_lost,
    is_zero,
    read_all_at,
    sync_data,
    why_not_at,
    write_all_at,
    zero_dirty,
)
from stages.persist.header import WATERMARK_BYTES, Area, read_live_header, structure_crc32
from stages.persist.rows import (
    ROW_BYTES,
    CommitRow,
    decode_rows,
    encode_row,
    pack_blob,
    row_crc32,
    split_blob,
)
from stages.persist.storedir import COPIED


class LiveReader:
    """Reads a live shard while its owner appends to it. Takes no lock; a file removed meanwhile stays readable.

    Its methods raise `ShardCorruptError` where the file was cut short since, and `OSError` where the disk refuses.
    """

    _FLAGS = os.O_RDONLY

    def __init__(self, path: Path) -> None:
        """Opens and checks the file's structure, without HDF5 (a damaged file can hang the library).

        Raises:
            FileNotFoundError: it was sealed meanwhile, or never there.
            ShardCorruptError: cut short, empty, or its structure is damaged.
            ShardError: not a live shard of a known format.
            OSError: it cannot be read.
        """
        self.path = path
        self.header = read_live_header(path)
        self._fd = os.open(path, self._FLAGS)
        header = self.header
        try:
            areas = [header.frames, header.index, header.watermark]
            found = structure_crc32(self._fd, path, header.file_bytes, areas)
            if found != header.structure_crc32:
                raise ShardCorruptError(f"{path}: its HDF5 structure is damaged; rebuild it from the stream")
        except BaseException:
            self.close()
            raise

    @property
    def rows_max(self) -> int:
        """How many commits the shard has room for."""
        return self.header.index.bytes // ROW_BYTES

    def watermark(self) -> int:
        """How many rows readers may see now."""
        return int.from_bytes(self._read(self.header.watermark, 0, WATERMARK_BYTES), "little", signed=True)

    def read_rows(self, first: int, last: int) -> list[CommitRow]:
        """Index rows [first, last), counted from 0, as they are on disk: unchecked, possibly empty or torn."""
        return decode_rows(self.row_bytes(first, last))

    def row_bytes(self, first: int, last: int) -> bytes:
        """The bytes of `read_rows`."""
        return self._read(self.header.index, first * ROW_BYTES, last * ROW_BYTES)

    def read_blobs(self, start: int, end: int) -> bytes:
        """The frames' bytes in [start, end), unchecked."""
        return self._read(self.header.frames, start, end)

    def _read(self, area: Area, start: int, end: int) -> bytes:
        if has_hole(self._fd, area.offset + start, end - start):
            raise ShardCorruptError(f"{self.path}: has a hole where commits are to be; rebuild it from the stream")
        return read_all_at(self._fd, end - start, area.offset + start, self.path)

    def blobs(self, commits: int | None = None) -> Iterator[tuple[CommitRow, bytes]]:
        """The valid rows from the first on, each with its blob, at most `commits` of them.

        Ends at the first row that is empty, does not follow on from the one before, or fails its CRC-32; also at one
        over a hole, whose bytes were never written.
        """
        header = self.header
        index = Window(self._fd, self.path, header.index.offset, header.index.bytes)
        frames = Window(self._fd, self.path, header.frames.offset, header.frames.bytes)
        limit = self.rows_max if commits is None else min(commits, self.rows_max)
        start = 0
        for number in range(limit):
            (row,) = decode_rows(index.take(number * ROW_BYTES, (number + 1) * ROW_BYTES))
            if row.ordinal != number + 1 or not start <= row.end_bytes <= header.frames.bytes:
                return
            if has_hole(self._fd, header.frames.offset + start, row.end_bytes - start):
                return
            blob = frames.take(start, row.end_bytes)
            if row_crc32(row, blob) != row.crc32:
                return
            yield row, blob
            start = row.end_bytes

    def scan(self, commits: int | None = None) -> Iterator[tuple[CommitRow, list[bytes]]]:
        """As `blobs`, with each blob split into its records."""
        for row, blob in self.blobs(commits):
            yield row, split_blob(blob)

    def close(self) -> None:
        """Closes the file. Closing again does nothing."""
        close_file(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class LiveShard(LiveReader):
    """The live shard in the hands of the one process that holds the partition's lock.

    After an `OSError` from `append` or `sync` nothing more can be written through it (`StoreFailedError`).

    Attributes:
        commits: valid rows, committed or not.
        end_bytes: where the next blob begins.
        events: in those rows.
        prev_origin: the first row's; None without rows.
        rows: SHA-256 over those rows' bytes.
        last_origin: the last row's origin; None without rows.
        torn: what lies after the last valid row is not empty, or cannot be read. `cut` before appending.
        lost: why the row after the last valid one cannot be read, where the disk cannot give it.
    """

    _FLAGS = os.O_RDWR

    def __init__(self, path: Path) -> None:
        """Opens the shard and reads every row, up to one that the disk cannot read. Raises as `LiveReader`."""
        super().__init__(path)
        self._failed = False
        try:
            self._settle(None)
        except BaseException:
            self.close()
            raise

    def _settle(self, commits: int | None) -> None:
        self.commits = self.end_bytes = self.events = 0
        self.rows = sha256()
        self.prev_origin: int | None = None
        self.last_origin: int | None = None
        self.lost: OSError | None = None
        try:
            for row, _ in self.blobs(commits):
                if self.prev_origin is None:
                    self.prev_origin = row.prev_origin
                self.commits, self.end_bytes, self.last_origin = row.ordinal, row.end_bytes, row.origin
                self.events += row.events
                self.rows.update(encode_row(row))
        except OSError as error:
            if not is_lost(error):
                raise
            self.lost = error
        used = self.commits * ROW_BYTES
        index = self.header.index
        self.torn = not is_zero(self._fd, index.offset + used, index.bytes - used)

    def fits(self, size_bytes: int) -> bool:
        """True when one more commit with a blob of that size (`rows.blob_bytes`) finds room."""
        return self.commits < self.rows_max and self.end_bytes + size_bytes <= self.header.frames.bytes

    def append(
        self,
        records: Sequence[bytes],
        *,
        prev_origin: int,
        origin: int,
        duplicates: int,
        dead_lettered: int,
        committed_ns: int,
    ) -> None:
        """Writes one commit: the records (`encode_event`'s bytes; perhaps none) and its row. Not durable before `sync`.

        If the process dies here: the commit is there whole, or `torn`. If the power fails here: likewise.

        Raises:
            ShardError: no room, a torn tail, or an origin that does not follow: the caller's mistake; nothing written.
            StoreFailedError: an earlier write failed, or somebody removed or replaced the file; nothing written.
            OSError: the disk refused.
        """
        self._writable()
        if why := why_not_at(self.path, self._fd):
            raise StoreFailedError(
                f"{self.path}: is no longer the file that this process appends to ({why}): somebody moved, removed or "
                "replaced it. Nothing more is written there; put it back, or run `fictl rebuild`"
            )
        blob = pack_blob(records)
        last = self.last_origin
        if self.torn or not self.fits(len(blob)):
            raise ShardError(
                f"{self.path}: {'cut its torn tail' if self.torn else 'is full, seal it'} before appending"
            )
        if prev_origin >= origin or (last is not None and prev_origin != last):
            raise ShardError(f"{self.path}: a commit from {prev_origin} to {origin} cannot follow one up to {last}")
        end = self.end_bytes + len(blob)
        row = CommitRow(
            self.commits + 1, end, 0, prev_origin, origin, len(records), duplicates, dead_lettered, committed_ns
        )
        row = row._replace(crc32=row_crc32(row, blob))
        self._write(blob, self.header.frames.offset + self.end_bytes)
        encoded = encode_row(row)
        self._write(encoded, self.header.index.offset + self.commits * ROW_BYTES)
        self.rows.update(encoded)
        if self.prev_origin is None:
            self.prev_origin = prev_origin
        self.commits, self.end_bytes, self.last_origin = row.ordinal, end, origin
        self.events += len(records)

    def sync(self) -> None:
        """Makes every append so far durable.

        If the process dies or the power fails after the return: all of them are there. Before: see `append`.

        Raises:
            StoreFailedError: an earlier write failed.
            OSError: the disk refused; what was appended since the last `sync` may be lost.
        """
        self._writable()
        try:
            sync_data(self._fd)
        except OSError:
            self._failed = True
            raise

    def set_watermark(self, commits: int) -> None:
        """Lets readers see the first `commits` rows. Call it after their receipt was accepted.

        Not synced: after a power cut readers see less until the owner sets it again.

        Raises:
            ShardError: more than there are.
            OSError: the disk refused.
        """
        if not 0 <= commits <= self.commits:
            raise ShardError(f"{self.path}: has {self.commits} commits, so {commits} cannot be shown")
        self._write(commits.to_bytes(WATERMARK_BYTES, "little"), self.header.watermark.offset)

    def cut(self, commits: int) -> bool:
        """Removes all rows after the first `commits`, and every byte of theirs, durably.

        If the process dies or the power fails here: some of them are still there; cut again.

        Returns:
            whether there was anything to remove.

        Raises:
            ShardCorruptError: there are fewer valid rows: committed data is damaged.
            OSError: the disk refused, or one of them is `lost`.
        """
        if not 0 <= commits <= self.commits:
            step = "rebuild it from the stream" if self.torn else f"what is there is whole: {COPIED}"
            raise self.lost or ShardCorruptError(
                f"{self.path}: only {self.commits} of {commits} committed rows are whole; {step}"
            )
        self._writable()
        # The watermark first: a reader must not find it beyond rows that are already gone.
        if self.watermark() > commits or self.watermark() < 0:
            self._write(commits.to_bytes(WATERMARK_BYTES, "little"), self.header.watermark.offset)
        if commits < self.commits:
            self._settle(commits)
        index, frames, used = self.header.index, self.header.frames, self.commits * ROW_BYTES
        try:
            rows_gone = zero_dirty(self._fd, index.offset + used, index.bytes - used)
            bytes_gone = zero_dirty(self._fd, frames.offset + self.end_bytes, frames.bytes - self.end_bytes)
        except OSError:
            self._failed = True
            raise
        self.sync()
        self.torn, self.lost = False, None
        return rows_gone or bytes_gone

    def _write(self, data: bytes, offset: int) -> None:
        try:
            write_all_at(self._fd, data, offset)
        except OSError:
            self._failed = True
            raise

    def _writable(self) -> None:
        if self._failed:
            raise StoreFailedError(f"{self.path}: a write or fsync failed before; open the shard anew, never retry")
