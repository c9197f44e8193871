"""Servers that say nothing, as frozen ones do, or that are not there."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from commands import stop_stage_once_it_says

from cluster.ports import HeldPorts
from cluster.testing.waiting import until
from contracts.errors import ClusterUnavailableError
from stages.runtime.connection import connect
from stages.runtime.names import Names

GREETING = b'INFO {"server_id":"S","version":"2.15.1","max_payload":1048576,"headers":true}\r\n'
TRIES = 4


async def answer_pings(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: bytes = b"PONG\r\n") -> None:
    """A server that does nothing else once it has greeted."""
    writer.write(GREETING)
    with contextlib.suppress(OSError):
        while line := await reader.readline():
            if line.startswith(b"PING"):
                writer.write(answer)
    writer.close()


async def test_no_socket_is_kept_for_a_try_that_a_server_left_unanswered() -> None:
    hang_up, tried = asyncio.Event(), asyncio.Event()
    came = open_now = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal came, open_now
        came, open_now = came + 1, open_now + 1
        if came == 1:
            writer.write(GREETING)
            await reader.readuntil(b"PING\r\n")
            writer.write(b"PONG\r\n")
            await hang_up.wait()
        elif came > TRIES:
            tried.set()
        if came > 1:
            await reader.read()
        open_now -= 1
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = await connect([f"nats://127.0.0.1:{port}"], "test")
        hang_up.set()
        async with asyncio.timeout(60):
            await tried.wait()
        # The one that is being tried, and perhaps one whose end has not been read yet.
        assert open_now <= 2
        await client.close()


async def test_a_server_that_says_nothing_is_given_up_when_the_time_is_over() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        # Each try takes as long as `CONNECT_ATTEMPT`: as many tries as refused connections would be a minute.
        async with asyncio.timeout(30):
            with pytest.raises(ClusterUnavailableError, match="within 5 s"):
                await connect([f"nats://127.0.0.1:{port}"], "test", wait_s=5.0)


@pytest.mark.parametrize(
    "greeting",
    [
        b"HTTP/1.1 502 Bad Gateway\r\n\r\n",
        b"INFO []\r\n",
        b"INFO\r\n",
        b"x" * 70_000,
        b"",
        b'INFO {"connect_urls":["[::1"]}\r\n',
        GREETING + b"-ERR\r\n",
    ],
    ids=lambda greeting: repr(greeting[:24]),
)
async def test_whatever_greets_at_a_reconnect_the_client_goes_on_trying(
    greeting: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    greetings = [GREETING]
    came, back = asyncio.Event(), asyncio.Event()
    hang_up: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wrong = greetings[0] is greeting
        writer.write(greetings[0])
        hang_up.append(writer)
        try:
            while not wrong and (line := await reader.readline()):
                if line.startswith(b"PING"):
                    writer.write(b"PONG\r\n")
            if wrong:
                await reader.read()
                came.set()
        except OSError:
            came.set()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    client = await connect([url], "test", reconnected=back.set)
    try:
        greetings[0] = greeting
        hang_up[0].close()
        async with asyncio.timeout(60):
            await came.wait()
            await until(lambda: bool(client.trouble), "it says why it is not connected")
            assert any(client.trouble == message for message in caplog.messages)
            greetings[0] = GREETING
            await back.wait()
            assert client.trouble == ""
    finally:
        await client.close()
        server.close()


async def test_of_several_addresses_each_is_tried_for_the_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that nobody answers at, as of a network that is cut off, does not take the time of those behind it."""

    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    waiting = [socket.socket() for _ in range(4)]
    try:
        port = full.getsockname()[1]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))

        async def addresses(self: Names, host: str) -> list[str]:
            return ["127.0.0.1", "127.0.0.2"]

        monkeypatch.setattr(Names, "addresses", addresses)
        async with await asyncio.start_server(answer_pings, "127.0.0.2", port):
            client = await connect([f"nats://nats.hospital:{port}"], "test")
            assert client.is_connected
            await client.close()
    finally:
        for one in (full, *waiting):
            one.close()


async def test_a_server_that_answers_the_first_ping_with_something_else_is_tried_again() -> None:
    answers = [b"PING\r\nPONG\r\n", b"PONG\r\n"]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer_pings(reader, writer, answers.pop(0) if len(answers) > 1 else answers[0])

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        client = await connect([f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"], "test")
        assert client.is_connected
        await client.close()


async def test_a_client_closed_at_any_moment_of_its_reconnecting_leaves_no_task() -> None:
    for turns in range(40):
        writers: list[asyncio.StreamWriter] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)  # noqa: B023 - each round has its server
            await answer_pings(reader, writer)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = await connect([f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"], "test")
        server.close()
        writers[0].close()
        # Nothing is awaited: each number of turns of the loop is another moment to be closed at.
        for _ in range(turns):
            await asyncio.sleep(0)
        await client.close()
        reconnecting = client._reconnection_task
        assert reconnecting is None or reconnecting.done(), f"after {turns} turns"


async def test_a_stage_that_waits_for_its_first_server_stops_when_told() -> None:
    with HeldPorts() as held:
        (port,) = held.take(1)
    ran = await stop_stage_once_it_says("connection error", "ingest", "--nats", f"nats://127.0.0.1:{port}")
    assert ran.code == 0, ran.err
    assert "draining" in ran.err
