"""Hash's work: the audit hash of every event's payload."""

from __future__ import annotations

import msgspec

from contracts.errors import InvalidEventError
from contracts.events import NESTING_MAX, Event, is_nested_beyond_reading
from contracts.hashing import INCREMENTAL_BYTES_MIN, audit_hash, audit_hash_incremental
from contracts.subjects import Stage
from stages.runtime.messages import StoredMessage
from stages.runtime.work import Step, step_frame

_decode = msgspec.json.Decoder().decode


def payload_hash(payload: bytes) -> bytes:
    """The audit hash of a payload given as JSON bytes, 32 bytes; incremental for large payloads.

    Raises:
        InvalidEventError: the payload has no canonical form (ingest refuses these; this is the second line).
    """
    # Asked first: some interpreters go deeper than others, and the same event must come out of each in the same way.
    if is_nested_beyond_reading(payload):
        raise InvalidEventError("payload.unhashable", "payload", f"nested deeper than {NESTING_MAX}")
    try:
        value = _decode(payload)
        return audit_hash_incremental(value) if len(payload) > INCREMENTAL_BYTES_MIN else audit_hash(value)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidEventError("payload.unhashable", "payload", f"has no canonical form: {error}") from error


class HashCore:
    """Stateless but for what it hands down."""

    stage: Stage = "hash"

    def open(self, closed: bytes) -> None:
        """Nothing to take up: each frame brings segment's memory along."""

    def begin(self) -> None:
        """Nothing changes while the process runs."""

    def step(self, message: StoredMessage, origin: int, now_ns: int) -> Step | None:
        """Hashes the events of one frame after `origin`. See `StageCore.step`."""
        return step_frame(message, origin, lambda event: _hashed(event, now_ns))


def _hashed(event: Event, now_ns: int) -> Event:
    return msgspec.structs.replace(event, hash_ns=now_ns, audit_hash=payload_hash(event.payload))
