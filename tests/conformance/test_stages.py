"""What every stage keeps to, whatever its work is: DESIGN's four rules, at the pure core of each.

A stage is given messages and a cursor, and says what it covers. The real streams around it are
`tests/integration/test_stage_conformance.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import HoleError, StrayFrameError, WireFormatError
from contracts.events import Event, decode_event, encode_event
from contracts.frames import Dead, Frame, PackedFrame, decode_frame, deflate_frame, encode_frame
from contracts.hashing import audit_hash
from contracts.settings import Settings
from contracts.subjects import STAGES, Stage, output_subject
from stages.hash.core import HashCore
from stages.ingest.core import IngestCore
from stages.persist.core import plan_group
from stages.runtime.api import Api
from stages.runtime.checkpoint import Cursor, read_frame
from stages.runtime.lane import Lane
from stages.runtime.messages import StoredMessage
from stages.segment.core import SegmentCore

CONSULTATION = UUID(int=7, version=4)
PARTITION = 5
NOW_NS = 1_700_000_000_000_000_000
CORES = {"ingest": IngestCore, "segment": SegmentCore, "hash": HashCore}
HOP_STAGES = STAGES[1:]


class Covered(NamedTuple):
    """What a stage made of some messages, in the terms all stages share.

    Attributes:
        prev, last: it covers (prev, last].
        events: (origin, index) of what it passes on, in order.
        dead: how many events it settles without passing them on.
        trail: hop sequences that it names.
        data: its output's bytes, where that is a frame.
    """

    prev: int
    last: int
    events: list[tuple[int, int]]
    dead: int
    trail: tuple[int, ...]
    data: bytes


def an_event(origin: int, index: int) -> Event:
    payload = b'{"n":%d}' % origin
    return Event(
        origin=origin,
        index=index,
        event_id=origin.to_bytes(12, "big") + index.to_bytes(4, "big"),
        consultation_id=CONSULTATION.bytes,
        site="clinic-1",
        event_type="CONTEXT_UPDATED",
        timestamp_ns=NOW_NS,
        stamped=True,
        payload=payload,
        metadata=b'{"user_id":"u","session_id":"s"}',
        accepted_ns=NOW_NS,
        group=0,
        criticality=0,
        audit_hash=audit_hash({"n": origin}),
    )


def body(good: int, bad: int) -> bytes:
    line = b'{"consultation_id":"%s","event_type":"CONTEXT_UPDATED","payload":{},"metadata":{%s}}'
    lines = [line % (str(CONSULTATION).encode(), b'"user_id":"u","session_id":"s"')] * good
    return b"\n".join([*lines, *([line % (str(CONSULTATION).encode(), b"")] * bad)])


def inputs(stage: Stage, plan: Sequence[tuple[int, int, int]], start: int) -> list[StoredMessage]:
    """A message for each (gap, good, bad): it skips `gap` origins of other partitions and holds events of one."""
    messages = []
    reached = start
    for number, (gap, good, bad) in enumerate(plan):
        origin = reached + 1 + gap
        if stage == "ingest":
            subject = f"fi.raw.{PARTITION}.clinic-1.{CONSULTATION}"
            messages.append(StoredMessage(subject, origin, NOW_NS, body(good, bad), {}))
        else:
            trail = tuple(range(1, HOP_STAGES.index(stage) + 1))
            dead = (Dead(origin, bad),) if bad else ()
            events = tuple(an_event(origin, index) for index in range(good))
            frame = Frame(PARTITION, reached, origin, origin, trail, "w", NOW_NS, b"", dead, events)
            messages.append(
                StoredMessage(f"fi.{stage}.{PARTITION}", 100 + number, NOW_NS, deflate_frame(frame, 1).data, {})
            )
        reached = origin
    return messages


def work(stage: Stage, messages: Iterable[StoredMessage], cursor: int) -> Covered | None:
    """One output of the stage from `cursor`; None when nothing in `messages` is new."""
    if stage == "persist":
        group = plan_group(list(messages), cursor, lambda ids: [False] * len(ids))
        if group is None:
            return None
        keys = [(event.origin, event.index) for event in map(decode_event, group.records)]
        return Covered(group.prev_origin, group.origin, keys, group.dead_lettered, group.trail, b"")
    # No connection: nothing here does I/O.
    api = Api(None, Settings())  # type: ignore[arg-type]
    core = CORES[stage]()
    lane = Lane(api, core, PARTITION, "nonce", lambda _: None, lambda: NOW_NS)
    core.open(b"")
    core.begin()
    made, letters = lane._build(list(messages), Cursor(cursor, 0, b""))
    if made is None:
        assert not letters
        return None
    # Whatever a stage makes, the next one takes.
    message = StoredMessage(output_subject(stage, PARTITION), 1, NOW_NS, made.encoded.data, {})
    frame = read_frame(message, decode_frame)
    assert frame == made.frame
    keys = [(event.origin, event.index) for event in frame.events]
    return Covered(frame.prev, frame.last, keys, sum(row.count for row in frame.dead), frame.trail, made.encoded.data)


PLANS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)).filter(lambda row: row[1] + row[2] > 0),
    min_size=1,
    max_size=8,
)
every_stage = pytest.mark.parametrize("stage", STAGES)
every_reader_of_frames = pytest.mark.parametrize("stage", HOP_STAGES)


def expected(plan: Sequence[tuple[int, int, int]], start: int) -> tuple[list[tuple[int, int]], int, int]:
    """Keys of all good events, how many are bad, and the last origin."""
    keys, dead, origin = [], 0, start
    for gap, good, bad in plan:
        origin += 1 + gap
        keys += [(origin, index) for index in range(good)]
        dead += bad
    return keys, dead, origin


@every_stage
@given(plan=PLANS, start=st.integers(0, 2**40), data=st.data())
@settings(max_examples=40)
def test_however_its_input_is_cut_the_outputs_join_and_cover_every_origin_once(
    stage: Stage, plan: list[tuple[int, int, int]], start: int, data: st.DataObject
) -> None:
    messages = inputs(stage, plan, start)
    cursor, at, keys, dead = start, 0, [], 0
    while at < len(messages):
        taken = data.draw(st.integers(1, len(messages) - at))
        made = work(stage, messages[at : at + taken], cursor)
        assert made is not None
        assert made.prev == cursor
        assert made.last > cursor
        keys += made.events
        dead += made.dead
        cursor, at = made.last, at + taken
    assert (keys, dead, cursor) == expected(plan, start)


@every_stage
@given(plan=PLANS, back=st.integers(0, 8))
@settings(max_examples=40)
def test_what_lies_at_or_before_the_cursor_is_skipped_event_by_event(
    stage: Stage, plan: list[tuple[int, int, int]], back: int
) -> None:
    messages = inputs(stage, plan, 10)
    done = max(0, len(messages) - back)
    _, _, cursor = expected(plan[:done], 10)
    keys, dead, last = expected(plan[done:], cursor)
    made = work(stage, messages, cursor)
    if done == len(messages):
        assert made is None
    else:
        assert made is not None
        assert (made.prev, made.last, made.events, made.dead) == (cursor, last, keys, dead)


def carrying(stage: Stage, frame: Frame | PackedFrame) -> StoredMessage:
    return StoredMessage(f"fi.{stage}.{PARTITION}", 101, NOW_NS, encode_frame(frame), {})


@every_reader_of_frames
def test_a_frame_that_the_cursor_cuts_through_gives_only_its_later_events(stage: Stage) -> None:
    events = tuple(an_event(origin, 0) for origin in range(11, 16))
    dead = (Dead(11, 2), Dead(13, 7), Dead(14, 3))
    made = work(stage, [carrying(stage, Frame(PARTITION, 10, 11, 15, (), "w", NOW_NS, b"", dead, events))], 13)
    assert made is not None
    assert (made.prev, made.last, made.events, made.dead) == (13, 15, [(14, 0), (15, 0)], 3)


@every_reader_of_frames
@given(plan=PLANS, short=st.integers(1, 5))
@settings(max_examples=20)
def test_a_hole_before_its_input_is_refused_and_named(
    stage: Stage, plan: list[tuple[int, int, int]], short: int
) -> None:
    messages = inputs(stage, plan, 10)
    with pytest.raises(HoleError) as refused:
        work(stage, messages, 10 - short)
    assert (refused.value.cursor, refused.value.prev) == (10 - short, 10)
    assert refused.value.subject == f"fi.{stage}.{PARTITION}"


@every_reader_of_frames
def test_a_hole_in_the_middle_of_its_input_is_refused(stage: Stage) -> None:
    messages = inputs(stage, [(0, 1, 0)] * 3, 10)
    with pytest.raises(HoleError):
        work(stage, [messages[0], messages[2]], 10)


@every_stage
def test_a_message_of_nothing_but_rejected_events_is_covered_without_an_event(stage: Stage) -> None:
    made = work(stage, inputs(stage, [(0, 0, 2), (2, 0, 1)], 10), 10)
    assert made is not None
    assert (made.prev, made.last, made.events, made.dead) == (10, 14, [], 3)


@every_stage
def test_the_same_input_from_the_same_cursor_gives_the_same_output(stage: Stage) -> None:
    messages = inputs(stage, [(1, 2, 1), (0, 3, 0)], 10)
    assert work(stage, messages, 10) == work(stage, messages, 10)


@every_reader_of_frames
def test_the_output_names_the_hop_messages_that_it_came_through(stage: Stage) -> None:
    made = work(stage, inputs(stage, [(0, 1, 0), (0, 1, 0)], 10), 10)
    assert made is not None
    assert made.trail == (*range(1, HOP_STAGES.index(stage) + 1), 101)


def newer(frame: bytes) -> bytes:
    """The frame as a later version would begin it."""
    return frame[:1] + b"\x03" + frame[2:]


def strange(stage: Stage, change: Callable[[bytes], bytes]) -> list[StoredMessage]:
    first, second, third = inputs(stage, [(0, 1, 0)] * 3, 10)
    return [first, msgspec.structs.replace(second, data=change(second.data)), third]


@every_reader_of_frames
@pytest.mark.parametrize("change", [newer, lambda _: msgspec.msgpack.encode([4, {"p": 1}])], ids=["alike", "unlike"])
def test_a_later_version_is_refused_loudly_and_nothing_is_skipped(
    stage: Stage, change: Callable[[bytes], bytes]
) -> None:
    with pytest.raises(WireFormatError, match=rf"fi\.{stage}\.5: sequence 101 .* later version") as refused:
        work(stage, strange(stage, change), 10)
    assert not isinstance(refused.value, StrayFrameError)


@every_reader_of_frames
@pytest.mark.parametrize("data", [b"", b"{}", b"\xff" * 40, b"\x91" * 5000, b"\xdd\xff\xff\xff\xff\x01"], ids=len)
def test_what_is_no_frame_is_refused_as_a_stray_and_nothing_is_skipped(stage: Stage, data: bytes) -> None:
    with pytest.raises(StrayFrameError, match="sequence 101") as refused:
        work(stage, strange(stage, lambda _: data), 10)
    assert refused.value.subject == f"fi.{stage}.{PARTITION}"


@every_reader_of_frames
def test_a_frame_of_another_partition_is_a_stray(stage: Stage) -> None:
    messages = inputs(stage, [(0, 1, 0)], 10)
    with pytest.raises(StrayFrameError, match="partition 5"):
        work(stage, [msgspec.structs.replace(messages[0], subject=f"fi.{stage}.6")], 10)


@every_reader_of_frames
@pytest.mark.parametrize("origins", [(9, 11), (11, 14), (12, 11)], ids=["before", "after", "out-of-order"])
def test_an_event_out_of_its_place_in_a_frame_is_a_stray(stage: Stage, origins: tuple[int, ...]) -> None:
    """Passed on, it would be stored out of order, or settled by a frame that does not cover it."""
    events = tuple(an_event(origin, 0) for origin in origins)
    with pytest.raises(StrayFrameError, match=r"sequence 101 .* is out of place"):
        work(stage, [carrying(stage, Frame(PARTITION, 10, 11, 13, (), "w", NOW_NS, b"", (), events))], 10)


@every_reader_of_frames
@pytest.mark.parametrize(
    ("prev", "first", "last"), [(10, 10, 12), (11, 11, 12), (10, 13, 12), (12, 11, 12)], ids=lambda origin: str(origin)
)
def test_a_frame_whose_ends_contradict_each_other_is_a_stray(stage: Stage, prev: int, first: int, last: int) -> None:
    """It would settle what is not in it, or take the cursor back."""
    with pytest.raises(StrayFrameError, match="it says that it covers"):
        work(stage, [carrying(stage, Frame(PARTITION, prev, first, last, (), "w", NOW_NS, b"", (), ()))], 12)


@every_reader_of_frames
@pytest.mark.parametrize("origin", [10, 13])
def test_a_frame_that_counts_dead_letters_of_what_it_does_not_cover_is_a_stray(stage: Stage, origin: int) -> None:
    """They would be counted twice, and the books not close any more."""
    frame = Frame(PARTITION, 10, 11, 12, (), "w", NOW_NS, b"", (Dead(origin, 1),), ())
    with pytest.raises(StrayFrameError, match="dead letters of origins that it does not cover"):
        work(stage, [carrying(stage, frame)], 10)


@pytest.mark.parametrize(
    "payload",
    [b"", b'{"a":', b'{"a":"\xff"}', b'{"a":1e400}', b'{"a":%s}' % (b"9" * 5000), b"[" * 600 + b"]" * 600],
    ids=lambda payload: str(payload[:12]),
)
def test_hash_refuses_a_payload_without_a_canonical_form_alone(payload: bytes) -> None:
    """Ingest refuses these; one that an earlier build of it let through must not end the process."""
    bad = msgspec.structs.replace(an_event(11, 0), payload=payload)
    frame = Frame(PARTITION, 10, 11, 12, (), "w", NOW_NS, b"", (), (bad, an_event(12, 0)))
    step = HashCore().step(carrying("hash", frame), 10, NOW_NS)
    assert step is not None
    assert [letter.error.reason for letter in step.letters] == ["payload.unhashable"]
    assert [event.origin for event in step.events] == [12]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (msgspec.msgpack.encode([1]), "sequence 101 "),
        (encode_event(msgspec.structs.replace(an_event(11, 0), audit_hash=b"")), "was not hashed"),
    ],
    ids=["no-event", "not-hashed"],
)
def test_persist_takes_no_event_with_which_a_shard_could_never_be_sealed(record: bytes, why: str) -> None:
    frame = PackedFrame(PARTITION, 10, 11, 11, (), "w", NOW_NS, b"", (), (msgspec.Raw(record),))
    with pytest.raises(StrayFrameError, match=why):
        work("persist", [carrying("persist", frame)], 10)


def test_repeats_within_and_before_a_group_are_counted_and_not_stored() -> None:
    again = msgspec.structs.replace(an_event(12, 0), event_id=an_event(11, 0).event_id)
    frame = Frame(PARTITION, 10, 11, 13, (), "w", NOW_NS, b"", (), (an_event(11, 0), again, an_event(13, 0)))
    message = StoredMessage(f"fi.persist.{PARTITION}", 9, NOW_NS, encode_frame(frame), {})
    stored = {an_event(13, 0).event_id}
    group = plan_group([message], 10, lambda ids: [event_id in stored for event_id in ids])
    assert group is not None
    assert (len(group.records), group.duplicates) == (1, 2)
    assert decode_event(group.records[0]) == an_event(11, 0)
    # `FI_EVENTS` keeps the repeats, though the shard does not.
    assert group.dropped_bytes == len(encode_event(again)) + len(encode_event(an_event(13, 0)))


def test_a_group_tells_the_times_of_each_frame_that_is_new_and_has_events() -> None:
    """Latencies are measured by them: no frame is taken apart again for that."""

    def frame(prev: int, last: int, *events: Event) -> Frame:
        return Frame(PARTITION, prev, prev + 1, last, (), "w", NOW_NS + last, b"", (), events)

    def stored(origin: int) -> Event:
        return msgspec.structs.replace(an_event(origin, 0), accepted_ns=origin)

    frames = [
        frame(8, 10, stored(9)),
        frame(9, 12, stored(10), stored(11), stored(12)),
        frame(12, 13),
        frame(13, 15, stored(14), stored(15)),
    ]
    messages = [carrying("persist", one) for one in frames]
    group = plan_group(messages, 10, lambda ids: [False] * len(ids))
    assert group is not None
    assert group.frames == [(NOW_NS + 12, 10, 3), (NOW_NS + 15, 14, 2)]
