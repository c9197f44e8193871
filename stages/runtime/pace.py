"""How far apart a lane's frames are begun, as the rate of its input says. Pure: it is told the time."""

from __future__ import annotations

import math
from typing import Final

COMPANY_MIN: Final = 3.0
"""Messages that a frame must be expected to gather: for fewer, waiting costs more than it saves."""
FADE_HZ: Final = 16.0
"""How fast what came in is forgotten: after a sixteenth of a second it counts for a third.

Slower, and what comes seldom waits for company that stopped coming: at a quarter of a second a whole second after a
load of 15,000 a second.
"""


class Pace:
    """The rate at which messages came in, and when the last frame was begun."""

    def __init__(self) -> None:
        self._begun_s = -math.inf
        self._level = 0.0

    def wait_s(self, now_s: float, gap_s: float) -> float:
        """Seconds until the next frame should begin; 0 for now.

        Args:
            now_s: of a clock that never steps.
            gap_s: between the beginnings of two frames, where messages come close enough.
        """
        if self._rate(now_s) * gap_s < COMPANY_MIN:
            return 0.0
        return max(0.0, self._begun_s + gap_s - now_s)

    def begin(self, now_s: float, messages: int) -> None:
        """A frame of so many messages begins."""
        self._level = self._rate(now_s) / FADE_HZ + messages
        self._begun_s = now_s

    def _rate(self, now_s: float) -> float:
        """Messages a second: each counts the less the longer ago it came."""
        return self._level * FADE_HZ * math.exp((self._begun_s - now_s) * FADE_HZ)
