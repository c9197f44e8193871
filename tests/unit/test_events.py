"""Times are exact to the nanosecond, events survive the wire, and readers get what DOMAIN promises."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from contracts.errors import InvalidEventError, WireFormatError
from contracts.events import (
    Event,
    decode_event,
    decode_event_key,
    derive_event_id,
    encode_event,
    event_to_dict,
    format_rfc3339,
    gateway_schema,
    parse_rfc3339,
)
from contracts.policy import EVENT_TYPES, PAYLOAD_RULES, PAYLOAD_SCHEMAS

YEAR_1_NS = parse_rfc3339("0001-01-01T00:00:00Z")
YEAR_9999_NS = parse_rfc3339("9999-12-31T23:59:59.999999999Z")


@given(st.integers(YEAR_1_NS, YEAR_9999_NS))
@example(0)
@example(-1)
@example(YEAR_1_NS)
@example(YEAR_9999_NS)
@example(1_700_000_000_123_456_789)
def test_a_formatted_time_parses_back_to_the_nanosecond(time_ns: int) -> None:
    assert parse_rfc3339(format_rfc3339(time_ns)) == time_ns


@given(
    st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29)),
    st.integers(-1439, 1439),
    st.text("0123456789", max_size=9),
)
def test_every_zone_and_fraction_is_taken_exactly(moment: datetime, offset_minutes: int, fraction: str) -> None:
    moment = moment.replace(microsecond=0, tzinfo=timezone(timedelta(minutes=offset_minutes)))
    sign, minutes = "-" if offset_minutes < 0 else "+", abs(offset_minutes)
    text = moment.replace(tzinfo=None).isoformat() + (f".{fraction}" if fraction else "")
    expected_s = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
    expected_ns = expected_s * 10**9 + int(fraction.ljust(9, "0") or 0)
    assert parse_rfc3339(f"{text}{sign}{minutes // 60:02}:{minutes % 60:02}") == expected_ns


@given(st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31)), st.integers(0, 999))
@example(datetime(2026, 1, 2, 3, 4, 59), 987)
def test_a_time_in_utc_with_milliseconds_is_taken_exactly(moment: datetime, milliseconds: int) -> None:
    """Nearly all gateways write this form, and it is read by a way of its own."""
    moment = moment.replace(microsecond=0)
    expected_ns = (moment - datetime(1970, 1, 1)) // timedelta(milliseconds=1) * 10**6 + milliseconds * 10**6
    assert parse_rfc3339(f"{moment.isoformat()}.{milliseconds:03}Z") == expected_ns


def test_the_fewest_digits_that_are_exact_are_written() -> None:
    assert format_rfc3339(0) == "1970-01-01T00:00:00.000Z"
    assert format_rfc3339(1_500_000) == "1970-01-01T00:00:00.001500Z"
    assert format_rfc3339(1) == "1970-01-01T00:00:00.000000001Z"
    assert format_rfc3339(-1) == "1969-12-31T23:59:59.999999999Z"


@pytest.mark.parametrize(
    "text",
    [
        "", "2026-01-02", "2026-01-02T03:04:05", "2026-01-02T03:04Z", "2026-1-2T03:04:05Z", "2026-01-02T03:04:05.Z",
        "2026-01-02T03:04:05.1234567890Z", "2026-01-02T03:04:05+0000", "2026-01-02T03:04:05+24:00",
        "2026-02-29T00:00:00Z", "2026-01-02T24:00:00Z", "2026-01-02T03:04:60Z", "0000-01-01T00:00:00Z",
        " 2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z\n", "２026-01-02T03:04:05Z", "20260102T030405Z",
        "2026-01-02T03:04:60.000Z", "2026-01-02T03:04:05.1234", "2026-01-02T03:04:05,123Z", "2026-01-02T03:04.05.123Z",
        "2026-01-02T03:04:05.12３Z", "2026-01-02T03:04:05.+12Z", "2026-01-02T24:00:00.000Z", "2026-02-29T00:00:00.000Z",
    ],
)  # fmt: skip
def test_what_is_not_a_time_with_a_zone_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_rfc3339(text)


def an_event(payload: bytes = b'{ "a":1.50}') -> Event:
    return Event(
        origin=2**40,
        index=3,
        event_id=bytes(range(16)),
        consultation_id=bytes(range(16, 32)),
        site="clinic-1",
        event_type="MESSAGE_RECEIVED",
        timestamp_ns=1_700_000_000_123_456_789,
        stamped=True,
        payload=payload,
        metadata=b'{"user_id":"u","session_id":"s"}',
        accepted_ns=1_700_000_000_200_000_000,
        group=0,
        criticality=0,
        policy_version=1,
        audit_hash=b"\x07" * 32,
    )


unsigned = st.integers(0, 2**63 - 1)


@given(
    st.builds(
        Event,
        origin=st.integers(1, 2**63 - 1),
        index=unsigned,
        event_id=st.binary(min_size=16, max_size=16),
        consultation_id=st.binary(min_size=16, max_size=16),
        audit_hash=st.sampled_from([b"", bytes(range(32))]),
        timestamp_ns=st.integers(-(2**63), 2**63 - 1),
        accepted_ns=unsigned,
        ingest_ns=unsigned,
        segment_ns=unsigned,
        hash_ns=unsigned,
        group=st.integers(-1, 7),
        criticality=st.integers(-1, 2),
        policy_version=unsigned,
    )
)
def test_an_event_survives_the_wire(event: Event) -> None:
    data = encode_event(event)
    assert decode_event(data) == decode_event(memoryview(data)) == event
    key = decode_event_key(data)
    assert (key.origin, key.index, key.event_id) == (event.origin, event.index, event.event_id)


def test_bytes_of_another_version_are_refused() -> None:
    fields = [2, *msgspec.structs.astuple(an_event())]
    with pytest.raises(WireFormatError):
        decode_event(msgspec.msgpack.encode(fields))


def test_fields_a_later_build_appends_are_passed_over() -> None:
    fields = [1, *msgspec.structs.astuple(an_event()), "something new"]
    assert decode_event(msgspec.msgpack.encode(fields)) == an_event()


def test_readers_get_every_field_of_the_domain_with_the_payloads_own_bytes() -> None:
    line = msgspec.json.encode(event_to_dict(an_event(), partition=5, leaf=9))
    assert b'"payload":{ "a":1.50},' in line
    event = json.loads(line)
    assert event["event_id"] == str(UUID(bytes=bytes(range(16))))
    assert event["timestamp"] == "2023-11-14T22:13:20.123456789Z"
    assert event["audit_hash"] == "07" * 32
    assert (event["partition"], event["origin"], event["leaf"]) == (5, 2**40, 9)
    assert {"consultation_id", "event_type", "metadata"} <= event.keys()


def test_a_derived_id_depends_on_all_that_names_the_message() -> None:
    ids = {derive_event_id(*place) for place in ((1, 1, 0), (1, 1, 1), (1, 2, 0), (2, 1, 0), (11, 1, 0), (1, 11, 0))}
    assert len(ids) == 6
    assert derive_event_id(1, 1, 0) in ids


def test_the_published_schema_names_every_event_type_and_limit() -> None:
    schema = json.loads(msgspec.json.encode(gateway_schema()))
    event = schema["$defs"]["EventSchema"]
    assert event["properties"]["event_type"]["enum"] == list(EVENT_TYPES)
    assert set(event["required"]) == {"consultation_id", "event_type", "payload", "metadata"}
    assert schema["x-limits"]["payload_bytes_max"] == 1024 * 1024
    assert schema["x-limits"]["body_bytes_max"] == 2 * 1024 * 1024 - 512
    payloads = {
        rule["if"]["properties"]["event_type"]["const"]: rule["then"]["properties"]["payload"]
        for rule in event["allOf"]
    }
    assert payloads == PAYLOAD_SCHEMAS


_MISSING: Any = object()
_VALUES = ["user", "assistant", "", True, None, {}, [], -1, -0.5, 0, 0.5, 1, 1.5, 5, 6, 10, 10.5, 11, 100, 100.5, 101]


def _fits(schema: dict[str, Any], value: Any) -> bool:
    """As much of JSON Schema as `PAYLOAD_SCHEMAS` uses."""
    kinds = {"string": str, "object": dict, "integer": int, "number": (int, float)}
    if "type" in schema and (isinstance(value, bool) or not isinstance(value, kinds[schema["type"]])):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    return "minimum" not in schema or schema["minimum"] <= value <= schema["maximum"]


@pytest.mark.parametrize("event_type", sorted(PAYLOAD_RULES))
def test_the_published_schema_says_of_a_payload_what_segment_does(event_type: str) -> None:
    """Of one with a single field that may be wrong: what comes before it would hide it."""
    assert set(PAYLOAD_SCHEMAS) == set(PAYLOAD_RULES)
    schema = PAYLOAD_SCHEMAS[event_type]
    assert set(schema) <= {"required", "properties"}
    fields, required = schema["properties"], schema.get("required", ())
    right = {name: next(value for value in _VALUES if _fits(field, value)) for name, field in fields.items()}
    for name, field in fields.items():
        for value in [_MISSING, *_VALUES]:
            payload = {key: one for key, one in {**right, name: value}.items() if one is not _MISSING}
            try:
                PAYLOAD_RULES[event_type](payload)
                passed = True
            except InvalidEventError:
                passed = False
            assert passed == (name not in required if value is _MISSING else _fits(field, value)), payload
