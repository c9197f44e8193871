"""JetStream requests that every part needs: read a message, purge. Retried while the cluster elects leaders.

Before each stream stands a circuit, shared by all of a process that read or write it: while it does not answer, one
tries for all.

Reads go to the stream's leader (never a direct get: a follower may be behind). Even so a read can be stale, when a
frozen leader thaws; nothing may be destroyed on the strength of a read alone.
"""

from __future__ import annotations

import asyncio
import builtins
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import msgspec
from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError, OutboundBufferLimitError, TimeoutError
from nats.errors import Error as NatsError

from contracts.budgets import CIRCUIT_PAUSE_MAX, CIRCUIT_PAUSE_MIN, STREAM_REMADE
from contracts.errors import (
    AccessDeniedError,
    ClusterUnavailableError,
    DefiniteError,
    NotAppliedError,
    UnreadableError,
)
from contracts.events import parse_rfc3339
from contracts.settings import Settings
from contracts.subjects import CONTROL, DLQ, HOPS, MEMBERS, RECEIPTS
from contracts.telemetry import CIRCUIT_TRIPS
from contracts.wire import UNREADABLE
from stages.runtime.answers import is_lasting, unavailable, why_silent
from stages.runtime.circuit import Circuit, Gate
from stages.runtime.client import GuardedClient
from stages.runtime.headers import parse_headers
from stages.runtime.messages import StoredMessage
from stages.runtime.telemetry import OFF, Telemetry

log = logging.getLogger(__name__)

T = TypeVar("T")

NO_MESSAGE: Final = 10037
NO_STREAM: Final = 10059
NOT_NOW: Final = frozenset({500, 503})
"""Codes of an answer that says no more than that nobody can answer now: no leader, no quorum."""
CIRCUIT_FAILURES: Final = 5

REMADE: Final = frozenset({*HOPS, MEMBERS})
"""Streams that are made again when they are gone (`stages.runtime.remake`, `fictl cluster apply`)."""

_FENCED: Final = frozenset({RECEIPTS, DLQ, CONTROL})
"""On disk, and written by who read the last message: the fence lets in what expects none."""
_LOOKS: Final = 3
"""Reads that must find nothing where the stream counts something: one, and that count, may each be a stale leader's."""

_STATUS: Final = "Status"
_END_OF_ANSWERS: Final = "204"
_NOTHING_FOUND: Final = "404"


class ApiError(msgspec.Struct, frozen=True):
    """The error part of a JetStream API answer."""

    code: int
    err_code: int = 0
    description: str = ""

    def __str__(self) -> str:
        return f"{self.description} ({self.err_code})" if self.err_code else self.description


class RequestRefusedError(DefiniteError):
    """The JetStream API refused a request.

    Attributes:
        error: what it said.
    """

    def __init__(self, subject: str, error: ApiError) -> None:
        self.error = error
        super().__init__(f"{subject}: {error}")


class _RawMessage(msgspec.Struct):
    subject: str
    seq: int
    time: str
    data: bytes = b""
    hdrs: bytes = b""


class _Answer(msgspec.Struct):
    type: str = ""
    error: ApiError | None = None
    message: _RawMessage | None = None


FOREIGN: Final = ApiError(
    503, description="Something else than JetStream answers there: end what subscribes to $JS.API"
)
_OURS: Final = "io.nats.jetstream.api."
"""What the type of everything that JetStream answers begins with."""
_answer_decoder = msgspec.json.Decoder(_Answer)


class _Told(msgspec.Struct):
    """What is looked at of a stream's description."""

    class State(msgspec.Struct, frozen=True):
        subjects: dict[str, int] = {}

    class Cluster(msgspec.Struct, frozen=True):
        leader: str = ""

    state: State = State()
    cluster: Cluster | None = None


def _error_in(data: bytes, kind: type | None) -> ApiError | None:
    """The error that an answer tells of, or is: no answer of JetStream's at all, or none of this `kind`."""
    try:
        answer = _answer_decoder.decode(data)
        if answer.error is None and kind is not None:
            msgspec.json.decode(data, type=kind)
    except UNREADABLE:
        return FOREIGN
    return FOREIGN if answer.error is None and not answer.type.startswith(_OURS) else answer.error


class Api:
    """The JetStream API of one connection, with time-outs and retries.

    `jitter` gives a number in [0, 1): passed in so that simulated runs repeat. `telemetry` is what lanes, readers and
    writers record with. `give_up_s` is how long one call goes on asking; None: for ever, as a stage does, which has
    nothing else to do.
    """

    def __init__(
        self,
        client: GuardedClient,
        settings: Settings,
        jitter: Callable[[], float] = random.random,
        telemetry: Telemetry = OFF,
        *,
        give_up_s: float | None = None,
    ) -> None:
        self.client = client
        self._give_up_s = give_up_s
        self.settings = settings
        self.telemetry = telemetry
        self.jitter = jitter
        self._gates: dict[str, Gate] = {}
        self._met: dict[str, object] = {}

    def gate(self, stream: str) -> Gate:
        """The circuit before `stream`, where its next try waits."""
        if stream not in self._gates:
            circuit = Circuit(
                failures_max=CIRCUIT_FAILURES,
                pause_s_min=CIRCUIT_PAUSE_MIN.s,
                pause_s_max=CIRCUIT_PAUSE_MAX.s,
                try_s_max=max(self.settings.publish_timeout_s, self.settings.api_timeout_s),
                jitter=self.jitter,
                trips=self.telemetry.counter(CIRCUIT_TRIPS, {"target": stream}),
            )
            self.telemetry.circuit(stream, circuit)
            self._gates[stream] = Gate(circuit, lambda words: log.warning("%s: %s", stream, words))
        return self._gates[stream]

    def poke(self) -> None:
        """The connection is back: every circuit may be tried at once."""
        for gate in self._gates.values():
            gate.poke()

    async def pause(self) -> None:
        """One retry interval, with jitter."""
        low, high = self.settings.retry_s_min, self.settings.retry_s_max
        await asyncio.sleep(low + (high - low) * self.jitter())

    @asynccontextmanager
    async def _patience(self, stream: str) -> AsyncIterator[None]:
        """Ends what is asked of `stream` within when `give_up_s` is over, with `ClusterUnavailableError`."""
        try:
            async with asyncio.timeout(self._give_up_s):
                yield
        except builtins.TimeoutError:
            raise unavailable(f"{stream} does not answer within {self._give_up_s:g} s", self._met.get(stream)) from None

    def note_silence(self, what: str, met: object) -> None:
        """A stream gave no answer about `what`: the client leaves a server through which none does.

        Raises `ClusterUnavailableError` if what was `met` lasts, on whichever server, and this gives up some time. That
        is a user who may not, or an account without JetStream. A stage asks on, and shows it at /readyz: both can be
        changed while it runs.
        """
        if not is_lasting(met):
            self.client.note_stream(answers=False)
        elif self._give_up_s is not None:
            raise unavailable(what, met) from (met if isinstance(met, Exception) else None)

    async def request(self, stream: str, subject: str, body: bytes) -> bytes:
        """One request about `stream`, repeated until something answers. Only for what may safely be repeated.

        Raises:
            RequestRefusedError: the API answered with an error that waiting does not cure.
            ClusterUnavailableError: the connection was closed, or nothing answered within `give_up_s`. With `give_up_s`
                also at once as `note_silence`.
        """
        return await self._ask(stream, subject, body, None)

    async def ask(self, stream: str, subject: str, body: bytes, kind: type[T]) -> T:
        """As `request`, for an answer of this `kind`: another is as none, for it was not JetStream that gave it."""
        return msgspec.json.decode(await self._ask(stream, subject, body, kind), type=kind)

    async def _ask(self, stream: str, subject: str, body: bytes, kind: type | None) -> bytes:
        loop = asyncio.get_running_loop()
        missing_s: float | None = None
        async with self._patience(stream):
            while True:
                answer, error_part = await self._try(stream, subject, body, kind)
                if answer is not None and error_part is None:
                    return answer
                if error_part is not None and error_part.code not in NOT_NOW:
                    missing_s = loop.time() if missing_s is None else missing_s
                    is_remade = error_part.err_code == NO_STREAM and stream in REMADE
                    if not is_remade or loop.time() - missing_s >= STREAM_REMADE.s:
                        raise RequestRefusedError(subject, error_part)
                await self.pause()

    async def _try(
        self, stream: str, subject: str, body: bytes, kind: type | None = None
    ) -> tuple[bytes | None, ApiError | None]:
        """One request, once, when its turn has come: answer and error in it; None when nobody answered.

        Raises as `request` when the connection was closed, or a server refuses what is given up some time.
        """
        gate = self.gate(stream)
        begun_s = await gate.turn()
        try:
            answer = await self.client.request(subject, body, timeout=self.settings.api_timeout_s)
        except ConnectionClosedError as error:
            raise ClusterUnavailableError("the connection was closed") from error
        except (TimeoutError, OutboundBufferLimitError, NatsError) as error:
            gate.failed(begun_s, why_silent(error))
            self._met[stream] = error
            self.note_silence(stream, error)
            return None, None
        error_part = _error_in(answer.data, kind)
        if error_part is not None and error_part.code in NOT_NOW:
            gate.failed(begun_s, f"{subject}: {error_part}")
            self._met[stream] = error_part
            self.note_silence(stream, error_part)
        else:
            gate.answered()
            self.client.note_stream(answers=True)
        return answer.data, error_part

    async def _get(self, stream: str, what: dict[str, object]) -> StoredMessage | None:
        try:
            data = await self.request(stream, f"$JS.API.STREAM.MSG.GET.{stream}", msgspec.json.encode(what))
        except RequestRefusedError as refused:
            if refused.error.err_code == NO_MESSAGE:
                return None
            if refused.error.err_code == NO_STREAM:
                raise NotAppliedError(f"stream {stream} does not exist; run `fictl cluster apply`") from refused
            raise
        raw = _answer_decoder.decode(data).message
        if raw is None:
            raise DefiniteError(f"{stream}: a read was answered without a message. {FOREIGN.description}")
        return StoredMessage(raw.subject, raw.seq, parse_rfc3339(raw.time), raw.data, parse_headers(raw.hdrs))

    async def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        """The last message on `subject` (wildcards allowed), or None when there is none.

        A leader that cannot read it any more answers that there is none, and accepts what is published as the first.

        Raises:
            NotAppliedError: the stream does not exist.
            UnreadableError: there is one in `FI_RECEIPTS`, `FI_DLQ` or `FI_CONTROL`, and the leader cannot read it.
            ClusterUnavailableError: as `request`.
        """
        told = _Told()
        for _ in range(_LOOKS):
            message = await self._get(stream, {"last_by_subj": subject})
            if message is not None or stream not in _FENCED:
                return message
            which = msgspec.json.encode({"subjects_filter": subject})
            told = await self.ask(stream, f"$JS.API.STREAM.INFO.{stream}", which, _Told)
            if not any(told.state.subjects.values()):
                return None
            await self.pause()
        server = (told.cluster.leader if told.cluster else "") or "the server"
        self.telemetry.unreadable(stream, server)
        raise UnreadableError(
            f"{server} cannot read the last message of {subject}: a file of its {stream} is damaged. Stop that server, "
            "so that another one leads, delete its store, and start it again, while all others are current"
        )

    async def message_at(self, stream: str, seq: int) -> StoredMessage | None:
        """The message with this stream sequence, or None. Raises as `last_message`."""
        return await self._get(stream, {"seq": seq})

    async def first_message(self, stream: str, subject: str, *, from_seq: int = 1) -> StoredMessage | None:
        """The first message on `subject` at this stream sequence or later, or None. Raises as `last_message`."""
        return await self._get(stream, {"seq": from_seq, "next_by_subj": subject})

    async def delete(self, stream: str, seq: int, *, erase: bool) -> bool:
        """Deletes one message; False when it is not there. Raises as `last_message`.

        With `erase` the servers overwrite it on their disks: some 20 ms for each message, where a plain deletion takes
        less than one.
        """
        what = msgspec.json.encode({"seq": seq, "no_erase": not erase})
        asked_before = False
        async with self._patience(stream):
            while True:
                answer, error_part = await self._try(stream, f"$JS.API.STREAM.MSG.DELETE.{stream}", what)
                if answer is not None and error_part is None:
                    return True
                # The codes for a message that is gone differ (10043, 10057); the latter stands for more than that.
                if answer is not None and await self.message_at(stream, seq) is None:
                    return asked_before
                asked_before |= answer is None
                await self.pause()

    async def last_messages(self, stream: str, patterns: Sequence[str]) -> dict[str, StoredMessage]:
        """Subject → its last message, for all subjects that match: one request for any number of messages.

        The stream must allow direct gets. They are not answered by its leader alone: what they give may be stale, and
        a frozen server may be the one that was asked. With `give_up_s` it is asked again until then, else once.

        Raises:
            ClusterUnavailableError: no complete answer within that time, or the request's time-out.
        """
        async with self._patience(stream):
            while True:
                try:
                    return await self._last_messages(stream, patterns)
                except ClusterUnavailableError as error:
                    if self._give_up_s is None or isinstance(error, AccessDeniedError):
                        raise
                await self.pause()

    async def _last_messages(self, stream: str, patterns: Sequence[str]) -> dict[str, StoredMessage]:
        """`last_messages`, asked once."""
        answers: asyncio.Queue[Msg] = asyncio.Queue()
        subject = f"$JS.API.DIRECT.GET.{stream}"
        inbox = self.client.new_inbox()
        found: dict[str, StoredMessage] = {}
        try:
            # As many answers may be on their way as one such request can give.
            subscription = await self.client.subscribe(inbox, cb=answers.put)
            try:
                body = msgspec.json.encode({"multi_last": patterns})
                await self.client.publish(subject, body, reply=inbox)
                async with asyncio.timeout(self.settings.api_timeout_s):
                    while _STATUS not in (headers := (answer := await answers.get()).headers or {}):
                        message = _direct(answer.data, headers)
                        found[message.subject] = message
            finally:
                await subscription.unsubscribe()
        except (KeyError, ValueError):
            raise unavailable(stream, FOREIGN) from None
        except (builtins.TimeoutError, NatsError) as error:
            raise unavailable(stream, self.client.denial(subject) or error) from error
        if headers[_STATUS] not in (_END_OF_ANSWERS, _NOTHING_FOUND):
            raise ClusterUnavailableError(f"{stream} cannot be read now: {headers}; see `fictl cluster status`")
        return found

    async def purge(self, stream: str, subject: str, *, below_seq: int | None = None, keep: int | None = None) -> None:
        """Removes messages of `subject`: those below a sequence, all but the last `keep`, or all.

        `below_seq` must be the sequence of a message that is there: one beyond the last empties the subject.
        """
        what: dict[str, object] = {"filter": subject}
        if below_seq is not None:
            what["seq"] = below_seq
        elif keep is not None:
            what["keep"] = keep
        await self.request(stream, f"$JS.API.STREAM.PURGE.{stream}", msgspec.json.encode(what))


def _direct(data: bytes, headers: dict[str, str]) -> StoredMessage:
    """A stored message as a direct get gives it: what is not its data comes in headers."""
    time_ns = parse_rfc3339(headers["Nats-Time-Stamp"])
    return StoredMessage(headers["Nats-Subject"], int(headers["Nats-Sequence"]), time_ns, data, headers)
