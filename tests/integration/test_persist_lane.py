"""Persist on real streams: what it seals, records and trims, also when it is fenced off or killed while it does."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from lanes import going, sealing_at
from nats.aio.client import Client
from nats.js.errors import APIError
from pipeline import until

from cluster.apply import apply
from cluster.audit import read_partition
from cluster.rewind import Rewinder
from cluster.testing.disk import flip
from contracts.backups import BACKUP_FILE, LastBackup, encode_last_backup
from contracts.receipts import Receipt, SealRecord
from contracts.settings import MIB, Settings
from contracts.subjects import EVENTS, STAGES, raw_filter
from contracts.telemetry import EVENT_PERSISTED, EVENT_QUEUED, EVENT_WORKER_STARTED
from stages.hash.core import HashCore
from stages.ingest.core import IngestCore
from stages.persist.actor import PersistLane
from stages.persist.audit import in_force
from stages.persist.disk import LOCAL, Disk
from stages.persist.names import list_shards
from stages.persist.partition import PartitionFiles
from stages.persist.room import EventsRoom
from stages.persist.seal import SealedInfo
from stages.persist.store import EventStore
from stages.persist.storedir import Store, open_store
from stages.persist.trim import Trimmer
from stages.runtime.api import Api
from stages.runtime.checkpoint import last_receipt
from stages.runtime.facts import read_cluster
from stages.runtime.lane import Lane
from stages.runtime.writer import STREAM_FULL
from stages.segment.core import SegmentCore

pytestmark = pytest.mark.cluster

CONSULTATION = UUID(int=1, version=4)


class Cluster:
    """One partition: stages before persist as lanes here, and what was accepted."""

    def __init__(self, client: Client, api: Api) -> None:
        self.client = client
        self.api = api
        self.accepted: list[bytes] = []
        self.last = 0
        self._lanes = 0

    def name(self) -> str:
        self._lanes += 1
        return f"lane-{self._lanes}"

    @asynccontextmanager
    async def upstream(self) -> AsyncIterator[None]:
        lanes = [
            Lane(self.api, core, 0, self.name(), lambda _: None) for core in (IngestCore(), SegmentCore(), HashCore())
        ]
        async with going(*lanes):
            yield

    def persist(self, store: Store, disk: Disk = LOCAL, room: EventsRoom | None = None, **changes: Any) -> PersistLane:
        api = Api(self.client, msgspec.structs.replace(self.api.settings, **changes))
        return PersistLane(api, store, 0, self.name(), lambda _: None, room=room, disk=disk)

    async def send(self, event_id: UUID, filling: str = "", event_type: str = "CORE_STATE_CHANGED") -> None:
        body = {
            "event_id": str(event_id),
            "consultation_id": str(CONSULTATION),
            "event_type": event_type,
            "payload": {"filling": filling},
            "metadata": {"user_id": "a", "session_id": "b"},
        }
        subject = f"fi.events.clinic-1.{CONSULTATION}"
        self.last = (await self.client.jetstream(timeout=10).publish(subject, json.dumps(body).encode())).seq
        self.accepted.append(event_id.bytes)

    async def takes(self, event_id: UUID, filling: str, event_type: str = "CORE_STATE_CHANGED") -> bool:
        """Sends an event; False when `FI_EVENTS` is full."""
        try:
            await self.send(event_id, filling, event_type)
        except APIError as error:
            if error.err_code not in STREAM_FULL:
                raise
            return False
        return True

    async def publish(self, count: int) -> None:
        """So many events, and waits until they are committed."""
        for _ in range(count):
            await self.send(uuid4())
        await until(self.is_committed, "all is committed", 60)

    async def is_committed(self) -> bool:
        receipt, _ = await last_receipt(self.api, 0)
        return receipt is not None and receipt.origin >= self.last

    async def receipt(self) -> Receipt:
        receipt, _ = await last_receipt(self.api, 0)
        assert receipt is not None
        return receipt

    async def first_kept(self) -> int:
        """The first sequence that `FI_EVENTS` still has."""
        message = await self.api.first_message(EVENTS, raw_filter(0))
        assert message is not None
        return message.seq

    async def records(self) -> list[tuple[int, str]]:
        """Shard and store of every seal record."""
        rows, _ = await read_partition(self.api, 0)
        return [(row.shard, row.store) for row in rows if isinstance(row, SealRecord)]

    async def seals(self) -> list[SealRecord]:
        """Those in force."""
        return in_force((await read_partition(self.api, 0))[0])[1]


async def ready(client: Client, **changes: Any) -> Cluster:
    settings = Settings(**{"partitions": 1, "probe_s": 0.5, "trim_s": 0.05, **changes})
    await apply(client, settings)
    return Cluster(client, Api(client, settings))


async def new_store(client: Client, path: Path) -> Store:
    return open_store(path, (await read_cluster(client)).cluster_id, now_ns=1)


def stored(store: Store) -> set[bytes]:
    with EventStore(store.directory) as events:
        return {found.event.event_id for found in events.iterate()}


async def test_the_log_leads_from_the_start_of_work_through_three_queues_to_the_shard(
    client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")
    with caplog.at_level(logging.DEBUG, logger="stages"):
        async with cluster.upstream(), going(cluster.persist(store)):
            await cluster.publish(1)

    def stages_that_say(event: str) -> list[str]:
        said = [vars(record) for record in caplog.records if record.message == event]
        last = 0 if event == EVENT_WORKER_STARTED else cluster.last
        assert all((record["partition"], record["origin"]) == (0, last) for record in said)
        return [record["stage"] for record in said]

    assert sorted(stages_that_say(EVENT_WORKER_STARTED)) == sorted(STAGES)
    assert stages_that_say(EVENT_QUEUED) == ["ingest", "segment", "hash"]
    assert stages_that_say(EVENT_PERSISTED) == ["persist"]


async def test_told_to_end_with_more_input_waiting_a_lane_shows_readers_its_last_commit(
    client: Client, tmp_path: Path
) -> None:
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")
    committing, go_on = threading.Event(), threading.Event()

    class HeldDisk(PartitionFiles):
        def commit(self, *arguments: Any) -> int:
            committing.set()
            assert go_on.wait(60)
            return super().commit(*arguments)

    lane = cluster.persist(store, LOCAL._replace(open=HeldDisk.open), seal_on_drain=False)

    async def more_waits() -> bool:
        return lane._feed is not None and lane._feed.reader.buffered > 0

    try:
        async with cluster.upstream():
            persisting = asyncio.create_task(lane.run())
            await cluster.send(uuid4())
            assert await asyncio.to_thread(committing.wait, 60)
            await cluster.send(uuid4())
            await until(more_waits, "a second frame waits behind the commit", 60)
        lane.stop()
        go_on.set()
        async with asyncio.timeout(60):
            await persisting
    finally:
        go_on.set()
    assert (await cluster.receipt()).persisted == 1
    assert stored(store) == set(cluster.accepted[:1])


async def test_an_owner_fenced_off_while_it_seals_takes_nothing_from_the_stream_that_the_next_one_needs(
    client: Client, tmp_path: Path
) -> None:
    cluster = await ready(client)
    first, second = [await new_store(client, tmp_path / name) for name in ("first", "second")]
    seal_now = threading.Event()

    async with cluster.upstream():
        async with going(cluster.persist(first)):
            await cluster.publish(20)
        slow = cluster.persist(first, sealing_at(seal_now), shard_events_max=20, probe_s=60.0)
        sealing = asyncio.create_task(slow.run())
        for _ in range(3):
            await cluster.publish(20)
    # Shard 1 is sealed, 2 and 3 are about to be, 4 is live; and ingest rests.
    assert await cluster.records() == [(1, first.store_id)]
    assert (await Rewinder(cluster.api, second).move(0)).origin == 20
    seal_now.set()

    async def stands_by() -> bool:
        return slow._standing_by

    try:
        await until(stands_by, "the first owner learns that it is none any more", 60)
        assert (2, first.store_id) in await cluster.records()
        assert [seal.shard for seal in await cluster.seals()] == [1], "the last words of no owner"
        assert await cluster.first_kept() <= 21
        async with cluster.upstream(), going(cluster.persist(second)):
            await cluster.publish(5)
        receipt = await cluster.receipt()
        assert (receipt.persisted, receipt.duplicates, receipt.dead_lettered) == (85, 0, 0)
        assert stored(second) == set(cluster.accepted[20:])
        assert [(seal.shard, seal.store) for seal in await cluster.seals()] == [
            (1, first.store_id),
            (2, second.store_id),
        ]
    finally:
        slow.stop()
        async with asyncio.timeout(60):
            await sealing


async def test_what_is_sealed_leaves_the_stream_also_when_nothing_comes_in_any_more(
    client: Client, tmp_path: Path
) -> None:
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")
    lane = cluster.persist(store, shard_events_max=10)

    async def trimmed() -> bool:
        return await cluster.first_kept() == 10

    async with cluster.upstream(), going(lane):
        for _ in range(3):
            await cluster.publish(10)
        await until(trimmed, "shard 1 is sealed, shard 2 kept, shard 3 live", 60)


async def test_a_shard_made_again_gets_a_record_of_its_own_though_its_owner_dies_before_it_is_published(
    client: Client, tmp_path: Path
) -> None:
    """The record of the shard that was given up has the same number."""
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")
    die_now = threading.Event()

    class Killed(PartitionFiles):
        def seal(self, *arguments: Any) -> SealedInfo:
            assert die_now.wait(60)
            raise RuntimeError("killed")

    async with cluster.upstream():
        for _ in range(2):
            async with going(cluster.persist(store)):
                await cluster.publish(20)
        newest = [file for file in list_shards(store.directory)[0] if file.sealed][-1].path
        flip(newest, newest.stat().st_size // 2)
        assert (await Rewinder(cluster.api, store).rebuild(0)) is not None
        assert [seal.shard for seal in await cluster.seals()] == [1]
        dying = asyncio.create_task(cluster.persist(store, LOCAL._replace(open=Killed.open), shard_events_max=20).run())
        await until(cluster.is_committed, "shard 2 is made again", 60)
        await cluster.publish(5)
        assert not dying.done()
        die_now.set()
        with pytest.raises(RuntimeError, match="killed"):
            async with asyncio.timeout(60):
                await dying
        assert [seal.shard for seal in await cluster.seals()] == [1]
        async with going(cluster.persist(store)):
            await cluster.publish(1)
    seals = await cluster.seals()
    assert [seal.shard for seal in seals] == [1, 2, 3]
    for seal in seals:
        assert (store.directory / seal.file).exists()


async def test_duplicates_do_not_fill_the_stream_until_the_shard_is_old(client: Client, tmp_path: Path) -> None:
    """A gateway that sends its backlog once more: the shard takes nothing, `FI_EVENTS` all of it."""
    # A third of it, which a shard may hold back, is more than one group of frames.
    cluster = await ready(client, events_bytes_max=24 * MIB)
    store = await new_store(client, tmp_path / "store")
    event_id = uuid4()

    async with cluster.upstream(), going(cluster.persist(store)):
        for number in range(120):
            await until(
                lambda: cluster.takes(event_id, "x" * 500_000),
                f"after {number}, one more is taken; there is room for 50",
                60,
            )
        await until(cluster.is_committed, "all is committed", 60)
    receipt = await cluster.receipt()
    assert (receipt.persisted, receipt.duplicates) == (1, 119)


@pytest.mark.parametrize("sealed_kept", [0, 1])
async def test_what_no_shard_shows_does_not_fill_the_stream_until_the_shard_is_old(
    client: Client, tmp_path: Path, sealed_kept: int
) -> None:
    """Refused events stay in `FI_EVENTS` as well, and all that came while persist was down is in one shard."""
    # A shard may be sealed for want of room once it is 5 s old.
    cluster = await ready(
        client, events_bytes_max=8 * MIB, sealed_kept=sealed_kept, dead_share_max=1.0, shard_age_s_max=300.0
    )
    store = await new_store(client, tmp_path / "store")

    async def takes() -> bool:
        return await cluster.takes(uuid4(), "x" * 500_000, "NO_SUCH_TYPE")

    async with cluster.upstream():
        while await takes():
            pass
        async with going(cluster.persist(store)):
            for number in range(20):
                await until(takes, f"after {number}, one more is taken; there is room for 16", 60)
            await until(cluster.is_committed, "all is committed", 60)
    assert (await cluster.receipt()).dead_lettered == len(cluster.accepted)


async def test_a_stream_that_others_fill_does_not_have_young_shards_sealed(client: Client, tmp_path: Path) -> None:
    cluster = await ready(client, events_bytes_max=8 * MIB, dead_share_max=1.0, shard_age_s_max=300 * 86_400.0)
    store = await new_store(client, tmp_path / "store")

    class Counted(EventsRoom):
        looks_when_short = 0

        async def look(self) -> None:
            await super().look()
            self.looks_when_short += self.short

    async def takes() -> bool:
        return await cluster.takes(uuid4(), "x" * 500_000, "NO_SUCH_TYPE")

    async def claimed() -> bool:
        return (await last_receipt(cluster.api, 0))[0] is not None

    async def looked() -> bool:
        return room.looks_when_short >= 5

    room = Counted(cluster.api)
    async with cluster.upstream(), going(cluster.persist(store, room=room, seal_on_drain=False)):
        await until(claimed, "persist has the partition", 60)
        await cluster.publish(1)
        while await takes():
            pass
        await until(looked, "it was seen that there is no room", 60)
        assert [shard.sealed for shard in list_shards(store.directory)[0]] == [False]


async def test_what_no_backup_has_stays_in_the_stream_while_it_has_room_to_spare(
    client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = await ready(client, sealed_kept=0, shard_events_max=10, events_bytes_max=8 * MIB)
    store = await new_store(client, tmp_path / "store")

    def backed_up(shard: int) -> None:
        mark = encode_last_backup(LastBackup(at_ns=1, to="/mnt/backup", copied={0: shard}))
        (store.directory / BACKUP_FILE).write_bytes(mark)

    async def starts_after(shard: int) -> bool:
        """`FI_EVENTS` has all that came after the shard, and the message that this follows."""
        file = next(file for file in list_shards(store.directory)[0] if file.shard == shard)
        return file.sealed and await cluster.first_kept() == file.last_origin

    backed_up(2)
    async with cluster.upstream(), going(cluster.persist(store)):
        for shards in (3, 5):
            while len(await cluster.seals()) < shards:
                await cluster.publish(10)
            await until(lambda: starts_after(2), "what is copied has left", 60)
        backed_up(4)
        await cluster.publish(20)
        await until(lambda: starts_after(4), "what was copied since has left too", 60)
        small = cluster.last
        for _ in range(12):
            await cluster.send(uuid4(), "x" * 500_000)

        async def left() -> bool:
            return await cluster.first_kept() > small

        await until(left, "what is not copied leaves a stream that is over half full", 60)
    assert "what no backup has leaves FI_EVENTS" in caplog.text


async def test_what_was_sealed_while_a_claim_was_made_waits_for_the_next_claim(client: Client) -> None:
    cluster = await ready(client)
    trimmer = Trimmer(cluster.api, 0, EventsRoom(cluster.api), lambda: None)
    trimmer.sealed(5)
    claiming = trimmer.unclaimed
    trimmer.sealed(9)
    trimmer.claimed(claiming)
    assert (claiming, trimmer.unclaimed) == (5, 9)
