"""What an owner of a partition has to trim and what it may not, and how it learns that it is none any more."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from lanes import going, sealing_at
from nats.aio.client import Client
from pipeline import until
from test_persist_lane import new_store, ready, stored

from cluster.rewind import Rewinder
from contracts.backups import BACKUP_FILE, LastBackup, encode_last_backup
from contracts.receipts import Receipt
from contracts.subjects import INPUT_STREAM, input_filter
from stages.persist import actor
from stages.persist.room import EventsRoom
from stages.runtime.api import Api

pytestmark = pytest.mark.cluster

HASHED, INPUT = INPUT_STREAM["persist"], input_filter("persist", 0)


async def test_what_an_owner_committed_that_died_before_it_trimmed_is_trimmed_by_the_next(
    client: Client, tmp_path: Path
) -> None:
    """A hop that is full of it lets nothing in that would be committed."""
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")

    async def frames() -> int:
        message, count = None, 0
        while message := await cluster.api.first_message(HASHED, INPUT, from_seq=message.seq + 1 if message else 1):
            count += 1
        return count

    async def trimmed() -> bool:
        return await frames() == 1

    async with cluster.upstream(), going(cluster.persist(store, trim_s=3600.0)):
        for _ in range(3):
            await cluster.publish(1)
    assert await frames() == 3
    async with going(cluster.persist(store)):
        await until(trimmed, "only the last frame stays, as its writer's checkpoint", 60)


async def test_what_no_backup_has_leaves_a_stream_that_others_fill_though_nothing_more_comes_in_here(
    client: Client, tmp_path: Path
) -> None:
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")
    mark = encode_last_backup(LastBackup(at_ns=1, to="/mnt/backup", copied={0: 1}))
    (store.directory / BACKUP_FILE).write_bytes(mark)

    class Room(EventsRoom):
        async def look(self) -> None:
            self.spare = not others_fill

    async def starts_after(shard: int) -> bool:
        """`FI_EVENTS` has all that came after the shard, and the message that this follows."""
        seals = await cluster.seals()
        return len(seals) == 2 and await cluster.first_kept() == seals[shard - 1].last_origin

    others_fill = False
    lane = cluster.persist(store, room=Room(cluster.api), sealed_kept=0, shard_events_max=10)
    async with cluster.upstream(), going(lane):
        for _ in range(3):
            await cluster.publish(10)
        await until(lambda: starts_after(1), "what a backup has has left", 60)
        others_fill = True
        await until(lambda: starts_after(2), "what is sealed has left", 60)


async def test_an_idle_owner_learns_that_another_store_has_the_partition(client: Client, tmp_path: Path) -> None:
    """Or its files would stay its own, and what the other gives up of them, until something comes in."""
    cluster = await ready(client)
    first, second = [await new_store(client, tmp_path / name) for name in ("first", "second")]
    lane = cluster.persist(first)

    async def stands_by() -> bool:
        return lane._standing_by

    async with going(lane):
        async with cluster.upstream():
            await cluster.publish(1)
        await Rewinder(cluster.api, second).move(0)
        await until(stands_by, "it stands by", 60)


async def test_an_owner_that_is_none_any_more_and_cannot_see_it_takes_nothing_from_the_stream(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a frozen leader thaws: it answers as it was before the partition went to another store."""
    cluster = await ready(client)
    first, second = [await new_store(client, tmp_path / name) for name in ("first", "second")]
    seal_now = threading.Event()

    slow = cluster.persist(first, sealing_at(seal_now), shard_events_max=20, sealed_kept=0)

    async def has_tried_to_claim() -> bool:
        return slow._sessions > 1

    try:
        async with cluster.upstream(), going(slow):
            for _ in range(2):
                await cluster.publish(20)
            stale = await actor.last_receipt(cluster.api, 0)

            async def last_receipt(_: Api, partition: int) -> tuple[Receipt | None, int]:
                return stale

            monkeypatch.setattr(actor, "last_receipt", last_receipt)
            assert (await Rewinder(cluster.api, second).move(0)).origin == 0
            seal_now.set()
            await until(has_tried_to_claim, "what it sealed may leave once a claim is accepted, and none is", 60)
            assert await cluster.records() == [(1, first.store_id)], "records are not fenced by receipts"
            monkeypatch.undo()
        assert await cluster.first_kept() == 1
        async with cluster.upstream(), going(cluster.persist(second)):
            await cluster.publish(1)
        assert stored(second) == set(cluster.accepted)
    finally:
        seal_now.set()
