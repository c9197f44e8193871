"""An uplink on which a message takes longer than a dead server is waited for: the message gets through all the same."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import pytest
from nats.js.api import StreamConfig
from papers import Authority

from cluster.gateway import Gateway
from cluster.nodes import find_nats_server
from cluster.ports import HeldPorts
from cluster.testing.waiting import until
from contracts.errors import ClusterUnavailableError
from stages.runtime.access import Access
from stages.runtime.connection import connect, server_name
from stages.runtime.sockets import unsent_bytes

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

UPLINK_BYTES_S = 125_000
"""1 Mbit/s."""
BODY = b"x" * 700_000
PIECE_BYTES = 4096
LIMIT_S = 90.0
DEADLINE_S = 1.0
WHO = UUID(int=1)


@asynccontextmanager
async def narrow(port: int) -> AsyncIterator[str]:
    """The URL at which a server is reached over an uplink of `UPLINK_BYTES_S`."""
    listening = socket.socket()
    # What it takes from the client and has not passed on must be little, or the uplink would look wide.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * PIECE_BYTES)
    listening.bind(("127.0.0.1", 0))

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)

        async def up() -> None:
            with contextlib.suppress(OSError):
                while data := await reader.read(PIECE_BYTES):
                    await asyncio.sleep(len(data) / UPLINK_BYTES_S)
                    far_writer.write(data)
            far_writer.close()

        async def down() -> None:
            with contextlib.suppress(OSError):
                while data := await far_reader.read(PIECE_BYTES):
                    writer.write(data)
            writer.close()

        await asyncio.gather(up(), down())

    server = await asyncio.start_server(join, sock=listening, limit=PIECE_BYTES)
    try:
        yield f"nats://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize("is_tls", [False, True], ids=["tcp", "tls"])
async def test_a_large_message_gets_through_and_a_deadline_holds(is_tls: bool, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "hospital")
    certificate, key = authority.sign("server")
    tls = f'tls {{ cert_file: "{certificate}", key_file: "{key}" }}' if is_tls else ""
    access = Access(ca_file=str(authority.file)) if is_tls else Access()
    with HeldPorts() as held:
        (port,) = held.take(1)
        config = tmp_path / "server.conf"
        config.write_text(f'port: {port}\nserver_name: s\njetstream {{ store_dir: "{tmp_path}/s" }}\n{tls}\n')
        server = await asyncio.create_subprocess_exec(
            find_nats_server(), "-c", config, stderr=asyncio.subprocess.DEVNULL
        )
    try:
        url = f"nats://127.0.0.1:{port}"

        async def greets() -> bool:
            return await server_name(url) is not None

        await until(greets, "the server greets", 60)
        maker = await connect([url], "maker", access=access)
        jetstream = maker.jetstream(timeout=30)
        await jetstream.add_stream(StreamConfig(name="FI_EVENTS", subjects=["fi.events.>"]))
        async with narrow(port) as slow_url:
            client = await connect([slow_url], "gateway", access=access)
            gateway = Gateway(client)
            async with asyncio.timeout(LIMIT_S):
                assert (await gateway.publish(BODY, "a", str(WHO), "id-1")).origin == 1
                begun_s = time.monotonic()
                with pytest.raises(ClusterUnavailableError):
                    await gateway.publish(BODY, "a", str(WHO), "id-2", deadline_s=DEADLINE_S)
                # Not when it has left, after five times as long.
                assert unsent_bytes(client._transport) > 0
                assert time.monotonic() - begun_s >= DEADLINE_S
                # It left all the same: what is given up may be stored.
                assert (await gateway.publish(BODY, "a", str(WHO), "id-2")).origin == 2
            assert (await jetstream.stream_info("FI_EVENTS")).state.messages == 2
            await client.close()
        await maker.close()
    finally:
        server.kill()
        await server.wait()
