"""Partitions move while events flow: processes join, leave, die and freeze. Every event is stored once, in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
import pytest_asyncio
from pipeline import Load, Pipeline, extra_stage, running, settings, under_load, until, workload

from contracts.membership import Member
from contracts.subjects import MEMBERS, STAGES, Stage, members_pattern
from stages.runtime.membership import readable

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

QUICK_AND_SLOW = [
    pytest.param("ingest"),
    pytest.param("segment", marks=pytest.mark.slow),
    pytest.param("hash", marks=pytest.mark.slow),
    pytest.param("persist"),
]

PARTITIONS = 8


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    async with running(tmp_path_factory.mktemp("scaling"), settings(partitions=PARTITIONS)) as started:
        yield started


async def members(pipeline: Pipeline, stage: Stage) -> dict[str, Member]:
    """Name → announcement of every process of the stage that lives."""
    found = readable(await pipeline.api.last_messages(MEMBERS, [members_pattern(stage)]))
    return {member.name: member for member in found.values()}


async def moved(pipeline: Pipeline, stage: Stage, names: Iterable[str], begun_s: float | None = None) -> float:
    """Waits until exactly these processes hold all partitions, each once, evenly and at work; how long that took."""
    wanted = set(names)
    begun_s = begun_s or time.monotonic()
    last: dict[str, Member] = {}

    async def settled() -> bool:
        last.clear()
        last.update(await members(pipeline, stage))
        held = [partition for member in last.values() for partition in member.partitions]
        loads = [len(member.partitions) for member in last.values()]
        return (
            last.keys() == wanted
            and sorted(held) == list(range(PARTITIONS))
            and max(loads) - min(loads) <= 1
            and not any(member.opening for member in last.values())
        )

    try:
        await until(settled, f"{stage} is shared by {sorted(wanted)}")
    except AssertionError as error:
        raise AssertionError(f"{error}; last seen: {last}") from None
    return time.monotonic() - begun_s


def names(stage: Stage, count: int) -> list[str]:
    return [f"{stage}-{index}" for index in range(count)]


@pytest.mark.parametrize("stage", QUICK_AND_SLOW)
async def test_a_stage_scaled_up_and_down_under_load(pipeline: Pipeline, stage: Stage) -> None:
    load = Load(workload(seed=100 + STAGES.index(stage), events=4000))
    async with under_load(load, pipeline.client, rate_per_s=500):
        for number, count in enumerate((4, 2, 1)):
            await load.reached(900 * number + 300)
            begun_s = time.monotonic()
            await pipeline.supervisor.scale(stage, count)
            took_s = await moved(pipeline, stage, names(stage, count), begun_s)
            print(f"{stage} scaled to {count} in {took_s:.2f} s")
    await pipeline.assert_whole(load)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
async def test_partitions_move_when_a_process_joins_leaves_and_dies(pipeline: Pipeline, stage: Stage) -> None:
    supervisor = pipeline.supervisor
    one, both, second = names(stage, 1), names(stage, 2), f"{stage}-1"
    load = Load(workload(seed=110 + STAGES.index(stage), events=8000))
    took_s: dict[str, float] = {}
    async with under_load(load, pipeline.client, rate_per_s=400):
        await load.reached(200)
        await supervisor.scale(stage, 2)
        await moved(pipeline, stage, both)
        took_s["join"] = time.time() - (await members(pipeline, stage))[second].started_ns / 1e9
        begun_s = time.monotonic()
        await supervisor.scale(stage, 1)
        took_s["leave"] = await moved(pipeline, stage, one, begun_s)
        await supervisor.scale(stage, 2)
        await moved(pipeline, stage, both)
        begun_s = time.monotonic()
        await supervisor.hold_down(second)
        took_s["death"] = await moved(pipeline, stage, one, begun_s)
        await supervisor.scale(stage, 1)
        print(f"{stage}: " + ", ".join(f"{what} {seconds:.2f} s" for what, seconds in took_s.items()))
    await pipeline.assert_whole(load)


@pytest.mark.parametrize("stage", QUICK_AND_SLOW[:3])
async def test_a_frozen_process_is_replaced_and_lets_go_or_shares_when_it_thaws(
    pipeline: Pipeline, stage: Stage
) -> None:
    supervisor = pipeline.supervisor
    load = Load(workload(seed=120 + STAGES.index(stage), events=6000))
    await supervisor.scale(stage, 2)
    try:
        async with under_load(load, pipeline.client, rate_per_s=600):
            await load.reached(300)
            await moved(pipeline, stage, names(stage, 2))
            supervisor.freeze(f"{stage}-1")
            await moved(pipeline, stage, names(stage, 1))
            await load.reached(load.accepted + 500)
            supervisor.thaw(f"{stage}-1")
            await moved(pipeline, stage, names(stage, 2))
        await pipeline.assert_whole(load)
    finally:
        supervisor.thaw(f"{stage}-1")
        await supervisor.scale(stage, 1)


@pytest.mark.slow
async def test_servers_that_answer_nobody_for_a_while_make_nobody_dead(pipeline: Pipeline) -> None:
    """All announcements expire at once: who is back first must not take everything over."""
    supervisor, servers = pipeline.supervisor, ("n1", "n2", "n3")
    load = Load(workload(seed=130, events=2000))
    await supervisor.scale("segment", 3)
    await moved(pipeline, "segment", names("segment", 3))
    logs = [supervisor.directory / "logs" / f"{name}.log" for name in names("segment", 3)]
    before = [log.stat().st_size for log in logs]
    try:
        for server in servers:
            supervisor.freeze(server)
        await asyncio.sleep(supervisor.settings.member_ttl_s + 2)
        for server in servers:
            supervisor.thaw(server)
        await load.publish(pipeline.client, rate_per_s=500)
        await moved(pipeline, "segment", names("segment", 3))
        await pipeline.assert_whole(load)
        for log, size in zip(logs, before, strict=True):
            assert "letting go" not in log.read_text()[size:]
    finally:
        for server in servers:
            supervisor.thaw(server)
        await supervisor.scale("segment", 1)
        await moved(pipeline, "segment", names("segment", 1))


async def test_a_restarted_process_has_its_old_share_and_the_others_move_nothing(pipeline: Pipeline) -> None:
    supervisor = pipeline.supervisor
    await supervisor.scale("segment", 3)
    await moved(pipeline, "segment", names("segment", 3))
    before = await members(pipeline, "segment")
    await supervisor.kill("segment-1")

    async def again() -> bool:
        now = await members(pipeline, "segment")
        return "segment-1" in now and now["segment-1"].nonce != before["segment-1"].nonce

    await until(again, "segment-1 announces itself again")
    await moved(pipeline, "segment", names("segment", 3))
    after = await members(pipeline, "segment")
    assert {name: member.partitions for name, member in after.items()} == {
        name: member.partitions for name, member in before.items()
    }
    await supervisor.scale("segment", 1)
    await moved(pipeline, "segment", names("segment", 1))


async def test_of_two_processes_with_one_name_the_later_works_and_the_earlier_stands_by(pipeline: Pipeline) -> None:
    first = (await members(pipeline, "hash"))["hash-0"]
    async with extra_stage(pipeline, "hash", "hash-0", partitions=None) as namesake:
        await namesake.start()

        async def taken() -> bool:
            now = (await members(pipeline, "hash"))["hash-0"]
            return now.nonce != first.nonce and len(now.partitions) == PARTITIONS

        await until(taken, "the later one has all partitions")
        log = pipeline.supervisor.directory / "logs" / "hash-0.log"
        await until(_logged(log, "standing by"), "the earlier one says why it stands by")

    async def back() -> bool:
        now = (await members(pipeline, "hash")).get("hash-0")
        return now is not None and now.nonce == first.nonce

    await until(back, "the earlier one works again once the name is free")
    await moved(pipeline, "hash", ["hash-0"])


def _logged(log: Path, text: str):  # type: ignore[no-untyped-def]
    async def there() -> bool:
        return text in await asyncio.to_thread(log.read_text)

    return there


async def test_a_pinned_process_takes_its_partitions_and_gives_them_back(pipeline: Pipeline) -> None:
    async with extra_stage(pipeline, "segment", "segment-pinned", partitions="2,5") as pinned:
        await pinned.start()

        async def shared() -> bool:
            now = await members(pipeline, "segment")
            return now["segment-pinned"].partitions == (2, 5) and now["segment-0"].partitions == (0, 1, 3, 4, 6, 7)

        await until(shared, "the pinned process has its two partitions and the other one the rest")
    await moved(pipeline, "segment", ["segment-0"])


async def test_a_persister_without_the_shards_gets_nothing_and_they_wait_for_their_own(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    load = Load(workload(seed=140, events=2000))
    supervisor = pipeline.supervisor
    before = {receipt.partition: receipt.store for receipt in await pipeline.receipts()}
    assert before.keys() == set(range(PARTITIONS))
    async with extra_stage(pipeline, "persist", "elsewhere", shards=tmp_path / "store", partitions=None) as elsewhere:
        await elsewhere.start()
        async with under_load(load, pipeline.client, rate_per_s=800):
            await load.reached(400)
            await supervisor.hold_down("persist-0")

            async def alone() -> bool:
                now = await members(pipeline, "persist")
                return now.keys() == {"elsewhere"}

            await until(alone, "the dead persister's announcement has expired")
            await load.reached(1500)
            assert (await members(pipeline, "persist"))["elsewhere"].partitions == ()
            await supervisor.bring_back("persist-0")
        await pipeline.assert_whole(load)
    assert {receipt.partition: receipt.store for receipt in await pipeline.receipts()} == before
