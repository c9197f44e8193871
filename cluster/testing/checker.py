"""Was every event kept, once, whole and in order? Judged from what was sent and what is stored, and nothing else.

Pure, and separate from any workload. A publish whose outcome is not known may or may not have happened: stored it is
*recovered*, not stored it is *unknown*; neither is a fault. Acknowledged, but not stored nor dead-lettered, is *lost*.
The audit hash is computed here once more, from its definition, so that a mistake in `contracts.hashing` shows.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import msgspec

from contracts.events import Event
from contracts.wire import UNREADABLE

FAULTS = ("lost", "duplicated", "reordered", "altered", "unexpected")
"""The findings that convict."""


def defined_hash(payload: bytes) -> bytes:
    """The audit hash of a payload given as JSON, as DESIGN defines it, 32 bytes. Raises `ValueError` if not JSON."""
    canonical = json.dumps(json.loads(payload), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).digest()


class _Named(msgspec.Struct):
    event_id: str


def event_id_of(data: bytes) -> bytes:
    """The id in an event's JSON, 16 bytes; empty when there is none. Dead letters hold whatever somebody sent."""
    try:
        return UUID(msgspec.json.decode(data, type=_Named).event_id).bytes
    except (*UNREADABLE, ValueError):
        return b""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One event that a gateway sent, perhaps several times.

    Attributes:
        event_id, consultation_id: 16 bytes.
        place: position in the order of sending within the consultation; grows.
        audit_hash: by the definition, over the payload as it was sent (`defined_hash`).
        acknowledged: some try of it was accepted.
    """

    event_id: bytes
    consultation_id: bytes
    place: int
    audit_hash: bytes
    acknowledged: bool = True


@dataclass(slots=True)
class Findings:
    """What is to be said of one consultation: event ids by kind, each in the order they were met.

    Attributes:
        lost: acknowledged, and neither stored nor dead-lettered.
        recovered: of unknown outcome, and stored.
        unknown: of unknown outcome, and not stored.
        duplicated: stored or dead-lettered more than once, or both stored and dead-lettered.
        reordered: stored after an event that was sent later.
        altered: stored in another consultation, with another payload, or under a hash that is not its own.
        unexpected: stored or dead-lettered, and never sent.
        counter_example: the first fault, in words; empty without faults.
    """

    lost: list[bytes] = field(default_factory=list)
    recovered: list[bytes] = field(default_factory=list)
    unknown: list[bytes] = field(default_factory=list)
    duplicated: list[bytes] = field(default_factory=list)
    reordered: list[bytes] = field(default_factory=list)
    altered: list[bytes] = field(default_factory=list)
    unexpected: list[bytes] = field(default_factory=list)
    counter_example: str = ""

    def accuse(self, kind: str, event_id: bytes, words: str) -> None:
        """Adds a fault once, and its words if they are the first."""
        found: list[bytes] = getattr(self, kind)
        if event_id not in found:
            found.append(event_id)
        self.counter_example = self.counter_example or words


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `check` found.

    Attributes:
        attempted, acknowledged, stored, dead_lettered: how many events.
        consultations: consultation id → its findings, where there are any.
    """

    attempted: int
    acknowledged: int
    stored: int
    dead_lettered: int
    consultations: Mapping[bytes, Findings]

    def all(self, kind: str) -> frozenset[bytes]:
        """The event ids found to be of one kind (an attribute of `Findings`), over all consultations."""
        return frozenset(event_id for found in self.consultations.values() for event_id in getattr(found, kind))

    @property
    def ok(self) -> bool:
        """Nothing was lost, doubled, reordered, altered or made up."""
        return not any(self.all(kind) for kind in FAULTS)

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.all(kind))} {kind}" for kind in (*FAULTS, "recovered", "unknown"))
        words = [found.counter_example for found in self.consultations.values() if found.counter_example]
        head = f"{self.acknowledged} of {self.attempted} acknowledged, {self.stored} stored, {self.dead_lettered} dead"
        return "; ".join((head, counts, *words[:5]))


def check(attempts: Sequence[Attempt], stored: Iterable[Event], dead: Iterable[bytes] = ()) -> Verdict:
    """Holds what is stored against what was sent.

    Args:
        attempts: every event that was sent, each once.
        stored: what is read back, in the order of storing.
        dead: ids of the events in the dead letters, one for each letter.

    Raises:
        ValueError: an event is among the attempts twice.
    """
    sent = {attempt.event_id: attempt for attempt in attempts}
    if len(sent) != len(attempts):
        raise ValueError("an event was given as two attempts; join them into one")
    findings: defaultdict[bytes, Findings] = defaultdict(Findings)
    kept = _check_stored(sent, stored, findings)
    buried = _check_dead(sent, dead, kept, findings)
    for attempt in attempts:
        event_id = attempt.event_id
        found = findings[attempt.consultation_id]
        if event_id in kept:
            if not attempt.acknowledged:
                found.recovered.append(event_id)
        elif event_id not in buried:
            if attempt.acknowledged:
                found.accuse("lost", event_id, f"{_name(attempt)} was acknowledged and is nowhere")
            else:
                found.unknown.append(event_id)
    return Verdict(
        attempted=len(attempts),
        acknowledged=sum(attempt.acknowledged for attempt in attempts),
        stored=sum(kept.values()),
        dead_lettered=sum(buried.values()),
        consultations={key: found for key, found in findings.items() if found != Findings()},
    )


def _check_stored(
    sent: Mapping[bytes, Attempt], stored: Iterable[Event], findings: Mapping[bytes, Findings]
) -> dict[bytes, int]:
    """Judges each stored event; gives how often each id is stored."""
    kept: dict[bytes, int] = {}
    latest: dict[bytes, Attempt] = {}
    for event in stored:
        event_id = event.event_id
        kept[event_id] = kept.get(event_id, 0) + 1
        attempt = sent.get(event_id)
        if attempt is None:
            words = f"event {UUID(bytes=event_id)} is stored at origin {event.origin} and was never sent"
            findings[event.consultation_id].accuse("unexpected", event_id, words)
            continue
        found = findings[attempt.consultation_id]
        if words := _difference(attempt, event):
            found.accuse("altered", event_id, f"{_name(attempt)} {words} (origin {event.origin})")
        if kept[event_id] > 1:
            found.accuse("duplicated", event_id, f"{_name(attempt)} is stored again at origin {event.origin}")
            continue
        before = latest.get(attempt.consultation_id)
        if before is not None and attempt.place < before.place:
            words = f"{_name(attempt)} is stored after {_name(before)}, which was sent later"
            found.accuse("reordered", event_id, words)
        else:
            latest[attempt.consultation_id] = attempt
    return kept


def _check_dead(
    sent: Mapping[bytes, Attempt], dead: Iterable[bytes], kept: Mapping[bytes, int], findings: Mapping[bytes, Findings]
) -> dict[bytes, int]:
    buried: dict[bytes, int] = {}
    for event_id in dead:
        buried[event_id] = buried.get(event_id, 0) + 1
        attempt = sent.get(event_id)
        if attempt is None:
            words = f"event {UUID(bytes=event_id)} is dead-lettered and was never sent"
            findings[b""].accuse("unexpected", event_id, words)
        elif event_id in kept or buried[event_id] > 1:
            how = "both stored and dead-lettered" if event_id in kept else "dead-lettered twice"
            findings[attempt.consultation_id].accuse("duplicated", event_id, f"{_name(attempt)} is {how}")
    return buried


def _difference(attempt: Attempt, event: Event) -> str:
    if event.consultation_id != attempt.consultation_id:
        return f"is stored in consultation {UUID(bytes=event.consultation_id)}"
    if event.audit_hash != attempt.audit_hash:
        return f"is stored with audit hash {event.audit_hash.hex()[:16]}…, not {attempt.audit_hash.hex()[:16]}…"
    try:
        own = defined_hash(event.payload)
    except ValueError:
        return "is stored with a payload that is not JSON"
    return "" if own == attempt.audit_hash else "is stored with another payload than its audit hash says"


def _name(attempt: Attempt) -> str:
    consultation = UUID(bytes=attempt.consultation_id)
    return f"event {UUID(bytes=attempt.event_id)} (number {attempt.place} of consultation {consultation})"
