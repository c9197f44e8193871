"""A shard's age limit holds however busy its partition is."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
from lanes import going
from nats.aio.client import Client
from pipeline import until
from test_persist_lane import new_store, ready

from stages.persist.actor import PersistLane
from stages.persist.names import list_shards, next_name
from stages.runtime.api import Api

pytestmark = pytest.mark.cluster


async def test_what_comes_when_a_shard_is_old_goes_into_the_next_one(client: Client, tmp_path: Path) -> None:
    """A lane to which input never ceases to come does not look at anything else."""
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")
    settings = msgspec.structs.replace(cluster.api.settings, probe_s=3600.0, seal_on_drain=False, shard_age_s_max=60.0)
    now_ns = time.time_ns()
    lane = PersistLane(Api(client, settings), store, 0, cluster.name(), lambda _: None, clock_ns=lambda: now_ns)
    async with cluster.upstream(), going(lane):
        await cluster.publish(1)
        await cluster.publish(1)
        assert [file.shard for file in list_shards(store.directory)[0]] == [1]
        now_ns += 60 * 10**9
        await cluster.publish(1)
        assert [file.shard for file in list_shards(store.directory)[0]] == [1, 2]
        end = (await cluster.receipt()).ends[store.store_id]
        assert (end.shard, end.commits) == (2, 1)


async def test_an_idle_lane_makes_the_next_shard_ready_before_this_one_is_old(client: Client, tmp_path: Path) -> None:
    """Who comes when it is old waits for a name, and not for a file to be written through."""
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")
    settings = msgspec.structs.replace(cluster.api.settings, probe_s=0.1, seal_on_drain=False, shard_age_s_max=60.0)
    now_ns = time.time_ns()
    lane = PersistLane(Api(client, settings), store, 0, cluster.name(), lambda _: None, clock_ns=lambda: now_ns)
    prepared = store.directory / next_name(0, 2)

    async def is_prepared() -> bool:
        return prepared.exists()

    async with cluster.upstream(), going(lane):
        await cluster.publish(1)
        assert not prepared.exists()
        now_ns += 55 * 10**9
        await until(is_prepared, "the next shard is prepared", 60)
        assert [file.shard for file in list_shards(store.directory)[0]] == [1]
