"""What a server refuses, by its own configuration, is told where an operator looks, and waited for where that helps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from commands import run_fictl
from nats.aio.msg import Msg
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, StorageType, StreamConfig
from nats.js.errors import BadRequestError
from pipeline import until

from cluster import nodes
from cluster.apply import apply, plan
from cluster.gateway import Gateway
from cluster.nodes import EmbeddedCluster, find_nats_server
from cluster.ports import HeldPorts
from cluster.status import FULL_SHARE, look_at_account, status
from contracts.errors import ClusterUnavailableError, DefiniteError, TopologyError
from contracts.settings import Settings
from contracts.subjects import EVENTS, EVENTS_PUBLISH_PATTERN
from stages.runtime.access import Servers
from stages.runtime.api import NO_MESSAGE, NO_STREAM, Api
from stages.runtime.client import GuardedClient
from stages.runtime.connection import connect
from stages.runtime.control import Control
from stages.runtime.facts import read_cluster
from stages.runtime.reader import OrderedReader
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


@pytest_asyncio.fixture
async def plain_server() -> AsyncIterator[str]:
    """The URL of a server without JetStream."""
    with HeldPorts() as held:
        (port,) = held.take(1)
        process = await asyncio.create_subprocess_exec(
            *(find_nats_server(), "-a", "127.0.0.1", "-p", str(port)), stderr=asyncio.subprocess.DEVNULL
        )
    try:
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.kill()
        await process.wait()


async def test_a_permission_that_is_missing_is_told_in_the_log_and_at_readyz(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server answers no such request: it looks like silence to whoever asked."""
    user = 'users: [{user: fi, password: x, permissions: {publish: {deny: "no.such"}}}]'
    async with one_server(tmp_path, monkeypatch, f"authorization {{ {user} }}\nno_auth_user: fi") as client:
        chosen = Settings(health_port=0)
        async with Watch("hash", "hash-0", chosen, {}) as watch:
            api = Api(client, chosen)
            watch.connected(api, Control(api, lambda: None), Servers(()))
            assert (await watch.ready()).checks["connected"].ok
            for _ in range(2):
                with pytest.raises(NatsTimeoutError):
                    await client.request("no.such", b"", timeout=1)
            check = (await watch.ready()).checks["connected"]
        assert not check.ok
        assert "permissions violation for publish" in check.why
        told = [record for record in caplog.records if "a server refuses" in record.getMessage()]
        assert len(told) == 1
        # What ends the connection is told too.
        client._transport.write(b"NONSENSE\r\n")  # type: ignore[union-attr]

        async def is_back() -> bool:
            return client.stats["reconnects"] > 0 and client.is_connected

        await until(is_back, "the server closes the connection, and takes another", LIMIT_S)
        assert any("a server refuses: unknown protocol" in message for message in caplog.messages)


async def test_why_there_is_no_connection_is_told_until_there_is_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with EmbeddedCluster(tmp_path, 1) as cluster:
        then: list[str] = []
        client = await connect(cluster.urls, "cut off", reconnected=lambda: then.append(client.trouble))
        try:
            await cluster.nodes[0].stop()

            async def told() -> bool:
                return "no connection: ConnectionRefusedError" in client.trouble

            await until(told, "it says why there is no connection", LIMIT_S)
            assert any("no connection: " in record.getMessage() for record in caplog.records)
            await cluster.nodes[0].start()

            async def is_back() -> bool:
                return bool(then)

            await until(is_back, "it is connected", LIMIT_S)
            assert then == [""]
        finally:
            await client.close()


async def test_who_may_not_connect_at_all_is_told_what_the_server_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = "users: [{user: a, password: a}, {user: b, password: b}]"
    async with one_server(tmp_path, monkeypatch, f"authorization {{ {users} }}\nno_auth_user: b") as client:
        url = f"nats://a:wrong@{client.connected_url.netloc}"
        with pytest.raises(ClusterUnavailableError, match="refused the connection: Authorization Violation"):
            await connect([url], "wrong", wait_s=1)


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


async def test_an_account_without_room_is_named_by_a_gateway_and_by_who_looks_at_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """FI_EVENTS itself is nearly empty then: that it is full, as was said, led nowhere."""
    account = "{ users: [{user: a, password: a}], jetstream: { max_file: 100KB, max_mem: 1MB } }"
    async with one_server(tmp_path, monkeypatch, f"accounts {{ A: {account} }}\nno_auth_user: a") as client:
        jetstream = client.jetstream(timeout=30)
        await jetstream.add_stream(name=EVENTS, subjects=[EVENTS_PUBLISH_PATTERN])
        await jetstream.add_stream(name="OTHER", subjects=["other"])
        await jetstream.publish("other", bytes(98_000))
        (storage, memory) = await look_at_account(client)
        assert (storage.what, storage.bytes_max, memory.what, memory.bytes) == ("storage", 100 * 1024, "memory", 0)
        assert 0.9 < storage.used < 1
        with pytest.raises(BadRequestError, match="resource limits exceeded"):
            await _fill_up(jetstream)
        with pytest.raises(ClusterUnavailableError, match=r"\(resource limits exceeded for account \(10002\)\)"):
            await Gateway(client).publish(b"{}", "clinic", "c", "e", deadline_s=0.1)
        assert "FI_EVENTS is full; holding what is to be published (resource limits exceeded" in caplog.text
        assert (await status(client, Servers(()))).allowances[0].used > FULL_SHARE


@pytest.mark.parametrize(
    ("limits", "step"),
    [
        ("max_streams: 3", "maximum number of streams reached .*raise the account's `max_streams`: 8 are ours"),
        ("disk_max_stream_bytes: 1MB", "exceeds account limit .*raise the account's `disk_max_stream_bytes`"),
        ("max_file: 1MB", "insufficient storage .*the servers, or their account"),
    ],
)
async def test_a_limit_that_streams_do_not_fit_is_told_with_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: str, step: str
) -> None:
    account = f"{{ users: [{{user: a, password: a}}], jetstream: {{ {limits} }} }}"
    async with one_server(tmp_path, monkeypatch, f"accounts {{ A: {account} }}\nno_auth_user: a") as client:
        with pytest.raises(TopologyError, match=step):
            await apply(client, Settings(replicas=1))


async def test_a_reader_asks_for_no_more_at_once_than_the_servers_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull for more is refused, and a new consumer's too: there were a thousand of them within seconds."""
    limited = f'jetstream {{ store_dir: "{tmp_path / "limited"}", limits: {{ max_request_batch: 3 }} }}'
    async with one_server(tmp_path, monkeypatch, limited) as client:
        jetstream = client.jetstream(timeout=30)
        await jetstream.add_stream(name="ROOM", subjects=["room"], storage="memory")
        for number in range(10):
            await jetstream.publish("room", str(number).encode())
        start = asyncio.Future[int]()
        start.set_result(1)
        reader = OrderedReader(Api(client, Settings()), "ROOM", "room", batch=8, locate=lambda: start, nonce="greedy")
        reader.start()
        try:
            read: list[bytes] = []
            async with asyncio.timeout(LIMIT_S):
                while len(read) < 10:
                    await reader.wait()
                    read += [message.data for message in reader.take(10, 1000)]
            assert read == [str(number).encode() for number in range(10)]
            assert reader.opened == 1
        finally:
            await reader.close()


async def _fill_up(jetstream: JetStreamContext) -> None:
    while True:
        await jetstream.publish("other", bytes(50))


async def _fill(writer: FencedWriter) -> None:
    number = 0
    while True:
        number += 1
        await writer.publish(bytes(50_000), str(number))


@pytest.mark.parametrize(
    "verb", [("members",), ("cluster", "plan"), ("cluster", "status"), ("status",), ("config", "check", "--connect")]
)
async def test_a_server_without_jetstream_is_called_that_with_the_next_step(
    plain_server: str, verb: tuple[str, ...]
) -> None:
    ran = await run_fictl(*verb, "--nats", plain_server)
    told = " ".join((ran.out + ran.err).split())
    assert ran.code == 3, told
    assert "no JetStream answers there" in told
    assert "is JetStream off? It needs `jetstream {…}` in each server's configuration" in told
    assert "kill -9" not in told


async def test_a_server_whose_jetstream_still_starts_is_waited_for(plain_server: str) -> None:
    client = await connect([plain_server], "asks")
    answering = await connect([plain_server], "answers")
    try:
        planning = asyncio.create_task(plan(client, Settings(), wait_s=LIMIT_S))
        await until(lambda: client.stats["out_msgs"] > 1, "it has been asked, with nobody to answer")
        assert not planning.done()
        missing = {"code": 404, "err_code": NO_STREAM, "description": "stream not found"}

        async def answer(message: Msg) -> None:
            await message.respond(json.dumps({"error": missing}).encode())

        await answering.subscribe("$JS.API.STREAM.INFO.*", cb=answer)
        assert {change.action for change in (await planning).changes} == {"create"}
    finally:
        await client.close()
        await answering.close()


async def test_what_something_else_than_jetstream_answers_is_no_answer(plain_server: str) -> None:
    client = await connect([plain_server], "asks")
    answering = await connect([plain_server], "answers")
    garbage = [
        b"",
        b"+OK",
        b'{"error": 1}',
        b"\xff",
        b'{"message": {"subject": 1}}',
        b"{}",
        b"[]",
        b'{"success": true}',
    ]
    try:
        none = {"code": 404, "err_code": NO_MESSAGE, "description": "no message found"}

        async def answer(message: Msg) -> None:
            await message.respond(garbage.pop() if garbage else json.dumps({"error": none}).encode())

        await answering.subscribe("$JS.API.STREAM.MSG.GET.*", cb=answer)
        await answering.subscribe("$JS.API.DIRECT.GET.*", cb=answer)
        await answering.flush()
        api = Api(client, Settings(), give_up_s=LIMIT_S)
        assert await api.last_message("ANY", "any") is None
        assert garbage == []
        with pytest.raises(ClusterUnavailableError, match="Something else than JetStream answers there"):
            await Api(client, Settings()).last_messages("ANY", ["any"])
    finally:
        await client.close()
        await answering.close()


@pytest.mark.parametrize(
    "garbage", [b"", b"{}", b"[]", b'{"config": 1}', b'{"config": {}, "state": 1}', b'{"error": 1}']
)
async def test_a_stage_that_starts_waits_for_jetstream_where_something_else_answers(
    plain_server: str, garbage: bytes
) -> None:
    client = await connect([plain_server], "asks")
    answering = await connect([plain_server], "answers")
    try:

        async def answer(message: Msg) -> None:
            await message.respond(garbage)

        await answering.subscribe("$JS.API.STREAM.INFO.*", cb=answer)
        await answering.flush()
        with pytest.raises(ClusterUnavailableError, match="Something else than JetStream answers there"):
            await read_cluster(client, wait_s=0.1)
    finally:
        await client.close()
        await answering.close()
