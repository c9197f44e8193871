"""nats-py's client, made safe against what a gateway can put into a subject or a header block.

The server stores subjects of any bytes but space, tab, CR and LF, and header blocks of any bytes. nats-py 2.16 decodes
subjects and status lines as strict UTF-8 inside its read loop, reads a block's first byte unchecked, and ends a subject
at any white space of Python's. Each of these ends or restarts the connection of whoever *reads* the message; it comes
again after the reconnect, so that one such message would stop a process for good. Here they are taken in, and ingest
dead-letters what is not an event.

It is also quicker where every event passes: what is read for a `Sink`, and the answers to requests, go from the bytes
read to their taker without a queue and a task between them, and messages are taken apart by position.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from typing import Any, Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import ConnectionDrainingError, ProtocolError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.protocol import parser

Sink = Callable[[bytes, bytes, bytes, bytes], None]
"""(subject, reply, header block, payload): takes a message inside the read loop. Must neither raise nor take long."""

_CRLF: Final = b"\r\n"
_SPACE: Final = " \t\n\r\v\f"
_H, _M = b"HM"
_FEW: Final = 4
_STATUS_AT: Final = len(b"NATS/1.0 ")


class _Parser(parser.Parser):
    """nats-py's parser, but messages are taken apart here: by position, as the server wrote their control line.

    A message that is not there whole stays in `buf`, without its control line, until it is.
    """

    def __init__(self, client: GuardedClient) -> None:
        self._client = client
        self._words: list[bytes] = []
        self._resets = 0
        super().__init__(client)

    def reset(self) -> None:
        """Forgets what was read: the connection it came from is gone."""
        super().reset()
        self._resets += 1

    async def parse(self, data: bytes = b"") -> None:
        """Takes in what was read, and hands on every message that is there whole.

        Raises:
            ProtocolError: these bytes are not of the protocol.
        """
        at, resets = 0, self._resets
        waiting = self.state == parser.AWAITING_MSG_PAYLOAD
        if waiting and len(self.buf) + len(data) < self.needed:
            self.buf.extend(data)
            return
        if self.buf:
            self.buf.extend(data)
            data, self.buf = bytes(self.buf), bytearray()
        if waiting:
            self.state = parser.AWAITING_CONTROL_LINE
            at = self.needed
            await self._hand_on(self._words, data, 0)
        while at < len(data) and resets == self._resets:
            end = data.find(_CRLF, at)
            if end < 0:
                if len(data) - at > parser.MAX_CONTROL_LINE_SIZE and data[at] in (_H, _M):
                    raise ProtocolError
                self.buf.extend(data[at:])
                return
            if data[at] in (_H, _M):
                words = data[at:end].split(b" ")
                at = end + len(_CRLF)
                self.needed = _number(words[-1]) + len(_CRLF)
                if len(data) - at < self.needed:
                    self._words, self.state = words, parser.AWAITING_MSG_PAYLOAD
                    self.buf.extend(data[at:])
                    return
                await self._hand_on(words, data, at)
                at += self.needed
            else:
                line = data[at : end + len(_CRLF)]
                at += len(line)
                self.buf.extend(line)
                await super().parse()

    async def _hand_on(self, words: list[bytes], data: bytes, at: int) -> None:
        """The message with the control line `words`, whose header block or payload begins at `at`.

        ``MSG subject sid [reply] size`` or ``HMSG subject sid [reply] header_size size``.
        """
        with_headers = words[0] == b"HMSG"
        try:
            subject, sid, *reply = words[1 : -2 if with_headers else -1]
            split = at + (_number(words[-2]) if with_headers else 0)
        except (ValueError, IndexError):
            raise ProtocolError from None
        end = at + _number(words[-1])
        number = _number(sid)
        sink = self._client.sinks.get(number)
        if sink is not None:
            sink(subject, reply[0] if reply else b"", data[at:split], data[split:end])
        else:
            block = data[at:split] if with_headers else b""
            await self._client._process_msg(number, subject, reply[0] if reply else b"", data[split:end], block)


def _number(word: bytes) -> int:
    try:
        return int(word)
    except ValueError:
        raise ProtocolError from None


def _expire(answer: asyncio.Future[Msg]) -> None:
    if not answer.done():
        answer.set_exception(NatsTimeoutError())


def parse_headers(block: bytes) -> dict[str, str]:
    """A NATS header block → its headers; what is not UTF-8 is replaced, later lines win."""
    headers: dict[str, str] = {}
    for line in block.decode(errors="replace").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip(_SPACE)] = value.strip(_SPACE)
    return headers


def read_headers(block: bytes) -> dict[str, str]:
    """A header block as it was delivered → its headers; of a status message also ``Status`` and ``Description``."""
    if not block:
        return {}
    headers = parse_headers(block)
    if block[_STATUS_AT - 1 : _STATUS_AT] == b" ":
        status, _, description = block[_STATUS_AT : block.find(_CRLF)].decode(errors="replace").partition(" ")
        headers["Status"] = status
        if description:
            headers["Description"] = description
    return headers


class GuardedClient(Client):
    """A client whose read loop survives any message the server delivers, and that ends when it is closed.

    Attributes:
        sinks: number of a subscription → what takes its messages.
    """

    _ended = False

    def __init__(self) -> None:
        super().__init__()
        self.sinks: dict[int, Sink] = {}
        self._tokens = count(1)
        self._request_inbox = ""
        self._ps = _Parser(self)

    async def subscribe_sink(self, subject: str, sink: Sink) -> Subscription:
        """Has everything on `subject` taken by `sink`, without any limit on what is pending: there is no queue.

        Meant for what the server sends only when asked. End it with `Subscription.unsubscribe`.
        """
        subscription = await self.subscribe(subject)
        self.sinks[subscription._id] = sink
        return subscription

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self.sinks.pop(sid, None)
        super()._remove_sub(sid, max_msgs)

    async def _init_request_sub(self) -> None:
        self._resp_map = {}
        self._request_inbox = f"{self.new_inbox()}."
        self._resp_sub_prefix = bytearray(self._request_inbox.encode())
        await self.subscribe_sink(f"{self._request_inbox}*", self._answered)

    def _answered(self, subject: bytes, reply: bytes, block: bytes, payload: bytes) -> None:
        token = subject[len(self._request_inbox) :].decode(errors="replace")
        answer = self._resp_map.get(token)
        if answer is not None and not answer.done():
            answer.set_result(self._build_message(0, subject, reply, payload, read_headers(block) or None))

    async def _request_new_style(
        self, subject: str, payload: bytes, timeout: float = 1, headers: dict[str, str] | None = None
    ) -> Msg:
        """As nats-py's, but a cancellation that comes together with the answer is not swallowed.

        (`asyncio.wait_for` of Python 3.11 does that: a task told to end would go on.)
        """
        if self.is_draining_pubs:
            raise ConnectionDrainingError
        if not self._resp_sub_prefix:
            await self._init_request_sub()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Msg] = loop.create_future()
        # Unique among this connection's requests; the inbox before it is unique among connections.
        token = str(next(self._tokens))
        self._resp_map[token] = answer
        expiry = loop.call_later(timeout, _expire, answer)
        try:
            await self.publish(subject, payload, reply=f"{self._request_inbox}{token}", headers=headers)
            return await answer
        finally:
            expiry.cancel()
            del self._resp_map[token]

    async def _send_publish(
        self, subject: str, reply: str, payload: bytes, payload_size: int, headers: dict[str, Any] | None
    ) -> None:
        """As nats-py's for headers that are well-formed by their making: names are constants of ours."""
        text = "".join([f"{name}: {value}\r\n" for name, value in headers.items()]) if headers else ""
        # Values may be a gateway's own: one with a line break must not become two headers.
        if headers is None or text.count("\r") != len(headers) or text.count("\n") != len(headers):
            await super()._send_publish(subject, reply, payload, payload_size, headers)
            return
        block = f"NATS/1.0\r\n{text}\r\n".encode()
        line = f"HPUB {subject} {reply} {len(block)} {len(block) + payload_size}\r\n".encode()
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += payload_size
        command = b"".join((line, block, payload, _CRLF))
        if self._is_idle():
            self._transport.write(command)  # type: ignore[union-attr]
            return
        await self._send_command(command)
        if self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()

    def _is_idle(self) -> bool:
        """True when little is under way, and what was written before has gone to the kernel.

        A message is then written at once. Where there are many, the flusher's queue, future and task pay: one system
        call takes them all.
        """
        if self._pending or len(self._resp_map or ()) > _FEW or not self.is_connected:
            return False
        writer = getattr(self._transport, "_io_writer", None)
        return writer is not None and writer.transport.get_write_buffer_size() == 0

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg:
        return self.msg_class(
            subject=subject.decode(errors="replace"),
            reply=reply.decode(errors="replace"),
            data=data,
            headers=headers,
            _client=self,
            _sid=sid,
        )

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (ValueError, IndexError):
            return parse_headers(headers)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        self._ended = status == Client.CLOSED
        await super()._close(status, do_cbs)

    async def _process_connect_init(self) -> None:
        """As nats-py's, but a try that failed leaves no open socket behind, and none follows the end of the client.

        (A frozen server takes connections and says nothing: one socket a try, for as long as it is frozen. And
        `asyncio.wait_for` of Python 3.11 swallows the cancellation that comes together with a connection: a client
        that was closed just then would go on connecting.)
        """
        transport = self._transport
        try:
            self._stop_if_ended()
            await super()._process_connect_init()
            self._stop_if_ended()
        except BaseException:
            if transport is not None:
                transport.close()  # type: ignore[no-untyped-call]
            raise

    def _stop_if_ended(self) -> None:
        if self._ended:
            raise asyncio.CancelledError
