"""The event: as a gateway sends it, as it travels, and as it is stored and given back.

`Event` is the one wire and storage record. It is an array-like msgpack struct with a version tag; new fields are only
ever appended, with a default. The bytes the hash stage encodes are the bytes that are stored and that the Merkle tree
covers.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Any
from uuid import UUID, uuid5

import msgspec
from msgspec import Meta

from contracts.errors import WireFormatError
from contracts.policy import CRITICALITIES, EVENT_TYPES, GROUPS, PAYLOAD_SCHEMAS
from contracts.subjects import TOKEN_PATTERN
from contracts.wire import UNREADABLE, Count, Id, Sequence, TimeNs

PAYLOAD_BYTES_MAX = 1024 * 1024
"""DOMAIN, "An event": a payload has at most 1 MiB."""
MESSAGE_BYTES_MAX = 2 * 1024 * 1024
"""Largest message `FI_EVENTS` takes, with its headers: several events of one consultation may share one."""
HEADERS_BYTES = 512
"""Room for a message's headers: those of a replay too, which has more of them than the message had at first."""
BODY_BYTES_MAX = MESSAGE_BYTES_MAX - HEADERS_BYTES
"""Largest body a gateway may publish."""
PAYLOAD_DEPTH_MAX = 64
NESTING_MAX = 500
"""What is nested deeper is not read at all. No interpreter gives up on less."""
DEFAULT_SOURCE = "fi_consultation_service"
JSON_SPACE = b" \t\r\n"
DEFAULT_TIMEZONE = "America/Mexico_City"

_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_BLOCK_BYTES = 16 * 1024
_NO_STRUCTURE = bytes(set(range(256)) - set(b'"{}[]'))
_ID_NAMESPACE = UUID("6f4b1d0e-6a52-5d0b-9f6b-3b0c8f7a2d11")
_UTC_MS_CHARS = len("2026-01-05T08:02:33.073Z")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# Not \d: what that is differs from one validator of the published schema to another.
_RFC3339 = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_UUID_PATTERN = "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"


class Event(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """One event on its way through the pipeline and in the store (wire version 1).

    Ids are 16 raw bytes, times are nanoseconds since the Unix epoch, UTC. A time of 0 means "not there yet".

    Attributes:
        origin: sequence in `FI_EVENTS` of the message the event came in.
        index: position within that message.
        event_id: 16 bytes.
        consultation_id: 16 bytes.
        site: subject token.
        event_type: one of `contracts.policy.EVENT_TYPES`.
        timestamp_ns: when it happened, as the gateway said, else when the stream stored it.
        stamped: the gateway gave the timestamp itself.
        payload: JSON object, the gateway's bytes.
        metadata: JSON object with defaults filled in.
        accepted_ns: when `FI_EVENTS` stored it.
        traceparent: W3C trace context of the gateway, or empty.
        ingest_ns, segment_ns, hash_ns: when each stage finished with it.
        group, criticality: index into `GROUPS`, `CRITICALITIES`; -1 before segment.
        policy_version: the policy it passed under.
        audit_hash: 32 bytes after the hash stage.
    """

    origin: Sequence
    index: Count
    event_id: Id
    consultation_id: Id
    site: str
    event_type: str
    timestamp_ns: TimeNs
    stamped: bool
    payload: bytes
    metadata: bytes
    accepted_ns: TimeNs
    traceparent: str = ""
    ingest_ns: TimeNs = 0
    segment_ns: TimeNs = 0
    hash_ns: TimeNs = 0
    group: Annotated[int, Meta(ge=-1, lt=len(GROUPS))] = -1
    criticality: Annotated[int, Meta(ge=-1, lt=len(CRITICALITIES))] = -1
    policy_version: Count = 0
    audit_hash: Annotated[bytes, Meta(max_length=32)] = b""


class EventKey(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The leading fields of an encoded `Event`: what persist needs to place it without decoding the rest."""

    origin: Sequence
    index: Count
    event_id: Id


def stored_ns_at(origin: int, last: Event | None) -> int:
    """When `FI_EVENTS` stored the message at `origin`, by the last event up to there; 0 where that does not tell.

    It does not where the message bore nothing but repeats or refused events.
    """
    return last.accepted_ns if last is not None and last.origin == origin else 0


def derive_event_id(origin: int, accepted_ns: int, index: int) -> bytes:
    """The id of an event whose gateway gave none: the same message gives the same id, 16 bytes.

    The storage time is part of it, so that a recreated stream that counts from 1 again cannot repeat an id.
    """
    return uuid5(_ID_NAMESPACE, f"{origin}/{accepted_ns}/{index}").bytes


def parse_rfc3339(text: str) -> int:
    """RFC 3339 date-time with a zone → nanoseconds since the epoch, UTC, exactly.

    Raises:
        ValueError: not RFC 3339, without a zone, more than nine fractional digits, or no such time.
    """
    if len(text) == _UTC_MS_CHARS and text[16:20:3] == ":." and text[-1] == "Z" and text.isascii():
        digits = text[17:19] + text[20:23]
        if digits.isdecimal() and digits < "60":
            return _minute_ns(text[:16]) + int(digits) * 1_000_000
    return _parse_rfc3339(text)


@lru_cache(maxsize=4096)
def _minute_ns(text: str) -> int:
    """A date-time up to its minutes, UTC → nanoseconds since the epoch. Most events of a time share it."""
    return _parse_rfc3339(f"{text}:00Z")


def _parse_rfc3339(text: str) -> int:
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError("not an RFC 3339 date-time with a zone")
    date, time, fraction, zone = match.groups()
    moment = datetime.fromisoformat(f"{date}T{time}{'+00:00' if zone in 'Zz' else zone}")
    return (moment - _EPOCH) // _MICROSECOND * 1000 + (int(fraction.ljust(9, "0")) if fraction else 0)


def format_rfc3339(time_ns: int) -> str:
    """Nanoseconds since the epoch → RFC 3339 in UTC with 3, 6 or 9 fractional digits, the fewest that are exact."""
    seconds, fraction_ns = divmod(time_ns, 1_000_000_000)
    moment = (_EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S")
    digits = f"{fraction_ns:09d}"
    if digits.endswith("000000"):
        digits = digits[:3]
    elif digits.endswith("000"):
        digits = digits[:6]
    # strftime("%Y") does not pad years before 1000 on every platform.
    return f"{moment.rjust(19, '0')}.{digits}Z"


_event_encoder = msgspec.msgpack.Encoder()
_event_decoder = msgspec.msgpack.Decoder(Event)
_key_decoder = msgspec.msgpack.Decoder(EventKey)


def encode_event(event: Event) -> bytes:
    """The event's wire and storage bytes."""
    return _event_encoder.encode(event)


def decode_event(data: bytes | memoryview) -> Event:
    """Inverse of `encode_event`. Raises as `decode_event_key`."""
    try:
        return _event_decoder.decode(data)
    except UNREADABLE as error:
        raise WireFormatError(f"not an event: {error}") from error


def decode_event_key(data: bytes | memoryview) -> EventKey:
    """The leading fields of `encode_event`'s bytes.

    Raises:
        WireFormatError: not an event of a version this build reads.
    """
    try:
        return _key_decoder.decode(data)
    except UNREADABLE as error:
        raise WireFormatError(f"not an event: {error}") from error


_syntax_decoder = msgspec.json.Decoder(msgspec.Raw)


def split_body(body: bytes) -> list[bytes]:
    """A gateway message's body → the text of each of its events, in order; an event's place is its `index`.

    A body that is one JSON value is one event, however it is laid out. Any other body is taken line by line, blank
    lines passed over. Whether the texts are events is not looked at.
    """
    text = body.strip(JSON_SPACE)
    first, newline, _ = text.partition(b"\n")
    # Where the first line is whole, what follows makes the rest no part of it; and it is the shorter one to read.
    if not newline or (not is_json(first) and is_json(text)):
        return [text]
    return [line for part in text.split(b"\n") if (line := part.strip(JSON_SPACE))]


def is_nested_beyond_reading(text: bytes) -> bool:
    """True when a parser of `text`, JSON or not, might go deeper than `NESTING_MAX`, whatever it makes of it.

    Asked before a parser, whose own limit moves with its caller's depth: the same message must always be taken apart
    in the same way, or its letters and its frame's counts would differ when it is read again.
    """
    if len(text) <= NESTING_MAX or text.count(b"{") + text.count(b"[") <= NESTING_MAX:
        return False
    depth = at = 0
    quoted = False
    while at < len(text):
        block = text[at : at + _BLOCK_BYTES]
        # Not between a backslash and what it escapes.
        block = text[at : at + _BLOCK_BYTES + (len(block) - len(block.rstrip(b"\\"))) % 2]
        at += len(block)
        if b"\\" in block:
            block = _ESCAPED.sub(b"", block)
        pieces = block.translate(None, _NO_STRUCTURE).split(b'"')
        for bracket in b"".join(pieces[quoted::2]):
            depth += 1 if bracket in b"{[" else -1
            if depth > NESTING_MAX:
                return True
        quoted ^= len(pieces) % 2 == 0
    return False


def is_json(text: bytes) -> bool:
    """True when `text` is one well-formed JSON value (strings are not checked for UTF-8), nested to `NESTING_MAX`."""
    if is_nested_beyond_reading(text):
        return False
    try:
        _syntax_decoder.decode(text)
    except UNREADABLE:
        return False
    return True


def gateway_line(event: Event) -> bytes:
    """The event as a gateway could have sent it: what ingest makes an event of, with the same id and time, again.

    Its payload is the gateway's bytes; the rest may be laid out otherwise than it was. One line where the payload is.
    """
    fields: dict[str, Any] = {
        "event_id": str(UUID(bytes=event.event_id)),
        "consultation_id": str(UUID(bytes=event.consultation_id)),
        "event_type": event.event_type,
    }
    # Without a time of its own it has that of the message, which whoever sends it again gives besides.
    if event.stamped:
        fields["timestamp"] = format_rfc3339(event.timestamp_ns)
    return msgspec.json.encode(
        fields | {"payload": msgspec.Raw(event.payload), "metadata": msgspec.Raw(event.metadata)}
    )


def event_to_dict(event: Event, *, partition: int, leaf: int | None = None) -> dict[str, Any]:
    """The event as its readers get it: DOMAIN's fields with `payload` and `metadata` as raw JSON to be embedded.

    Args:
        event: a stored event.
        partition: the partition whose shard holds it.
        leaf: its index in the partition's Merkle tree, if known.

    Returns:
        a dict that `msgspec.json.encode` turns into one JSON object.
    """
    out: dict[str, Any] = {
        "event_id": str(UUID(bytes=event.event_id)),
        "consultation_id": str(UUID(bytes=event.consultation_id)),
        "timestamp": format_rfc3339(event.timestamp_ns),
        "event_type": event.event_type,
        "payload": msgspec.Raw(event.payload),
        "metadata": msgspec.Raw(event.metadata),
        "audit_hash": event.audit_hash.hex(),
        "partition": partition,
        "origin": event.origin,
        "index": event.index,
        "site": event.site,
        "group": GROUPS[event.group],
        "criticality": CRITICALITIES[event.criticality],
        "policy_version": event.policy_version,
        "times": {
            "accepted": format_rfc3339(event.accepted_ns),
            "ingest": format_rfc3339(event.ingest_ns),
            "segment": format_rfc3339(event.segment_ns),
            "hash": format_rfc3339(event.hash_ns),
        },
    }
    if event.traceparent:
        out["traceparent"] = event.traceparent
    if leaf is not None:
        out["leaf"] = leaf
    return out


_Name = Annotated[str, msgspec.Meta(min_length=1)]
# A format alone holds nobody to anything (JSON Schema 2020-12, validation, 7.2.1).
_Uuid = Annotated[
    str, msgspec.Meta(pattern=_UUID_PATTERN, description="UUID string", extra_json_schema={"format": "uuid"})
]


class MetadataSchema(msgspec.Struct):
    """Who and where: part of every event. Further fields are kept."""

    user_id: _Name
    session_id: _Name
    source: str = DEFAULT_SOURCE
    site_id: Annotated[str, msgspec.Meta(pattern=f"^{TOKEN_PATTERN}$")] | None = None
    timezone: str = DEFAULT_TIMEZONE


class EventSchema(msgspec.Struct, forbid_unknown_fields=True):
    """One event, as an edge gateway publishes it."""

    consultation_id: _Uuid
    event_type: str
    payload: dict[str, Any]
    metadata: MetadataSchema
    event_id: _Uuid | None = None
    timestamp: (
        Annotated[
            str,
            msgspec.Meta(
                pattern=f"^{_RFC3339.pattern}$",
                description="RFC 3339 with a zone; a time that exists, no leap second, of the years 1678 to 2261",
            ),
        ]
        | None
    ) = None


def gateway_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of an event as a gateway publishes it, with the subject rules beside it.

    Payload rules are those of the built-in policy. What JSON Schema has no words for stands under `x-limits`.
    """
    (schema,), components = msgspec.json.schema_components([EventSchema], ref_template="#/$defs/{name}")
    components["EventSchema"]["properties"]["event_type"] = {"enum": list(EVENT_TYPES)}
    components["EventSchema"]["allOf"] = [
        {"if": {"properties": {"event_type": {"const": name}}}, "then": {"properties": {"payload": payload}}}
        for name, payload in PAYLOAD_SCHEMAS.items()
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "$defs": components,
        "x-subject": {
            "pattern": "fi.events.<site>.<consultation_id>",
            "token": f"^{TOKEN_PATTERN}$",
            "rules": [
                "consultation_id in the event equals the subject's last token; write it in lower case, always the same",
                "metadata.site_id, when given, equals the subject's site token",
                "header Nats-Msg-Id names the message: for one event its event_id, for several an id of all of them",
                "an event without event_id is stored twice when it is sent again after two minutes",
                "header traceparent (W3C) is kept",
                "the body is one JSON object, or several of the same consultation, one a line (NDJSON)",
            ],
        },
        "x-limits": {
            "payload_bytes_max": PAYLOAD_BYTES_MAX,
            "payload_depth_max": PAYLOAD_DEPTH_MAX,
            "metadata_depth_max": PAYLOAD_DEPTH_MAX,
            "depth_counts": "the object itself is 1",
            "body_bytes_max": BODY_BYTES_MAX,
            "message_bytes_max": MESSAGE_BYTES_MAX,
            "message_bytes_hold": "body and headers",
            "numbers": "no NaN or infinity, no float beyond 64 bits (1e400), no integer of over 4300 digits",
            "integers": "written as such: JSON Schema takes 5.0 and 5e0 for integers, here they are refused",
            "strings": "UTF-8, without a byte order mark and halves of surrogate pairs (\\ud800)",
            "names": "once in the event and in metadata; in payload, and deeper in metadata, the last of a name counts",
        },
    }
