"""What a verdict is made of."""

from __future__ import annotations

import msgspec


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is not well.

    Attributes:
        urgency: 1 stops all events, 2 some, 3 makes them late, 4 refuses some, 5 stops nothing yet.
        kind: a fixed name, for programs.
        what: the problem, in words.
        next: what to do; may hold a command in backquotes.
    """

    urgency: int
    kind: str
    what: str
    next: str

    @property
    def text(self) -> str:
        """All of it."""
        return f"{self.what} -> {self.next}"
