"""What a partition can go on from after a sealed shard: computed from the shard, kept in its seal record."""

from __future__ import annotations

import heapq
from contextlib import closing
from pathlib import Path

from contracts.events import decode_event, stored_ns_at
from contracts.lifecycle import CLOSING_TYPES, ClosedConsultations
from contracts.receipts import ResumePoint
from contracts.rules import CLOSED_REMEMBERED_MAX
from stages.persist.rows import ROW_COLUMNS
from stages.persist.sealed import SealedReader, Selection

BEGINNING = ResumePoint(frontier=b"", duplicates=0, dead_lettered=0, closed=b"")
"""Before the first shard."""


def resume_after(before: ResumePoint, sealed: Path) -> ResumePoint:
    """The point after the sealed shard at `sealed`, from the point before it.

    Segment's memory follows from the stored events, as far back as any policy looks. A commit that came again as a
    duplicate long after leaves no trace in it, as if that had not been sent.

    Raises:
        ShardCorruptError: the shard cannot be read.
    """
    with closing(SealedReader(sealed)) as reader:
        commits = reader.read("commits")
        duplicates, dead_lettered = (
            int(commits[:, ROW_COLUMNS.index(name)].sum()) for name in ("duplicates", "dead_lettered")
        )
        closed = ClosedConsultations(before.closed, CLOSED_REMEMBERED_MAX)
        for _, event in heapq.merge(
            *(reader.select(Selection(event_type=name)) for name in CLOSING_TYPES), key=lambda found: found[0]
        ):
            closed.note(event)
        last = next(map(decode_event, reader.records(max(0, reader.header.events - 1))), None)
        return ResumePoint(
            frontier=reader.header.frontier,
            duplicates=before.duplicates + duplicates,
            dead_lettered=before.dead_lettered + dead_lettered,
            closed=closed.packed,
            stored_ns=stored_ns_at(reader.header.last_origin, last),
        )
