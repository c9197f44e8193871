"""What is done to an event, whoever carries it: the stages' own functions, one event at a time. Pure.

Left out, in the baselines' favour: the lifecycle rule, duplicates, the Merkle tree and dead letters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from benchmarks.storage.samples import CLASSIFICATION, Sample
from contracts.events import decode_event, encode_event, event_to_dict
from contracts.policy import PAYLOAD_RULES
from contracts.rules import DEFAULT_POLICY
from stages.hash.core import payload_hash
from stages.ingest.core import parse_message

Work = Callable[[bytes, int], bytes]
"""(an encoded event, the time now in ns) → the encoded event after a stage."""


def ingest(body: bytes, site: str, consultation: str, origin: int, now_ns: int) -> bytes:
    """A gateway's message of one event → the encoded event. Raises `InvalidEventError`."""
    parsed = parse_message(
        body,
        subject_site=site,
        subject_consultation=consultation,
        origin=origin,
        accepted_ns=now_ns,
        traceparent="",
        now_ns=now_ns,
    )
    for rejected in parsed.rejected:
        raise rejected.error
    (event,) = parsed.events
    return encode_event(event)


def segment(record: bytes, now_ns: int) -> bytes:
    """Classifies, and checks the payload rule. Raises `InvalidEventError`."""
    event = decode_event(record)
    rule = PAYLOAD_RULES.get(event.event_type)
    if rule is not None:
        rule(msgspec.json.decode(event.payload, type=dict[str, Any]))
    group, criticality = CLASSIFICATION[event.event_type]
    return encode_event(
        msgspec.structs.replace(
            event, segment_ns=now_ns, group=group, criticality=criticality, policy_version=DEFAULT_POLICY.version
        )
    )


def hashed(record: bytes, now_ns: int) -> bytes:
    """Adds the audit hash."""
    event = decode_event(record)
    return encode_event(msgspec.structs.replace(event, hash_ns=now_ns, audit_hash=payload_hash(event.payload)))


def sample(record: bytes) -> Sample:
    """The event as the classic files store it: a JSON string."""
    event = decode_event(record)
    line = msgspec.json.encode(event_to_dict(event, partition=0))
    return Sample(record, line, event.event_id, event.consultation_id)


def everything(body: bytes, site: str, consultation: str, origin: int, now_ns: int) -> Sample:
    """All stages' work on one message, for designs that do it in one place."""
    return sample(hashed(segment(ingest(body, site, consultation, origin, now_ns), now_ns), now_ns))
