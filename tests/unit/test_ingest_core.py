"""What a gateway sends becomes an event or a rejection with a reason; nothing else can happen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from contracts.errors import InvalidEventError
from contracts.events import DEFAULT_SOURCE, DEFAULT_TIMEZONE, Event, derive_event_id, encode_event
from contracts.hashing import audit_hash, canonical_json
from contracts.policy import EVENT_TYPES
from stages.ingest.core import EVENTS_MAX, IngestCore, Parsed, parse_message, parse_uuid
from stages.runtime.messages import StoredMessage

CONSULTATION = "0a1b2c3d-4e5f-4a6b-8c7d-9e0f1a2b3c4d"
EVENT_ID = "11111111-2222-4333-8444-555555555555"
ORIGIN, ACCEPTED_NS, NOW_NS = 41, 1_700_000_000_123_456_789, 1_700_000_000_200_000_000
REAL = Path(__file__).parents[2].parent / "shared" / "data" / "primock57.ndjson"


def parse(
    body: bytes, *, site: str = "clinic-1", consultation: str = CONSULTATION, trace: str = "", first_seen: str = ""
) -> Parsed:
    return parse_message(
        body,
        subject_site=site,
        subject_consultation=consultation,
        origin=ORIGIN,
        accepted_ns=ACCEPTED_NS,
        traceparent=trace,
        now_ns=NOW_NS,
        first_seen=first_seen,
    )


def a_gateway_event(**changes: Any) -> dict[str, Any]:
    event = {
        "event_id": EVENT_ID,
        "consultation_id": CONSULTATION,
        "timestamp": "2026-01-02T03:04:05.678Z",
        "event_type": "MESSAGE_RECEIVED",
        "payload": {"message_content": "Me duele la cabeza", "message_role": "user"},
        "metadata": {"user_id": "u-1", "session_id": "s-1", "site_id": "clinic-1"},
    }
    event.update(changes)
    return {key: value for key, value in event.items() if value != "absent"}


def body_of(**changes: Any) -> bytes:
    return json.dumps(a_gateway_event(**changes), ensure_ascii=False).encode()


def with_payload(payload: bytes) -> bytes:
    return body_of(payload="@").replace(b'"@"', payload)


def with_metadata(metadata: bytes) -> bytes:
    return body_of(metadata="@").replace(b'"@"', metadata)


def only_event(parsed: Parsed) -> Event:
    assert not parsed.rejected
    assert len(parsed.events) == 1
    return parsed.events[0]


def only_error(parsed: Parsed) -> InvalidEventError:
    assert not parsed.events
    assert len(parsed.rejected) == 1
    return parsed.rejected[0].error


def test_a_valid_event_keeps_every_field_and_its_payload_bytes() -> None:
    payload = b'{ "message_role" : "user","message_content":"\\u00e1 \xc3\xa1", "n": 1.50 }'
    event = only_event(parse(with_payload(payload), trace="00-" + "a" * 32 + "-" + "b" * 16 + "-01"))
    assert event.payload == payload
    assert (event.origin, event.index, event.site) == (ORIGIN, 0, "clinic-1")
    assert (event.event_id, event.consultation_id) == (UUID(EVENT_ID).bytes, UUID(CONSULTATION).bytes)
    assert (event.timestamp_ns, event.stamped) == (1_767_323_045_678_000_000, True)
    assert (event.accepted_ns, event.ingest_ns) == (ACCEPTED_NS, NOW_NS)
    assert event.traceparent.startswith("00-aaaa")


def test_defaults_are_added_behind_the_gateways_own_metadata() -> None:
    event = only_event(parse(with_metadata(b'{"user_id":"u", "session_id":"s","ward": {"bed": 7.0} }')))
    assert event.metadata == (
        b'{"user_id":"u", "session_id":"s","ward": {"bed": 7.0},'
        b'"source":"%s","timezone":"%s"}' % (DEFAULT_SOURCE.encode(), DEFAULT_TIMEZONE.encode())
    )
    own = b'{"user_id":"u","session_id":"s","source":"x","timezone":"UTC","extra":null}'
    assert only_event(parse(with_metadata(own))).metadata == own


@pytest.mark.parametrize("value", ["absent", None])
def test_an_event_without_id_or_time_gets_one_from_its_origin(value: str | None) -> None:
    parsed = parse(body_of(event_id=value, timestamp=value) + b"\n" + body_of(event_id=value, timestamp=value))
    assert [event.event_id for event in parsed.events] == [derive_event_id(ORIGIN, ACCEPTED_NS, i) for i in (0, 1)]
    assert {(event.timestamp_ns, event.stamped) for event in parsed.events} == {(ACCEPTED_NS, False)}


def test_ids_are_compared_as_uuids_whatever_their_case() -> None:
    assert only_event(parse(body_of(consultation_id=CONSULTATION.upper()))).consultation_id == UUID(CONSULTATION).bytes
    assert only_event(parse(body_of(), consultation=CONSULTATION.upper()))


def test_lines_of_ndjson_are_judged_one_by_one() -> None:
    body = b"\n".join([body_of(), b"", b"{nope", b"  \r", body_of(event_type="NO"), body_of(event_id=None)])
    parsed = parse(body)
    assert [event.index for event in parsed.events] == [0, 3]
    assert [(part.index, part.error.reason) for part in parsed.rejected] == [
        (1, "json.malformed"),
        (2, "event_type.unknown"),
    ]
    assert parsed.rejected[0].raw == b"{nope"


def test_a_single_object_over_several_lines_is_one_event_or_one_rejection() -> None:
    pretty = json.dumps(a_gateway_event(), indent=2).encode()
    assert only_event(parse(b"\n" + pretty + b"\r\n")).index == 0
    broken = pretty[:-1] + b',\n"extra": nope\n}'
    parsed = parse(broken)
    assert only_error(parsed).reason == "json.malformed"
    assert parsed.rejected[0].raw == broken
    assert only_error(parse(pretty.replace(b'"user"', b"NaN"))).reason == "payload.number"
    assert only_error(parse(pretty.replace(b'"user"', b'"\xff"'))).reason == "payload.utf8"


def test_more_lines_than_a_message_can_hold_are_one_rejection() -> None:
    assert only_error(parse(b"{}\n" * (EVENTS_MAX + 1))).reason == "message.events"
    assert len(parse(b"{}\n" * 3).rejected) == 3


def test_beyond_64_refused_lines_those_that_follow_one_another_are_one_rejection() -> None:
    good = body_of(event_id=None)
    lines = [b"{}"] * 66 + [good] + [b"[]"] * 500 + [good, b"{}"]
    parsed = parse(b"\n\n".join(lines))
    assert [event.index for event in parsed.events] == [66, 567]
    assert [(part.index, part.lines) for part in parsed.rejected] == [
        *((index, 1) for index in range(64)),
        (64, 2),
        (67, 500),
        (568, 1),
    ]
    assert [part.raw for part in parsed.rejected[64:]] == [b"{}\n{}", b"\n".join([b"[]"] * 500), b"{}"]
    assert parsed.rejected[65].error.reason == "json.not_object"
    subject = f"fi.raw.0.clinic-1.{CONSULTATION}"
    step = IngestCore().step(StoredMessage(subject, ORIGIN, ACCEPTED_NS, b"\n".join(lines), {}), 0, NOW_NS)
    assert step is not None
    (dead,) = step.dead
    assert dead.count == 567, "every refused line is accounted for"


def test_lines_refused_together_keep_their_places_when_they_are_mended_and_sent_again() -> None:
    """An event without an id gets it from its place: a mended one must not take that of another line."""
    refused = parse(b"\n".join([b"{}"] * 70)).rejected[64]
    again = parse(b"\n".join([body_of(event_id=None)] * 6), first_seen=f"{ORIGIN}/{ACCEPTED_NS}/{refused.index}")
    expected = [derive_event_id(ORIGIN, ACCEPTED_NS, index) for index in range(64, 70)]
    assert [event.event_id for event in again.events] == expected


DEEP_64 = b'{"a":' * 63 + b"[]" + b"}" * 63
DEEP_65 = b'{"a":' * 64 + b"[]" + b"}" * 64


def test_the_limits_themselves_are_inside() -> None:
    only_event(parse(with_payload(DEEP_64)))
    only_event(parse(with_payload(b'{"a":"' + b"[" * 100_000 + b'"}')))
    only_event(parse(with_payload(b'{"a":[' + b"[]," * 999 + b"{}]}")))
    only_event(parse(with_payload(b'{"a":"' + b"x" * (1024 * 1024 - 8) + b'"}')))
    only_event(parse(with_payload(b'{"a":' + b"9" * 4300 + b"}")))


M = b'{"user_id":"u","session_id":"s"%s}'
REFUSED: list[tuple[bytes, str, str]] = [
    (b"", "json.empty", ""),
    (b" \n\t\n ", "json.empty", ""),
    (b"hello", "json.malformed", ""),
    (b"\xef\xbb\xbf" + body_of(), "json.malformed", ""),
    (body_of()[:-1], "json.malformed", ""),
    (b"[1]", "json.not_object", ""),
    (b"[\n1\n]", "json.not_object", ""),
    (b"null", "json.not_object", ""),
    (b"{}", "field.missing", "consultation_id"),
    (body_of(payload="absent"), "field.missing", "payload"),
    (body_of(metadata="absent"), "field.missing", "metadata"),
    (body_of(event_type="absent"), "field.missing", "event_type"),
    (body_of(eventtype="x"), "field.unknown", "eventtype"),
    (body_of(**{"bad\r\nX: 1": 1}), "field.unknown", "'bad\\r\\nX: 1'"),
    (body_of(event_id=7), "field.type", "event_id"),
    (body_of(event_type=None), "field.type", "event_type"),
    (body_of(payload=[1]), "field.type", "payload"),
    (body_of(payload=None), "field.type", "payload"),
    (body_of(metadata="m"), "field.type", "metadata"),
    (body_of(event_type="message_received"), "event_type.unknown", "event_type"),
    (body_of(event_id="not-a-uuid"), "event_id.invalid", "event_id"),
    (body_of(event_id=""), "event_id.invalid", "event_id"),
    (body_of(event_id="{" + EVENT_ID[:-2] + "}"), "event_id.invalid", "event_id"),
    (body_of(event_id=EVENT_ID[:-1] + " "), "event_id.invalid", "event_id"),
    (body_of(event_id=EVENT_ID[:-1] + "١"), "event_id.invalid", "event_id"),
    (body_of(consultation_id="x"), "consultation.invalid", "consultation_id"),
    (body_of(consultation_id=EVENT_ID), "consultation.mismatch", "consultation_id"),
    (body_of(timestamp="2026-01-02T03:04:05"), "timestamp.invalid", "timestamp"),
    (body_of(timestamp="2026-02-30T03:04:05Z"), "timestamp.invalid", "timestamp"),
    (body_of(timestamp="2026-01-02T03:04:05+99:00"), "timestamp.invalid", "timestamp"),
    (body_of(timestamp=""), "timestamp.invalid", "timestamp"),
    (body_of(timestamp="9999-12-31T23:59:59Z"), "timestamp.range", "timestamp"),
    (body_of(timestamp="0001-01-01T00:00:00+23:59"), "timestamp.range", "timestamp"),
    (with_payload(DEEP_65), "payload.depth", "payload"),
    (with_payload(b'{"a":' * 999 + b"1" + b"}" * 999), "payload.depth", "payload"),
    (with_payload(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "payload.depth", "payload"),
    (with_payload(b'{"a":"' + b"x" * (2 * 1024 * 1024) + b'"}'), "payload.too_large", "payload"),
    (with_payload(b'{"a":[0,{"b":NaN}]}'), "payload.number", "payload.a.1.b"),
    (with_payload(b'{"a":-Infinity}'), "payload.number", "payload.a"),
    (with_payload(b'{"a":{"x":1},"c":1e400}'), "payload.number", "payload.c"),
    (with_payload(b'{"a":' + b"9" * 4301 + b"}"), "payload.number", "payload"),
    (with_payload(b'{"a":"\xff"}'), "payload.utf8", "payload"),
    (with_payload(b'{"a":"\\ud800"}'), "payload.utf8", "payload.a"),
    (with_payload(b'{"\\udc00":1}'), "payload.utf8", "payload"),
    (body_of(event_type="@").replace(b"@", b"\xff"), "json.utf8", ""),
    (body_of().replace(b'"event_id"', b'"\xff"'), "json.utf8", ""),
    (body_of(event_type="@").replace(b'"@"', b"NaN"), "json.number", "event_type"),
    (with_metadata(b"{}"), "metadata.user_id", "metadata.user_id"),
    (with_metadata(b'{"user_id":"","session_id":"s"}'), "metadata.user_id", "metadata.user_id"),
    (with_metadata(b'{"user_id":"u","session_id":null}'), "metadata.session_id", "metadata.session_id"),
    (with_metadata(M % b',"site_id":"clinic-2"'), "site.mismatch", "metadata.site_id"),
    (with_metadata(M % b',"site_id":1'), "site.mismatch", "metadata.site_id"),
    (with_metadata(M % b',"source":null'), "metadata.source", "metadata.source"),
    (with_metadata(M % b',"timezone":[]'), "metadata.timezone", "metadata.timezone"),
    (with_metadata(M % b',"x":"\xff"'), "metadata.utf8", "metadata"),
    (with_metadata(M % b',"x":NaN'), "metadata.number", "metadata.x"),
    (with_metadata(M % b',"x":1e999'), "metadata.number", "metadata.x"),
    (with_metadata(M % (b',"x":' + DEEP_64)), "metadata.depth", "metadata"),
    (with_metadata(M % (b',"x":' + b"[" * 5000 + b"]" * 5000)), "metadata.depth", "metadata"),
    (with_metadata(M % b',"user_id":"v"'), "field.duplicate", "metadata.user_id"),
    (with_metadata(M % b',"x":{},"user\\u005fid":"v"'), "field.duplicate", "metadata.user_id"),
    (body_of()[:-1] + b',"event_id":null}', "field.duplicate", "event_id"),
    (body_of()[:-1] + b',"payload":{}}', "field.duplicate", "payload"),
    (b'{"payload":0,' + body_of()[1:], "field.duplicate", "payload"),
    (b'{"event\\u005fid":null,' + body_of()[1:], "field.duplicate", ""),
    (b'{"metadata":{},' + body_of(metadata={"user_id": "u", "session_id": "s"})[1:], "field.duplicate", "metadata"),
]


@pytest.mark.parametrize(("body", "reason", "field"), REFUSED, ids=lambda value: str(value)[:40])
def test_every_broken_rule_is_refused_with_its_reason_and_field(body: bytes, reason: str, field: str) -> None:
    error = only_error(parse(body))
    assert (error.reason, error.field) == (reason, field)
    assert error.detail
    assert error.detail.isascii()
    assert error.detail.isprintable()
    between = parse(body_of() + b"\n" + body.replace(b"\n", b" ") + b"\n" + body_of())
    assert len(between.events) == 2
    assert [part.error.reason for part in between.rejected] == ([] if reason == "json.empty" else [reason])


@pytest.mark.parametrize("deep", [(b"[", b"]"), (b'{"b":', b"}")], ids=["arrays", "objects"])
def test_what_is_nested_as_deep_as_parsers_go_is_refused_alone_whatever_else_is_wrong_with_it(
    deep: tuple[bytes, bytes],
) -> None:
    """Some depth is one that the first parser still reads, and the one that says why it is refused does not."""
    for depth in range(480, 1080, 5):
        nested = deep[0] * depth + b"1" + deep[1] * depth
        for payload in (b'{"x":1e400,"y":%s}', b'{"y":%s,"x":1e400}'):
            parsed = parse(body_of() + b"\n" + with_payload(payload % nested) + b"\n" + body_of())
            assert len(parsed.events) == 2
            assert [part.error.reason for part in parsed.rejected] in (["payload.number"], ["payload.depth"])


@pytest.mark.parametrize("site", ["../../x", "", "a.b", "a b", "x" * 65, "é", "a\n", "a/b"])
def test_a_site_that_is_not_a_token_is_refused(site: str) -> None:
    assert only_error(parse(body_of(), site=site)).reason == "site.invalid"


@pytest.mark.parametrize("consultation", ["", "abc", "../../etc/passwd", CONSULTATION.replace("-", ""), "g" * 36])
def test_a_subject_whose_consultation_is_no_uuid_is_refused(consultation: str) -> None:
    assert only_error(parse(body_of(), consultation=consultation)).reason == "consultation.invalid"


@pytest.mark.parametrize("trace", ["nonsense", "00-" + "0" * 32 + "-" + "b" * 16 + "-01", "x" * 10_000])
def test_a_trace_header_that_is_not_w3c_is_left_out(trace: str) -> None:
    assert only_event(parse(body_of(), trace=trace)).traceparent == ""


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=12,
)
payloads = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), json_values, max_size=5)


@given(
    payload=payloads,
    event_type=st.sampled_from(sorted(EVENT_TYPES)),
    event_id=st.uuids() | st.none(),
    indent=st.none() | st.integers(0, 3),
    escape=st.booleans(),
)
def test_a_valid_event_passes_with_payload_bytes_unaltered_and_hash_as_defined(
    payload: dict[str, Any], event_type: str, event_id: UUID | None, indent: int | None, escape: bool
) -> None:
    raw = json.dumps(payload, ensure_ascii=escape, indent=indent).encode()
    event = a_gateway_event(payload="@@", event_type=event_type, event_id=event_id and str(event_id))
    parsed = only_event(parse(json.dumps(event, indent=indent).encode().replace(b'"@@"', raw)))
    assert parsed.payload == raw
    assert parsed.event_type == event_type
    assert audit_hash(msgspec.json.decode(parsed.payload)) == audit_hash(payload)
    assert canonical_json(msgspec.json.decode(raw)) == canonical_json(json.loads(raw))
    encode_event(parsed)


near_json = st.lists(
    st.sampled_from([
        b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b"\\", b"\\ud800", b"NaN", b"1e999", b"null", b"\xff", b"0",
        b'"payload":', b'"metadata":', b'"event_id":', b"{}", body_of(), b" ",
    ]),
    max_size=30,
).map(b"".join)  # fmt: skip


@settings(max_examples=400)
@given(body=st.binary(max_size=200) | near_json, site=st.text(max_size=8), consultation=st.text(max_size=40))
@example(body=b'"\\' * 50_000, site="a", consultation="b")
@example(body=b"[" * 1_000_000, site="a", consultation="b")
@example(body=b'{"a":' * 400_000, site="a", consultation="b")
@example(body=b'{"a":["' + b"\\" * 1_000_001, site="a", consultation="b")
@example(body=b'"' * 1_000_001, site="a", consultation="b")
@example(body=b"9" * 1_000_000, site="a", consultation="b")
def test_no_bytes_whatever_raise_and_every_line_is_accounted_for(body: bytes, site: str, consultation: str) -> None:
    for parsed in (parse(body), parse(body, site=site, consultation=consultation)):
        indexes = [event.index for event in parsed.events] + [part.index for part in parsed.rejected]
        assert sorted(indexes) == list(range(len(indexes)))
        assert indexes
        for part in parsed.rejected:
            assert part.raw in body
            assert part.error.reason.isascii()


@given(st.text(alphabet="0123456789abcdefABCDEF- {}\n", min_size=34, max_size=38) | st.uuids().map(str))
def test_parse_uuid_takes_the_canonical_form_only(text: str) -> None:
    try:
        expected = UUID(text).bytes if str(UUID(text)) == text.lower() else None
    except ValueError:
        expected = None
    try:
        assert parse_uuid(text) == expected
    except ValueError:
        assert expected is None


@pytest.mark.skipif(not REAL.exists(), reason=f"the real events are not here: {REAL}")
def test_all_real_events_pass_unaltered() -> None:
    seen = set()
    for line in REAL.read_bytes().splitlines():
        event = json.loads(line)
        parsed = only_event(parse(line, site=event["metadata"]["site_id"], consultation=event["consultation_id"]))
        assert json.loads(parsed.payload) == event["payload"]
        assert parsed.payload in line
        assert json.loads(parsed.metadata) == event["metadata"]
        assert audit_hash(msgspec.json.decode(parsed.payload)) == audit_hash(event["payload"])
        seen.add(parsed.event_id)
    assert len(seen) == 7450
