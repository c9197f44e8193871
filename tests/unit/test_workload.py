"""Made-up consultations are valid, the same for a seed, and as mixed as real ones."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from cluster.workload import OPEN_AT_ONCE, consultations
from contracts.events import parse_rfc3339
from contracts.policy import CLOSED_TO, EVENT_TYPES, PAYLOAD_RULES
from stages.ingest.core import parse_message


@pytest.fixture(scope="module")
def events() -> list[dict[str, Any]]:
    return list(consultations(7, 20_000))


def test_every_event_passes_ingest_and_the_payload_rules(events: list[dict[str, Any]]) -> None:
    for event in events:
        parsed = parse_message(
            json.dumps(event, ensure_ascii=False).encode(),
            subject_site=event["metadata"]["site_id"],
            subject_consultation=event["consultation_id"],
            origin=1,
            accepted_ns=1,
            traceparent="",
            now_ns=1,
        )
        assert not parsed.rejected, parsed.rejected[0].error
        PAYLOAD_RULES.get(event["event_type"], lambda payload: None)(event["payload"])


def test_the_same_seed_gives_the_same_events_and_another_seed_others() -> None:
    assert list(consultations(3, 500)) == list(consultations(3, 500))
    assert list(consultations(3, 200)) == list(consultations(3, 500))[:200]
    first, second = ({event["event_id"] for event in consultations(seed, 500)} for seed in (3, 4))
    assert len(first) == len(second) == 500
    assert not first & second


def test_times_grow_and_consultations_are_interleaved(events: list[dict[str, Any]]) -> None:
    times = [parse_rfc3339(event["timestamp"]) for event in events]
    assert all(earlier < later for earlier, later in pairwise(times))
    assert len({event["consultation_id"] for event in events[: 4 * OPEN_AT_ONCE]}) > OPEN_AT_ONCE // 2
    assert len({event["event_id"] for event in events}) == len(events)


def test_messages_dominate_and_every_event_type_occurs(events: list[dict[str, Any]]) -> None:
    counts = Counter(event["event_type"] for event in events)
    assert counts.keys() == EVENT_TYPES.keys()
    assert counts["MESSAGE_RECEIVED"] > len(events) / 2


def test_nothing_a_committed_consultation_refuses_comes_after_the_commit(events: list[dict[str, Any]]) -> None:
    committed = set()
    for event in events:
        if event["event_type"] in CLOSED_TO:
            assert event["consultation_id"] not in committed
        if event["event_type"] == "CONSULTATION_COMMITTED":
            committed.add(event["consultation_id"])
    assert len(committed) > 100


def test_events_are_spread_over_the_sites_asked_for() -> None:
    assert {event["metadata"]["site_id"] for event in consultations(1, 5_000, sites=3)} == {
        "clinic-1", "clinic-2", "clinic-3",
    }  # fmt: skip
