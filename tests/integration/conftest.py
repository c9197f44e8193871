"""One embedded cluster for all tests that break no server; files that do start their own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import PubAck
from nats.js.errors import NoStreamResponseError

from cluster.nodes import EmbeddedCluster
from cluster.testing.waiting import until
from stages.runtime.connection import connect


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The gateway team's example runs on both backends, as it stands in the README."""
    if metafunc.module.__name__ == "test_gateway_example":
        docker = pytest.param("docker", marks=pytest.mark.docker)
        metafunc.parametrize("fi_backend", ["embedded", docker], indirect=True, scope="session")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def embedded_cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedCluster]:
    """Three servers shared by the session. Only `urls` and pids may be used: it lives in another event loop."""
    directory: Path = tmp_path_factory.mktemp("cluster")
    async with EmbeddedCluster(directory) as cluster:
        yield cluster


@pytest.fixture
def cluster_urls(embedded_cluster: EmbeddedCluster) -> tuple[str, ...]:
    """Client URLs of the shared servers."""
    return embedded_cluster.urls


class PatientJetStream(JetStreamContext):
    """Publishes to a stream just made also before the server it is connected to has heard of it."""

    async def publish(self, *arguments: Any, **options: Any) -> PubAck:
        publish = super().publish

        async def answered() -> PubAck | None:
            try:
                return await publish(*arguments, **options)
            except NoStreamResponseError:
                return None

        return await until(answered, "the stream is heard of")


@pytest_asyncio.fixture
async def client(cluster_urls: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    """A connection to the shared servers; all streams are deleted before and after the test."""
    connection = await connect(cluster_urls, "test", wait_s=30)
    monkeypatch.setattr(connection, "jetstream", partial(PatientJetStream, connection))
    await delete_streams(connection)
    yield connection
    await delete_streams(connection)
    await connection.close()


async def delete_streams(connection: Client) -> None:
    """Deletes every stream of the cluster."""
    jetstream = connection.jetstream(timeout=10)
    for info in await jetstream.streams_info():
        await jetstream.delete_stream(str(info.config.name))
