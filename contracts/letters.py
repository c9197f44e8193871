"""Which event a dead letter is of, however often it was replayed.

An event without an id or a time of its own gets both from where it came in. A replay brings it in again at another
place, so it carries the first one along (header ``Fi-First-Seen``): ingest then derives the same id and time as it
would have at first, and persist counts every further copy as a duplicate, however late it comes.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

_TEXT: Final = re.compile(r"(\d{1,19})/(\d{1,19})/(\d{1,9})", re.ASCII)
_INT64_MAX: Final = 2**63 - 1


class FirstSeen(msgspec.Struct, frozen=True):
    """Where an event first came in.

    Attributes:
        origin: sequence in `FI_EVENTS` of the message it came in.
        accepted_ns: when `FI_EVENTS` stored that message.
        index: its position within the message.
    """

    origin: int
    accepted_ns: int
    index: int

    def at(self, index: int) -> FirstSeen:
        """The event `index` places after this one."""
        return msgspec.structs.replace(self, index=self.index + index)

    def __str__(self) -> str:
        return f"{self.origin}/{self.accepted_ns}/{self.index}"


def parse_first_seen(text: str) -> FirstSeen | None:
    """Inverse of ``str(FirstSeen)``; None for anything else. Gateways can send any text."""
    match = _TEXT.fullmatch(text)
    if match is None:
        return None
    origin, accepted_ns, index = map(int, match.groups())
    return FirstSeen(origin, accepted_ns, index) if max(origin, accepted_ns) <= _INT64_MAX else None
