"""When a client writes what it is given: at once while little is under way, else once a turn of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from urllib.parse import urlparse

import pytest
from nats.aio.client import Server
from nats.errors import BadSubjectError
from turns import turns

from stages.runtime.client import GuardedClient

INBOX = "_INBOX.x."
FEW = 4


class Socket:
    """Stands for a connection whose other end answers when the test says so."""

    def __init__(self) -> None:
        self.writes: list[list[bytes]] = []
        self.unwritten = 0
        self.closed = False
        self._io_writer = self.transport = self

    def close(self) -> None:
        self.closed = True

    async def wait_closed(self) -> None:
        pass

    def at_eof(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return self.unwritten

    def is_closing(self) -> bool:
        return self.closed

    def write(self, data: bytes) -> None:
        if self.closed:
            raise RuntimeError("the handler is closed")
        self.writes.append([data])

    def writelines(self, lines: Iterable[bytes]) -> None:
        if self.closed:
            raise RuntimeError("the handler is closed")
        self.writes.append(list(lines))

    async def drain(self) -> None:
        pass


class Connected(GuardedClient):
    """A client that is connected to a `Socket`."""

    def __init__(self) -> None:
        super().__init__()
        self.socket = Socket()
        self._transport = self.socket  # type: ignore[assignment]
        self._current_server = Server(urlparse("nats://127.0.0.1:4222"))
        self._status = self.CONNECTED
        self._max_payload = 1024 * 1024
        self._flush_queue: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()
        self._request_inbox, self._request_id = INBOX, 1
        self.asked = 0

    @property
    def sizes(self) -> list[int]:
        """Messages in each write so far."""
        return [len(lines) for lines in self.socket.writes]

    def ask(self, tasks: asyncio.TaskGroup, count: int, payload: bytes = b"") -> None:
        """So many requests, from tasks of their own."""
        for _ in range(count):
            self.asked += 1
            tasks.create_task(self.request(f"subject.{self.asked}", payload, timeout=60))

    def answer(self, *numbers: int) -> None:
        """The answers to these requests, as one read brings them."""
        for number in numbers:
            self._answered(f"{INBOX}{number}".encode(), b"", b"", b"yes")


async def test_while_little_is_under_way_each_message_is_written_at_once() -> None:
    client = Connected()
    async with asyncio.TaskGroup() as tasks:
        for number in range(1, 20):
            client.ask(tasks, 1)
            # The request's own turn, and not one more.
            await turns(1)
            assert client.sizes == [1] * number
            client.answer(number)
            await turns()


async def test_while_much_is_under_way_what_one_turn_sends_is_written_together() -> None:
    client = Connected()
    async with asyncio.TaskGroup() as tasks:
        for number in range(1, 6):
            client.ask(tasks, 10)
            await turns()
            assert sum(client.sizes) == number * 10
            assert client.sizes[-1] >= 10 - FEW
        client.answer(*range(1, 51))


async def test_what_the_socket_does_not_take_is_left_to_the_flusher() -> None:
    client = Connected()
    client.socket.unwritten = 1
    async with asyncio.TaskGroup() as tasks:
        client.ask(tasks, 3)
        await turns()
        assert client.sizes == []
        assert client._flush_queue.qsize() == 1
        client.answer(1, 2, 3)


async def test_a_connection_that_was_just_lost_is_left_to_the_flusher() -> None:
    client = Connected()
    client.socket.closed = True
    await client.publish("some.subject", b"1")
    await turns()
    assert client.socket.writes == []
    assert client._flush_queue.qsize() == 1


async def test_a_transport_that_sends_when_drained_is_left_to_the_flusher() -> None:
    """nats-py's WebSocket transport keeps what is written until then."""
    client = Connected()
    del client.socket._io_writer
    await client.publish("subject", b"x")
    await turns()
    assert client.sizes == []
    assert client._flush_queue.qsize() == 1


async def test_a_header_value_with_a_line_break_stays_one_header() -> None:
    client = Connected()
    await client.publish("subject", b"x", headers={"traceparent": "a\r\nNats-Msg-Id: forged"})
    ((written,),) = client.socket.writes
    assert b"traceparent" in written
    assert b"\r\nNats-Msg-Id" not in written


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB x 0", "a\tb"])
async def test_a_subject_that_would_be_another_command_is_refused(subject: str) -> None:
    client = Connected()
    with pytest.raises(BadSubjectError):
        await client.request(subject, b"", timeout=1)
    with pytest.raises(BadSubjectError):
        await client.publish("good", b"", reply=subject or "a b")
    assert client.sizes == []


@pytest.mark.parametrize("is_web_socket", [False, True])
async def test_what_is_pending_when_a_client_is_closed_goes_out_before(is_web_socket: bool) -> None:
    client = Connected()
    if is_web_socket:
        del client.socket._io_writer
    client.socket.unwritten = 1
    await client.publish("subject", b"last")
    assert client.sizes == []
    await client.close()
    assert client.sizes == [1]
    assert client.socket.closed


@pytest.mark.parametrize("is_web_socket", [False, True])
@pytest.mark.parametrize("is_noticed", [False, True])
async def test_a_client_is_closed_although_its_connection_is_gone(is_web_socket: bool, is_noticed: bool) -> None:
    client = Connected()
    if is_web_socket:
        del client.socket._io_writer
    client.socket.unwritten = 1
    await client.publish("subject", b"1")
    client.socket.closed = True
    if is_noticed:
        client._status = client.RECONNECTING
    await client.close()
    assert client.sizes == []
    assert client.is_closed


async def test_a_connection_that_is_lost_while_it_is_closed_is_closed_all_the_same() -> None:
    client = Connected()
    client.socket.unwritten = 1
    await client.publish("subject", b"1")
    asyncio.get_running_loop().call_soon(client.socket.close)
    await client.close()
    assert client.is_closed
    assert client.sizes == [1]
