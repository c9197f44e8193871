"""Frames with their events deflated: what is written, what is read back, and what is refused."""

from __future__ import annotations

import tracemalloc
from random import Random
from zlib import compress

import msgspec
import pytest

from contracts.errors import WireFormatError
from contracts.events import Event
from contracts.frames import (
    FRAME_BYTES_MAX,
    Dead,
    Frame,
    decode_frame,
    decode_frame_head,
    decode_packed_frame,
    deflate_frame,
    encode_frame,
    held_bytes,
    is_newer_frame,
)

EVENTS = tuple(
    Event(
        origin=100 + number,
        index=0,
        event_id=number.to_bytes(16, "big"),
        consultation_id=bytes(16),
        site="clinic-1",
        event_type="MESSAGE_RECEIVED",
        timestamp_ns=number,
        stamped=True,
        payload=b'{"message_content":"la misma frase otra vez"}',
        metadata=b'{"user_id":"u"}',
        accepted_ns=number,
    )
    for number in range(200)
)
FRAME = Frame(3, 99, 100, 400, (7, 8), "w", 5, b"\x00memory", (Dead(310, 2),), EVENTS)
PLAIN = encode_frame(FRAME)


def deflated_by_hand(events: bytes, says_bytes: int) -> bytes:
    head = [2, 3, 99, 100, 400, [7, 8], "w", 5, b"", [], says_bytes, events]
    return msgspec.msgpack.encode(head)


def test_a_frame_is_read_back_whole_from_far_fewer_bytes() -> None:
    data = deflate_frame(FRAME, 1).data
    assert len(data) < len(PLAIN) / 4
    assert decode_frame(data) == FRAME
    assert encode_frame(decode_packed_frame(data)) == PLAIN
    head = decode_frame_head(data)
    assert (head.prev, head.first, head.last, head.trail, head.closed) == (99, 100, 400, (7, 8), b"\x00memory")


def test_only_frames_of_many_bytes_are_deflated() -> None:
    events_bytes = len(msgspec.msgpack.encode(EVENTS))
    assert deflate_frame(FRAME, events_bytes + 1).data == PLAIN
    assert deflate_frame(FRAME, events_bytes).data != PLAIN
    empty = msgspec.structs.replace(FRAME, events=())
    assert deflate_frame(empty, 1).data == encode_frame(empty)


def test_events_that_do_not_shrink_stay_plain() -> None:
    random = msgspec.structs.replace(EVENTS[0], payload=Random(1).randbytes(4000))
    frame = msgspec.structs.replace(FRAME, events=(random,))
    assert deflate_frame(frame, 1).data == encode_frame(frame)


def test_events_beyond_what_a_frame_may_hold_stay_plain() -> None:
    large = msgspec.structs.replace(EVENTS[0], payload=bytes(FRAME_BYTES_MAX))
    frame = msgspec.structs.replace(FRAME, events=(large,))
    assert deflate_frame(frame, 1).data == encode_frame(frame)


def test_what_a_frame_weighs_counts_its_events_inflated() -> None:
    assert held_bytes(PLAIN) == deflate_frame(FRAME, FRAME_BYTES_MAX).held_bytes == len(PLAIN)
    encoded = deflate_frame(FRAME, 1)
    assert held_bytes(encoded.data) == encoded.held_bytes > len(PLAIN)
    assert held_bytes(b"no frame") == len(b"no frame")


@pytest.mark.parametrize(
    ("events", "says_bytes", "why"),
    [
        (b"", 1, "inflated|are not"),
        (b"no deflate stream", 1, "cannot be inflated"),
        (compress(b"\x90"), 2, "not the 2 bytes"),
        (compress(b"\x90" * 9), 1, "not the 1 bytes"),
        (compress(b"\x90")[:-1], 1, "inflated|are not"),
        (compress(b"\x90") + b"more", 1, "not the 1 bytes"),
        (compress(b"\x90\x90"), 2, "not a frame"),
        (compress(b"\x91\xc0"), 2, "not a frame"),
        (compress(b"\x90"), 0, "not a frame"),
        (compress(b"\x90"), FRAME_BYTES_MAX + 1, "not a frame"),
    ],
    ids=[
        *("empty", "no stream", "shorter than it says", "longer than it says", "cut short", "trailing bytes"),
        *("two values", "no event", "says nothing", "says too much"),
    ],
)
def test_deflated_bytes_that_are_not_what_they_say_are_refused(events: bytes, says_bytes: int, why: str) -> None:
    data = deflated_by_hand(events, says_bytes)
    with pytest.raises(WireFormatError, match=why):
        decode_frame(data)
    assert not is_newer_frame(data)


def test_the_hand_made_frame_is_read_when_it_is_right() -> None:
    assert decode_frame(deflated_by_hand(compress(b"\x90"), 1)).events == ()


def test_a_bomb_takes_no_more_memory_than_it_says() -> None:
    data = deflated_by_hand(compress(bytes(256 * 1024 * 1024)), 1000)
    tracemalloc.start()
    try:
        with pytest.raises(WireFormatError, match="not the 1000 bytes"):
            decode_packed_frame(data)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(data)
    finally:
        tracemalloc.stop()


def test_a_later_version_is_told_from_what_is_no_frame() -> None:
    assert is_newer_frame(msgspec.msgpack.encode([3, "whatever"]))
    assert not is_newer_frame(deflate_frame(FRAME, 1).data)
