"""A server that lost its routes still answers its clients: the two others go on, and so do those clients."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline import Load, settings, until, workload

from cluster.testing.embedded import EmbeddedBackend
from cluster.testing.ficluster import FiCluster
from contracts.subjects import INPUT_STREAM
from stages.runtime.connection import connect

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


async def test_stages_and_gateways_of_a_server_without_routes_go_on_at_another(tmp_path: Path) -> None:
    quick = settings(partitions=2)
    async with FiCluster(tmp_path, backend="embedded", links=True, settings=quick) as cluster:
        await Load(workload(seed=93, events=50)).publish(cluster.client)

        async def leader() -> str | None:
            found = (await cluster.client.jetstream(timeout=10).stream_info(INPUT_STREAM["segment"])).cluster
            return None if found is None else found.leader

        # Stages connect near the leader of what they write.
        parted = await until(leader, "a leader")
        url = cluster.urls[cluster.servers.index(parted)]
        others = [other for other in cluster.urls if other != url]
        client = await connect([url, *others], "gateway", in_order=True)
        assert isinstance(cluster.backend, EmbeddedBackend)
        cluster.backend.part(parted)
        try:
            load = Load(workload(seed=94, events=200))
            await load.publish(client)
            await cluster.assert_whole(load)
        finally:
            await cluster.heal(parted)
            await client.close()
