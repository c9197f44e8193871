"""A server that freezes with unread bytes before it, over TCP and TLS: its clients go elsewhere, and can be closed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple
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

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

MEGABYTE = 1_000_000
MANY = 64
"""More megabytes than the kernel takes and nats-py keeps pending."""
LIMIT_S = 15.0
"""Less than the farewell of TLS is waited for."""


class Two(NamedTuple):
    """Two servers that do not know each other, each with a stream of events."""

    processes: dict[str, asyncio.subprocess.Process]
    access: Access

    @property
    def urls(self) -> list[str]:
        return list(self.processes)


@pytest.fixture(params=["tcp", "tls"])
async def two(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Two]:
    authority = Authority(tmp_path, "hospital")
    is_tls = request.param == "tls"
    processes: dict[str, asyncio.subprocess.Process] = {}
    try:
        with HeldPorts() as held:
            for port in held.take(2):
                certificate, key = authority.sign(str(port))
                tls = f'tls {{ cert_file: "{certificate}", key_file: "{key}" }}\n' if is_tls else ""
                config = tmp_path / f"{port}.conf"
                config.write_text(
                    f'port: {port}\nserver_name: "{port}"\njetstream {{ store_dir: "{tmp_path}/{port}" }}\n{tls}'
                )
                processes[f"nats://127.0.0.1:{port}"] = await asyncio.create_subprocess_exec(
                    find_nats_server(), "-c", config, stderr=asyncio.subprocess.DEVNULL
                )
        servers = Two(processes, Access(ca_file=str(authority.file)) if is_tls else Access())
        for url in servers.urls:

            async def greets(url: str = url) -> bool:
                return await server_name(url) is not None

            await until(greets, "the server greets", 60)
            client = await connect([url], "maker", access=servers.access)
            await client.jetstream(timeout=30).add_stream(StreamConfig(name="FI_EVENTS", subjects=["fi.events.>"]))
            await client.close()
        yield servers
    finally:
        for process in processes.values():
            process.kill()
            await process.wait()


async def test_a_gateway_goes_on_at_another_server(two: Two) -> None:
    first, second = two.urls
    client = await connect([first, second], "gateway", access=two.access, in_order=True)
    gateway = Gateway(client)
    try:
        two.processes[first].send_signal(signal.SIGSTOP)
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as calls:
            for number in range(MANY):
                calls.create_task(gateway.publish(b"x" * MEGABYTE, "a", str(UUID(int=number)), f"id-{number}"))
        assert client.connected_url is not None
        assert client.connected_url.geturl() == second
    finally:
        await client.close()


async def test_a_deadline_holds_and_a_client_is_closed_while_every_server_is_frozen(two: Two) -> None:
    client = await connect(two.urls, "gateway", access=two.access)
    gateway = Gateway(client)
    try:
        for process in two.processes.values():
            process.send_signal(signal.SIGSTOP)

        async def call(number: int) -> None:
            with pytest.raises(ClusterUnavailableError):
                await gateway.publish(b"x" * MEGABYTE, "a", str(UUID(int=number)), f"id-{number}", deadline_s=1.0)

        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as calls:
            for number in range(MANY):
                calls.create_task(call(number))
    finally:
        async with asyncio.timeout(LIMIT_S):
            await client.close()


async def test_a_client_is_closed_before_its_server_is_known_to_be_frozen(two: Two) -> None:
    client = await connect(two.urls, "publisher", access=two.access)
    assert client.connected_url is not None
    two.processes[client.connected_url.geturl()].send_signal(signal.SIGSTOP)
    for _ in range(MANY):
        await client.publish("any", b"x" * MEGABYTE)
    async with asyncio.timeout(LIMIT_S):
        await client.close()
