"""Real processes killed, frozen, doubled and starved: nothing may be lost, doubled, reordered or altered.

The moments are drawn from a seed and gated by how much was accepted, so that each fault falls into a running load.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import pytest
import pytest_asyncio
from pipeline import Load, Pipeline, extra_stage, running, settings, stage_names, under_load, until, workload

from contracts.receipts import decode_seal
from contracts.settings import MIB
from contracts.subjects import EVENTS, RECEIPTS, STAGES, Stage, seal_subject
from contracts.telemetry import DEAD_INDEX, DEAD_ORIGIN
from stages.persist.names import list_shards

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

SERVERS = ("n1", "n2", "n3")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    async with running(tmp_path_factory.mktemp("faults"), settings()) as started:
        yield started


def pid_of(pipeline: Pipeline, name: str) -> int | None:
    return next(process.pid for process in pipeline.supervisor.processes if process.name == name)


async def test_each_stage_killed_at_random_moments_under_load(pipeline: Pipeline) -> None:
    rng = random.Random(21)
    load = Load(workload(seed=21, events=5000))
    async with under_load(load, pipeline.client, rate_per_s=800):
        victims = list(stage_names(pipeline)) * 2
        rng.shuffle(victims)
        for number, name in enumerate(victims):
            await load.reached(550 * number + rng.randrange(500))
            before = pid_of(pipeline, name)
            await pipeline.supervisor.kill(name)

            async def restarted(name: str = name, before: int | None = before) -> bool:
                return pid_of(pipeline, name) not in (None, before)

            await until(restarted, f"{name} runs again", 30)
    await pipeline.assert_whole(load)


async def test_a_server_killed_under_load_and_brought_back(pipeline: Pipeline) -> None:
    load = Load(workload(seed=22, events=3000))
    async with under_load(load, pipeline.client, rate_per_s=600):
        await load.reached(400)
        info = await pipeline.client.jetstream(timeout=30).stream_info(EVENTS)
        assert info.cluster is not None
        leader = str(info.cluster.leader)
        await pipeline.supervisor.hold_down(leader)
        await load.reached(1500)
        await pipeline.supervisor.bring_back(leader)
    await pipeline.assert_whole(load)


async def test_all_servers_killed_under_load_with_frames_waiting_in_memory(pipeline: Pipeline) -> None:
    """The hop streams are lost: everything not committed must be made again from `FI_EVENTS` and the last receipt."""
    load = Load(workload(seed=23, events=3000))
    supervisor = pipeline.supervisor
    stored = await asyncio.to_thread(pipeline.count)
    async with under_load(load, pipeline.client, rate_per_s=600):
        await load.reached(500)
        await supervisor.stop_stage("persist")
        await load.reached(1200)
        await asyncio.gather(*(supervisor.hold_down(name) for name in SERVERS))
        assert await asyncio.to_thread(pipeline.count) < stored + load.accepted
        await asyncio.gather(*(supervisor.bring_back(name) for name in SERVERS))
        await supervisor.start_stage("persist")
    await pipeline.assert_whole(load)


@pytest.mark.parametrize(
    "stage", [pytest.param("ingest"), *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("segment", "hash"))]
)
async def test_a_frozen_stage_is_replaced_and_harmless_when_it_thaws(pipeline: Pipeline, stage: Stage) -> None:
    seed = 30 + STAGES.index(stage)
    first, second = Load(workload(seed, events=1200)), Load(workload(seed + 10, events=1200))
    async with extra_stage(pipeline, stage, f"{stage}-successor", frozen=f"{stage}-0") as successor:
        async with under_load(first, pipeline.client, rate_per_s=800):
            await first.reached(300)
            pipeline.supervisor.freeze(f"{stage}-0")
            await successor.start()
        await pipeline.assert_whole(first)
        async with under_load(second, pipeline.client, rate_per_s=800):
            await second.reached(300)
            pipeline.supervisor.thaw(f"{stage}-0")
        await pipeline.assert_whole(second)
    await pipeline.assert_whole(first)


async def test_a_frozen_persister_keeps_its_shards_and_goes_on_when_it_thaws(pipeline: Pipeline) -> None:
    load = Load(workload(seed=51, events=1200))
    async with extra_stage(pipeline, "persist", "persist-successor", frozen="persist-0") as successor:
        async with under_load(load, pipeline.client, rate_per_s=800):
            await load.reached(300)
            pipeline.supervisor.freeze("persist-0")
            await successor.start()
            assert "stands by" in successor.log_text()
            await load.reached(1000)
            pipeline.supervisor.thaw("persist-0")
        await pipeline.assert_whole(load)


async def test_a_standby_persister_takes_over_the_same_shards_when_the_owner_dies(pipeline: Pipeline) -> None:
    load = Load(workload(seed=52, events=1500))
    async with extra_stage(pipeline, "persist", "persist-standby") as standby:
        await standby.start()
        async with under_load(load, pipeline.client, rate_per_s=800):
            await load.reached(400)
            await pipeline.supervisor.hold_down("persist-0")
        await pipeline.assert_whole(load)
        assert all(receipt.writer.startswith("persist-standby-") for receipt in await pipeline.receipts())
    await pipeline.supervisor.bring_back("persist-0")
    await pipeline.assert_whole(load)


async def test_two_processes_told_to_own_every_partition_of_every_stage(pipeline: Pipeline, tmp_path: Path) -> None:
    load = Load(workload(seed=61, events=4000))
    before = {receipt.partition: receipt.store for receipt in await pipeline.receipts()}
    jetstream, totals, bad = pipeline.client.jetstream(timeout=30), await pipeline.totals(), 200
    async with AsyncExitStack() as stack:
        doubles = [
            await stack.enter_async_context(extra_stage(pipeline, stage, f"{stage}-double-{number}"))
            for stage in STAGES
            for number in range(2)
        ]
        elsewhere = await stack.enter_async_context(
            extra_stage(pipeline, "persist", "persist-elsewhere", shards=tmp_path / "elsewhere")
        )
        async with under_load(load, pipeline.client, rate_per_s=700):
            for double in doubles:
                await double.start()

            async def stands_by() -> bool:
                return any("stands by" in double.log_text() for double in doubles[-2:])

            await until(stands_by, "one of two persisters that share a store stands by")
            await elsewhere.start()
            assert "belongs to store" in elsewhere.log_text()
            for number in range(bad):
                await jetstream.publish(f"fi.events.clinic-1.{UUID(int=number % 16, version=4)}", b"not JSON")
        settled = await pipeline.assert_whole(load)
    assert settled.dead_lettered == totals.dead_lettered + bad
    letters = [(letter.headers[DEAD_ORIGIN], letter.headers[DEAD_INDEX]) for letter in await pipeline.letters()]
    assert len(set(letters)) == len(letters) == settled.dead_lettered
    assert not list_shards(tmp_path / "elsewhere")
    assert {receipt.partition: receipt.store for receipt in await pipeline.receipts()} == before
    await pipeline.assert_whole(load)


@pytest.mark.slow
async def test_full_streams_hold_the_gateway_until_persist_returns(tmp_path: Path) -> None:
    """1 MiB a hop and 4 MiB of input: 12 MiB of events cannot be anywhere else than with their publisher.

    The last frames of eight partitions fill a hop: kept, they would hold it for good.
    """
    small = settings(partitions=8, hop_bytes_max=MIB, events_bytes_max=4 * MIB, dedup_window_s=0.1, shard_age_s_max=1.0)
    async with running(tmp_path, small) as pipeline:
        await pipeline.supervisor.stop_stage("persist")
        load = Load(workload(seed=71, events=300, padding_bytes=40_000))
        async with under_load(load, pipeline.client) as publishing:

            async def held() -> bool:
                return load.gateway is not None and load.gateway.held_s > 1

            await until(held, "the gateway is held", 60)
            assert not publishing.done()
            assert load.accepted < 150
            assert await asyncio.to_thread(pipeline.count) == 0
            await pipeline.supervisor.start_stage("persist")
            await load.reached(load.accepted + 40)
            await pipeline.supervisor.kill("persist-0")
            report = await publishing
        assert (report.accepted, report.refused_count) == (300, 0)
        totals = await pipeline.assert_whole(load)
        assert totals.persisted == 300
        # Duplicates fill the input too, and no shard with them.
        async with asyncio.timeout(120):
            await Load(load.lines[:120]).publish(pipeline.client)
        again = await pipeline.assert_whole(load)
        assert again.duplicates >= totals.duplicates + 120


@pytest.mark.slow
async def test_persist_killed_while_shards_are_sealed(tmp_path: Path) -> None:
    rng = random.Random(81)
    async with running(tmp_path, settings(partitions=1)) as pipeline:
        load = Load(workload(seed=81, events=1100, padding_bytes=50_000))

        def files() -> set[str]:
            return {path.name for path in pipeline.shards.iterdir()}

        async with under_load(load, pipeline.client) as publishing:
            for _ in range(4):
                known, goal = files(), rng.randrange(1, 4)

                async def changed(known: set[str] = known, goal: int = goal) -> bool:
                    # A file made, renamed or removed: somewhere within preparing, rolling or sealing.
                    return len(files() ^ known) >= goal or publishing.done()

                await until(changed, "persist works on its shards", 60)
                await pipeline.supervisor.kill("persist-0")
            await publishing
        await pipeline.assert_whole(load)

        async def all_sealed() -> bool:
            shards = list_shards(pipeline.shards)[0]
            record = await pipeline.api.last_message(RECEIPTS, seal_subject(0))
            full = [shard for shard in shards if shard.shard != shards[-1].shard]
            return bool(
                full
                and all(shard.sealed for shard in full)
                and record is not None
                and decode_seal(record.data).shard == full[-1].shard
            )

        await until(all_sealed, "every full shard is sealed and recorded", 60)
        await pipeline.assert_whole(load)
        await assert_seal_records(pipeline)


async def assert_seal_records(pipeline: Pipeline) -> None:
    """One record for each sealed shard, in order, each true of its file."""
    sealed = [shard for shard in list_shards(pipeline.shards)[0] if shard.sealed]
    assert len(sealed) >= 2
    records = []
    info = await pipeline.client.jetstream(timeout=30).stream_info(RECEIPTS)
    for seq in range(1, info.state.last_seq + 1):
        message = await pipeline.api.message_at(RECEIPTS, seq)
        if message is not None and message.subject == seal_subject(0):
            records.append(decode_seal(message.data))
    assert [record.shard for record in records] == [shard.shard for shard in sealed]
    for record, shard in zip(records, sealed, strict=True):
        assert record.file == shard.path.name
        assert record.sha256 == hashlib.sha256(shard.path.read_bytes()).hexdigest()
    assert all(after.first_origin == before.last_origin + 1 for before, after in pairwise(records))
