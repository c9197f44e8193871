"""A live shard as its readers may see it: the rows up to the watermark, by event, by id, by consultation, by column.

There is no index yet, so a search runs over the raw bytes (the ids stand in them as they are) and only decodes commits
that hold a hit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from contracts.errors import ShardCorruptError
from contracts.events import Event, decode_event
from stages.persist.columns import Array, as_rows
from stages.persist.live import LiveReader
from stages.persist.rows import CommitRow, row_crc32, split_blob
from stages.persist.sealed import Selection

_SEARCH_BYTES = 4 * 1024 * 1024
_ID_COLUMNS = ("event_id", "consultation_id", "audit_hash")


class LiveView:
    """A live shard as it stood when this was made. Every method raises `ShardCorruptError` where a row is not whole."""

    def __init__(self, path: Path) -> None:
        """Raises as `LiveReader`; a watermark beyond the rows is a `ShardCorruptError`."""
        self._reader = LiveReader(path)
        self.path = path
        self.header = self._reader.header
        commits = self._reader.watermark()
        if not 0 <= commits <= self._reader.rows_max:
            self._reader.close()
            raise ShardCorruptError(f"{path}: its watermark is {commits} of {self._reader.rows_max} rows")
        self.rows: list[CommitRow] = self._reader.read_rows(0, commits)

    @property
    def count(self) -> int:
        """Events that may be seen."""
        return sum(row.events for row in self.rows)

    def close(self) -> None:
        """Closes the file. Closing again does nothing."""
        self._reader.close()

    def records(self) -> Iterator[bytes]:
        """The records of all events in order."""
        commits = 0
        for _, records in self._reader.scan(len(self.rows)):
            commits += 1
            yield from records
        if commits != len(self.rows):
            raise self._damaged(commits + 1)

    def events(self) -> Iterator[tuple[int, Event]]:
        """(row, event) for all events in order."""
        return ((row, decode_event(record)) for row, record in enumerate(self.records()))

    def find(self, event_id: bytes) -> tuple[int, Event] | None:
        """(row, event) of an event id (16 bytes), or None."""
        return next(self._holding(event_id, lambda event: event.event_id == event_id), None)

    def consultation(self, consultation_id: bytes) -> Iterator[tuple[int, Event]]:
        """(row, event) of a consultation's events (16 bytes), in stored order."""
        return self._holding(consultation_id, lambda event: event.consultation_id == consultation_id)

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

    def _holding(self, needle: bytes, matches: Callable[[Event], bool]) -> Iterator[tuple[int, Event]]:
        """The matching events in the commits whose bytes hold `needle`."""
        ends = [0, *(row.end_bytes for row in self.rows)]
        numbers = np.cumsum([0, *(row.events for row in self.rows)]).tolist()
        first = 0
        while first < len(self.rows):
            last = max(first + 1, int(np.searchsorted(ends, ends[first] + _SEARCH_BYTES, "right")) - 1)
            data = self._reader.read_blobs(ends[first], ends[last])
            hit = data.find(needle)
            while hit >= 0:
                commit = int(np.searchsorted(ends, ends[first] + hit, "right")) - 1
                row = self.rows[commit]
                blob = data[ends[commit] - ends[first] : row.end_bytes - ends[first]]
                if row_crc32(row, blob) != row.crc32:
                    raise self._damaged(commit + 1)
                events = map(decode_event, split_blob(blob))
                yield from ((number, event) for number, event in enumerate(events, numbers[commit]) if matches(event))
                hit = data.find(needle, row.end_bytes - ends[first])
            first = last

    def _damaged(self, commit: int) -> ShardCorruptError:
        return ShardCorruptError(f"{self.path}: commit {commit} is not whole; rebuild the shard from the stream")
