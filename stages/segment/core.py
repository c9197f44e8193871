"""Segment's work: classify, check payload rules, and hold the append-only order of a consultation's life.

Lifecycle rule: once a consultation is committed, an event of a clinical type that says it *happened* after the commit
is refused until a reset. Late or repeated events that happened before it pass: an outage at a gateway must not lose
them. The rule needs memory, and a stage keeps none but its output, so each frame carries the memory (`closed`): the
last committed consultations with their commit times, oldest first, bounded by the policy. Receipts carry it on.
"""

from __future__ import annotations

from typing import Any

import msgspec

from contracts.errors import InvalidEventError
from contracts.events import Event
from contracts.lifecycle import ClosedConsultations
from contracts.policy import (
    CLOSED_TO,
    CRITICALITIES,
    DEFAULT_POLICY,
    EVENT_TYPES,
    GROUPS,
    PAYLOAD_RULES,
    Policy,
)
from contracts.subjects import Stage
from stages.runtime.api import StoredMessage
from stages.runtime.work import Step, step_frame

CLASSIFICATION = {
    name: (GROUPS.index(group), CRITICALITIES.index(criticality)) for name, (group, criticality) in EVENT_TYPES.items()
}


class SegmentCore:
    """See the module's text. `policy` is the one in force."""

    stage: Stage = "segment"

    def __init__(self, policy: Policy = DEFAULT_POLICY) -> None:
        self._policy = policy
        self._closed = ClosedConsultations(b"", policy.closed_remembered)

    def open(self, closed: bytes) -> None:
        """Takes up the committed consultations stored with the last frame."""
        self._closed = ClosedConsultations(closed, self._policy.closed_remembered)

    def step(self, message: StoredMessage, origin: int, now_ns: int) -> Step | None:
        """Classifies and checks the events of one frame after `origin`. See `StageCore.step`."""
        step = step_frame(message, origin, lambda event: self._pass(event, now_ns))
        return None if step is None else step._replace(closed=self._closed.packed)

    def _pass(self, event: Event, now_ns: int) -> Event:
        policy = self._policy
        if len(event.payload) > policy.payload_bytes_max:
            raise InvalidEventError(
                "payload.too_large",
                "payload",
                f"{len(event.payload)} bytes; the policy allows {policy.payload_bytes_max}",
            )
        rule = PAYLOAD_RULES.get(event.event_type)
        if rule is not None and policy.check_payload:
            payload: dict[str, Any] = msgspec.json.decode(event.payload)
            rule(payload)
        if policy.check_lifecycle:
            self._check_lifecycle(event)
        group, criticality = CLASSIFICATION[event.event_type]
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
        self._closed.note(event)
