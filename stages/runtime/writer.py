"""The fenced writer: one message at a time on one subject, each accepted only after the one before it.

Two headers make a retry safe and a zombie harmless. `Nats-Expected-Last-Subject-Sequence` lets the server refuse
any writer that did not see the subject's last message. `Nats-Msg-Id` turns the retry of a publish whose
acknowledgement was lost into that same publish; it holds a nonce of this writer, because the server checks it *before*
the fence and across subjects and purges, so an id made of origins alone would have a recomputed frame acknowledged and
not stored.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Final

import msgspec
from nats.errors import ConnectionClosedError, MaxPayloadError
from nats.errors import Error as NatsError

from contracts.errors import ClusterUnavailableError, DefiniteError, FencedError, TopologyError
from contracts.telemetry import HEADER_EXPECTED_LAST_SUBJECT_SEQ, HEADER_EXPECTED_STREAM, HEADER_MSG_ID
from contracts.wire import UNREADABLE
from stages.runtime.answers import why_silent
from stages.runtime.api import NOT_NOW, Api, ApiError
from stages.runtime.messages import StoredMessage

log = logging.getLogger(__name__)

WRONG_LAST_SEQUENCE: Final = 10071
STILL_IN_PROCESS: Final = frozenset({10158, 10164})
STREAM_FULL: Final = frozenset({10077, 10023, 10028, 10047, 10002})
"""The stream's own limit, the servers' storage or memory, the account's limits."""
WRONG_STREAM: Final = 10060
NEVER: Final = frozenset({10054, 10097, WRONG_STREAM, 10109})
"""Message too large; its headers too large; another stream's subject; stream sealed: no retry can help."""
BAD_REQUEST: Final = 400

_LAST_SEQ = re.compile(r"wrong last sequence: (\d+)")


class PubAnswer(msgspec.Struct, frozen=True):
    """What a stream answers a publish: stored at `seq`, from 1 on, or `error`."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: ApiError | None = None


_decode_pub_answer = msgspec.json.Decoder(PubAnswer).decode


def read_pub_answer(data: bytes, stream: str, subject: str) -> PubAnswer:
    """What `stream` answered a publish to `subject`.

    Raises:
        TopologyError: somebody else answers there. Whether the stream stored the message besides is unknown.
    """
    try:
        answer = _decode_pub_answer(data)
    except UNREADABLE:
        answer = PubAnswer()
    if answer.error is None and (answer.seq < 1 or answer.stream != stream):
        raise TopologyError(
            f"{subject}: something else than {stream} answers; end what subscribes there, and see `fictl cluster plan`"
        )
    return answer


def error_type(error: ApiError | None) -> str:
    """What telemetry calls a refusal; empty for none."""
    if error is None:
        return ""
    if error.err_code == WRONG_LAST_SEQUENCE:
        return "fenced"
    if error.err_code in STREAM_FULL:
        return "stream_full"
    return "in_process" if error.err_code in STILL_IN_PROCESS else "refused"


def says_something(error: ApiError | None) -> bool:
    """False for a refusal that means no more than that there is no leader or no quorum now."""
    return error is None or error.code not in NOT_NOW or error.err_code in STREAM_FULL | STILL_IN_PROCESS


async def replace_last(
    api: Api,
    stream: str,
    subject: str,
    make: Callable[[StoredMessage | None], bytes],
    nonce: str,
    headers: dict[str, str] | None = None,
) -> None:
    """Stores after a subject's last message what `make` makes of it; again if somebody else was faster.

    A try that is given up takes no effect later, once somebody has written after it.

    Args:
        api, stream, subject: where.
        make: gets the last message, None without any.
        nonce: of this call alone.
        headers: further headers.

    Raises:
        TopologyError: there is no such stream.
    As `FencedWriter.publish` besides.
    """
    while True:
        last = await api.last_message(stream, subject)
        writer = FencedWriter(api, stream, subject, nonce)
        writer.expected_seq = 0 if last is None else last.seq
        try:
            await writer.publish(make(last), "last", headers)
            return
        except FencedError:
            continue


class FencedWriter:
    """Writes one subject. Not for concurrent use: one publish in flight.

    Attributes:
        expected_seq: sequence of the last message on the subject as this writer knows it; 0 when empty.
        full_since: monotonic seconds since when the stream refuses for lack of room, or None.
        held_s: seconds lost to that in all.
    """

    def __init__(self, api: Api, stream: str, subject: str, nonce: str) -> None:
        self._api = api
        self._stream = stream
        self._subject = subject
        self._nonce = nonce
        self._probe = api.telemetry.writer(stream, subject)
        self._gate = api.gate(stream)
        self.expected_seq = 0
        self.full_since: float | None = None
        self.held_s = 0.0
        self._told: ApiError | None = None

    async def publish(self, data: bytes, key: str, headers: dict[str, str] | None = None) -> int:
        """Stores `data` as the subject's next message and returns its stream sequence.

        Retries for as long as the outcome is unknown, the cluster has no leader, or the stream is full. Cancelling
        leaves the outcome unknown: read the checkpoint again before the next publish.

        Args:
            data: the message.
            key: what makes it this message and no other, e.g. its last origin.
            headers: further headers.

        Raises:
            FencedError: the subject's last message is not the one this writer knows.
            TopologyError: the subject belongs to another stream, or something else than a stream answers there.
            DefiniteError: it can never be stored, e.g. too large.
            ClusterUnavailableError: the connection was closed, or as `Api.note_silence`.
        """
        fixed = {
            **(headers or {}),
            HEADER_MSG_ID: f"{self._nonce}:{self._subject}:{self.expected_seq}:{key}",
            HEADER_EXPECTED_LAST_SUBJECT_SEQ: str(self.expected_seq),
            HEADER_EXPECTED_STREAM: self._stream,
        }
        try:
            while True:
                answer = await self._attempt(data, dict(fixed))
                if answer is not None:
                    self.expected_seq = answer.seq
                    return answer.seq
                await self._api.pause()
        finally:
            self._note_end()

    async def _attempt(self, data: bytes, headers: dict[str, str]) -> PubAnswer | None:
        """One try, when its turn has come: the acceptance, or None to try again."""
        turn_s = await self._gate.turn()
        begun_s = time.perf_counter()
        try:
            reply = await self._api.client.request(
                self._subject, data, timeout=self._api.settings.publish_timeout_s, headers=headers
            )
        except ConnectionClosedError as error:
            raise ClusterUnavailableError("the connection was closed") from error
        except MaxPayloadError as error:
            raise DefiniteError(
                f"{self._subject}: {len(data)} bytes and their headers are more than the servers' max_payload takes; "
                "raise it to 8 MiB"
            ) from error
        except NatsError as error:
            # A time-out, no responder or a lost connection: it may or may not have happened.
            self._gate.failed(turn_s, why_silent(error))
            self._api.note_silence(self._subject, error)
            self._probe.sent(begun_s, type(error).__name__)
            log.debug("%s: publish to be retried: %r", self._subject, error)
            return None
        answer = read_pub_answer(reply.data, self._stream, self._subject)
        if says_something(answer.error):
            self._gate.answered()
            self._api.client.note_stream(answers=True)
        else:
            self._gate.failed(turn_s, str(answer.error))
            self._api.note_silence(self._subject, answer.error)
        self._probe.sent(begun_s, error_type(answer.error))
        if answer.error is None:
            return answer
        self._judge(answer.error)
        return None

    def _judge(self, error: ApiError) -> None:
        """Raises if `error` is final; notes a full stream; returns if the publish is to be repeated."""
        if error.err_code == WRONG_LAST_SEQUENCE:
            match = _LAST_SEQ.search(error.description)
            raise FencedError(self._subject, int(match.group(1)) if match else None)
        if error.err_code in NEVER:
            kind = TopologyError if error.err_code == WRONG_STREAM else DefiniteError
            raise kind(f"{self._subject}: refused for good: {error.description} ({error.err_code})")
        if error.err_code in STREAM_FULL:
            if self.full_since is None:
                self.full_since = time.monotonic()
                self._probe.holding(self.full_since)
                log.warning("%s: stream %s is full; holding (%s)", self._subject, self._stream, error.description)
        elif error.err_code not in STILL_IN_PROCESS and error != self._told:
            self._told = error
            level = logging.WARNING if error.code == BAD_REQUEST else logging.INFO
            log.log(level, "%s: publish to be retried until it is taken: %s", self._subject, error)

    def _note_end(self) -> None:
        """The publish is over, in whatever way."""
        self._told = None
        if self.full_since is not None:
            held_s = time.monotonic() - self.full_since
            self.held_s += held_s
            self._probe.released(held_s)
            self.full_since = None
            log.info("%s: held %.1f s by back-pressure", self._subject, held_s)
