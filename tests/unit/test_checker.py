"""The checker is fed broken histories of every kind, and must convict each and acquit what is merely unknown."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from uuid import UUID

import msgspec
import pytest

from cluster.testing.checker import FAULTS, Attempt, Verdict, check, defined_hash
from contracts.events import Event

A, B = UUID(int=0xA).bytes, UUID(int=0xB).bytes
LENGTH = 6


def payload(number: int) -> bytes:
    return json.dumps({"número": number, "x": [1.5, "ß"]}).encode()


def identity(consultation: bytes, place: int) -> bytes:
    return UUID(bytes=consultation).int.to_bytes(8, "big") + place.to_bytes(8, "big")


def attempt(consultation: bytes, place: int, acknowledged: bool = True) -> Attempt:
    digest = defined_hash(payload(place))
    return Attempt(identity(consultation, place), consultation, place, digest, acknowledged)


def stored(consultation: bytes, place: int, origin: int) -> Event:
    return Event(
        origin=origin,
        index=0,
        event_id=identity(consultation, place),
        consultation_id=consultation,
        site="clinic-1",
        event_type="MESSAGE_RECEIVED",
        timestamp_ns=0,
        stamped=True,
        payload=payload(place),
        metadata=b"{}",
        accepted_ns=0,
        audit_hash=defined_hash(payload(place)),
    )


ATTEMPTS = [attempt(consultation, place) for place in range(LENGTH) for consultation in (A, B)]


def whole() -> list[Event]:
    """A faithful record of `ATTEMPTS`: the two consultations interleaved."""
    return [stored(a.consultation_id, a.place, origin) for origin, a in enumerate(ATTEMPTS, 1)]


def only(verdict: Verdict, kind: str, *ids: bytes) -> None:
    """`verdict` convicts of `kind` alone, of exactly `ids`, and says which event it saw first."""
    assert not verdict.ok
    assert {name: verdict.all(name) for name in FAULTS} == {**dict.fromkeys(FAULTS, frozenset()), kind: frozenset(ids)}
    words = [found.counter_example for found in verdict.consultations.values() if found.counter_example]
    assert any(str(UUID(bytes=event_id)) in word for event_id in ids for word in words)
    assert f"{len(ids)} {kind}" in str(verdict)


def test_a_faithful_record_is_acquitted() -> None:
    verdict = check(ATTEMPTS, whole())
    assert verdict.ok
    assert not verdict.consultations
    assert (verdict.attempted, verdict.acknowledged, verdict.stored, verdict.dead_lettered) == (12, 12, 12, 0)


def test_consultations_may_be_interleaved_in_any_way() -> None:
    order = whole()
    random.Random(1).shuffle(order)
    order.sort(key=lambda event: event.event_id)
    assert check(ATTEMPTS, order).ok


def test_a_dead_lettered_event_is_not_lost() -> None:
    record = whole()
    gone = record.pop(4)
    verdict = check(ATTEMPTS, record, [gone.event_id])
    assert verdict.ok
    assert verdict.dead_lettered == 1


@pytest.mark.parametrize("at", [0, 5, 11])
def test_an_acknowledged_event_that_is_nowhere_is_lost(at: int) -> None:
    record = whole()
    gone = record.pop(at)
    verdict = check(ATTEMPTS, record)
    only(verdict, "lost", gone.event_id)
    assert list(verdict.consultations) == [gone.consultation_id]


def test_everything_lost_is_convicted_too() -> None:
    only(check(ATTEMPTS, []), "lost", *(a.event_id for a in ATTEMPTS))


def test_an_unknown_outcome_is_no_fault_whether_stored_or_not() -> None:
    attempts = [*ATTEMPTS, attempt(A, LENGTH, acknowledged=False), attempt(B, LENGTH, acknowledged=False)]
    verdict = check(attempts, [*whole(), stored(A, LENGTH, 13)])
    assert verdict.ok
    assert verdict.all("recovered") == {identity(A, LENGTH)}
    assert verdict.all("unknown") == {identity(B, LENGTH)}


@pytest.mark.parametrize("again", [1, 12])
def test_an_event_stored_twice_is_duplicated(again: int) -> None:
    record = whole()
    record.insert(again, record[0])
    only(check(ATTEMPTS, record), "duplicated", record[0].event_id)


def test_an_event_both_stored_and_dead_lettered_is_duplicated() -> None:
    only(check(ATTEMPTS, whole(), [ATTEMPTS[3].event_id]), "duplicated", ATTEMPTS[3].event_id)


def test_an_event_dead_lettered_twice_is_duplicated() -> None:
    record = whole()
    gone = record.pop(4)
    only(check(ATTEMPTS, record, [gone.event_id] * 2), "duplicated", gone.event_id)


def test_neighbours_that_changed_places_are_reordered() -> None:
    record = whole()
    record[2], record[4] = record[4], record[2]
    only(check(ATTEMPTS, record), "reordered", identity(A, 1))


def test_an_event_that_comes_last_is_the_one_reordered() -> None:
    record = whole()
    record.append(record.pop(1))
    only(check(ATTEMPTS, record), "reordered", identity(B, 0))


Change = Callable[[Event], Event]


@pytest.mark.parametrize(
    "change",
    [
        lambda event: msgspec.structs.replace(event, payload=payload(99)),
        lambda event: msgspec.structs.replace(event, payload=payload(99), audit_hash=defined_hash(payload(99))),
        lambda event: msgspec.structs.replace(event, audit_hash=b"\0" * 32),
        lambda event: msgspec.structs.replace(event, payload=b"\xff"),
        lambda event: msgspec.structs.replace(event, consultation_id=B),
    ],
    ids=["payload", "payload and hash", "hash", "not JSON", "consultation"],
)
def test_an_event_that_is_not_what_was_sent_is_altered(change: Change) -> None:
    record = whole()
    record[4] = change(record[4])
    only(check(ATTEMPTS, record), "altered", record[4].event_id)


def test_a_payload_that_only_looks_different_is_not_altered() -> None:
    record = whole()
    same = json.dumps(json.loads(record[4].payload), indent=2, sort_keys=True).encode()
    record[4] = msgspec.structs.replace(record[4], payload=same)
    assert check(ATTEMPTS, record).ok


def test_an_event_nobody_sent_is_unexpected_stored_or_dead() -> None:
    only(check(ATTEMPTS, [*whole(), stored(A, 77, 13)]), "unexpected", identity(A, 77))
    only(check(ATTEMPTS, whole(), [identity(A, 77)]), "unexpected", identity(A, 77))


def test_several_faults_are_told_apart_by_consultation() -> None:
    record = [event for event in whole() if event.event_id != identity(A, 2)]
    record.append(record[1])
    verdict = check(ATTEMPTS, record)
    assert verdict.all("lost") == {identity(A, 2)}
    assert verdict.all("duplicated") == {identity(B, 0)}
    assert "nowhere" in verdict.consultations[A].counter_example
    assert "stored again" in verdict.consultations[B].counter_example


def test_one_event_in_two_attempts_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="two attempts"):
        check([ATTEMPTS[0], ATTEMPTS[0]], [])


def test_the_defined_hash_is_the_definition() -> None:
    value = {"b": [1e22, -0.0, "é"], "a": {"z": None, "y": 10**30}}
    definition = hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).digest()
    assert defined_hash(json.dumps(value).encode()) == definition
