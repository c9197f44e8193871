"""Segment's work: classify, check payload rules, and hold the append-only order of a consultation's life.

Lifecycle rule: once a consultation is committed, an event of a clinical type that says it *happened* after the commit
is refused until a reset. Late or repeated events that happened before it pass: an outage at a gateway must not lose
them. The rule needs memory, and a stage keeps none but its output, so each frame carries the memory (`closed`): the
last committed consultations with their commit times, oldest first, bounded by the policy. Receipts carry it on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from contracts.errors import InvalidEventError, WireFormatError
from contracts.events import Event
from contracts.lifecycle import ClosedConsultations
from contracts.policy import (
    CLOSED_TO,
    CRITICALITIES,
    EVENT_TYPES,
    GROUPS,
    PAYLOAD_RULES,
)
from contracts.rules import CLOSED_REMEMBERED_MAX, DEFAULT_POLICY, Policy, Rules
from contracts.subjects import Stage
from contracts.wire import UNREADABLE
from stages.runtime.messages import StoredMessage
from stages.runtime.work import Step, step_frame

_decode_payload = msgspec.json.Decoder(dict[str, Any]).decode


def classify(rules: Rules) -> dict[str, tuple[int, int]]:
    """Event type → index of its group and of its criticality."""
    return {
        name: (GROUPS.index(group), CRITICALITIES.index(rules.criticality.get(name, criticality)))
        for name, (group, criticality) in EVENT_TYPES.items()
    }


class SegmentCore:
    """See the module's text. `policy` gives the one in force: it is asked once for each frame."""

    stage: Stage = "segment"

    def __init__(self, policy: Callable[[], Policy] = lambda: DEFAULT_POLICY) -> None:
        self._in_force = policy
        self._policy = DEFAULT_POLICY
        self._classes = classify(DEFAULT_POLICY.rules)
        self._closed = ClosedConsultations(b"", CLOSED_REMEMBERED_MAX)

    def open(self, closed: bytes) -> None:
        """Takes up the committed consultations stored with the last frame.

        How many of them count is for the policy to say that the next frame is judged by.
        """
        self._closed = ClosedConsultations(closed, CLOSED_REMEMBERED_MAX)

    def begin(self) -> None:
        """Takes the policy that the next frame is judged by."""
        policy = self._in_force()
        if policy is not self._policy:
            self._policy = policy
            self._classes = classify(policy.rules)

    def step(self, message: StoredMessage, origin: int, now_ns: int) -> Step | None:
        """Classifies and checks the events of one frame after `origin`. See `StageCore.step`."""
        self._closed.limit(self._policy.rules.closed_remembered)
        step = step_frame(message, origin, lambda event: self._pass(event, now_ns), self._policy.version)
        return None if step is None else msgspec.structs.replace(step, closed=self._closed.packed)

    def _pass(self, event: Event, now_ns: int) -> Event:
        policy, rules = self._policy, self._policy.rules
        if event.event_type not in EVENT_TYPES:
            raise WireFormatError(f"event type {event.event_type!r} is not known to this build; run a later one")
        if event.event_type in rules.refused_types:
            raise InvalidEventError(
                "event_type.refused", "event_type", f"policy {policy.version} refuses {event.event_type}"
            )
        if len(event.payload) > rules.payload_bytes_max:
            raise InvalidEventError(
                "payload.too_large",
                "payload",
                f"{len(event.payload)} bytes; policy {policy.version} allows {rules.payload_bytes_max}",
            )
        rule = PAYLOAD_RULES.get(event.event_type)
        if rule is not None and rules.check_payload:
            rule(_payload(event))
        if rules.check_lifecycle:
            self._check_lifecycle(event)
        # Also when the rule is off: it may be on again while the consultation is remembered.
        self._closed.note(event)
        group, criticality = self._classes[event.event_type]
        return msgspec.structs.replace(
            event, segment_ns=now_ns, group=group, criticality=criticality, policy_version=policy.version
        )

    def _check_lifecycle(self, event: Event) -> None:
        kind = event.event_type
        committed_ns = self._closed.committed_ns(event.consultation_id)
        if committed_ns is not None and kind in CLOSED_TO and event.stamped and event.timestamp_ns > committed_ns:
            raise InvalidEventError(
                "lifecycle.closed",
                "event_type",
                f"{kind} happened after the consultation was committed, and it was not reset since",
            )


def _payload(event: Event) -> dict[str, Any]:
    """The decoded payload. Ingest refuses what is no JSON object; this is the second line."""
    try:
        return _decode_payload(event.payload)
    except UNREADABLE as error:
        raise InvalidEventError("payload.malformed", "payload", f"is not a JSON object: {error}") from error
