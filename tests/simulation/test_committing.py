"""One persist lane on simulated servers and disk: what it leaves alone before a commit is accepted, and its waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from virtual import Ground, in_virtual_time

from cluster.testing.sim.disk import MemoryDisk
from cluster.testing.sim.world import CLUSTER
from cluster.testing.waiting import until
from contracts.budgets import DISK_PAUSE_MAX, DISK_PAUSE_MIN
from contracts.errors import StoreFailedError
from contracts.events import Event
from contracts.flush import Flush, encode_flush
from contracts.frames import Frame, encode_frame
from contracts.receipts import first_receipt
from contracts.subjects import EVENTS, FLUSH_SUBJECT, HASH, PERSIST, RECEIPTS, SEGMENT, publish_subject
from contracts.telemetry import EVENT_PERSIST_FAILED
from stages.persist.actor import PersistLane
from stages.persist.disk import Disk
from stages.persist.flush import Flushes
from stages.persist.room import EARLY_SHARE, EventsRoom
from stages.persist.storedir import Store
from stages.persist.trim import Trimmer
from stages.runtime.api import ApiError, RequestRefusedError
from stages.runtime.base import HOLES_BEFORE_PURGE
from stages.runtime.checkpoint import last_receipt
from stages.runtime.messages import StoredMessage
from stages.runtime.tasks import end_tasks

LANES = {SEGMENT: "fi.segment.0", HASH: "fi.hash.0", PERSIST: "fi.persist.0"}


def a_frame(origin: int, trail: tuple[int, ...]) -> bytes:
    """Of one event."""
    event = Event(
        origin=origin,
        index=0,
        event_id=origin.to_bytes(16, "big"),
        consultation_id=bytes(16),
        site="clinic-1",
        event_type="CONTEXT_UPDATED",
        timestamp_ns=1,
        stamped=True,
        payload=b"{}",
        metadata=b"{}",
        accepted_ns=1,
        audit_hash=bytes(32),
    )
    return encode_frame(Frame(0, origin - 1, origin, origin, trail, "w", 0, b"", (), (event,)))


async def pass_on(ground: Ground, *origins: int) -> None:
    """As the stages before persist: a frame for each, in each hop."""
    for origin in origins:
        trail: tuple[int, ...] = ()
        for stream, subject in LANES.items():
            await ground.publish(subject, a_frame(origin, trail))
            trail = (*trail, ground.broker.streams[stream].last_seq)


def kept(ground: Ground) -> list[int]:
    """How many frames each hop has."""
    return [len(ground.broker.streams[stream].messages) for stream in LANES]


async def is_committed(ground: Ground, origin: int) -> bool:
    """As the last receipt says."""
    receipt, _ = await last_receipt(ground.api, 0)
    return receipt is not None and receipt.origin == origin


def memory(ground: Ground) -> MemoryDisk:
    return MemoryDisk(Store(Path("/node"), "a" * 32, CLUSTER), ground.rng)


@contextlib.asynccontextmanager
async def working(
    ground: Ground, store: Store, disk: Disk, room: EventsRoom | None = None, flushes: Flushes | None = None
) -> AsyncIterator[PersistLane]:
    before, clock_ns = asyncio.all_tasks(), ground.broker.now_ns
    lane = PersistLane(ground.api, store, 0, "nonce", lambda _: None, clock_ns, room=room, flushes=flushes, disk=disk)
    running = asyncio.create_task(lane.run())
    try:
        yield lane
    finally:
        lane.stop()
        await running
    left = {task.get_name() for task in asyncio.all_tasks() - before}
    assert not left & {"trim 0", "seal 0", "read fi.persist.0"}


def test_nothing_leaves_a_hop_before_the_receipt_of_its_commit_is_accepted() -> None:
    """Who was fenced off since does not get that far, and must not take what its successor has still to commit."""

    async def job(ground: Ground) -> None:
        disk = memory(ground)
        async with working(ground, disk.store, disk.as_disk()):
            await pass_on(ground, 1)
            await until(lambda: is_committed(ground, 1), "the first is committed")
            ground.broker.headless_until_s[RECEIPTS] = asyncio.get_running_loop().time() + 5
            await pass_on(ground, 2, 3)
            await asyncio.sleep(4)
            assert len(disk.shards(0)[1].groups) > 1, "a commit waits for its receipt"
            assert kept(ground) == [3, 3, 3]
            await until(lambda: kept(ground) == [1, 1, 1], "all but the last frames have left")
            assert await is_committed(ground, 3)

    in_virtual_time(job, trim_s=0.01)


def test_what_is_not_committed_stays_whatever_is_told_to_be_sealed() -> None:
    """Who tells it goes by the names of files."""

    async def job(ground: Ground) -> None:
        for _ in range(4):
            await ground.publish(publish_subject("clinic-1", "c"), b"{}")
        trimmer = Trimmer(ground.api, 0, EventsRoom(ground.api), lambda: None)
        running = asyncio.create_task(trimmer.run())
        receipt = first_receipt(0, CLUSTER, "s", "w")
        trimmer.committed(msgspec.structs.replace(receipt, origin=2))
        trimmer.sealed(4)
        trimmer.claimed(4)
        stored = ground.broker.streams[EVENTS].messages
        await until(lambda: len(stored) < 4, "it has trimmed")
        assert list(stored) == [2, 3, 4]
        await end_tasks(running)

    in_virtual_time(job)


def test_a_stream_that_refuses_to_be_trimmed_is_asked_again_and_commits_go_on(caplog: pytest.LogCaptureFixture) -> None:
    async def job(ground: Ground) -> None:
        disk, purge, refused = memory(ground), ground.api.purge, list[str]()

        async def refuse(stream: str, subject: str, **_: int | None) -> None:
            refused.append(stream)
            raise RequestRefusedError(subject, ApiError(500, 10110, "stream is not allowed to be purged"))

        async with working(ground, disk.store, disk.as_disk()):
            ground.api.purge = refuse  # type: ignore[method-assign,assignment]
            await pass_on(ground, 1, 2)
            await until(lambda: len(refused) > 3, "it asks again")
            await pass_on(ground, 3)
            await until(lambda: is_committed(ground, 3), "it commits")
            assert "is not trimmed now" in caplog.text
            ground.api.purge = purge  # type: ignore[method-assign]
            await until(lambda: kept(ground) == [1, 1, 1], "it has trimmed")

    in_virtual_time(job)


def test_a_commit_in_hand_when_it_is_told_to_stop_is_shown_before_it_ends() -> None:
    async def job(ground: Ground) -> None:
        disk = memory(ground)
        async with working(ground, disk.store, disk.as_disk()) as lane:
            disk.kill_in_commit = lambda _: bool(lane.stop())
            await pass_on(ground, 1)
            await until(lambda: is_committed(ground, 1), "it is committed")
        assert len(disk.records(0)) == 1

    in_virtual_time(job, seal_on_drain=False)


def test_of_a_nearly_full_stream_shards_are_sealed_sooner_but_not_at_once() -> None:
    class Room(EventsRoom):
        async def look(self) -> None:
            pass

    async def job(ground: Ground) -> None:
        room, disk = Room(ground.api), memory(ground)
        early_s = EARLY_SHARE * ground.settings.shard_age_s_max
        async with working(ground, disk.store, disk.as_disk(), room):
            await pass_on(ground, 1)
            await until(lambda: is_committed(ground, 1), "it is committed")
            await asyncio.sleep(2 * early_s)
            assert not disk.shards(0)[1].sealed, "there is room"
            await pass_on(ground, 2)
            room.short = True
            await until(lambda: disk.shards(0)[1].sealed, "it is old enough", early_s)
            await pass_on(ground, 3)
            await asyncio.sleep(early_s / 2)
            assert not disk.shards(0)[2].sealed
            await until(lambda: disk.shards(0)[2].sealed, "it is old enough too", early_s)

    in_virtual_time(job)


async def ask(flushes: Flushes, target: int) -> None:
    """For all up to there to be sealed."""
    data = encode_flush(Flush(cluster=CLUSTER, targets={0: target}, since_ns=0, by="somebody"))
    await flushes.take(StoredMessage(FLUSH_SUBJECT, 1, 0, data, {}))


def test_a_flush_is_done_at_once_whether_it_waits_for_the_commit_or_for_the_lane_or_neither() -> None:
    async def job(ground: Ground) -> None:
        disk, flushes = memory(ground), Flushes(CLUSTER)

        async def sealed(*shards: int) -> None:
            def are_sealed() -> bool:
                return [number for number, shard in sorted(disk.shards(0).items()) if shard.sealed] == list(shards)

            await until(are_sealed, "what was committed up to the target is sealed", 1)

        async with working(ground, disk.store, disk.as_disk(), flushes=flushes):
            await ask(flushes, 2)
            await pass_on(ground, 1)
            await until(lambda: is_committed(ground, 1), "it is committed")
            await asyncio.sleep(200)
            await sealed()
            await pass_on(ground, 2)
            await sealed(1)
            await pass_on(ground, 3)
            await asyncio.sleep(200)
            await sealed(1)
            await ask(flushes, 3)
            await sealed(1, 2)
            await pass_on(ground, 4)
            await until(lambda: is_committed(ground, 4), "it is committed")
        await ask(flushes, 4)
        async with working(ground, disk.store, disk.as_disk(), flushes=flushes):
            await sealed(1, 2, 3)

    in_virtual_time(job, seal_on_drain=False, probe_s=60.0)


def test_holes_of_the_past_do_not_count_against_the_input(caplog: pytest.LogCaptureFixture) -> None:
    """At the third attempt it would be emptied."""

    async def job(ground: Ground) -> None:
        disk = memory(ground)
        async with working(ground, disk.store, disk.as_disk()) as lane:
            lane._holes = HOLES_BEFORE_PURGE - 1
            await pass_on(ground, 1)
            await until(lambda: is_committed(ground, 1), "it is committed")
            await pass_on(ground, 3)
            await until(lambda: "(attempt 1)" in caplog.text, "it reads again")

    in_virtual_time(job)


def test_a_partition_that_another_process_holds_is_taken_over_when_that_ends_and_the_log_has_one_line_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def job(ground: Ground) -> None:
        disk, opened = memory(ground), list[int]()
        held = disk.lock(disk.store, 0)
        async with working(ground, disk.store, disk.as_disk()) as lane:
            lane._on_open = opened.append
            await pass_on(ground, 1)
            await asyncio.sleep(60)
            assert opened, "it has its place in the stage: nobody waits for it"
            assert 30 < lane._sessions < 90
            assert caplog.text.count("persist partition 0 stands by") == 1
            held.close()
            await until(lambda: is_committed(ground, 1), "it is committed", 5)

    in_virtual_time(job)


def test_a_partition_whose_file_is_damaged_waits_for_somebody_to_change_it(caplog: pytest.LogCaptureFixture) -> None:
    async def job(ground: Ground) -> None:
        disk = memory(ground)
        async with working(ground, disk.store, disk.as_disk()):
            await pass_on(ground, 1)
            await until(lambda: is_committed(ground, 1), "it is committed")
        shard = disk.shards(0).pop(1)
        looks, opened = list[object](), list[int]()

        def state(*arguments: Any) -> object:
            looks.append(disk.as_disk().state(*arguments))
            return looks[-1]

        async with working(ground, disk.store, disk.as_disk()._replace(state=state)) as lane:
            lane._on_open = opened.append
            await pass_on(ground, 2)
            await asyncio.sleep(60)
            assert (lane._sessions, opened) == (1, [0])
            assert 30 < len(looks) < 90
            assert caplog.text.count(EVENT_PERSIST_FAILED) == 1
            disk.shards(0)[1] = shard
            await until(lambda: is_committed(ground, 2), "it is committed", 5)

    in_virtual_time(job)


def test_a_disk_that_refused_is_tried_after_a_second_and_then_less_often() -> None:
    async def job(ground: Ground) -> None:
        disk, tried_s = memory(ground), list[float]()

        def probe(*_: object) -> None:
            tried_s.append(asyncio.get_running_loop().time())
            disk.refuse_if_failing()

        async with working(ground, disk.store, disk.as_disk()._replace(probe=probe)) as lane:
            disk.failing = True
            tried_s.append(asyncio.get_running_loop().time())
            await until(lambda: len(tried_s) == 9, "it was tried again and again")
            disk.failing = False
            await pass_on(ground, 1)
            await until(lambda: is_committed(ground, 1), "it is committed", DISK_PAUSE_MAX.s + 1)
            assert not lane._disk_circuit.is_open
        pauses = [after - before for before, after in pairwise(tried_s)]
        assert DISK_PAUSE_MIN.s / 2 <= pauses[0] < DISK_PAUSE_MIN.s + 1
        assert DISK_PAUSE_MIN.s / 2 <= pauses[1] < 2 * DISK_PAUSE_MIN.s + 1
        assert all(DISK_PAUSE_MAX.s / 2 <= pause < DISK_PAUSE_MAX.s + 1 for pause in pauses[4:])

    in_virtual_time(job)


def test_a_partition_whose_disk_was_full_waits_until_a_shard_can_be_sealed_and_another_be_made() -> None:
    async def job(ground: Ground) -> None:
        disk = memory(ground)
        shard_bytes = ground.settings.shard_bytes
        free_bytes, probes = shard_bytes, list[int]()

        def probe(_: Store, partition: int, room_bytes: int) -> None:
            probes.append(partition)
            if free_bytes < room_bytes:
                raise StoreFailedError("No space left on device")

        async with working(ground, disk.store, disk.as_disk()._replace(probe=probe)) as lane:
            disk.failing = True
            await pass_on(ground, 1)
            await until(lambda: len(probes) > 2, "it looks again and again")
            disk.failing = False
            sessions = lane._sessions
            await asyncio.sleep(60)
            assert (lane._sessions, await is_committed(ground, 1)) == (sessions, False)
            free_bytes = 2 * shard_bytes
            await until(lambda: is_committed(ground, 1), "it is committed", 15)
            assert lane._sessions == sessions + 1

    in_virtual_time(job)
