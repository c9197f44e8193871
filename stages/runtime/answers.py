"""Requests that wait for their answers, under one timer: one each took an eighth of what a gateway spends on an event.

Nearly all are answered long before their time, and then the timer has nothing to do but to look when the next is due.
"""

from __future__ import annotations

import asyncio
import math
from typing import Final

from nats.aio.msg import Msg
from nats.errors import TimeoutError as NatsTimeoutError

_ROUNDING: Final = 0.001
"""Seconds by which a timer may be early: uvloop counts milliseconds."""


class Answers:
    """By a token: the future of each answer, and when it fails for want of one. All on one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[float, asyncio.Future[Msg]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    def expect(self, token: str, timeout: float) -> asyncio.Future[Msg]:
        """What the answer is awaited with; it fails with `nats.errors.TimeoutError` after `timeout` seconds."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Msg] = loop.create_future()
        due = loop.time() + timeout
        self._waiting[token] = due, answer
        if due < self._timer_due:
            self._arm(loop, due)
        return answer

    def forget(self, token: str) -> None:
        """It is awaited no more. Every token that was expected is forgotten once."""
        del self._waiting[token]

    def awaited(self, token: str) -> asyncio.Future[Msg] | None:
        """What an answer with that token is to be given to; None when it is too late, or was never asked for."""
        found = self._waiting.get(token)
        return None if found is None or found[1].done() else found[1]

    def _arm(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = due
        self._timer = loop.call_at(due, self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer, self._timer_due = None, math.inf
        now = loop.time() + _ROUNDING
        next_due = math.inf
        for due, answer in self._waiting.values():
            if answer.done():
                continue
            if due <= now:
                answer.set_exception(NatsTimeoutError())
            elif due < next_due:
                next_due = due
        if next_due < math.inf:
            self._arm(loop, next_due)
