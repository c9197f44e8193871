"""A replayed event keeps the id and the time that it would have had when it first came in."""

from __future__ import annotations

import json
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.events import Event, derive_event_id
from contracts.letters import FirstSeen, parse_first_seen
from contracts.subjects import EVENTS
from contracts.telemetry import HEADER_FIRST_SEEN
from stages.ingest.core import IngestCore
from stages.runtime.messages import StoredMessage

CONSULTATION = str(UUID(int=7, version=4))
BARE = {
    "consultation_id": CONSULTATION,
    "event_type": "CONTEXT_UPDATED",
    "payload": {},
    "metadata": {"user_id": "u", "session_id": "s"},
}


def ingested(bodies: list[dict[str, object]], first_seen: str = "") -> list[Event]:
    headers = {HEADER_FIRST_SEEN: first_seen} if first_seen else {}
    data = b"\n".join(json.dumps(body).encode() for body in bodies)
    step = IngestCore().step(StoredMessage(f"fi.raw.0.clinic-1.{CONSULTATION}", 900, 5000, data, headers), 0, 6000)
    assert step is not None, EVENTS
    return step.events


def test_an_event_without_id_and_time_gets_those_of_the_place_where_it_first_came_in() -> None:
    (event,) = ingested([BARE], "17/1234/3")
    assert event.event_id == derive_event_id(17, 1234, 3)
    assert (event.timestamp_ns, event.stamped) == (1234, False)
    assert (event.origin, event.index, event.accepted_ns) == (900, 0, 5000)


def test_several_events_count_on_from_the_first() -> None:
    events = ingested([BARE, BARE], "17/1234/3")
    assert [event.event_id for event in events] == [derive_event_id(17, 1234, 3), derive_event_id(17, 1234, 4)]


def test_what_the_gateway_gave_itself_stays() -> None:
    own = str(UUID(int=8, version=4))
    (event,) = ingested([{**BARE, "event_id": own, "timestamp": "2026-01-01T00:00:00Z"}], "17/1234/3")
    assert (event.event_id, event.stamped) == (UUID(own).bytes, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1/2",
        "1/2/3/4",
        "a/b/c",
        "-1/2/3",
        "1/2/3 ",
        "9223372036854775808/1/1",
        "1/9223372036854775808/1",
        "٣/2/3",
    ],
)
def test_anything_else_in_the_header_counts_for_nothing(text: str) -> None:
    (event,) = ingested([BARE], text)
    assert event.event_id == derive_event_id(900, 5000, 0)
    assert event.timestamp_ns == 5000


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(0, 10**9 - 1))
def test_it_reads_what_it_writes(origin: int, accepted_ns: int, index: int) -> None:
    first = FirstSeen(origin, accepted_ns, index)
    assert parse_first_seen(str(first)) == first


@given(st.text())
def test_no_text_is_too_strange_to_be_read(text: str) -> None:
    found = parse_first_seen(text)
    assert found is None or isinstance(found, FirstSeen)
