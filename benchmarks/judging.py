"""Whether all that a benchmark published is stored, once, in order and unaltered: the checker's word on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from benchmarks.load import Message
from cluster.testing.checker import FAULTS, Attempt, check, defined_hash
from stages.persist.store import EventStore


class _Sent(msgspec.Struct):
    event_id: str
    consultation_id: str
    payload: msgspec.Raw


_decode = msgspec.json.Decoder(_Sent).decode


def judge(messages: Iterable[Message], shards: Path) -> dict[str, Any]:
    """Counts of the checker, of messages that were all accepted, against everything in `shards`: read when settled.

    Raises:
        RuntimeError: something was lost, doubled, reordered or altered.
    """
    places: Counter[str] = Counter()
    attempts = []
    for message in messages:
        for line in message.data.split(b"\n"):
            sent = _decode(line)
            place = places[sent.consultation_id]
            places[sent.consultation_id] += 1
            ids = UUID(sent.event_id).bytes, UUID(sent.consultation_id).bytes
            attempts.append(Attempt(*ids, place, defined_hash(bytes(sent.payload))))
    ours = {attempt.event_id for attempt in attempts}
    with EventStore(shards) as store:
        verdict = check(attempts, [row.event for row in store.iterate() if row.event.event_id in ours])
    if not verdict.ok:
        raise RuntimeError(f"events were harmed: {verdict}")
    return {"accepted": verdict.acknowledged, "stored": verdict.stored, **{k: len(verdict.all(k)) for k in FAULTS}}
