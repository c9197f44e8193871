"""A live shard as its readers may see it: the rows up to the watermark, by event, by id, by consultation, by column."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from contracts.errors import ShardCorruptError, WireFormatError
from contracts.events import Event, decode_event
from stages.persist.columns import Array, as_rows
from stages.persist.live import LiveReader
from stages.persist.liveindex import IdColumn, LiveIndex
from stages.persist.rows import LENGTH_BYTES, ROW_COLUMNS, CommitRow, row_crc32
from stages.persist.sealed import Selection

_ID_COLUMNS = ("event_id", "consultation_id", "audit_hash")
_ORDINAL, _END_BYTES, _EVENTS = (ROW_COLUMNS.index(name) for name in ("ordinal", "end_bytes", "events"))


class LiveView:
    """A live shard as it stood when this was made or last refreshed.

    Every method raises `ShardCorruptError` where a row is not whole.

    Attributes:
        path, header: the shard.
        commits: rows that may be seen.
        count: events in them.
    """

    def __init__(self, path: Path) -> None:
        """Raises as `LiveReader`; a watermark beyond the rows is a `ShardCorruptError`."""
        self._reader = LiveReader(path)
        self.path = path
        self.header = self._reader.header
        self.commits = 0
        self._numbers = np.zeros(1, "<i8")
        """How many events there are before each commit, and after the last one."""
        self._index: LiveIndex | None = None
        self._indexed = 0
        try:
            self.refresh()
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        """Events that may be seen."""
        return int(self._numbers[-1])

    def refresh(self) -> None:
        """Takes in what became visible since. Raises as the constructor."""
        commits = self._reader.watermark()
        if not 0 <= commits <= self._reader.rows_max:
            raise ShardCorruptError(f"{self.path}: its watermark is {commits} of {self._reader.rows_max} rows")
        if commits < self.commits:
            self.commits, self._numbers, self._index = commits, self._numbers[: commits + 1], None
        elif commits > self.commits:
            events = self._rows(self.commits, commits)[:, _EVENTS]
            self._numbers = np.concatenate([self._numbers, self._numbers[-1] + np.cumsum(events)])
            self.commits = commits

    def row(self, commit: int) -> CommitRow:
        """The row of a visible commit, counted from 0."""
        return self._reader.read_rows(commit, commit + 1)[0]

    def close(self) -> None:
        """Closes the file. Closing again does nothing."""
        self._index = None
        self._reader.close()

    def records(self) -> Iterator[bytes]:
        """The records of all events in order."""
        visible = self.commits
        commits = 0
        for _, records in self._reader.scan(visible):
            commits += 1
            yield from records
        if commits != visible:
            raise self._damaged(commits)

    def events(self) -> Iterator[tuple[int, Event]]:
        """(row, event) for all events in order."""
        for row, record in enumerate(self.records()):
            try:
                event = decode_event(record)
            except WireFormatError as error:
                raise ShardCorruptError(f"{self.path}: event {row + 1} is {error}") from error
            yield row, event

    def find(self, event_id: bytes) -> tuple[int, Event] | None:
        """(row, event) of an event id (16 bytes), or None."""
        return next(self._having("event_id", event_id), None)

    def consultation(self, consultation_id: bytes) -> Iterator[tuple[int, Event]]:
        """(row, event) of a consultation's events (16 bytes), in stored order."""
        return self._having("consultation_id", consultation_id)

    def select(self, wanted: Selection) -> Iterator[tuple[int, Event]]:
        """(row, event) of the events that `wanted` describes, in stored order."""
        found = self.events() if wanted.consultation_id is None else self.consultation(wanted.consultation_id)
        return ((row, event) for row, event in found if wanted.takes(event))

    def column(self, name: str) -> Array:
        """A column of n values as `SealedReader.column` gives it."""
        values = [getattr(event, name) for _, event in self.events()]
        if name in _ID_COLUMNS:
            return as_rows(values, 32 if name == "audit_hash" else 16)
        return np.array(values, "U" if name in ("site", "event_type") else "<i8")

    def _having(self, column: IdColumn, wanted: bytes) -> Iterator[tuple[int, Event]]:
        """The events with the id `wanted` in `column`; each one's commit is checked before it is believed."""
        index = self._up_to_date_index()
        found = index.find(column, wanted)
        commits = np.searchsorted(self._numbers, found, "right") - 1
        checked, start, blob = -1, 0, b""
        for number, commit in zip(found.tolist(), commits.tolist(), strict=True):
            if commit != checked:
                row = self.row(commit)
                start = self.row(commit - 1).end_bytes if commit else 0
                blob = self._reader.read_blobs(start, row.end_bytes)
                if row_crc32(row, blob) != row.crc32:
                    raise self._damaged(commit)
                checked = commit
            event = self._event(blob, index.start_of(number) - start, commit)
            if getattr(event, column) == wanted:
                yield number, event

    def _event(self, blob: bytes, at: int, commit: int) -> Event:
        """The event whose record's length stands at `at`."""
        begin = at + LENGTH_BYTES
        try:
            return decode_event(blob[begin : begin + int.from_bytes(blob[at:begin], "little")])
        except WireFormatError as error:
            raise self._damaged(commit) from error

    def _up_to_date_index(self) -> LiveIndex:
        """The index over all visible commits."""
        frames = self.header.frames
        if self._index is None:
            self._index = LiveIndex(self._reader.read_blobs)
            self._indexed = 0
        if self._indexed < self.commits:
            first = self._indexed
            rows = self._rows(first, self.commits)
            ends, events = rows[:, _END_BYTES].copy(), rows[:, _EVENTS].copy()
            starts = np.concatenate([[self.row(first - 1).end_bytes if first else 0], ends[:-1]])
            sizes = ends - starts
            good = (rows[:, _ORDINAL] == np.arange(first + 1, self.commits + 1)) & (ends <= frames.bytes)
            good &= (events >= 0) & (events <= sizes // LENGTH_BYTES)
            damaged = self._index.extend(starts, ends, events) if good.all() else int(np.argmin(good))
            if damaged is not None:
                raise self._damaged(first + damaged)
            self._indexed = self.commits
        return self._index

    def _rows(self, first: int, last: int) -> Array:
        """Rows [first, last), as i8 (n×9)."""
        return np.frombuffer(self._reader.row_bytes(first, last), "<i8").reshape(-1, len(ROW_COLUMNS))

    def _damaged(self, commit: int) -> ShardCorruptError:
        return ShardCorruptError(f"{self.path}: commit {commit + 1} is not whole; rebuild the shard from the stream")
