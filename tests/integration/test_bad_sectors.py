"""Disks that cannot read a page of a live shard: its partition stops, loudly, or does not need the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lanes import going
from nats.aio.client import Client
from pipeline import until
from test_persist_lane import new_store, ready, stored

from contracts.telemetry import EVENT_PERSIST_FAILED
from stages.persist.header import read_live_header
from stages.persist.names import list_shards

pytestmark = pytest.mark.cluster


async def test_a_bad_sector_among_commits_stops_the_partition_until_it_can_be_read_and_ends_no_process(
    client: Client,
    tmp_path: Path,
    bad_sector: Callable[[Path, int], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")
    async with cluster.upstream():
        async with going(cluster.persist(store, seal_on_drain=False)):
            await cluster.publish(3)
        path = list_shards(store.directory)[0][0].path
        bad_sector(path, read_live_header(path).index.offset)
        async with going(cluster.persist(store)) as (task,):

            async def stopped() -> bool:
                reasons = [
                    vars(record)["reason"] for record in caplog.records if record.message == EVENT_PERSIST_FAILED
                ]
                return any(f"Input/output error: '{path}'" in reason for reason in reasons) or task.done()

            await until(stopped, "the partition says that it stops")
            assert not task.done()
            monkeypatch.undo()
            await cluster.publish(1)
    assert stored(store) == set(cluster.accepted)


async def test_a_bad_sector_in_the_room_for_commits_is_made_good_and_nothing_stops(
    client: Client, tmp_path: Path, bad_sector: Callable[[Path, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")
    async with cluster.upstream():
        async with going(cluster.persist(store, seal_on_drain=False)):
            await cluster.publish(3)
        path = list_shards(store.directory)[0][0].path
        header = read_live_header(path)
        bad_sector(path, header.index.offset + 4096)
        bad_sector(path, header.frames.offset + header.frames.bytes // 2)
        async with going(cluster.persist(store)):
            await cluster.publish(3)
    assert EVENT_PERSIST_FAILED not in caplog.text
    assert stored(store) == set(cluster.accepted)
