"""What was sent: an endless stream of messages, the same for the same seed, and what must be stored of it."""

from __future__ import annotations

import json
import random
from typing import NamedTuple

from contracts.events import Event, encode_event
from contracts.hashing import audit_hash

NOW_NS = 1_700_000_000_000_000_000
_TYPES = ("MESSAGE_RECEIVED", "SOAP_SECTION_COMPLETED", "URGENCY_CLASSIFIED")
_SITES = ("hospital-norte", "clinic_7")
_REPEATED = 0.06
_REFUSED = 0.04
_LARGE = 0.02


class Message(NamedTuple):
    """One message: its events' records and ids (16 bytes), and how many events of it an earlier stage refused."""

    records: list[bytes]
    ids: list[bytes]
    refused: int


class Totals(NamedTuple):
    """What the messages up to one origin come to, in events."""

    stored: int
    duplicates: int
    refused: int


class Source:
    """Messages by origin, from 1.

    Attributes:
        records: what must be stored, in order, of the messages made so far: the first event with each id.
    """

    def __init__(self, seed: str) -> None:
        self._rng = random.Random(seed)
        self._messages: list[Message] = []
        self._totals = [Totals(0, 0, 0)]
        self._ids: list[bytes] = []
        self.records: list[bytes] = []

    def message(self, origin: int) -> Message:
        """The message that the events stream holds at sequence `origin`."""
        while len(self._messages) < origin:
            self._make()
        return self._messages[origin - 1]

    def totals(self, origin: int) -> Totals:
        """What must have become of the events up to `origin`, inclusive."""
        if origin:
            self.message(origin)
        return self._totals[origin]

    def stored(self, origin: int) -> list[bytes]:
        """The records that must be stored, in order, of the messages up to `origin`, inclusive."""
        return self.records[: self.totals(origin).stored]

    def _make(self) -> None:
        rng, origin = self._rng, len(self._messages) + 1
        message = Message([], [], int(rng.random() < _REFUSED))
        duplicates = 0
        for index in range(rng.choice((1, 1, 1, 1, 2, 5))):
            repeated = bool(self._ids) and rng.random() < _REPEATED
            event_id = rng.choice(self._ids) if repeated else rng.randbytes(16)
            record = encode_event(self._event(origin, index, event_id))
            message.records.append(record)
            message.ids.append(event_id)
            if repeated:
                duplicates += 1
            else:
                self._ids.append(event_id)
                self.records.append(record)
        self._messages.append(message)
        before = self._totals[-1]
        self._totals.append(Totals(len(self.records), before.duplicates + duplicates, before.refused + message.refused))

    def _event(self, origin: int, index: int, event_id: bytes) -> Event:
        rng = self._rng
        size = rng.randint(8_000, 20_000) if rng.random() < _LARGE else rng.randint(0, 400)
        payload = {"message_content": "¿Cómo está? 你好 " + rng.randbytes(size // 2).hex(), "score": rng.random()}
        return Event(
            origin=origin,
            index=index,
            event_id=event_id,
            consultation_id=rng.randbytes(16),
            site=rng.choice(_SITES),
            event_type=rng.choice(_TYPES),
            timestamp_ns=NOW_NS + origin * 1_000,
            stamped=True,
            payload=json.dumps(payload).encode(),
            metadata=b'{"user_id":"u","session_id":"s"}',
            accepted_ns=NOW_NS,
            group=0,
            criticality=0,
            policy_version=1,
            audit_hash=audit_hash(payload),
        )
