"""The client takes messages apart as nats-py does, wherever the reads happen to end."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.errors import ProtocolError, UnexpectedEOF
from turns import turns

from stages.runtime.client import GuardedClient
from stages.runtime.headers import read_headers

SINK, QUEUE = 7, 8
Taken = tuple[bytes, bytes, bytes, bytes]

subjects = st.binary(min_size=1, max_size=12).filter(lambda text: not set(text) & set(b" \t\r\n"))
blocks = st.sampled_from([b"", b"NATS/1.0\r\n\r\n", b"NATS/1.0 100 Idle\r\nA: b\r\n\r\n", b"x"])
messages = st.tuples(subjects, st.one_of(st.just(b""), subjects), blocks, st.binary(max_size=40))


def wire(sid: int, message: Taken) -> bytes:
    subject, reply, block, payload = message
    words = [b"HMSG" if block else b"MSG", subject, b"%d" % sid, *([reply] if reply else [])]
    words += [b"%d" % len(block)] if block else []
    return b" ".join([*words, b"%d" % (len(block) + len(payload))]) + b"\r\n" + block + payload + b"\r\n"


PING = (0, b"", b"", b"", b"")


class Listening(GuardedClient):
    """A client that notes what reaches it, in turn; it reads from `stream`."""

    def __init__(self, stream: asyncio.StreamReader | None = None) -> None:
        super().__init__()
        self.noted: list[tuple[int, bytes, bytes, bytes, bytes]] = []
        self.errors: list[Exception] = []
        self.pinged, self.reading = asyncio.Event(), asyncio.Event()
        self.sinks[b"%d" % SINK] = lambda *message: self.noted.append((SINK, *message))
        self._status = self.CONNECTED
        self._io_reader = stream
        self._transport: Any = self

    def at_eof(self) -> bool:
        assert self._io_reader is not None
        return self._io_reader.at_eof()

    async def read(self, limit: int) -> bytes:
        assert self._io_reader is not None
        self.reading.set()
        return await self._io_reader.read(limit)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, payload: bytes, headers: bytes | None) -> None:
        await turns(1)  # As for a queue that is full.
        self.noted.append((sid, subject, reply, headers or b"", payload))

    async def _process_ping(self) -> None:
        self.noted.append(PING)
        self.pinged.set()
        await turns(3)  # Answering takes some, as a write does.

    async def _process_op_err(self, e: Exception) -> None:
        self.errors.append(e)


kinds = st.sampled_from(["sink", "queue", "ping"])
comings = st.lists(st.tuples(kinds, messages), max_size=12)


def on_the_wire(turn: tuple[str, Taken]) -> bytes:
    kind, message = turn
    return b"PING\r\n" if kind == "ping" else wire(SINK if kind == "sink" else QUEUE, message)


def noted(turn: tuple[str, Taken]) -> tuple[int, bytes, bytes, bytes, bytes]:
    kind, message = turn
    return PING if kind == "ping" else (SINK if kind == "sink" else QUEUE, *message)


@settings(max_examples=300, derandomize=True)
@given(comings, st.lists(st.integers(0, 900), max_size=12))
def test_messages_come_out_whole_wherever_the_reads_end(sent: list[tuple[str, Taken]], cuts: list[int]) -> None:
    bytes_ = b"".join(map(on_the_wire, sent))
    ends = sorted({0, len(bytes_), *(cut for cut in cuts if cut < len(bytes_))})
    client = Listening()

    async def read() -> None:
        for start, end in pairwise(ends):
            await client._ps.parse(bytes_[start:end])

    asyncio.run(read())
    assert client.noted == list(map(noted, sent))


@settings(max_examples=300, derandomize=True)
@given(comings, st.lists(st.tuples(st.integers(0, 900), st.integers(0, 3)), max_size=12), st.integers(0, 30))
def test_what_sinks_take_at_once_overtakes_nothing(
    sent: list[tuple[str, Taken]], cuts: list[tuple[int, int]], early: int
) -> None:
    bytes_ = b"".join(map(on_the_wire, sent))
    pauses = {cut: pause for cut, pause in cuts if cut < len(bytes_)} | {len(bytes_): 0}

    async def read() -> Listening:
        stream = asyncio.StreamReader(limit=16)
        client = Listening(stream)
        stream.feed_data(bytes_[:early])  # Read before the read loop began.
        reading = asyncio.create_task(client._read_loop())
        await client.reading.wait()
        start = early
        for end, pause in sorted(pauses.items()):
            if end > start:
                stream.feed_data(bytes_[start:end])
                start = end
            await turns(pause)  # What varies is how many the read loop had before more came.
        stream.feed_eof()
        async with asyncio.timeout(10):
            await reading
        return client

    client = asyncio.run(read())
    assert client.noted == list(map(noted, sent))
    assert [type(error) for error in client.errors] == [UnexpectedEOF]


async def test_sinks_take_at_once_while_the_read_loop_lasts_and_not_after() -> None:
    stream = asyncio.StreamReader()
    client = Listening(stream)
    reading = asyncio.create_task(client._read_loop())
    await client.reading.wait()
    stream.feed_data(wire(SINK, (b"a", b"", b"", b"1")))
    assert [message[1] for message in client.noted] == [b"a"]
    reading.cancel()
    await asyncio.wait([reading])
    stream.feed_data(wire(SINK, (b"b", b"", b"", b"2")))
    assert [message[1] for message in client.noted] == [b"a"]


async def test_sinks_take_nothing_more_from_a_connection_that_was_given_up() -> None:
    stream = asyncio.StreamReader()
    client = Listening(stream)
    reading = asyncio.create_task(client._read_loop())
    await client.reading.wait()
    client._ps.reset()
    stream.feed_data(wire(SINK, (b"a", b"", b"", b"1")))
    assert client.noted == []
    reading.cancel()
    await asyncio.wait([reading])


async def test_a_connection_that_was_given_up_does_not_count_for_the_next_one() -> None:
    old, new = asyncio.StreamReader(), asyncio.StreamReader()
    client = Listening(old)
    first = asyncio.create_task(client._read_loop())
    await client.reading.wait()
    old.feed_data(b"PING\r\n" * 40)
    await client.pinged.wait()
    client.noted.clear()
    client._ps.reset()
    client._io_reader = new
    new.feed_data(b"PING\r\n" * 20)
    client.reading.clear()
    second = asyncio.create_task(client._read_loop())
    await client.reading.wait()
    first.cancel()
    await asyncio.wait([first])
    new.feed_data(wire(SINK, (b"a", b"", b"", b"1")))
    new.feed_eof()
    async with asyncio.timeout(10):
        await second
    assert [message[0] for message in client.noted] == [0] * 20 + [SINK]


async def test_what_is_not_of_the_protocol_ends_the_connection_from_wherever_it_was_read() -> None:
    stream = asyncio.StreamReader()
    client = Listening(stream)
    reading = asyncio.create_task(client._read_loop())
    await client.reading.wait()
    stream.feed_data(wire(SINK, (b"a", b"", b"", b"1")) + b"MSG a 7 x\r\n")
    async with asyncio.timeout(10):
        await reading
    assert [message[1] for message in client.noted] == [b"a"]
    assert [type(error) for error in client.errors] == [ProtocolError]


@pytest.mark.parametrize(
    "line",
    [
        b"MSG\r\n",
        b"MSG a b c\r\n",
        b"MSG a 7 x 1 2\r\n",
        b"HMSG a 7 1\r\n",
        b"HMSG a 7 9 x\r\n",
        b"HUH\r\n",
        b"MSG a 7 -15\r\n",
        b"HMSG a 7 -9 3\r\n",
        b"MSG a 7 1_0\r\n",
    ],
)
def test_what_is_not_of_the_protocol_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        asyncio.run(Listening()._ps.parse(line + b"12345678901234567890\r\n"))


def test_a_control_line_without_end_is_refused() -> None:
    with pytest.raises(ProtocolError):
        asyncio.run(Listening()._ps.parse(b"MSG " + b"a" * 5000))


def test_a_status_is_read_from_the_first_line() -> None:
    assert read_headers(b"NATS/1.0 409 Message Size Exceeds MaxBytes\r\nNats-Pending-Messages: 3\r\n\r\n") == {
        "Status": "409",
        "Description": "Message Size Exceeds MaxBytes",
        "Nats-Pending-Messages": "3",
    }
    assert read_headers(b"NATS/1.0 503\r\n\r\n") == {"Status": "503"}
    assert read_headers(b"NATS/1.0\r\nStatus-Not: 503\r\n\r\n") == {"Status-Not": "503"}
    assert read_headers(b"") == {}
    assert read_headers(b"NATS/1.0 404 no: \xff\r\n\r\n") == {"Status": "404", "Description": "no: \ufffd"}


def test_headers_of_any_bytes_are_read() -> None:
    block = b"NATS/1.0\r\n Name : a: b \r\nno header\r\nTwice: 1\r\nTwice: 2\r\nBytes\xfe: \xff\r\nEmpty:\r\n\r\n"
    assert read_headers(block) == {"Name": "a: b", "Twice": "2", "Bytes\ufffd": "\ufffd", "Empty": ""}
