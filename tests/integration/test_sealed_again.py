"""A shard whose owner died just after its seal record is, to the last byte, the file that the record speaks of."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from lanes import going
from nats.aio.client import Client
from test_persist_lane import new_store, ready, stored

from cluster.testing.disk import flip
from stages.persist.disk import LOCAL
from stages.persist.names import FIRST_SHARD, live_name
from stages.persist.partition import PartitionFiles
from stages.persist.records import kept_record, record_path

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("hurt", ["file", "record"])
async def test_what_an_owner_left_that_died_after_a_seal_record_is_made_good(
    client: Client, tmp_path: Path, hurt: str
) -> None:
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")

    class Killed(PartitionFiles):
        def finish_seal(self, *arguments: Any) -> None:
            raise RuntimeError("killed")

    async with cluster.upstream():
        # What ends in the background ends the lane, though it has no other reason to look for an hour.
        lane = cluster.persist(store, LOCAL._replace(open=Killed.open), shard_events_max=5, probe_s=3600.0)
        dying = asyncio.create_task(lane.run())
        await cluster.publish(5)
        await cluster.send(uuid4())
        with pytest.raises(RuntimeError, match="killed"):
            async with asyncio.timeout(60):
                await dying
        (seal,) = await cluster.seals()
        path = store.directory / seal.file
        assert (store.directory / live_name(0, FIRST_SHARD)).exists()
        if hurt == "file":
            flip(path, path.stat().st_size // 2)
        else:
            record_path(path).unlink()
        async with going(cluster.persist(store)):
            await cluster.publish(1)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == seal.sha256
    assert kept_record(path) == seal
    assert await cluster.records() == [(1, store.store_id), (2, store.store_id)], "none was published twice"
    assert not (store.directory / live_name(0, FIRST_SHARD)).exists()
    assert stored(store) == set(cluster.accepted)
