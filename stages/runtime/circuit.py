"""The circuit before something that can fail for a while: a stream's leader, a disk. `Circuit` itself does no I/O.

Closed, everybody may try. After `failures_max` failures with no answer between them it is open: nobody tries until a
pause is over. Then it is half-open: one may try. An answer closes it; a failure opens it again, for twice as long.
What counts as an answer is the target's word, also a refusal with a meaning (fenced, stream full): it is there.

It cannot deadlock, because nobody is ever waited for. Whoever may try holds nothing: being let through only moves the
time at which the next one is, by the longest that a try can take. So a trier that is cancelled, killed or lost changes
nothing but that time, and always somebody is let through again after `pause_s_max` or `try_s_max`. What a try tells
counts only if it began after the last answer was heard, and after the last one was let through: a time-out that began
before that knows nothing new.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final, Literal

from stages.runtime.instruments import Counter

CircuitState = Literal["closed", "half-open", "open"]

_DOUBLINGS_MAX: Final = 16


class Circuit:
    """Decides who may try. Times are of a clock that never steps; not for concurrent use.

    Args:
        failures_max: failures in a row that open it.
        pause_s_min, pause_s_max: the first pause, and the longest. Half of each is jitter.
        try_s_max: the longest that a try takes.
        jitter: gives a number in [0, 1).
        trips: counts how often it opened after having been closed.

    Attributes:
        is_open: it was opened, and nothing was answered since.
        why: in words, what the last failure was.
    """

    def __init__(
        self,
        *,
        failures_max: int,
        pause_s_min: float,
        pause_s_max: float,
        try_s_max: float,
        jitter: Callable[[], float],
        trips: Counter,
    ) -> None:
        self._failures_max = failures_max
        self._pause_s_min = pause_s_min
        self._pause_s_max = pause_s_max
        self._try_s_max = try_s_max
        self._jitter = jitter
        self._trips = trips
        self._failures = 0
        self.is_open = False
        self.why = ""
        self._pauses = 0
        self._next_s = 0.0
        self._answered_s = float("-inf")
        self._tried_s: float | None = None
        """When the one who tries was let through; None while nobody was since the pause began."""
        self._poked_s = float("-inf")

    def state(self, now_s: float) -> CircuitState:
        """``half-open`` when one may try or is at it."""
        if not self.is_open:
            return "closed"
        return "open" if self._tried_s is None and now_s < self._next_s else "half-open"

    def is_silent(self, now_s: float) -> bool:
        """True while it is not answered: in a pause, or while one tries. Not when nobody has anything to try."""
        return self.is_open and now_s < self._next_s

    def ask(self, now_s: float) -> float:
        """0: try now. Else how many seconds to wait before asking again."""
        if not self.is_open:
            return 0.0
        if now_s < self._next_s:
            return self._next_s - now_s
        self._tried_s = now_s
        self._next_s = now_s + self._try_s_max
        return 0.0

    def answered(self, now_s: float) -> bool:
        """The target answered: closed from now on. True when it was not."""
        was_open, self.is_open = self.is_open, False
        self._failures = self._pauses = 0
        self._answered_s = now_s
        return was_open

    def failed(self, now_s: float, begun_s: float, why: str = "") -> bool:
        """A try that began at `begun_s` got no answer. True when that trips it: it was closed and is open now."""
        self.why = why
        if self.is_open:
            if self._tried_s is not None and begun_s >= self._tried_s:
                self._pause(now_s)
            return False
        if begun_s < self._answered_s:
            return False
        self._failures += 1
        if self._failures < self._failures_max:
            return False
        self.is_open = True
        self._trips.add()
        self._pause(now_s)
        return True

    def poke(self, now_s: float) -> bool:
        """A sign that the target is back (reconnected, a message was heard): one may try at once. True when one may.

        Counts once in `pause_s_max`: a stream of signs is no way around the pause.
        """
        if not self.is_open or now_s < self._poked_s + self._pause_s_max:
            return False
        self._poked_s = self._next_s = now_s
        self._tried_s = None
        return True

    def _pause(self, now_s: float) -> None:
        pause_s = min(self._pause_s_min * 2 ** min(self._pauses, _DOUBLINGS_MAX), self._pause_s_max)
        self._pauses += 1
        self._tried_s = None
        self._next_s = now_s + pause_s * (0.5 + 0.5 * self._jitter())


class Gate:
    """A circuit that tasks wait at. Whoever is let through says `answered` or `failed`, or nothing when it is cut off.

    Args:
        circuit: decides.
        told: called with words for the log when it trips or closes.
    """

    def __init__(self, circuit: Circuit, told: Callable[[str], None]) -> None:
        self._circuit = circuit
        self._told = told
        self._tripped_s = 0.0
        self._changed = asyncio.Event()

    async def turn(self) -> float:
        """Waits until this task may try; gives the time, which `failed` asks for. Waits for no other task's doing."""
        while hold_s := self._circuit.ask(now_s := asyncio.get_running_loop().time()):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(hold_s):
                    await self._changed.wait()
        return now_s

    def answered(self) -> None:
        """The target answered: all who wait go on."""
        now_s = asyncio.get_running_loop().time()
        if self._circuit.answered(now_s):
            self._told(f"circuit closed after {now_s - self._tripped_s:.1f} s")
            self._wake()

    def failed(self, begun_s: float, why: str = "no answer") -> None:
        """The try that began at `begun_s` failed: `why` in words."""
        now_s = asyncio.get_running_loop().time()
        if self._circuit.failed(now_s, begun_s, why):
            self._tripped_s = now_s
            self._told(f"circuit open: {why}; one try at a time until there is an answer. What is in hand is kept")

    def poke(self) -> None:
        """A sign that the target is back."""
        if self._circuit.is_open and self._circuit.poke(asyncio.get_running_loop().time()):
            self._wake()

    def _wake(self) -> None:
        # Wakes those that wait now; whoever comes later asks the circuit first.
        self._changed.set()
        self._changed.clear()
