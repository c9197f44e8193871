"""Messages of a chosen size, over a chosen number of consultations, some of them hotter than others."""

from __future__ import annotations

import random
from typing import Final
from uuid import UUID

import msgspec

from benchmarks.load import Message
from cluster.gateway import batch_id

SITES = 5
_TEXT_BYTES = 256 * 1024
"""Payloads are cut out of so much text, more than a compressor looks back."""
_WORDS: Final = """
    the patient reports pain fever cough since yesterday morning no known allergies takes medication for blood pressure
    daily feels better after rest denies nausea sleeps badly history of asthma in the family does not smoke
""".split()  # noqa: SIM905
_TIMESTAMP = "2026-01-05T09:00:00Z"
_WHOLE_BYTES = 300
"""Smaller events do without what is optional."""


def sized_messages(
    seed: int,
    count: int,
    size_bytes: int = 1024,
    consultations: int = 100,
    *,
    batch: int = 1,
    hot_consultation: float = 0.0,
    hot_site: float = 0.0,
) -> list[Message]:
    """`count` messages of `batch` events of `size_bytes` each, the consultations in turn.

    Args:
        seed: decides all of it, ids too.
        count: messages.
        size_bytes: of one event's JSON; at least 205.
        consultations: over which the events are spread.
        batch: events a message.
        hot_consultation: share of the messages that one consultation gets.
        hot_site: share of the consultations that one site gets; the others have the rest in turn.

    Raises:
        ValueError: an event cannot be so small.
    """
    rng = random.Random(seed)
    names = [_uuid(rng) for _ in range(consultations)]
    hot_names = round(consultations * hot_site)
    sites = [f"clinic-{0 if at < hot_names else 1 + at % (SITES - 1)}" for at in range(consultations)]
    text = " ".join(rng.choices(_WORDS, k=(_TEXT_BYTES + size_bytes) // 4)).encode()
    made = []
    debt = 0.0
    for number in range(count):
        debt += hot_consultation
        hot, debt = debt >= 1, debt % 1
        at = 0 if hot else number % consultations
        ids = [_uuid(rng) for _ in range(batch)]
        data = b"\n".join(_event(rng, event_id, names[at], sites[at], size_bytes, text) for event_id in ids)
        made.append(Message(sites[at], names[at], batch_id(ids), data, batch))
    return made


def _event(rng: random.Random, event_id: str, consultation: str, site: str, size_bytes: int, text: bytes) -> bytes:
    metadata = {"user_id": "u", "session_id": "s"}
    event = {
        "event_id": event_id,
        "consultation_id": consultation,
        "event_type": "CONTEXT_UPDATED",
        "payload": {"text": ""},
        "metadata": metadata,
    }
    if size_bytes >= _WHOLE_BYTES:
        event["timestamp"] = _TIMESTAMP
        metadata["site_id"] = site
    empty = msgspec.json.encode(event)
    room = size_bytes - len(empty)
    if room < 0:
        raise ValueError(f"{size_bytes} bytes are too few for an event: {len(empty)} are the least")
    start = rng.randrange(len(text) - room)
    return empty.replace(b'{"text":""}', b'{"text":"%b"}' % text[start : start + room])


def _uuid(rng: random.Random) -> str:
    return str(UUID(int=rng.getrandbits(128), version=4))


def renewed(messages: list[Message], turn: int) -> list[Message]:
    """The same messages under other ids, those of the consultations too: for turn after turn of a long run.

    Each id differs from the one it stands for by `turn` in its last 12 hex digits.
    """
    return [_renewed(message, turn) for message in messages]


def _renewed(message: Message, turn: int) -> Message:
    ids = [_read_ids(line).event_id for line in message.data.split(b"\n")]
    data = message.data
    for old in {message.consultation, *ids}:
        data = data.replace(old.encode(), _shifted(old, turn).encode())
    new_ids = [_shifted(event_id, turn) for event_id in ids]
    return Message(message.site, _shifted(message.consultation, turn), batch_id(new_ids), data, message.events)


class _Ids(msgspec.Struct):
    event_id: str


_read_ids = msgspec.json.Decoder(_Ids).decode


def _shifted(text: str, turn: int) -> str:
    return f"{text[:24]}{(int(text[24:], 16) + turn) % 16**12:012x}"
