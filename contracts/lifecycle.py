"""Which consultations are committed: the memory that segment hands down with its frames, and that receipts carry on.

A consultation takes no more clinical events that happened after its commit, until it is reset. The memory is bounded:
it holds the last committed ones only, oldest first.
"""

from __future__ import annotations

import struct

from contracts.errors import WireFormatError
from contracts.events import Event

_ROW = struct.Struct(">16sq")


class ClosedConsultations:
    """Consultation id (16 bytes) → when it was committed, nanoseconds since the epoch."""

    def __init__(self, packed: bytes, remembered_max: int) -> None:
        """The memory that `packed` holds; it keeps `remembered_max` consultations at most.

        Raises:
            WireFormatError: `packed` holds something else.
        """
        if len(packed) % _ROW.size:
            raise WireFormatError(f"not committed consultations: {len(packed)} bytes are no rows of {_ROW.size}")
        self._closed: dict[bytes, int] = dict(_ROW.iter_unpack(packed))
        self.packed = packed
        self.limit(remembered_max)

    def limit(self, remembered_max: int) -> None:
        """From now on it keeps so many consultations at most, the last ones."""
        self._remembered_max = remembered_max
        if len(self._closed) > remembered_max:
            self._pack()

    def committed_ns(self, consultation_id: bytes) -> int | None:
        """When the consultation was committed; None when it is open or no longer remembered."""
        return self._closed.get(consultation_id)

    def note(self, event: Event) -> None:
        """Takes an event that passed into account."""
        committed_ns = self._closed.get(event.consultation_id)
        if event.event_type == "CONSULTATION_RESET":
            if committed_ns is None or event.timestamp_ns < committed_ns:
                return
            del self._closed[event.consultation_id]
        elif event.event_type == "CONSULTATION_COMMITTED" and committed_ns is None:
            self._closed[event.consultation_id] = event.timestamp_ns
        else:
            return
        self._pack()

    def _pack(self) -> None:
        while len(self._closed) > self._remembered_max:
            del self._closed[next(iter(self._closed))]
        self.packed = b"".join(_ROW.pack(*row) for row in self._closed.items())
