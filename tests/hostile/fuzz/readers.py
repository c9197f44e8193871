"""How each kind of bytes is read, by everything of ours that reads it, and what must then hold."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from cluster.config import parse_file
from contracts.errors import FiError, InvalidEventError
from contracts.events import Event, decode_event, encode_event, event_to_dict
from contracts.evidence import check_evidence, decode_evidence
from contracts.flush import decode_flush, encode_flush
from contracts.frames import Frame, decode_frame, decode_frame_head, decode_packed_frame, encode_frame
from contracts.letters import parse_first_seen, read_letter
from contracts.membership import decode_member, decode_pause, shares
from contracts.policy import EVENT_TYPES
from contracts.receipts import decode_receipt, decode_seal, encode_receipt
from contracts.rules import decode_policy, encode_policy
from contracts.settings import load_settings
from contracts.statements import check_signature, statement_of
from contracts.telemetry import DEAD_SUBJECT, HEADER_FIRST_SEEN, HEADER_TRACEPARENT
from stages.hash.core import HashCore
from stages.ingest.core import IngestCore
from stages.persist.core import plan_group
from stages.persist.header import decode_header
from stages.runtime.checkpoint import cursor_from_receipt, read_frame
from stages.runtime.headers import parse_headers
from stages.runtime.messages import StoredMessage
from stages.segment.core import SegmentCore

CONSULTATION = "0a1b2c3d-4e5f-4a6b-8c7d-9e0f1a2b3c4d"
SITE = "clinic-1"
RAW_SUBJECT = f"fi.raw.5.{SITE}.{CONSULTATION}"
ORIGIN = 41
STORED_NS = 1_700_000_000_123_456_789
NOW_NS = 1_700_000_000_200_000_000
PARTITION = 5
DETAIL_CHARS_MAX = 4001
"""No refusal is longer: it goes to a log or a terminal."""


def refusal(error: FiError, parts: int = 1) -> str:
    """The kind of a refusal, which must say why and not at length. `parts`: how many things it may speak of."""
    text = str(error)
    assert text.strip(), "refused without a reason"
    assert len(text) <= DETAIL_CHARS_MAX * parts, f"a reason of {len(text)} characters"
    return type(error).__name__


def ingest_message(body: bytes, headers: dict[str, str] | None = None, subject: str = RAW_SUBJECT) -> StoredMessage:
    """A gateway's message as `FI_EVENTS` holds it."""
    return StoredMessage(subject, ORIGIN, STORED_NS, body, headers or {})


def read_body(body: bytes) -> str:
    """Ingest, and every stage after it on what ingest let pass."""
    return _through_all_stages(ingest_message(body))


def read_gateway_headers(data: bytes) -> str:
    """A gateway's header block, under a subject of its making, around a body that is fine."""
    site, _, block = data.partition(b"\n")
    tokens = site.decode(errors="replace").replace(".", "_").replace(" ", "_") or "_"
    body = json.dumps({"consultation_id": CONSULTATION, "event_type": "CONTEXT_UPDATED", "payload": {}}).encode()
    body = body[:-1] + b',"metadata":{"user_id":"u","session_id":"s"}}'
    subject = f"fi.raw.5.{tokens}.{CONSULTATION}"
    headers = parse_headers(block)
    seen = [name for name in (HEADER_TRACEPARENT, HEADER_FIRST_SEEN) if name in headers]
    parsed = parse_first_seen(headers.get(HEADER_FIRST_SEEN, ""))
    return f"{_through_all_stages(ingest_message(body, headers, subject))} {seen} {parsed is not None}"


def _through_all_stages(message: StoredMessage) -> str:
    ingest = IngestCore()
    ingest.open(b"")
    step = ingest.step(message, ORIGIN - 1, NOW_NS)
    assert step is not None
    assert (step.first, step.last) == (ORIGIN, ORIGIN)
    places = sorted([event.index for event in step.events] + [letter.index for letter in step.letters])
    assert places == list(range(len(places)))
    assert places, "a message became nothing at all"
    for letter in step.letters:
        _check_refusal(message.data, letter.error, letter.data)
    for event in step.events:
        _check_accepted(message.data, event)
    frame = Frame(PARTITION, ORIGIN - 1, ORIGIN, ORIGIN, (), "w", NOW_NS, b"", tuple(step.dead), tuple(step.events))
    hop = StoredMessage(f"fi.segment.{PARTITION}", 1, NOW_NS, encode_frame(frame), {})
    segment, hashed = SegmentCore(), HashCore()
    second = segment.step(hop, ORIGIN - 1, NOW_NS)
    assert second is not None
    refused = [letter.error.reason for letter in second.letters]
    frame = msgspec.structs.replace(
        frame, trail=(1,), closed=second.closed, dead=tuple(second.dead), events=tuple(second.events)
    )
    third = hashed.step(
        msgspec.structs.replace(hop, subject=f"fi.hash.{PARTITION}", data=encode_frame(frame)), ORIGIN - 1, NOW_NS
    )
    assert third is not None
    assert not third.letters, "ingest let something pass that cannot be hashed"
    for event in third.events:
        defined = json.dumps(json.loads(event.payload), sort_keys=True, ensure_ascii=False)
        assert event.audit_hash == sha256(defined.encode()).digest()
        msgspec.json.encode(event_to_dict(event, partition=PARTITION))
    reasons = sorted({letter.error.reason for letter in step.letters})
    return f"{len(step.events)} events, {len(step.letters)} refused {reasons}, segment refused {sorted(set(refused))}"


def _check_accepted(body: bytes, event: Event) -> None:
    assert event.payload in body, "the payload is not the gateway's own bytes"
    assert decode_event(encode_event(event)) == event
    value = strict_json(event.payload)
    assert isinstance(value, dict)
    assert isinstance(strict_json(event.metadata), dict)
    assert event.event_type in EVENT_TYPES
    assert event.consultation_id == UUID(CONSULTATION).bytes


def _check_refusal(body: bytes, error: InvalidEventError, raw: bytes | None) -> None:
    assert raw is not None
    assert raw in body
    for text in (error.reason, error.field, error.detail):
        assert text.isascii(), f"{text!r} may break a header"
        assert text.isprintable(), f"{text!r} may break a terminal"
    assert error.reason
    assert error.detail
    assert len(error.detail) <= InvalidEventError.DETAIL_CHARS_MAX
    # Python's reader does not see half a surrogate pair in a value that a later one of the same name hides.
    if error.reason == "json.malformed" and b"\\ud" not in raw.lower():
        try:
            strict_json(raw.strip(b" \t\r\n"))
        except (ValueError, RecursionError):
            return
        raise AssertionError(f"refused as no JSON, which it is: {error}")


def strict_json(text: bytes) -> Any:
    """JSON by Python's own reader, without what it takes beyond the standard. Raises `ValueError`."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    value = json.loads(text.decode(), parse_constant=refuse)
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    return value


def read_hop(data: bytes) -> str:
    """A hop's message, by every stage that reads frames."""
    message = StoredMessage(f"fi.segment.{PARTITION}", 9, NOW_NS, data, {})
    words = []
    for name, use in (
        ("head", lambda: str(read_frame(message, decode_frame_head).last > 0)),
        ("whole", lambda: str(len(read_frame(message, decode_frame).events))),
        ("packed", lambda: str(len(read_frame(message, decode_packed_frame).events))),
        ("segment", lambda: _step_of(SegmentCore(), message)),
        ("hash", lambda: _step_of(HashCore(), message)),
        ("persist", lambda: _group_of(message)),
    ):
        try:
            words.append(f"{name} {use()}")
        except FiError as error:
            words.append(f"{name} {refusal(error)}")
    return ", ".join(words)


def _step_of(core: SegmentCore | HashCore, message: StoredMessage) -> str:
    core.open(decode_frame_head(message.data).closed)
    step = core.step(message, read_frame(message, decode_frame_head).prev, NOW_NS)
    assert step is not None
    frame = Frame(
        PARTITION,
        step.first - 1,
        step.first,
        step.last,
        step.trail[-2:],
        "w",
        NOW_NS,
        step.closed,
        tuple(step.dead),
        tuple(step.events),
    )
    decode_frame(encode_frame(frame))
    return f"{len(step.events)}+{len(step.letters)}"


def _group_of(message: StoredMessage) -> str:
    group = plan_group(
        [message], read_frame(message, decode_frame_head).prev, lambda ids: [False for event_id in ids if event_id]
    )
    assert group is not None
    assert all(len(event_id) == 16 for event_id in group.ids)
    return f"{len(group.records)}+{group.dead_lettered}"


def read_receipt(data: bytes) -> str:
    """The last message of a partition's receipts, by whoever goes on from it."""
    receipt = decode_receipt(data)
    for stage in ("ingest", "segment", "hash", "persist"):
        cursor_from_receipt(receipt, stage)  # type: ignore[arg-type]
    SegmentCore().open(receipt.closed)
    _check_signed(receipt)
    assert decode_receipt(encode_receipt(receipt)) == receipt
    return f"receipt, takeover {receipt.takeover}, {len(receipt.ends)} stores"


def read_seal(data: bytes) -> str:
    """A seal record, by whoever audits it."""
    record = decode_seal(data)
    _check_signed(record)
    assert decode_seal(encode_receipt(record)) == record
    return "seal"


def _check_signed(record: Any) -> None:
    if record.signature is not msgspec.UNSET:
        check_signature(statement_of(record), record.signature)


def read_member(data: bytes) -> str:
    """An announcement, and the shares that follow from it."""
    member = decode_member(data)
    found = shares({"a": member, "b": msgspec.structs.replace(member, pinned=None)}, 4, {0: "st"})
    return f"{member.stage} draining {member.draining}, {len(found)} of 4 given"


def read_pause_key(data: bytes) -> str:
    """What stands under a pause key."""
    return f"paused, when is known: {decode_pause(data).since_ns != 0}"


def read_policy(data: bytes) -> str:
    """What stands under a policy's key, and segment's work by it."""
    policy = decode_policy(data, 2)
    assert decode_policy(encode_policy(policy), 2) == policy
    core = SegmentCore(lambda: policy)
    core.begin()
    return f"policy that refuses {len(policy.rules.refused_types)} types"


def read_flush(data: bytes) -> str:
    """What stands under a flush key."""
    flush = decode_flush(data)
    assert decode_flush(encode_flush(flush)) == flush
    return f"flush of {len(flush.targets)} partitions"


def read_dead_letter(data: bytes) -> str:
    """A message of `FI_DLQ`: header block, a line with nothing but ``--``, data."""
    block, _, body = data.partition(b"--\r\n")
    letter = read_letter("fi.dlq.ingest.5", 1, NOW_NS, body, parse_headers(block))
    given = [name for name in ("origin", "index", "partition") if getattr(letter, name) >= 0]
    return f"{given}, subject {bool(letter.site)}, handled {letter.handled}, {DEAD_SUBJECT in parse_headers(block)}"


def read_shard_header(data: bytes) -> str:
    """The first bytes of a shard."""
    return type(decode_header(data.ljust(8191) + b"\n", Path("p005-00000001.live.h5"))).__name__


def read_proof(data: bytes) -> str:
    """A proof that somebody shows."""
    check_evidence(decode_evidence(data))
    return "holds"


def read_settings_file(data: bytes) -> str:
    """A settings file."""
    load_settings({}, file=parse_file(data, "fi.toml"))
    return "settings"


def read_settings_text(data: bytes) -> str:
    """NAME=VALUE lines, as environment and as ``--set``."""
    pairs = {
        name.decode("utf-8", "surrogateescape"): value.decode("utf-8", "surrogateescape")
        for name, _, value in (line.partition(b"=") for line in data.split(b"\n") if line)
    }
    words = []
    for use in (lambda: load_settings(pairs), lambda: load_settings({}, pairs)):
        try:
            use()
            words.append("settings")
        except FiError as error:
            words.append(refusal(error, max(1, len(pairs))))
    return ", ".join(words)
