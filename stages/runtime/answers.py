"""Requests that wait for their answers, under one timer: one each took an eighth of what a gateway spends on an event.

Nearly all are answered long before their time, and then the timer has nothing to do but to look when the next is due.
What is said of one that got no answer, and the next step, is here too.
"""

from __future__ import annotations

import asyncio
import math
from typing import Final

import msgspec
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.errors import APIError, ServiceUnavailableError

from contracts.errors import AccessDeniedError, ClusterUnavailableError

_QUOTED: Final = "' \r\n"
_ROUNDING: Final = 0.001
"""Seconds by which a timer may be early: uvloop counts milliseconds."""
_ACCOUNT_WITHOUT: Final = 10039
_NO_JETSTREAM: Final = frozenset({_ACCOUNT_WITHOUT, 10076})
NO_PEERS: Final = 10005
"""Error code of a server: a stream cannot have as many copies as it shall, now."""


def words_of(text: str) -> str:
    """What a server said by itself, without the marks around it. Whoever asked for what it refuses gets no answer."""
    return text.removeprefix("nats: ").strip(_QUOTED)


class DeniedError(NatsTimeoutError):
    """A server does not let this user ask that, or hear the answer: there will be none.

    Args:
        words: the server's.
    """

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self._words = words

    def __str__(self) -> str:
        return f"a server refuses: {self._words}"


def why_silent(met: object) -> str:
    """In words, what a request met that got no answer to go on with: an exception, or the error part of an answer."""
    code, words = getattr(met, "err_code", None), getattr(met, "description", None)
    if code is not None and words:
        return f"{words} ({code})" if code else str(words)
    if isinstance(met, DeniedError):
        return str(met)
    if isinstance(met, (NoRespondersError, APIError)):
        return "no JetStream answers there"
    return f"no answer ({type(met).__name__})"


def step_after(met: object) -> str:
    """The next step where `met`, as for `why_silent`, says more than that nobody answers now; else empty."""
    if isinstance(met, DeniedError):
        return "let the URL's user do that, or take another user"
    if getattr(met, "err_code", None) in _NO_JETSTREAM:
        return "enable JetStream for the account of the URL's user, or take another user"
    if getattr(met, "err_code", None) == NO_PEERS:
        return (
            "start as many servers as `replicas` says, or lower it; `fictl cluster status` shows who answers. Where "
            "all do, raise their `max_ha_assets`"
        )
    # Of nobody being there to answer nats-py's JetStream makes an error without a code.
    wordless = isinstance(met, ServiceUnavailableError) and met.err_code is None
    if wordless or isinstance(met, NoRespondersError):
        return "is JetStream off? It needs `jetstream {…}` in each server's configuration, and a failed disk ends it"
    return ""


def is_lasting(met: object) -> bool:
    """Whether what was `met`, as for `why_silent`, stays as it is until somebody changes the user or the account.

    A server of which JetStream still starts says something else.
    """
    return isinstance(met, DeniedError) or getattr(met, "err_code", None) == _ACCOUNT_WITHOUT


def unavailable(what: str, met: object) -> ClusterUnavailableError:
    """The error for `what` nobody answered; `met` as for `why_silent`, None where that is not known."""
    why = "" if met is None else f": {why_silent(met)}"
    kind = AccessDeniedError if isinstance(met, DeniedError) else ClusterUnavailableError
    return kind(f"{what}{why}; {step_after(met) or 'see `fictl cluster status`'}")


class _Awaited(msgspec.Struct):
    due: float
    answer: asyncio.Future[Msg]
    subject: str
    timeout: float
    end: int


class Answers:
    """By a token: the future of each answer, and when it fails for want of one. All on one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Awaited] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    def expect(self, token: str, timeout: float, subject: str = "", end: int = 0) -> asyncio.Future[Msg]:
        """What the answer is awaited with; it fails with `nats.errors.TimeoutError` after `timeout` seconds.

        `subject` is what `deny` knows it by, `end` where the request ends among the bytes that were given to the
        connection, for `put_off`.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Msg] = loop.create_future()
        due = loop.time() + timeout
        self._waiting[token] = _Awaited(due, answer, subject, timeout, end)
        if due < self._timer_due:
            self._arm(loop, due)
        return answer

    def forget(self, token: str) -> None:
        """It is awaited no more. Every token that was expected is forgotten once."""
        del self._waiting[token]

    def awaited(self, token: str) -> asyncio.Future[Msg] | None:
        """What an answer with that token is to be given to; None when it is too late, or was never asked for."""
        found = self._waiting.get(token)
        return None if found is None or found.answer.done() else found.answer

    def deny(self, words: str, subject: str | None) -> None:
        """Those asked on `subject`, in lower case, fail with `DeniedError`; None: all."""
        for awaited in self._waiting.values():
            if not awaited.answer.done() and subject in (None, awaited.subject.lower()):
                awaited.answer.set_exception(DeniedError(words))

    def place(self, token: str, end: int) -> None:
        """The request ends there, not where `expect` said."""
        self._waiting[token].end = end

    def put_off(self, reached: int) -> None:
        """So many bytes have come to the server: the time of each request that ends behind them begins anew."""
        now = asyncio.get_running_loop().time()
        for awaited in self._waiting.values():
            if awaited.end > reached:
                awaited.due = now + awaited.timeout

    def _arm(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = due
        self._timer = loop.call_at(due, self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer, self._timer_due = None, math.inf
        now = loop.time() + _ROUNDING
        next_due = math.inf
        for awaited in self._waiting.values():
            if awaited.answer.done():
                continue
            if awaited.due <= now:
                awaited.answer.set_exception(NatsTimeoutError())
            elif awaited.due < next_due:
                next_due = awaited.due
        if next_due < math.inf:
            self._arm(loop, next_due)
