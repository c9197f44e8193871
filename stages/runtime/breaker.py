"""The breaker that keeps a stage from dead-lettering nearly everything, as after a bad deploy. Pure: no clock, no I/O.

One for each process, shared by its lanes: what a process decides wrongly it decides wrongly in every lane, while the
bad events of one gateway are a small share of them all. Open, every lane holds: it neither buries nor publishes, and
its input waits in the stream. After a pause each lane may try with one message. One that passes closes the breaker; one
that is refused opens it again, for longer. There is no permit to try, so none can be lost with a lane that ends.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from contracts.settings import Settings
from stages.runtime.work import DeadLetter

WINDOW_TO_MIN: Final = 5
"""The window holds this many times `dead_events_min` events."""
MESSAGE_SHARE: Final = 10
"""A message's refused events count as a tenth of `dead_events_min` at most: it takes ten bad messages to open."""
DOUBLINGS_MAX: Final = 4
REASONS_SHOWN_MAX: Final = 3
_NO_REASONS: Final[Counter[str]] = Counter()


class _Decided(NamedTuple):
    """What one frame adds to the window."""

    passed: int
    refused: int
    reasons: Counter[str]

    @property
    def events(self) -> int:
        return self.passed + self.refused


class Breaker:
    """Decides whether what a process is about to dead-letter may go out.

    Attributes:
        trips: how often it opened after having been closed.
    """

    def __init__(self, settings: Settings) -> None:
        """`dead_share_max`, `dead_events_min` and `breaker_pause_s` of `settings` count; a share of 1 never opens."""
        self._share_max = settings.dead_share_max
        self._events_min = settings.dead_events_min
        self._pause_s = settings.breaker_pause_s
        self._window: deque[_Decided] = deque()
        self._events = self._refused = 0
        self._open_until_s: float | None = None
        self._tries = 0
        self.trips = 0

    @property
    def is_open(self) -> bool:
        """True from the moment it opens until a message has passed: lanes then try with one message at a time."""
        return self._open_until_s is not None

    def hold_s(self, now_s: float) -> float:
        """How long a lane has to wait before it may try; 0 when it need not. `now_s` is of a clock that never steps."""
        return 0.0 if self._open_until_s is None else max(0.0, self._open_until_s - now_s)

    def retry_now(self) -> None:
        """What decides has changed: lanes may try at once, and in vain it holds as long as at first."""
        if self._open_until_s is not None:
            self._open_until_s = 0.0
            self._tries = -1

    def allows(self, passed: int, letters: Sequence[DeadLetter], now_s: float) -> bool:
        """Judges what a lane is about to publish; False: it must hold all of it and work on it again later.

        Args:
            passed: events that the stage let through.
            letters: those that it refused itself.
            now_s: as for `hold_s`.
        """
        if self._open_until_s is None:
            return self._judge_window(passed, letters, now_s)
        if now_s < self._open_until_s:
            # It was in hand when another lane opened the breaker.
            return False
        if not passed and not letters:
            return True
        refused = sum(letter.lines for letter in letters)
        if refused > self._share_max * (passed + refused):
            self._tries += 1
            self._open(now_s)
            return False
        self._open_until_s = None
        self._tries = 0
        self._window.clear()
        self._events = self._refused = 0
        return True

    def _judge_window(self, passed: int, letters: Sequence[DeadLetter], now_s: float) -> bool:
        self._add(passed, letters)
        if not letters or self._events < self._events_min or self._refused <= self._share_max * self._events:
            return True
        self.trips += 1
        self._open(now_s)
        return False

    def _add(self, passed: int, letters: Sequence[DeadLetter]) -> None:
        if not passed and not letters:
            return
        decided = _Decided(passed, 0, _NO_REASONS)
        if letters:
            most = max(1, self._events_min // MESSAGE_SHARE)
            by_message: Counter[int] = Counter()
            for letter in letters:
                by_message[letter.origin] += letter.lines
            refused = sum(min(count, most) for count in by_message.values())
            decided = _Decided(passed, refused, Counter(letter.error.reason for letter in letters))
        self._window.append(decided)
        self._events += decided.events
        self._refused += decided.refused
        while self._events - self._window[0].events >= WINDOW_TO_MIN * self._events_min:
            oldest = self._window.popleft()
            self._events -= oldest.events
            self._refused -= oldest.refused

    def _open(self, now_s: float) -> None:
        self._open_until_s = now_s + self._pause_s * 2 ** min(self._tries, DOUBLINGS_MAX)

    def explain(self, letters: Sequence[DeadLetter]) -> str:
        """Why it opened: the commonest reasons, and an example out of `letters`."""
        reasons: Counter[str] = sum((entry.reasons for entry in self._window), Counter())
        commonest = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(REASONS_SHOWN_MAX))
        example = f"; for example {letters[0].error}" if letters else ""
        return f"{self._refused} of the last {self._events} events would be dead letters ({commonest}){example}"
