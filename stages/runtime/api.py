"""JetStream requests that every part needs: read a message, purge. Retried while the cluster elects leaders.

Reads go to the stream's leader (never a direct get: a follower may be behind). Even so a read can be stale, when a
frozen leader thaws; nothing may be destroyed on the strength of a read alone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec
from nats.aio.client import Client
from nats.errors import ConnectionClosedError, OutboundBufferLimitError, TimeoutError
from nats.errors import Error as NatsError

from contracts.errors import ClusterUnavailableError, DefiniteError, TopologyError
from contracts.events import parse_rfc3339
from contracts.settings import Settings
from stages.runtime.telemetry import OFF, Telemetry

NO_MESSAGE: Final = 10037
NO_STREAM: Final = 10059
NO_CONSUMER: Final = 10014


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
            try:
                answer = await self.client.request(subject, body, timeout=self.settings.api_timeout_s)
            except ConnectionClosedError as error:
                raise ClusterUnavailableError("the connection was closed") from error
            except (TimeoutError, OutboundBufferLimitError, NatsError):
                await self.pause()
                continue
            error_part = _answer_decoder.decode(answer.data).error
            if error_part is None:
                return answer.data
            if error_part.code != 503 and error_part.code != 500:
                raise RequestRefusedError(subject, error_part)
            await self.pause()

    async def _get(self, stream: str, what: dict[str, object]) -> StoredMessage | None:
        try:
            data = await self.request(f"$JS.API.STREAM.MSG.GET.{stream}", msgspec.json.encode(what))
        except RequestRefusedError as refused:
            if refused.error.err_code == NO_MESSAGE:
                return None
            if refused.error.err_code == NO_STREAM:
                raise TopologyError(f"stream {stream} does not exist; run `fi cluster apply`") from refused
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


def parse_headers(block: bytes) -> dict[str, str]:
    """A NATS header block → its headers; what is not UTF-8 is replaced, later lines win."""
    headers: dict[str, str] = {}
    for line in block.split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            headers[name.strip().decode(errors="replace")] = value.strip().decode(errors="replace")
    return headers
