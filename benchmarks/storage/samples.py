"""Events for the storage benchmarks: the real ones of a data set, over and over under new ids, as persist gets them.

Event *n* is the same for the same data set, always. A round is the data set once, all of its consultations under way at
the same time, so that the events of one lie as far apart in a shard as they do on a busy day. The next round has
the same texts under other ids: it compresses no better, because gzip looks back 32 KB and a round is some megabytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import msgspec

from cluster.workload import consultations
from contracts.events import Event, encode_event, format_rfc3339, parse_rfc3339
from contracts.rules import DEFAULT_POLICY
from stages.hash.core import payload_hash
from stages.ingest.core import parse_message
from stages.segment.core import classify

CLASSIFICATION = classify(DEFAULT_POLICY.rules)
DATA_SET = Path(__file__).resolve().parents[3] / "shared" / "data" / "primock57.ndjson"
MADE_UP_EVENTS = 7450

_SEED = 57
_FIRST_NS = parse_rfc3339("2026-01-05T09:00:00Z")
_GAP_NS = 100_000_000
_STAGE_NS = 3_000_000


class Sample(NamedTuple):
    """One event.

    Attributes:
        record: as persist stores it.
        line: as the gateway sent it, JSON.
        event_id, consultation_id: 16 bytes.
    """

    record: bytes
    line: bytes
    event_id: bytes
    consultation_id: bytes


class Samples:
    """See the module's text.

    Attributes:
        source: where the events come from, for people.
        round_events: how many there are before they repeat under new ids.
        consultations: how many a round has.
        line_bytes, payload_bytes: of an event as the gateway sends it, and of its payload; means.
    """

    def __init__(self, data_set: Path | None = None) -> None:
        """`data_set` is NDJSON of gateway events; without it made-up ones are taken."""
        if data_set is None:
            self.source = f"{MADE_UP_EVENTS} made-up events (cluster.workload, seed {_SEED})"
            lines = [msgspec.json.encode(event) for event in consultations(_SEED, MADE_UP_EVENTS)]
        else:
            self.source = data_set.name
            lines = data_set.read_bytes().splitlines()
        templates = [_Template(line) for line in lines]
        self._round = _interleaved(templates)
        self.round_events = len(templates)
        self.consultations = len({template.event.consultation_id for template in templates})
        self.line_bytes = sum(len(line) for line in lines) / len(lines)
        self.payload_bytes = sum(len(template.event.payload) for template in templates) / len(lines)

    def event(self, number: int) -> Sample:
        """Event `number`, counted from 1; its origin is its number."""
        turn, at = divmod(number - 1, self.round_events)
        return self._round[at].make(number, turn)

    def take(self, first: int, count: int) -> Iterator[Sample]:
        """Events `first` to `first + count - 1`."""
        return map(self.event, range(first, first + count))


def _interleaved(templates: list[_Template]) -> list[_Template]:
    """All consultations at the same time, each in its own order."""
    lanes: dict[bytes, list[_Template]] = {}
    for template in templates:
        lanes.setdefault(template.event.consultation_id, []).append(template)
    turns = [template.event.consultation_id for template in templates]
    random.Random(_SEED).shuffle(turns)
    ahead = {consultation_id: iter(lane) for consultation_id, lane in lanes.items()}
    return [next(ahead[consultation_id]) for consultation_id in turns]


class _Template:
    """One event of the data set, after ingest, segment and hash."""

    def __init__(self, line: bytes) -> None:
        raw = msgspec.json.decode(line)
        parsed = parse_message(
            line,
            subject_site=raw["metadata"]["site_id"],
            subject_consultation=raw["consultation_id"],
            origin=1,
            accepted_ns=_FIRST_NS,
            traceparent="",
            now_ns=_FIRST_NS,
        )
        if parsed.rejected:
            raise parsed.rejected[0].error
        event = parsed.events[0]
        group, criticality = CLASSIFICATION[event.event_type]
        self.event = msgspec.structs.replace(
            event,
            group=group,
            criticality=criticality,
            policy_version=DEFAULT_POLICY.version,
            audit_hash=payload_hash(event.payload),
        )
        texts = (raw["event_id"], raw["consultation_id"], raw["timestamp"])
        for place, text in enumerate(texts):
            line = line.replace(text.encode(), b"\0%d\0" % place, 1)
        self._pieces = line.split(b"\0")

    def make(self, number: int, turn: int) -> Sample:
        event = self.event
        event_id, consultation_id = _vary(event.event_id, turn), _vary(event.consultation_id, turn)
        happened_ns = _FIRST_NS + number * _GAP_NS
        record = encode_event(
            Event(
                number,
                event.index,
                event_id,
                consultation_id,
                event.site,
                event.event_type,
                happened_ns,
                True,
                event.payload,
                event.metadata,
                happened_ns + _STAGE_NS,
                event.traceparent,
                happened_ns + 2 * _STAGE_NS,
                happened_ns + 3 * _STAGE_NS,
                happened_ns + 4 * _STAGE_NS,
                event.group,
                event.criticality,
                event.policy_version,
                event.audit_hash,
            )
        )
        texts = (str(UUID(bytes=event_id)), str(UUID(bytes=consultation_id)), format_rfc3339(happened_ns))
        pieces = [texts[int(piece)].encode() if place % 2 else piece for place, piece in enumerate(self._pieces)]
        return Sample(record, b"".join(pieces), event_id, consultation_id)


def _vary(value: bytes, turn: int) -> bytes:
    """16 bytes that differ for each round; the data set's own in the first."""
    return value if turn == 0 else blake2b(value, digest_size=16, salt=turn.to_bytes(16, "little")).digest()
