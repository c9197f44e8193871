"""Ingest's work: what a gateway sent → events and rejections, whatever it holds.

Always true of `parse_message`: it returns for any bytes whatever; every line of the message is either one event or one
rejection; the payload of an event is the gateway's own bytes, and those bytes decode to something
`contracts.hashing.audit_hash` can take.

The rules are DOMAIN's event table. What it leaves open is decided here:

* An unknown field beside the six is refused: dropping it in silence would lose data. `metadata` takes further fields.
* A field given twice is refused, of the event and of `metadata`: parsers disagree on which of two wins, so gateway and
  record could disagree on who said what. Inside `payload` and deeper in `metadata`, names are the application's; there
  the last one wins, as it does in the definition of the audit hash.
* Of a message's refused lines, the first 64 are rejections of their own; after that, those that follow one another are
  one. Each is a dead letter, stored before anything behind the message goes on: thousands would hold that up.
* Ids are UUIDs in their canonical form of 36 characters, in either case.
* A time must fit 64 bits of nanoseconds: years 1678 to 2261.
* The object itself counts as depth 1, and `metadata` is held to the payload's depth.

Rejections carry one of these reasons: ``json.empty``, ``json.malformed``, ``json.not_object``, ``json.utf8``,
``json.number``, ``message.events``, ``field.unknown``, ``field.missing``, ``field.type``, ``field.duplicate``,
``site.invalid``, ``site.mismatch``, ``consultation.invalid``, ``consultation.mismatch``, ``event_id.invalid``,
``event_type.unknown``, ``timestamp.invalid``, ``timestamp.range``, ``{payload,metadata}.{depth,number,utf8}``,
``payload.too_large``, ``metadata.{user_id,session_id,source,timezone}``.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from contracts.errors import InvalidEventError
from contracts.events import (
    DEFAULT_SOURCE,
    DEFAULT_TIMEZONE,
    JSON_SPACE,
    PAYLOAD_BYTES_MAX,
    PAYLOAD_DEPTH_MAX,
    Event,
    derive_event_id,
    parse_rfc3339,
    split_body,
)
from contracts.frames import Dead
from contracts.letters import LETTERS_APART, FirstSeen, parse_first_seen
from contracts.policy import EVENT_TYPES
from contracts.subjects import Stage, is_token, split_raw_subject
from contracts.telemetry import HEADER_FIRST_SEEN, HEADER_TRACEPARENT, parse_traceparent
from contracts.wire import UNREADABLE
from stages.ingest.explain import duplicate_field, explain_decoding, explain_part, quoted
from stages.runtime.messages import StoredMessage
from stages.runtime.work import DeadLetter, Step

EVENTS_MAX = 32 * 1024
"""Lines one message may hold. No message within `MESSAGE_BYTES_MAX` can hold as many valid events."""

_TIME_NS_MIN, _TIME_NS_MAX = -(2**63), 2**63 - 1
_REQUIRED_BYTES = len('{"consultation_id":"","event_type":"","payload":,"metadata":}')
_OPTIONAL_BYTES = len(',"event_id":'), len(',"timestamp":')
_STRINGS_BYTES = sum(_OPTIONAL_BYTES) + 4
_REPEATED_BYTES_MAX = 1024
_DUPLICATE_BYTES_MIN = len('"payload":0,')
"""No field given twice takes fewer bytes."""


class Rejection(msgspec.Struct, frozen=True):
    """A part of a message that is not an event.

    Attributes:
        index: its position among the message's events, from 0; of several lines that of the first.
        raw: its bytes as they were sent.
        error: what is wrong with it; of several lines with the first.
        lines: how many.
    """

    index: int
    raw: bytes
    error: InvalidEventError
    lines: int = 1


class Parsed(msgspec.Struct, frozen=True):
    """A whole message, taken apart. `events` and `rejected` together cover every index exactly once, in order."""

    events: list[Event] = []
    rejected: list[Rejection] = []


class _Message(msgspec.Struct, frozen=True, gc=False):
    site: str
    consultation: str
    origin: int
    accepted_ns: int
    first: FirstSeen
    traceparent: str
    now_ns: int


class _Wire(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One event with its two objects left as bytes."""

    consultation_id: str
    event_type: str
    payload: Raw
    metadata: Raw
    event_id: str | UnsetType | None = UNSET
    timestamp: str | UnsetType | None = UNSET


_decode_wire = msgspec.json.Decoder(_Wire).decode
_decode_any = msgspec.json.Decoder().decode


class IngestCore:
    """See `StageCore`. Its input counts in origins, so there is nothing to join on to."""

    stage: Stage = "ingest"

    def __init__(self) -> None:
        self._closed = b""

    def open(self, closed: bytes) -> None:
        """Keeps segment's memory: frames made after the hops were lost hand it on from the receipt."""
        self._closed = closed

    def begin(self) -> None:
        """Nothing changes while the process runs."""

    def step(self, message: StoredMessage, origin: int, now_ns: int) -> Step | None:
        """Parses one gateway message. See `StageCore.step`."""
        if message.seq <= origin:
            return None
        _, site, consultation = split_raw_subject(message.subject)
        parsed = parse_message(
            message.data,
            subject_site=site,
            subject_consultation=consultation,
            origin=message.seq,
            accepted_ns=message.time_ns,
            traceparent=message.headers.get(HEADER_TRACEPARENT, ""),
            now_ns=now_ns,
            first_seen=message.headers.get(HEADER_FIRST_SEEN, ""),
        )
        dead = [Dead(message.seq, sum(row.lines for row in parsed.rejected))] if parsed.rejected else []
        letters = [
            DeadLetter(message.seq, row.index, row.error, row.raw, lines=row.lines, original=message)
            for row in parsed.rejected
        ]
        return Step(message.seq, message.seq, parsed.events, dead, letters, (), self._closed, message.time_ns)


def parse_message(
    body: bytes,
    *,
    subject_site: str,
    subject_consultation: str,
    origin: int,
    accepted_ns: int,
    traceparent: str,
    now_ns: int,
    first_seen: str = "",
) -> Parsed:
    """Takes one gateway message apart. Never raises for anything a gateway can send.

    A body that is one JSON value is one event, however it is laid out. Any other body with line breaks is NDJSON: blank
    lines are passed over, every other line is one event. If no line of it is even JSON, the body is one rejection.

    Args:
        body: one JSON object, or several, one a line.
        subject_site, subject_consultation: the subject's last two tokens, unchecked.
        origin: the message's sequence in `FI_EVENTS`.
        accepted_ns: when `FI_EVENTS` stored it.
        traceparent: the header's text; anything that is not a W3C trace context is ignored.
        now_ns: the time now, stored as `ingest_ns`.
        first_seen: of a replayed message, where it first came in: what ids and times are derived from.
    """
    first = (parse_first_seen(first_seen) if first_seen else None) or FirstSeen(origin, accepted_ns, 0)
    trace = traceparent if traceparent and parse_traceparent(traceparent) is not None else ""
    message = _Message(subject_site, subject_consultation, origin, accepted_ns, first, trace, now_ns)
    lines = split_body(body)
    if len(lines) == 1:
        return _parse_parts(message, lines, body)
    if len(lines) > EVENTS_MAX:
        error = InvalidEventError("message.events", "", f"{len(lines)} lines, at most {EVENTS_MAX} in one message")
        return Parsed([], [Rejection(0, body, error)])
    parsed = _parse_parts(message, lines, None)
    if not parsed.events and all(part.error.reason.startswith("json.") for part in parsed.rejected):
        return _parse_parts(message, [body.strip(JSON_SPACE)], body)
    if len(parsed.rejected) > LETTERS_APART:
        return Parsed(parsed.events, _join_neighbours(parsed.rejected))
    return parsed


def _join_neighbours(rejected: list[Rejection]) -> list[Rejection]:
    """The first ones as they are; after them, those of lines that follow one another are one."""
    joined = rejected[:LETTERS_APART]
    neighbours: list[list[Rejection]] = []
    for part in rejected[LETTERS_APART:]:
        if neighbours and part.index == neighbours[-1][-1].index + 1:
            neighbours[-1].append(part)
        else:
            neighbours.append([part])
    return joined + [
        Rejection(parts[0].index, b"\n".join([part.raw for part in parts]), parts[0].error, len(parts))
        for parts in neighbours
    ]


def parse_uuid(text: str) -> bytes:
    """A UUID in canonical form, in either case → 16 bytes.

    Raises:
        ValueError: anything else.
    """
    value = bytes.fromhex(text.replace("-", ""))
    # fromhex passes over white space: fewer bytes come out of a text that holds some, or further hyphens.
    if len(value) != 16 or len(text) != 36 or text[8:24:5] != "----":
        raise ValueError("not a UUID of 36 characters")
    return value


def _parse_parts(message: _Message, parts: list[bytes], raw: bytes | None) -> Parsed:
    parsed = Parsed()
    for index, part in enumerate(parts):
        try:
            parsed.events.append(_parse_event(message, index, part))
        except InvalidEventError as error:
            parsed.rejected.append(Rejection(index, part if raw is None else raw, error.unraised()))
    return parsed


def _parse_event(message: _Message, index: int, text: bytes) -> Event:
    try:
        wire = _decode_wire(text)
    except UNREADABLE as error:
        raise explain_decoding(text, error) from None
    consultation_id = _check_subject(message.site, message.consultation)
    payload, metadata = bytes(wire.payload), bytes(wire.metadata)
    if wire.event_type not in EVENT_TYPES:
        raise InvalidEventError("event_type.unknown", "event_type", f"no such event type: {quoted(wire.event_type)}")
    if (
        wire.consultation_id != message.consultation
        and _uuid_field("consultation_id", wire.consultation_id, "consultation.invalid") != consultation_id
    ):
        detail = f"{quoted(wire.consultation_id)} is not the subject's {quoted(message.consultation)}"
        raise InvalidEventError("consultation.mismatch", "consultation_id", detail)
    event_id = _uuid_field("event_id", wire.event_id, "event_id.invalid") if wire.event_id else None
    if wire.event_id == "":
        raise InvalidEventError("event_id.invalid", "event_id", "empty; leave it out or give a UUID")
    time_ns = _parse_time(wire.timestamp) if type(wire.timestamp) is str else None
    _check_duplicates(text, wire, payload, metadata)
    _check_payload(payload)
    if event_id is None:
        first = message.first.at(index)
        event_id = derive_event_id(first.origin, first.accepted_ns, first.index)
    return Event(
        origin=message.origin,
        index=index,
        event_id=event_id,
        consultation_id=consultation_id,
        site=message.site,
        event_type=wire.event_type,
        timestamp_ns=message.first.accepted_ns if time_ns is None else time_ns,
        stamped=time_ns is not None,
        payload=payload,
        metadata=(_complete_again if len(metadata) <= _REPEATED_BYTES_MAX else _complete_metadata)(
            metadata, message.site
        ),
        accepted_ns=message.accepted_ns,
        traceparent=message.traceparent,
        ingest_ns=message.now_ns,
    )


@lru_cache(maxsize=4096)
def _check_subject(site: str, consultation: str) -> bytes:
    if not is_token(site):
        raise InvalidEventError("site.invalid", "site", f"{quoted(site)} is not 1 to 64 of A-Z a-z 0-9 _ -")
    return _uuid_field("consultation_id", consultation, "consultation.invalid")


def _uuid_field(name: str, text: str, reason: str) -> bytes:
    try:
        return parse_uuid(text)
    except ValueError:
        raise InvalidEventError(reason, name, f"{quoted(text)} is not a UUID of 36 characters") from None


def _parse_time(text: str) -> int:
    try:
        time_ns = parse_rfc3339(text)
    except (ValueError, OverflowError) as error:
        raise InvalidEventError("timestamp.invalid", "timestamp", f"{quoted(text)}: {error}") from None
    if not _TIME_NS_MIN <= time_ns <= _TIME_NS_MAX:
        raise InvalidEventError("timestamp.range", "timestamp", f"{quoted(text)} is outside the years 1678 to 2261")
    return time_ns


def _check_payload(payload: bytes) -> None:
    if payload[:1] != b"{":
        raise InvalidEventError("field.type", "payload", "must be a JSON object")
    if len(payload) > PAYLOAD_BYTES_MAX:
        detail = f"{len(payload)} bytes, at most {PAYLOAD_BYTES_MAX}"
        raise InvalidEventError("payload.too_large", "payload", detail)
    _decode_part("payload", payload)


def _decode_part(name: str, part: bytes) -> Any:
    """Decodes `payload` or `metadata` whole: as `Raw` it was skipped over, with its strings and numbers unread."""
    try:
        value = _decode_any(part)
    except UNREADABLE as error:
        raise explain_part(name, part, error) from None
    # A part with no more brackets than that cannot be deeper, whatever its strings hold.
    if part.count(b"{") + part.count(b"[") > PAYLOAD_DEPTH_MAX and _is_too_deep(value):
        raise InvalidEventError(f"{name}.depth", name, f"nested deeper than {PAYLOAD_DEPTH_MAX}")
    return value


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(PAYLOAD_DEPTH_MAX):
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return False
    return True


def _complete_metadata(metadata: bytes, site: str) -> bytes:
    """`metadata` checked, with defaults for `source` and `timezone` added behind the gateway's own bytes."""
    if metadata[:1] != b"{":
        raise InvalidEventError("field.type", "metadata", "must be a JSON object")
    value: dict[str, Any] = _decode_part("metadata", metadata)
    for name in ("user_id", "session_id"):
        if not isinstance(value.get(name), str) or not value[name]:
            raise InvalidEventError(f"metadata.{name}", f"metadata.{name}", "required: a string that is not empty")
    given = value.get("site_id")
    if given is not None and given != site:
        detail = f"{quoted(given)} is not the subject's {quoted(site)}"
        raise InvalidEventError("site.mismatch", "metadata.site_id", detail)
    added = b""
    for name, default in (("source", DEFAULT_SOURCE), ("timezone", DEFAULT_TIMEZONE)):
        if name not in value:
            added += f',"{name}":"{default}"'.encode()
        elif not isinstance(value[name], str):
            detail = "must be a string; leave it out for the default"
            raise InvalidEventError(f"metadata.{name}", f"metadata.{name}", detail)
    # Each name and each string takes two quotation marks at least; only a name given twice or nested ones leave more.
    if metadata.count(b'"') != 2 * (len(value) + [type(item) for item in value.values()].count(str)):
        _check_metadata_names(metadata)
    return metadata[:-1].rstrip(JSON_SPACE) + added + b"}" if added else metadata


_complete_again = lru_cache(maxsize=4096)(_complete_metadata)
"""For metadata that the other events of a session are likely to repeat, byte for byte."""


def _check_metadata_names(metadata: bytes) -> None:
    names = set()
    for name, _ in json.loads(metadata, object_pairs_hook=list):
        if name in names:
            raise duplicate_field("metadata", name)
        names.add(name)


def _check_duplicates(text: bytes, wire: _Wire, payload: bytes, metadata: bytes) -> None:
    """Refuses a field given twice. msgspec keeps the last and drops the other, so `text` is longer than what was kept.

    White space makes it longer too. Quotation marks settle it: no valid id, type or time holds one, so all those of
    `text` must be accounted for by the names and values kept.
    """
    kept_bytes = _REQUIRED_BYTES + len(wire.consultation_id) + len(wire.event_type) + len(payload) + len(metadata)
    optional = wire.event_id, wire.timestamp
    if type(optional[0]) is type(optional[1]) is str:
        kept_bytes += _STRINGS_BYTES + len(optional[0]) + len(optional[1])
    else:
        for value, name_bytes in zip(optional, _OPTIONAL_BYTES, strict=True):
            if value is not UNSET:
                kept_bytes += name_bytes + (4 if value is None else 2 + len(value))
    if len(text) - kept_bytes < _DUPLICATE_BYTES_MIN:
        return
    quotes = 12 + sum(0 if value is UNSET else 2 if value is None else 4 for value in optional)
    if text.count(b'"') - payload.count(b'"') - metadata.count(b'"') != quotes:
        for name in _Wire.__struct_fields__:
            key = b'"%s"' % name.encode()
            if text.count(key) > 1 + payload.count(key) + metadata.count(key):
                raise duplicate_field(name)
        raise duplicate_field()
