"""JetStream requests that every part needs: read a message, purge. Retried while the cluster elects leaders.

Reads go to the stream's leader (never a direct get: a follower may be behind). Even so a read can be stale, when a
frozen leader thaws; nothing may be destroyed on the strength of a read alone.
"""

from __future__ import annotations

import asyncio
import builtins
import random
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError, OutboundBufferLimitError, TimeoutError
from nats.errors import Error as NatsError

from contracts.errors import ClusterUnavailableError, DefiniteError, TopologyError
from contracts.events import parse_rfc3339
from contracts.settings import Settings
from stages.runtime.telemetry import OFF, Telemetry

NO_MESSAGE: Final = 10037
NO_STREAM: Final = 10059
NO_CONSUMER: Final = 10014

_STATUS: Final = "Status"
_END_OF_ANSWERS: Final = "204"
_NOTHING_FOUND: Final = "404"


class ApiError(msgspec.Struct, frozen=True):
    """The error part of a JetStream API answer."""

    code: int
    err_code: int = 0
    description: str = ""


class RequestRefusedError(DefiniteError):
    """The JetStream API refused a request.

    Attributes:
        error: what it said.
    """

    def __init__(self, subject: str, error: ApiError) -> None:
        self.error = error
        super().__init__(f"{subject}: {error.description} ({error.err_code})")


class StoredMessage(NamedTuple):
    """One message as a stream holds it. `time_ns` is when it was stored."""

    subject: str
    seq: int
    time_ns: int
    data: bytes
    headers: dict[str, str]


class _RawMessage(msgspec.Struct):
    subject: str
    seq: int
    time: str
    data: bytes = b""
    hdrs: bytes = b""


class _Answer(msgspec.Struct):
    error: ApiError | None = None
    message: _RawMessage | None = None


_answer_decoder = msgspec.json.Decoder(_Answer)


class Api:
    """The JetStream API of one connection, with time-outs and retries.

    `jitter` gives a number in [0, 1): passed in so that simulated runs repeat. `telemetry` is what lanes, readers and
    writers record with.
    """

    def __init__(
        self,
        client: Client,
        settings: Settings,
        jitter: Callable[[], float] = random.random,
        telemetry: Telemetry = OFF,
    ) -> None:
        self.client = client
        self.settings = settings
        self.telemetry = telemetry
        self._jitter = jitter

    async def pause(self) -> None:
        """One retry interval, with jitter."""
        low, high = self.settings.retry_s_min, self.settings.retry_s_max
        await asyncio.sleep(low + (high - low) * self._jitter())

    async def request(self, subject: str, body: bytes) -> bytes:
        """One request, repeated until something answers. Only for requests that may safely be repeated.

        Raises:
            RequestRefusedError: the API answered with an error that waiting does not cure.
            ClusterUnavailableError: the connection was closed.
        """
        while True:
            answer = await self._try(subject, body)
            error_part = None if answer is None else _answer_decoder.decode(answer).error
            if answer is not None and error_part is None:
                return answer
            if error_part is not None and error_part.code != 503 and error_part.code != 500:
                raise RequestRefusedError(subject, error_part)
            await self.pause()

    async def _try(self, subject: str, body: bytes) -> bytes | None:
        """One request, once; None when nobody answered. Raises as `request` when the connection was closed."""
        try:
            answer = await self.client.request(subject, body, timeout=self.settings.api_timeout_s)
        except ConnectionClosedError as error:
            raise ClusterUnavailableError("the connection was closed") from error
        except (TimeoutError, OutboundBufferLimitError, NatsError):
            return None
        return answer.data

    async def _get(self, stream: str, what: dict[str, object]) -> StoredMessage | None:
        try:
            data = await self.request(f"$JS.API.STREAM.MSG.GET.{stream}", msgspec.json.encode(what))
        except RequestRefusedError as refused:
            if refused.error.err_code == NO_MESSAGE:
                return None
            if refused.error.err_code == NO_STREAM:
                raise TopologyError(f"stream {stream} does not exist; run `fictl cluster apply`") from refused
            raise
        raw = _answer_decoder.decode(data).message
        if raw is None:
            raise DefiniteError(f"{stream}: the server answered a read without a message")
        return StoredMessage(raw.subject, raw.seq, parse_rfc3339(raw.time), raw.data, parse_headers(raw.hdrs))

    async def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        """The last message on `subject` (wildcards allowed), or None when there is none.

        Raises:
            TopologyError: the stream does not exist.
        """
        return await self._get(stream, {"last_by_subj": subject})

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
        while True:
            answer = await self._try(f"$JS.API.STREAM.MSG.DELETE.{stream}", what)
            if answer is not None and _answer_decoder.decode(answer).error is None:
                return True
            # The codes for a message that is gone differ (10043, 10057), and the latter stands for more than that.
            if answer is not None and await self.message_at(stream, seq) is None:
                return asked_before
            asked_before |= answer is None
            await self.pause()

    async def last_messages(self, stream: str, patterns: Sequence[str]) -> dict[str, StoredMessage]:
        """Subject → its last message, for all subjects that match: one request for any number of messages.

        The stream must allow direct gets. They are not answered by its leader alone: what they give may be stale.

        Raises:
            ClusterUnavailableError: no complete answer within the request's time-out.
        """
        answers: asyncio.Queue[Msg] = asyncio.Queue()
        inbox = self.client.new_inbox()
        found: dict[str, StoredMessage] = {}
        try:
            # As many answers may be on their way as one such request can give.
            subscription = await self.client.subscribe(inbox, cb=answers.put)
            try:
                body = msgspec.json.encode({"multi_last": patterns})
                await self.client.publish(f"$JS.API.DIRECT.GET.{stream}", body, reply=inbox)
                async with asyncio.timeout(self.settings.api_timeout_s):
                    while _STATUS not in (headers := (answer := await answers.get()).headers or {}):
                        message = _direct(answer.data, headers)
                        found[message.subject] = message
            finally:
                await subscription.unsubscribe()
        except (builtins.TimeoutError, NatsError) as error:
            raise ClusterUnavailableError(
                f"{stream} does not answer ({error!r}); see `fictl cluster status`"
            ) from error
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
        await self.request(f"$JS.API.STREAM.PURGE.{stream}", msgspec.json.encode(what))


def _direct(data: bytes, headers: dict[str, str]) -> StoredMessage:
    """A stored message as a direct get gives it: what is not its data comes in headers."""
    time_ns = parse_rfc3339(headers["Nats-Time-Stamp"])
    return StoredMessage(headers["Nats-Subject"], int(headers["Nats-Sequence"]), time_ns, data, headers)


def parse_headers(block: bytes) -> dict[str, str]:
    """A NATS header block → its headers; what is not UTF-8 is replaced, later lines win."""
    headers: dict[str, str] = {}
    for line in block.split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            headers[name.strip().decode(errors="replace")] = value.strip().decode(errors="replace")
    return headers
