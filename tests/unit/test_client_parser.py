"""The client takes messages apart as nats-py does, wherever the reads happen to end."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.errors import ProtocolError

from stages.runtime.client import GuardedClient, read_headers

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


class Listening(GuardedClient):
    """A client without a connection that notes what reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Taken] = []
        self.processed: list[tuple[Any, ...]] = []
        self.pings = 0
        self.sinks[b"%d" % SINK] = lambda *message: self.taken.append(message)

    async def _process_msg(self, *message: Any) -> None:
        self.processed.append(message)

    async def _process_ping(self) -> None:
        self.pings += 1


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(messages, max_size=6), st.lists(st.integers(0, 600), max_size=12))
def test_messages_come_out_whole_wherever_the_reads_end(sent: list[Taken], cuts: list[int]) -> None:
    bytes_ = b"".join(b"PING\r\n" + wire(SINK, message) + wire(QUEUE, message) for message in sent)
    ends = sorted({0, len(bytes_), *(cut for cut in cuts if cut < len(bytes_))})
    client = Listening()

    async def read() -> None:
        for start, end in pairwise(ends):
            await client._ps.parse(bytes_[start:end])

    asyncio.run(read())
    assert client.taken == sent
    assert client.processed == [(QUEUE, s, reply, payload, block) for s, reply, block, payload in sent]
    assert client.pings == len(sent)


@pytest.mark.parametrize(
    "line", [b"MSG\r\n", b"MSG a b c\r\n", b"MSG a 7 x 1 2\r\n", b"HMSG a 7 1\r\n", b"HMSG a 7 9 x\r\n", b"HUH\r\n"]
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
