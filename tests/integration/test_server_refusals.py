"""What a server refuses, by its own configuration, is told where an operator looks, and waited for where that helps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.api import DiscardPolicy, StorageType, StreamConfig
from pipeline import until

from cluster import nodes
from cluster.nodes import EmbeddedCluster
from contracts.errors import DefiniteError
from contracts.settings import Settings
from stages.runtime.api import Api
from stages.runtime.client import GuardedClient
from stages.runtime.connection import connect
from stages.runtime.control import Control
from stages.runtime.watch import Watch
from stages.runtime.writer import FencedWriter

pytestmark = pytest.mark.cluster

LIMIT_S = 60.0


@asynccontextmanager
async def one_server(
    directory: Path, monkeypatch: pytest.MonkeyPatch, configuration: str
) -> AsyncIterator[GuardedClient]:
    """A connection to a server with so much more in its configuration."""
    real = nodes.server_config
    monkeypatch.setattr(nodes, "server_config", lambda *given: f"{real(*given)}{configuration}\n")
    async with EmbeddedCluster(directory, 1) as cluster:
        client = await connect(cluster.urls, "refused")
        try:
            yield client
        finally:
            await client.close()


async def test_a_permission_that_is_missing_is_told_in_the_log_and_at_readyz(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server answers no such request: it looks like silence to whoever asked."""
    user = 'users: [{user: fi, password: x, permissions: {publish: {deny: "no.such"}}}]'
    async with one_server(tmp_path, monkeypatch, f"authorization {{ {user} }}\nno_auth_user: fi") as client:
        chosen = Settings(health_port=0)
        async with Watch("hash", "hash-0", chosen, {}) as watch:
            api = Api(client, chosen)
            watch.connected(api, Control(api, lambda: None))
            assert (await watch.ready()).checks["connected"].ok
            for _ in range(2):
                with pytest.raises(NatsTimeoutError):
                    await client.request("no.such", b"", timeout=1)
            check = (await watch.ready()).checks["connected"]
        assert not check.ok
        assert "permissions violation for publish" in check.why
        told = [record for record in caplog.records if "the server refuses" in record.getMessage()]
        assert len(told) == 1
        # What ends the connection is told too.
        client._transport.write(b"NONSENSE\r\n")  # type: ignore[union-attr]

        async def closed() -> bool:
            return client.is_closed

        await until(closed, "the server closes the connection", LIMIT_S)
        assert "unknown protocol" in client.refusal


async def test_a_message_that_is_too_large_by_its_headers_alone_is_refused_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server would close the connection over it, again and again, and never say why."""
    async with one_server(tmp_path, monkeypatch, "") as client:
        await client.jetstream(timeout=30).add_stream(name="ROOM", subjects=["room"], storage="memory")
        writer = FencedWriter(Api(client, Settings()), "ROOM", "room", "nonce")
        with pytest.raises(DefiniteError, match="max_payload"):
            await writer.publish(bytes(client.max_payload), "1")
        assert client.is_connected


@pytest.mark.parametrize("storage", [StorageType.FILE, StorageType.MEMORY])
async def test_a_full_account_holds_a_writer_until_there_is_room_and_a_sealed_stream_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: StorageType
) -> None:
    limits = "max_file: 1MB, max_mem: 1MB, max_streams: 10, max_consumers: 10"
    account = f"{{ users: [{{user: a, password: a}}], jetstream: {{ {limits} }} }}"
    async with one_server(tmp_path, monkeypatch, f"accounts {{ A: {account} }}\nno_auth_user: a") as client:
        jetstream = client.jetstream(timeout=30)
        config = StreamConfig(name="ROOM", subjects=["room"], storage=storage, discard=DiscardPolicy.NEW)
        await jetstream.add_stream(config)
        writer = FencedWriter(Api(client, Settings()), "ROOM", "room", "nonce")
        filling = asyncio.create_task(_fill(writer))
        try:

            async def held() -> bool:
                assert not filling.done()
                return writer.full_since is not None

            await until(held, "the writer holds", LIMIT_S)
            before = writer.expected_seq
            await jetstream.purge_stream("ROOM", keep=1)

            async def goes_on() -> bool:
                return writer.expected_seq > before

            await until(goes_on, "the writer goes on", LIMIT_S)
            await jetstream.update_stream(config.evolve(sealed=True))
            with pytest.raises(DefiniteError, match="sealed"):
                async with asyncio.timeout(LIMIT_S):
                    await filling
        finally:
            filling.cancel()
            await asyncio.wait((filling,))


async def _fill(writer: FencedWriter) -> None:
    number = 0
    while True:
        number += 1
        await writer.publish(bytes(50_000), str(number))
