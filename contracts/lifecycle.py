"""Which consultations are committed: the memory that segment hands down with its frames, and that receipts carry on.

A consultation takes no more clinical events that happened after its commit, until it is reset. A commit that comes
again, or late, does not close again what was reset since. The memory is bounded: it holds the consultations that were
committed or reset last, oldest first.
"""

from __future__ import annotations

import struct

from contracts.errors import WireFormatError
from contracts.events import Event

CLOSING_TYPES = ("CONSULTATION_COMMITTED", "CONSULTATION_RESET")
"""Of events that a consultation is remembered by."""

_ROW = struct.Struct(">16sq")
_ALL_BITS = (1 << 128) - 1


class ClosedConsultations:
    """Consultation id (16 bytes) → when it was committed, nanoseconds since the epoch.

    One that was reset has a row too: under its id with every bit turned, which is no consultation's to builds that do
    not know of such rows, and with the time of the reset.
    """

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
        if event.event_type not in CLOSING_TYPES:
            return
        closed, opened = event.consultation_id, _turned(event.consultation_id)
        committed_ns, reset_ns = self._closed.get(closed), self._closed.get(opened)
        at_ns = event.timestamp_ns
        if event.event_type == "CONSULTATION_RESET":
            since_ns = reset_ns if committed_ns is None else committed_ns
            if since_ns is not None and at_ns < since_ns:
                return
            self._closed.pop(closed, None)
            self._closed[opened] = at_ns
        elif committed_ns is None and (reset_ns is None or at_ns > reset_ns):
            self._closed.pop(opened, None)
            self._closed[closed] = at_ns
        else:
            return
        self._pack()

    def _pack(self) -> None:
        while len(self._closed) > self._remembered_max:
            del self._closed[next(iter(self._closed))]
        self.packed = b"".join(_ROW.pack(*row) for row in self._closed.items())


def _turned(consultation_id: bytes) -> bytes:
    return (int.from_bytes(consultation_id, "big") ^ _ALL_BITS).to_bytes(16, "big")
