"""A dead letter holds its own event, also where `FI_EVENTS` has another message at its place by now, or none."""

from __future__ import annotations

import msgspec
import pytest
from virtual import Ground, in_virtual_time

from contracts.errors import InvalidEventError
from contracts.events import Event
from contracts.letters import LETTERS_APART, Letter, read_letter
from contracts.subjects import DLQ, EVENTS, publish_subject, raw_subject
from stages.ingest.core import IngestCore, Parsed, parse_message
from stages.runtime.graveyard import Graveyard
from stages.runtime.messages import StoredMessage
from stages.runtime.work import DeadLetter, join_letters

CONSULTATION = "aac18039-54dd-5c5d-a12f-d0aaa1882a18"
OTHER = "bbc18039-54dd-5c5d-a12f-d0aaa1882a18"
ACCEPTED_NS = 1_780_000_000_000_000_000
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
REFUSED = InvalidEventError("payload.value", "payload", "")


def line(number: int, **fields: str) -> bytes:
    return msgspec.json.encode(
        {
            "consultation_id": CONSULTATION,
            "event_type": "MESSAGE_RECEIVED",
            "payload": {"message_content": f"{number}", "message_role": "user"},
            "metadata": {"user_id": "u", "session_id": "s", "site_id": "clinic-1"},
        }
        | fields
    )


def parsed(body: bytes, *, origin: int, accepted_ns: int, first_seen: str = "", trace: str = TRACE) -> Parsed:
    return parse_message(
        body,
        subject_site="clinic-1",
        subject_consultation=CONSULTATION,
        origin=origin,
        accepted_ns=accepted_ns,
        traceparent=trace,
        now_ns=1,
        first_seen=first_seen,
    )


def refused(events: list[Event]) -> list[DeadLetter]:
    """What segment makes of events that it refuses."""
    return join_letters([DeadLetter(e.origin, e.index, REFUSED, None, 3, events=(e,)) for e in events])


async def letters_of(ground: Ground, stage: str, letters: list[DeadLetter]) -> list[Letter]:
    await Graveyard(ground.api, stage, 0, "nonce").bury(letters)
    stored = ground.broker.streams[DLQ].messages.values()
    return [read_letter(m.subject, m.seq, m.time_ns, m.data, m.headers) for m in stored]


@pytest.mark.parametrize("count", [1, LETTERS_APART + 3], ids=["of its own", "shared"])
@pytest.mark.parametrize("instead", ["another message", "a later one", "nothing at all"])
def test_what_segment_refuses_is_in_its_letter_though_its_message_is_gone(instead: str, count: int) -> None:
    async def job(ground: Ground) -> None:
        lines = [
            line(number) if number % 2 else line(number, timestamp="2026-01-05T08:02:33Z") for number in range(count)
        ]
        events = parsed(b"\n".join(lines), origin=1, accepted_ns=ACCEPTED_NS).events
        await ground.publish(publish_subject("clinic-2", OTHER), b"of somebody else")
        if instead == "a later one":
            await ground.publish(publish_subject("clinic-2", OTHER), b"of somebody else, later")
        if instead != "another message":
            ground.broker.streams[EVENTS].remove(1)
        letters = await letters_of(ground, "segment", refused(events))
        assert [letter.lines for letter in letters] == [1] * min(count, LETTERS_APART) + [3] * (count > LETTERS_APART)
        assert {(letter.site, letter.consultation) for letter in letters} == {("clinic-1", CONSULTATION)}
        assert {letter.traceparent for letter in letters} == {TRACE}
        again: list[Event] = []
        for letter in letters:
            # As it is when the letter is replayed.
            made = parsed(letter.data, origin=900, accepted_ns=2 * ACCEPTED_NS, first_seen=letter.first_seen)
            assert not made.rejected
            again += made.events
        came = [msgspec.structs.replace(event, origin=0, index=0, accepted_ns=0) for event in events]
        assert [msgspec.structs.replace(event, origin=0, index=0, accepted_ns=0) for event in again] == came
        assert {event.timestamp_ns for event in came if not event.stamped} <= {ACCEPTED_NS}

    in_virtual_time(job)


def test_what_segment_refuses_is_in_its_letter_as_it_came_while_its_message_is_there() -> None:
    async def job(ground: Ground) -> None:
        body = line(1).replace(b":", b" : ")
        await ground.publish(publish_subject("clinic-1", CONSULTATION), body)
        (message,) = ground.broker.streams[EVENTS].messages.values()
        events = parsed(body, origin=1, accepted_ns=message.time_ns).events
        (letter,) = await letters_of(ground, "segment", refused(events))
        assert letter.data == body

    in_virtual_time(job)


def test_what_ingest_refuses_keeps_the_place_it_came_from() -> None:
    async def job(ground: Ground) -> None:
        await ground.publish(publish_subject("clinic-2", OTHER), b"of somebody else")
        message = StoredMessage(raw_subject(0, "clinic-1", CONSULTATION), 1, ACCEPTED_NS, b"no event", {})
        core = IngestCore()
        core.open(b"")
        step = core.step(message, 0, 1)
        assert step is not None
        (letter,) = await letters_of(ground, "ingest", step.letters)
        assert (letter.site, letter.consultation, letter.data) == ("clinic-1", CONSULTATION, b"no event")
        assert letter.first_seen == f"1/{ACCEPTED_NS}/0"
        assert (letter.reason, letter.field) == ("json.malformed", "")

    in_virtual_time(job)


def test_what_a_gateway_has_in_the_words_of_a_refusal_is_no_header() -> None:
    async def job(ground: Ground) -> None:
        forged = "x\r\nNats-Rollup: all\r\n\r\n\0"
        error = InvalidEventError("json.malformed", forged, forged)
        (letter,) = await letters_of(ground, "ingest", [DeadLetter(1, 0, error, None)])
        (stored,) = ground.broker.streams[DLQ].messages.values()
        assert all(value.isprintable() and value.encode() for value in stored.headers.values())
        assert letter.field == letter.detail == "x  Nats-Rollup: all"

    in_virtual_time(job)
