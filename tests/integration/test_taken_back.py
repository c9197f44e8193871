"""Partitions that are taken back, or go from store to store, on real streams: also where that is interrupted."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
from lanes import going
from nats.aio.client import Client
from pipeline import until
from test_persist_lane import Cluster, new_store, ready

from cluster.audit import audit_store, read_partition
from cluster.rewind import Rewinder
from cluster.testing.disk import flip
from contracts.errors import NotOursError
from contracts.receipts import Receipt
from contracts.telemetry import EVENT_PERSIST_FAILED
from stages.persist.aside import ASIDE
from stages.persist.disk import LOCAL_STORE
from stages.persist.header import read_live_header
from stages.persist.moved import let_go_of_moved
from stages.persist.names import list_shards, live_name
from stages.persist.rows import ROW_BYTES
from stages.persist.store import EventStore
from stages.persist.storedir import Store
from stages.runtime.access import Servers

pytestmark = pytest.mark.cluster


async def receipts(cluster: Cluster) -> list[Receipt]:
    """All of them, void ones too."""
    return [row for row in (await read_partition(cluster.api, 0))[0] if isinstance(row, Receipt)]


def shown(*stores: Store) -> list[bytes]:
    """The ids of the events that readers see in the stores."""
    ids = []
    for store in stores:
        with EventStore(store.directory) as events:
            ids += [found.event.event_id for found in events.iterate()]
    return ids


async def assert_each_event_once(cluster: Cluster, cluster_urls: tuple[str, ...], *stores: Store) -> None:
    assert sorted(shown(*stores)) == sorted(cluster.accepted)
    assert (await cluster.receipt()).persisted == len(cluster.accepted)
    for store in stores:
        report = await audit_store(store.directory, Servers(cluster_urls))
        assert report.store.ok, report.store.problems


async def test_a_partition_that_comes_back_leaves_no_file_of_what_was_given_up(
    client: Client, cluster_urls: tuple[str, ...], tmp_path: Path
) -> None:
    cluster = await ready(client)
    first, second = [await new_store(client, tmp_path / name) for name in ("first", "second")]
    async with cluster.upstream():
        async with going(cluster.persist(first)):
            await cluster.publish(5)
        async with going(cluster.persist(first, seal_on_drain=False)):
            await cluster.publish(20)
        await Rewinder(cluster.api, second).move(0)
        async with going(cluster.persist(second)):
            await until(cluster.is_committed, "made again", 60)
        # Nobody ran on the first store since, that would have let go of what the second one has made again.
        told = await Rewinder(cluster.api, first).move(0)
        assert told.aside == (live_name(0, 2),)
        async with going(cluster.persist(first)):
            await cluster.publish(5)
    await assert_each_event_once(cluster, cluster_urls, first, second)


class KilledError(Exception):
    """The process was killed."""


def killed(*_: Any) -> None:
    raise KilledError


async def test_a_way_back_that_was_interrupted_leaves_nothing_of_what_was_given_up_either(
    client: Client, cluster_urls: tuple[str, ...], tmp_path: Path
) -> None:
    cluster = await ready(client)
    first, second = [await new_store(client, tmp_path / name) for name in ("first", "second")]
    async with cluster.upstream():
        async with going(cluster.persist(first, seal_on_drain=False)):
            await cluster.publish(20)
        await Rewinder(cluster.api, second).move(0)
        async with going(cluster.persist(second)):
            await until(cluster.is_committed, "made again", 60)
        with pytest.raises(KilledError):
            await Rewinder(cluster.api, first, files=LOCAL_STORE._replace(set_aside=killed)).move(0)
        told = await Rewinder(cluster.api, first).rebuild(0)
        assert told is not None
        assert (told.aside, told.again) == ((live_name(0, 1),), 0)
        assert await Rewinder(cluster.api, first).rebuild(0) is None
        async with going(cluster.persist(first)):
            await cluster.publish(5)
    await assert_each_event_once(cluster, cluster_urls, first, second)


async def test_a_rebuild_that_was_interrupted_is_taken_up_again(
    client: Client,
    cluster_urls: tuple[str, ...],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")
    async with cluster.upstream():
        async with going(cluster.persist(store, seal_on_drain=False)):
            for _ in range(4):
                await cluster.publish(1)
        path = store.directory / live_name(0, 1)
        flip(path, read_live_header(path).index.offset + 2 * ROW_BYTES + 8)
        with pytest.raises(KilledError):
            await Rewinder(cluster.api, store, files=LOCAL_STORE._replace(set_aside=killed)).rebuild(0)
        before = path.read_bytes()
        async with going(cluster.persist(store, seal_on_drain=False)):

            async def refused() -> bool:
                return "run `fictl rebuild` if one was interrupted" in reasons(caplog)

            await until(refused, "persist cuts nothing that readers were shown", 60)
            assert path.read_bytes() == before
            told = await Rewinder(cluster.api, store).rebuild(0)
            assert told is not None
            assert (told.aside, told.events, told.again) == ((path.name,), 2, 0)
            assert [moved.read_bytes() for moved in (store.directory / ASIDE).iterdir()] == [before]
            await cluster.publish(5)
    await assert_each_event_once(cluster, cluster_urls, store)


def reasons(caplog: pytest.LogCaptureFixture) -> str:
    """Why partitions stopped."""
    return "\n".join(vars(record)["reason"] for record in caplog.records if record.message == EVENT_PERSIST_FAILED)


async def test_an_old_store_that_cannot_move_its_files_aside_stops_alone(
    client: Client, cluster_urls: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = await ready(client)
    first, second = [await new_store(client, tmp_path / name) for name in ("first", "second")]
    obstacle = first.directory / ASIDE
    old = cluster.persist(first)
    async with cluster.upstream():
        async with going(cluster.persist(first, seal_on_drain=False)):
            await cluster.publish(20)
        await Rewinder(cluster.api, second).move(0)
        obstacle.write_bytes(b"")
        async with going(cluster.persist(second)):
            await until(cluster.is_committed, "made again", 60)
            before = len(await receipts(cluster))
            with caplog.at_level(logging.ERROR):
                await let_go_of_moved(cluster.api, first, 1, "start", None, time.time_ns)
            assert "is not let go of" in caplog.text
            async with going(old):

                async def tried_again() -> bool:
                    return reasons(caplog).count("cannot be moved to") >= 2

                await until(tried_again, "the old store tries again", 60)
                await cluster.publish(5)
                assert [one for one in (await receipts(cluster))[before:] if one.takeover] == []
                obstacle.unlink()

                async def moved() -> bool:
                    return obstacle.is_dir() and not list_shards(first.directory).get(0)

                await until(moved, "it lets go by itself", 60)
            await cluster.publish(5)
    await assert_each_event_once(cluster, cluster_urls, first, second)


async def test_a_move_from_an_owner_that_goes_on_committing_says_whom_to_stop_and_changes_nothing(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at what would be done writes nothing, and so is never refused."""
    cluster = await ready(client)
    first, second = [await new_store(client, tmp_path / name) for name in ("first", "second")]
    check_retained = Rewinder._check_retained

    async def while_it_commits(self: Rewinder, *arguments: Any) -> None:
        await check_retained(self, *arguments)
        await cluster.publish(1)
        await until(cluster.is_committed, "the owner commits", 60)

    monkeypatch.setattr(Rewinder, "_check_retained", while_it_commits)
    async with cluster.upstream(), going(cluster.persist(first)):
        await cluster.publish(5)
        await until(cluster.is_committed, "the owner commits", 60)
        assert (await Rewinder(cluster.api, second).move(0, dry_run=True)).from_store == first.store_id
        with pytest.raises(NotOursError, match=f"store {first.store_id} on .* goes on committing. Stop persist there"):
            await Rewinder(cluster.api, second).move(0)
        assert (await cluster.receipt()).store == first.store_id
        assert list_shards(second.directory) == {}
