"""Persist's decisions, pure: which of the events at hand are new, and what the commit of them says."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from contracts.errors import StrayFrameError, WireFormatError
from contracts.events import Event, decode_event
from contracts.frames import decode_packed_frame
from contracts.hashing import HASH_BYTES
from stages.runtime.checkpoint import check_joined, read_frame
from stages.runtime.messages import StoredMessage
from stages.runtime.telemetry import FrameTimes


class Group(NamedTuple):
    """What one group commit stores and settles: the part of some frames that lies after the cursor.

    Attributes:
        prev_origin, origin: settles the origins in (prev_origin, origin].
        records: encoded events to store, in order.
        ids: their event ids.
        duplicates: events whose id is stored already.
        dead_lettered: events refused by an earlier stage.
        trail: sequences in the three hop streams of the last frame.
        closed: segment's memory at `origin`.
        dropped_bytes: of the records that are not stored again.
        frames: the times of those that have events.
        stored_ns: when `FI_EVENTS` stored the message at `origin`; 0 when not known.
    """

    prev_origin: int
    origin: int
    records: list[bytes]
    ids: list[bytes]
    duplicates: int
    dead_lettered: int
    trail: tuple[int, ...]
    closed: bytes
    dropped_bytes: int = 0
    frames: Sequence[FrameTimes] = ()
    stored_ns: int = 0


def plan_group(
    messages: Sequence[StoredMessage], cursor: int, seen: Callable[[Sequence[bytes]], Sequence[bool]]
) -> Group | None:
    """Joins frames into one group; None when all of them lie at or before `cursor`.

    Args:
        messages: frames of one partition in stream order.
        cursor: the origin already settled.
        seen: for each id, whether an event with it is stored.

    Raises:
        HoleError: frames are missing before one of these.
        WireFormatError: not frames or not events of a version this build reads.
    """
    origin = cursor
    records: list[bytes] = []
    ids: list[bytes] = []
    frames: list[FrameTimes] = []
    dead_lettered = 0
    trail: tuple[int, ...] = ()
    closed, stored_ns = b"", 0
    for message in messages:
        frame = read_frame(message, decode_packed_frame)
        check_joined(message.subject, frame, origin)
        if frame.last <= origin:
            continue
        reached, accepted_ns = frame.prev, 0
        for raw in frame.events:
            event = _read_event(message, raw)
            if not reached <= event.origin <= frame.last:
                raise StrayFrameError(
                    message.subject, message.seq, f"an event of origin {event.origin} is out of place"
                )
            reached, accepted_ns = event.origin, accepted_ns or event.accepted_ns
            if event.origin > origin:
                records.append(bytes(raw))
                ids.append(event.event_id)
        if frame.events:
            frames.append(FrameTimes(frame.made_ns, accepted_ns, len(frame.events)))
        dead_lettered += sum(row.count for row in frame.dead if row.origin > origin)
        origin, trail = frame.last, (*frame.trail, message.seq)
        closed, stored_ns = frame.closed, frame.stored_ns
    if not trail:
        return None
    fresh_records, fresh_ids = _without_duplicates(records, ids, seen(ids))
    duplicates = len(records) - len(fresh_records)
    dropped_bytes = sum(map(len, records)) - sum(map(len, fresh_records)) if duplicates else 0
    return Group(
        cursor,
        origin,
        fresh_records,
        fresh_ids,
        duplicates,
        dead_lettered,
        trail,
        closed,
        dropped_bytes,
        frames,
        stored_ns,
    )


def count_settled(shards: Sequence[int], kept: int, copied: int | None) -> int:
    """How many of a store's sealed shards, by number in order, `FI_EVENTS` need not have any more.

    Args:
        shards: the numbers.
        kept: so many of the newest it has.
        copied: the newest that is copied to another disk; None where that does not count.
    """
    settled = max(0, len(shards) - kept)
    return settled if copied is None else min(settled, bisect_right(shards, copied))


def _read_event(message: StoredMessage, record: bytes) -> Event:
    """The whole event, although only its key is needed: a shard that holds what is no event can never be sealed."""
    try:
        event = decode_event(record)
    except WireFormatError as error:
        raise StrayFrameError(message.subject, message.seq, str(error)) from error
    if len(event.audit_hash) != HASH_BYTES:
        raise StrayFrameError(message.subject, message.seq, f"the event of origin {event.origin} was not hashed")
    return event


def _without_duplicates(
    records: list[bytes], ids: list[bytes], stored: Sequence[bool]
) -> tuple[list[bytes], list[bytes]]:
    fresh: dict[bytes, bytes] = {}
    for record, event_id, known in zip(records, ids, stored, strict=True):
        if not known and event_id not in fresh:
            fresh[event_id] = record
    return list(fresh.values()), list(fresh)
