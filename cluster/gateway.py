"""What an edge gateway does: publishes events so that none is lost, doubled or reordered, and waits when told to.

Always true: a message is retried with the same `Nats-Msg-Id` until the cluster has said yes or no; of one consultation,
at most one message is in flight. Two in flight cannot be kept in order: when the first is refused by a full stream or
lost with a leader, the second may already be stored. For the same reason a call that is given up, of which nobody knows
whether it is stored, takes those along that wait behind it: nothing of the consultation is tried before what its caller
sends next. Throughput comes from many consultations at once, and from several events of a consultation in one message.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import lru_cache
from typing import NamedTuple
from uuid import UUID, uuid5

from nats.errors import ConnectionClosedError, MaxPayloadError, NoRespondersError
from nats.errors import Error as NatsError

from contracts.budgets import ACCEPT, ACCEPT_PAUSE_MAX, ACCEPT_PAUSE_MIN
from contracts.errors import ClusterUnavailableError, DefiniteError, TopologyError
from contracts.events import HEADERS_BYTES, MESSAGE_BYTES_MAX
from contracts.subjects import EVENTS, is_token, publish_subject
from contracts.telemetry import (
    ACCEPTED_LATENCY,
    HEADER_EXPECTED_STREAM,
    HEADER_FIRST_SEEN,
    HEADER_MSG_ID,
    HEADER_TRACEPARENT,
)
from stages.runtime.answers import DeniedError, unavailable
from stages.runtime.api import ApiError
from stages.runtime.client import GuardedClient
from stages.runtime.telemetry import OFF, Telemetry
from stages.runtime.writer import (
    BAD_REQUEST,
    NEVER,
    STREAM_FULL,
    WRONG_STREAM,
    PubAnswer,
    error_type,
    read_pub_answer,
    says_something,
)

log = logging.getLogger(__name__)

IN_FLIGHT = 256
FULL_DOUBLINGS_MAX = 3
"""A full stream is asked again after the retry interval, doubled each time up to this often."""

_BATCH_NAMESPACE = UUID("0d7a3d9e-5a0f-5c1b-8a55-6d2a2f6d7c10")


class Accepted(NamedTuple):
    """`FI_EVENTS` has the message on a majority of its servers' disks.

    Attributes:
        origin: its stream sequence.
        duplicate: the servers had it before this call; False when an earlier try of this same call may have stored it.
        latency_ns: from the first try to the acceptance.
        sent_ns: wall clock at the first try.
    """

    origin: int
    duplicate: bool
    latency_ns: int
    sent_ns: int


class RefusedError(DefiniteError):
    """The cluster will never take this message."""


class _Failure(Enum):
    """Why a try was not accepted, when another may be."""

    NOT_STORED = auto()
    FULL = auto()
    UNKNOWN = auto()


class _Call(NamedTuple):
    """One publish in its consultation's lane.

    Attributes:
        message_id: of its message.
        turn: done when it may go; it raises when a call before it was given up.
    """

    message_id: str
    turn: asyncio.Future[None]


def batch_id(event_ids: Sequence[str]) -> str:
    """The message id of several events sent as one: the same events in the same order give the same id."""
    return event_ids[0] if len(event_ids) == 1 else str(uuid5(_BATCH_NAMESPACE, "/".join(event_ids)))


class Gateway:
    """Publishes over one connection.

    Attributes:
        in_flight: how many messages may be on their way at once.
        retries: tries beyond the first, in all.
    """

    def __init__(
        self,
        client: GuardedClient,
        *,
        in_flight: int = IN_FLIGHT,
        timeout_s: float = ACCEPT.s,
        jitter: Callable[[], float] = random.random,
        telemetry: Telemetry = OFF,
    ) -> None:
        """To be used in the event loop that `client` was connected in, and there alone.

        Args:
            client: connected (`stages.runtime.connection.connect`); stays the caller's to close.
            in_flight: at least 1.
            timeout_s: how long one try waits for the answer, once it has left, before its outcome counts as unknown;
                above 0.
            jitter: gives a number in [0, 1).
            telemetry: to record with.

        Raises:
            ValueError: `in_flight` or `timeout_s` is out of range.
        """
        if in_flight < 1:
            raise ValueError(f"in_flight = {in_flight}: nothing would ever be sent; give 1 or more")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s = {timeout_s}: no answer would be waited for; give more than 0")
        self._loop = client.loop
        self.in_flight = in_flight
        self.retries = 0
        self.client = client
        self._timeout_s = timeout_s
        self._jitter = jitter
        self._accepted = telemetry.histogram(ACCEPTED_LATENCY, {})
        self._probe = telemetry.writer(EVENTS, publish_subject("{site}", "{consultation}"))
        self._permits = asyncio.Semaphore(in_flight)
        self._lanes: defaultdict[str, deque[_Call]] = defaultdict(deque)
        """Consultation → its calls in call order. The first is on its way."""
        self._full = ""
        """What the servers said last for want of room: of the stream's, the account's or their own."""
        self._held_s = 0.0
        self._held_since = 0.0
        self._holding = 0

    @property
    def held_s(self) -> float:
        """Seconds during which back-pressure held at least one message."""
        return self._held_s + (time.monotonic() - self._held_since if self._holding else 0.0)

    @property
    def message_bytes_max(self) -> int:
        """Largest body the connected server and `FI_EVENTS` take."""
        return min(MESSAGE_BYTES_MAX, self.client.max_payload) - HEADERS_BYTES

    async def publish(
        self,
        event_bytes: bytes,
        site: str,
        consultation: str,
        event_id: str,
        *,
        traceparent: str = "",
        first_seen: str = "",
        deadline_s: float | None = None,
    ) -> Accepted:
        """Publishes one message and returns once it is accepted. Calls for one consultation take effect in call order.

        Cancelled, it leaves unknown whether the message is stored, as a `ClusterUnavailableError` does. Either way
        the calls that wait behind it for the consultation end untried, and what is published next goes first.

        Args:
            event_bytes: one event as JSON, or several of the consultation as NDJSON.
            site, consultation: the subject's tokens (`contracts.subjects.is_token`).
            event_id: what makes it this message and no other; for several events see `batch_id`. Printable, and no
                blank at its ends: a header's value loses those, and line breaks, and another id may be left, or none.
            traceparent: W3C trace context to send along.
            first_seen: of a replay: where the events first came in (`contracts.letters`).
            deadline_s: give up this long after the first try, once the try then under way is over, which is waited for
                `timeout_s` at most; None: never.

        Raises:
            RefusedError: it can never be stored: too large, not for a subject of its own, or refused by the servers.
            TypeError: not bytes, not text, or no number. What may change while it is sent again is not sent at all.
            ValueError: one of them is empty, or an `event_id` would be another one at the servers, or `deadline_s` is
                nan. Without an id of its own they could not tell a second try from another message.
            RuntimeError: this is another event loop or process than that of the connection: its answers come there.
            TopologyError: the subject is another stream's, or something else than a stream answers there.
            ClusterUnavailableError: the deadline passed or the connection was closed; whether it is stored is unknown.
                Publish it again with the same id before anything else of its consultation. Or a call before it ended
                so, or in any way but accepted or refused: it was not tried. Publish that one first, and then this.
            AccessDeniedError: the connection's user may not publish there; it is not stored by this try.
        """
        if not isinstance(event_bytes, bytes):
            raise TypeError(f"event_bytes is {type(event_bytes).__name__}; give bytes")
        subject = _subject(site, consultation)
        _check_id(event_id)
        _check_deadline(deadline_s)
        loop = asyncio.get_running_loop()
        self._loop = self._loop or loop
        if loop is not self._loop:
            raise RuntimeError("this gateway is of another event loop or process; connect, and make one, in each")
        if len(event_bytes) > self.message_bytes_max:
            raise RefusedError(f"{len(event_bytes)} bytes are too large for one message of {self.message_bytes_max}")
        headers = {HEADER_MSG_ID: event_id, HEADER_EXPECTED_STREAM: EVENTS}
        if traceparent:
            headers[HEADER_TRACEPARENT] = traceparent
        if first_seen:
            headers[HEADER_FIRST_SEEN] = first_seen
        call = _Call(event_id, loop.create_future())
        lane = self._lanes[consultation]
        lane.append(call)
        if len(lane) == 1:
            call.turn.set_result(None)
        try:
            await call.turn
            async with self._permits:
                return await self._send(subject, event_bytes, headers, deadline_s)
        except RefusedError:
            raise
        except BaseException:
            _end_those_behind(call, lane, consultation)
            raise
        finally:
            self._leave(call, lane, consultation)

    def _leave(self, call: _Call, lane: deque[_Call], consultation: str) -> None:
        """The call is over, or was ended by one before it: then it is in the lane no more."""
        if call not in lane:
            return
        lane.remove(call)
        if not lane:
            del self._lanes[consultation]
        # One that was cancelled ends those behind it when it gets to know of that.
        elif not lane[0].turn.done():
            lane[0].turn.set_result(None)

    async def _send(self, subject: str, body: bytes, headers: dict[str, str], deadline_s: float | None) -> Accepted:
        sent_ns, start_ns = time.time_ns(), time.perf_counter_ns()
        give_up_s = math.inf if deadline_s is None else time.monotonic() + deadline_s
        maybe_stored = False
        times_full = 0
        try:
            while True:
                answer = await self._attempt(subject, body, headers, give_up_s)
                if isinstance(answer, PubAnswer):
                    elapsed_ns = time.perf_counter_ns() - start_ns
                    self._accepted.record(elapsed_ns / 1e9)
                    return Accepted(answer.seq, answer.duplicate and not maybe_stored, elapsed_ns, sent_ns)
                maybe_stored |= answer is _Failure.UNKNOWN
                if answer is _Failure.FULL:
                    times_full += 1
                    if times_full == 1:
                        self._hold()
                await self._pause(2 ** min(times_full, FULL_DOUBLINGS_MAX), give_up_s)
                if time.monotonic() >= give_up_s:
                    why = f" ({self._full})" if answer is _Failure.FULL else ""
                    raise ClusterUnavailableError(
                        f"{subject}: not accepted within {deadline_s:g} s{why}; "
                        "publish it again, nothing will be doubled"
                    )
                self.retries += 1
        finally:
            if times_full:
                self._release()

    async def _attempt(
        self, subject: str, body: bytes, headers: dict[str, str], give_up_s: float
    ) -> PubAnswer | _Failure:
        """One try. Raises when no further one can help."""
        begun_s = time.perf_counter()
        # The client does not count the time that a body takes over a slow link; whoever set a deadline does.
        limit_s = None if give_up_s == math.inf else give_up_s - time.monotonic() + self._timeout_s
        try:
            async with asyncio.timeout(limit_s):
                reply = await self.client.request(subject, body, timeout=self._timeout_s, headers=dict(headers))
        except ConnectionClosedError as error:
            raise ClusterUnavailableError("the connection was closed; publish again to be sure") from error
        except MaxPayloadError as error:
            raise RefusedError(f"{len(body)} bytes are more than the server's max_payload takes") from error
        except DeniedError as error:
            raise unavailable(subject, error) from error
        except NoRespondersError as error:
            self._probe.sent(begun_s, type(error).__name__)
            self.client.note_stream(answers=False)
            return _Failure.NOT_STORED
        except (NatsError, TimeoutError) as error:
            self._probe.sent(begun_s, type(error).__name__)
            self.client.note_stream(answers=False)
            log.debug("%s: to be published again: %r", subject, error)
            return _Failure.UNKNOWN
        answer = read_pub_answer(reply.data, EVENTS, subject)
        self.client.note_stream(answers=says_something(answer.error))
        self._probe.sent(begun_s, error_type(answer.error))
        return answer if answer.error is None else self._judge(subject, answer.error)

    def _judge(self, subject: str, error: ApiError) -> _Failure:
        if error.err_code in STREAM_FULL:
            self._full = str(error)
            return _Failure.FULL
        if error.err_code == WRONG_STREAM:
            raise TopologyError(f"{subject} is not stored by {EVENTS} ({error.description}); see `fictl cluster plan`")
        if error.err_code in NEVER or error.code == BAD_REQUEST:
            raise RefusedError(f"{error.description} ({error.err_code})")
        log.debug("%s: to be published again: %s (%d)", subject, error.description, error.err_code)
        return _Failure.UNKNOWN

    def _hold(self) -> None:
        if not self._holding:
            self._held_since = time.monotonic()
            self._probe.holding(self._held_since)
            log.warning("%s is full; holding what is to be published (%s)", EVENTS, self._full)
        self._holding += 1

    def _release(self) -> None:
        self._holding -= 1
        if not self._holding:
            held_s = time.monotonic() - self._held_since
            self._held_s += held_s
            self._probe.released(held_s)

    async def _pause(self, times: int, give_up_s: float) -> None:
        """Returns when the next try may help, or the monotonic clock shows `give_up_s`."""
        while True:
            low_s, high_s = ACCEPT_PAUSE_MIN.s, ACCEPT_PAUSE_MAX.s
            pause_s = times * (low_s + (high_s - low_s) * self._jitter())
            await asyncio.sleep(min(pause_s, give_up_s - time.monotonic()))
            # While the client reconnects, requests would pile up in its buffer.
            if self.client.is_connected or self.client.is_closed or time.monotonic() >= give_up_s:
                return


def _check_text(name: str, text: object) -> None:
    """Holds that it is text, and not empty. Raises as `Gateway.publish`."""
    if not isinstance(text, str):
        raise TypeError(f"{name} is {type(text).__name__}; give str")
    if not text:
        raise ValueError(f"{name} is empty")


def _check_id(event_id: str) -> None:
    """Raises as `Gateway.publish`."""
    _check_text("event_id", event_id)
    if not event_id.isprintable() or event_id != event_id.strip():
        raise ValueError(f"event_id {event_id!a} would change in a header; give printable text, no blank at its ends")


def _check_deadline(deadline_s: object) -> None:
    """Raises as `Gateway.publish`."""
    if deadline_s is None:
        return
    if not isinstance(deadline_s, (int, float)):
        raise TypeError(f"deadline_s is {type(deadline_s).__name__}; give seconds, or None")
    if math.isnan(deadline_s):
        raise ValueError("deadline_s is nan; give seconds, or None")


@lru_cache(maxsize=4096)
def _subject(site: str, consultation: str) -> str:
    """Where its events are published. Raises as `Gateway.publish`."""
    for name, text in (("site", site), ("consultation", consultation)):
        _check_text(name, text)
        if not is_token(text):
            raise RefusedError(f"{name} {text!r} is not 1 to 64 of A-Z a-z 0-9 _ -, as a subject asks for")
    return publish_subject(site, consultation)


def _end_those_behind(call: _Call, lane: deque[_Call], consultation: str) -> None:
    """Whether `call` is stored is unknown: it will be published again, and those behind it must not come before it."""
    if call not in lane:
        return
    while lane[-1] is not call:
        waiting = lane.pop()
        if not waiting.turn.done():
            waiting.turn.set_exception(
                ClusterUnavailableError(
                    f"consultation {consultation}: message {waiting.message_id} was not tried, because "
                    f"{call.message_id} before it may not be stored; publish that one again, then this"
                )
            )
