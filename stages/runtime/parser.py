"""Takes apart what a server sends: by position, as the server wrote it, and what a `Sink` takes as soon as it was read.

nats-py reads into a stream, wakes a task, and matches regular expressions. What is for a sink needs none of that: it
goes from the bytes read to its taker in the callback that the socket's bytes come with. Everything else, and what
comes behind it, goes nats-py's way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

from nats.errors import ProtocolError
from nats.protocol import parser

Sink = Callable[[bytes, bytes, bytes, bytes], None]
"""(subject, reply, header block, payload): takes a message while it is read. Must neither raise nor take long."""

_CRLF: Final = b"\r\n"
_H, _M = b"HM"


class Taker(Protocol):
    """The client that messages are for."""

    sinks: dict[bytes, Sink]
    """By subscription."""

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes, /) -> None:
        """Takes what no sink does."""


class SinkParser(parser.Parser):
    """A parser for `client`, whose `sinks` take their messages.

    A message that is not there whole stays in `buf`, without its control line, until it is.
    """

    def __init__(self, client: Taker) -> None:
        self._client = client
        self._words: list[bytes] = []
        self._resets = 0
        self._tapped: asyncio.StreamReader | None = None
        self.heard = False
        """Something was read since somebody said that nothing was."""
        self._behind = 0
        """Bytes that the tapped stream holds or `parse` works on: what is read meanwhile must not overtake them."""
        super().__init__(client)

    def reset(self) -> None:
        """Forgets what was read: the connection it came from is gone."""
        super().reset()
        self._resets += 1
        self._tapped = None
        self._refused = False

    def tap(self, stream: asyncio.StreamReader) -> None:
        """From now on sinks take what comes into `stream` before it gets there; what else comes is left to `parse`."""
        feed = stream.feed_data

        def intercept(data: bytes) -> None:
            self.heard = True
            if self._tapped is stream:
                if not self._behind:
                    data = self._rest_of(data)
                self._behind += len(data)
            if data:
                feed(data)

        held: Any = stream
        self._behind = len(held._buffer)
        self._tapped = stream
        held.feed_data = intercept

    def untap(self, stream: asyncio.StreamReader) -> None:
        """Nothing more is taken from `stream`."""
        if self._tapped is stream:
            self._tapped = None

    def _rest_of(self, data: bytes) -> bytes:
        """Takes in what was read; gives back what is left to `parse`, which also raises what is to be raised."""
        try:
            data, at = self._take(data)
        except ProtocolError:
            self._refused = True
            return data
        return data[at:]

    async def parse(self, data: bytes = b"") -> None:
        """Takes in what was read, and hands on every message that is there whole.

        Raises:
            ProtocolError: these bytes are not of the protocol.
        """
        read, resets = len(data), self._resets
        self.heard = True
        try:
            if self._refused:
                raise ProtocolError
            data, at = self._take(data)
            while at < len(data):
                if data[at] in (_H, _M):
                    at = await self._queue(data, at)
                else:
                    end = data.find(_CRLF, at) + len(_CRLF)
                    self.buf.extend(data[at:end])
                    await super().parse()
                    at = end
                if resets != self._resets:
                    return
                data, at = self._take(data, at)
        finally:
            if resets == self._resets:
                self._behind = max(0, self._behind - read)

    def _take(self, data: bytes, at: int = 0) -> tuple[bytes, int]:
        """Takes in what was read, from `at` on, up to what is to be awaited: where that is, in which bytes."""
        waiting = self.state == parser.AWAITING_MSG_PAYLOAD
        if waiting and len(self.buf) + len(data) - at < self.needed:
            self.buf.extend(data[at:])
            return b"", 0
        if self.buf:
            self.buf.extend(data[at:])
            data, self.buf, at = bytes(self.buf), bytearray(), 0
        if waiting:
            self.state = parser.AWAITING_CONTROL_LINE
            if not self._sink(self._words, data, at, at + self.needed - len(_CRLF)):
                return b" ".join(self._words) + _CRLF + data[at:], 0
            at += self.needed
        while at < len(data):
            begin = at
            end = data.find(_CRLF, at)
            if end < 0:
                if len(data) - at > parser.MAX_CONTROL_LINE_SIZE and data[at] in (_H, _M):
                    raise ProtocolError
                self.buf.extend(data[at:])
                return b"", 0
            if data[at] not in (_H, _M):
                break
            words = data[at:end].split(b" ")
            at = end + len(_CRLF)
            end = at + _number(words[-1])
            self.needed = end + len(_CRLF) - at
            if end + len(_CRLF) > len(data):
                self._words, self.state = words, parser.AWAITING_MSG_PAYLOAD
                self.buf.extend(data[at:])
                return b"", 0
            if not self._sink(words, data, at, end):
                return data, begin
            at = end + len(_CRLF)
        return data, at

    def _sink(self, words: list[bytes], data: bytes, at: int, end: int) -> bool:
        """Gives a message, its control line in `words`, to its sink; False if it has none."""
        subject, sid, reply, header_bytes = _head(words)
        sink = self._client.sinks.get(sid)
        if sink is None:
            return False
        split = at + header_bytes
        sink(subject, reply, data[at:split], data[split:end])
        return True

    async def _queue(self, data: bytes, at: int) -> int:
        """Hands the whole message at `at` to its subscription's queue: where the next one is."""
        end = data.find(_CRLF, at)
        words = data[at:end].split(b" ")
        subject, sid, reply, header_bytes = _head(words)
        at = end + len(_CRLF)
        split, end = at + header_bytes, at + _number(words[-1])
        await self._client._process_msg(_number(sid), subject, reply, data[split:end], data[at:split])
        return end + len(_CRLF)


def _head(words: list[bytes]) -> tuple[bytes, bytes, bytes, int]:
    """Subject, subscription, reply and size of the header block, from a control line.

    ``MSG subject sid [reply] size`` or ``HMSG subject sid [reply] header_size size``.
    """
    with_headers = words[0] == b"HMSG"
    try:
        subject, sid, *reply = words[1 : -2 if with_headers else -1]
    except ValueError:
        raise ProtocolError from None
    return subject, sid, reply[0] if reply else b"", _number(words[-2]) if with_headers else 0


def _number(word: bytes) -> int:
    if not word.isdigit():
        raise ProtocolError
    try:
        return int(word)
    except ValueError:
        raise ProtocolError from None
