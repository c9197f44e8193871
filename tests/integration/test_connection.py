"""Which server a process connects to: near a stream's leader or beside it, and to any other where that cannot be."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from nats.js.api import StreamConfig

from cluster.nodes import EmbeddedCluster, find_nats_server
from cluster.ports import HeldPorts
from cluster.testing.waiting import until
from contracts.errors import ClusterUnavailableError
from stages.runtime.client import GuardedClient
from stages.runtime.connection import connect, connect_beside, connect_near

pytestmark = pytest.mark.cluster

STREAM = "FI_PLACES"


def server_of(client: GuardedClient) -> str:
    return str(client._server_info["server_name"])


async def test_near_the_leader_or_beside_it_and_elsewhere_once_that_server_is_gone(tmp_path: Path) -> None:
    async with EmbeddedCluster(tmp_path) as cluster:
        observer = await connect(cluster.urls, "observer")
        jetstream = observer.jetstream(timeout=10)
        await jetstream.add_stream(StreamConfig(name=STREAM, subjects=["places.>"], num_replicas=3))
        cluster_info = (await jetstream.stream_info(STREAM)).cluster
        assert cluster_info is not None
        leader = cluster_info.leader
        assert leader is not None
        near = await connect_near(cluster.urls, STREAM, "near")
        assert server_of(near) == leader
        others = sorted({"n1", "n2", "n3"} - {leader})
        # Whatever order the servers are named in, all choose the same one.
        beside = await connect_beside(cluster.urls, STREAM, "beside")
        beside_too = await connect_beside(cluster.urls[::-1], STREAM, "beside-too")
        assert (server_of(beside), server_of(beside_too)) == (others[0], others[0])

        await cluster.node(others[0]).kill()
        await until(lambda: beside.is_connected and server_of(beside) != others[0], "it is connected elsewhere")
        next_one = await connect_beside(cluster.urls, STREAM, "next")
        assert server_of(next_one) == others[1]
        for client in (observer, near, beside, beside_too, next_one):
            await client.close()


async def test_where_no_leader_is_known_any_server_serves(cluster_urls: tuple[str, ...]) -> None:
    for choose in (connect_near, connect_beside):
        client = await choose(cluster_urls, "NO_SUCH_STREAM", "anywhere")
        assert client.is_connected
        await client.close()


async def test_a_tls_url_is_never_served_in_plain_text(cluster_urls: tuple[str, ...]) -> None:
    with pytest.raises(ClusterUnavailableError, match="does not speak TLS"):
        await connect([url.replace("nats://", "tls://") for url in cluster_urls], "test", wait_s=1.0)


async def test_a_server_that_refuses_the_user_is_not_called_absent(tmp_path: Path) -> None:
    with HeldPorts() as held:
        (port,) = held.take(1)
        config = tmp_path / "server.conf"
        config.write_text(f'port: {port}\nauthorization {{ user: "a", password: "b" }}\n')
        server = await asyncio.create_subprocess_exec(
            find_nats_server(), "-c", config, stderr=asyncio.subprocess.DEVNULL
        )
    try:
        client = await connect([f"nats://a:b@127.0.0.1:{port}"], "test")
        await client.close()
        with pytest.raises(ClusterUnavailableError, match=r"nats://\*\*\*@\S+ refused .*Authorization Violation"):
            await connect([f"nats://a:wrong@127.0.0.1:{port}"], "test", wait_s=1.0)
    finally:
        server.kill()
        await server.wait()


async def test_a_server_that_was_not_named_is_connected_to_with_the_same_password(tmp_path: Path) -> None:
    """Once all that were named are gone; those that its servers name no more are forgotten."""
    password = "/a@b:c#%"
    servers: dict[str, asyncio.subprocess.Process] = {}
    with HeldPorts() as held:
        ports = held.take(6)

    async def start(number: int) -> None:
        config = tmp_path / f"{number}.conf"
        config.write_text(
            f'host: 127.0.0.1\nport: {ports[number]}\nserver_name: "{number}"\n'
            f'authorization {{ user: a, password: "{password}" }}\n'
            f'cluster {{ name: c, listen: "127.0.0.1:{ports[number + 3]}", routes: ["nats://127.0.0.1:{ports[4]}"] }}\n'
        )
        servers[str(number)] = await asyncio.create_subprocess_exec(
            find_nats_server(), "-c", config, stderr=asyncio.subprocess.DEVNULL
        )

    async def kill(name: str) -> None:
        servers[name].kill()
        await servers[name].wait()

    def known() -> set[int | None]:
        return {server.uri.port for server in client._server_pool}

    try:
        for number in range(3):
            await start(number)
        client = await connect([f"nats://a:{quote(password, safe='')}@127.0.0.1:{ports[0]}"], "test", wait_s=30)
        await until(lambda: known() == set(ports[:3]), "it has heard of all")
        await kill("0")
        await until(lambda: client.is_connected and server_of(client) != "0", "it is connected to another one")
        for other in {"1", "2"} - {server_of(client)}:
            await kill(other)
        await until(lambda: len(known()) == 2, "the one that is gone is forgotten, the one that was named is not")
        assert ports[0] in known()
        assert len(client._server_pool) == 2
        await client.close()
    finally:
        for process in servers.values():
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest.mark.parametrize("which", range(3))
async def test_a_cancellation_that_comes_together_with_an_answer_is_not_lost(
    which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`which` of the waits of a connection: for the socket, the server's greeting, or its answer to ours."""
    wait_for, waits = asyncio.wait_for, itertools.count()

    async def cancelled_meanwhile(what: Awaitable[Any], timeout: float | None) -> Any:
        answer = asyncio.ensure_future(what)
        if next(waits) == which:
            # Called before `wait_for` is told: what it waits for is there, and it has not run since.
            answer.add_done_callback(lambda _: connecting.cancel())
        return await wait_for(answer, timeout)

    async with EmbeddedCluster(tmp_path, 1) as cluster:
        [node] = cluster.nodes

        def connections() -> int:
            with urlopen(f"{node.monitor_url}/connz", timeout=10) as answer:
                return int(json.load(answer)["num_connections"])

        async def alone() -> bool:
            return await asyncio.to_thread(connections) == 0

        monkeypatch.setattr(asyncio, "wait_for", cancelled_meanwhile)
        connecting = asyncio.create_task(connect(cluster.urls, "cancelled"))
        with pytest.raises(asyncio.CancelledError):
            await connecting
        monkeypatch.undo()
        assert next(waits) > which
        await until(alone, "no connection is left")
