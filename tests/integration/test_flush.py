"""`fictl flush` on a real pipeline: under load, with persist killed, with a paused stage, with nothing to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio
from pipeline import Load, Pipeline, fictl, members, running, settings, under_load, until, workload

from contracts.flush import decode_flush
from contracts.subjects import CONTROL, FLUSH_SUBJECT, RECEIPTS, seal_subject
from stages.persist.names import list_shards
from stages.persist.sealed import SealedReader

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

PARTITIONS = 4


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    async with running(tmp_path_factory.mktemp("flush"), settings(partitions=PARTITIONS)) as started:
        yield started


def total(answer: dict[str, Any], name: str) -> int:
    return sum(row[name] for row in answer["partitions"])


def sealed_ids(pipeline: Pipeline) -> set[bytes]:
    """Ids of the events in sealed shards, from the files alone."""
    ids: set[bytes] = set()
    for shards in list_shards(pipeline.shards).values():
        for shard in shards:
            if shard.sealed:
                reader = SealedReader(shard.path)
                try:
                    ids.update(row.tobytes() for row in reader.read("event_id"))
                finally:
                    reader.close()
    return ids


def ids_of(load: Load) -> set[bytes]:
    """Ids of the events of a load."""
    return {attempt.event_id for attempt in load.attempts}


async def verified(pipeline: Pipeline) -> None:
    code, answer, err = await fictl(pipeline, "verify", str(pipeline.supervisor.directory), "--receipts")
    assert code == 0, f"{answer} {err}"


async def test_a_cluster_that_nothing_ever_came_to_has_nothing_to_flush(pipeline: Pipeline) -> None:
    code, answer, err = await fictl(pipeline, "flush")
    assert (code, answer["done"], total(answer, "target"), total(answer, "shards")) == (0, True, 0, 0), err
    assert await pipeline.api.last_message(CONTROL, FLUSH_SUBJECT) is None


async def test_everything_accepted_before_it_is_sealed_and_counted_and_a_second_one_does_nothing(
    pipeline: Pipeline,
) -> None:
    load = Load(workload(seed=801, events=600))
    await load.publish(pipeline.client)
    before = await pipeline.totals()
    code, answer, err = await fictl(pipeline, "flush")
    assert (code, answer["done"], answer["holdups"]) == (0, True, []), err
    assert ids_of(load) <= sealed_ids(pipeline)
    totals = await pipeline.totals()
    # What was committed before it began is sealed by it too.
    assert total(answer, "sealed") == total(answer, "unsealed") + total(answer, "events") == totals.persisted
    assert total(answer, "events") <= totals.persisted - before.persisted
    files = [shard for shards in list_shards(pipeline.shards).values() for shard in shards if shard.sealed]
    assert total(answer, "shards") == len(files)
    assert total(answer, "bytes") == sum(shard.path.stat().st_size for shard in files)
    code, listed, err = await fictl(pipeline, "partitions", "ls")
    assert [row["sealed_events"] for row in listed] == [row["events"] for row in listed], err
    told = await pipeline.api.last_message(CONTROL, FLUSH_SUBJECT)
    code, answer, err = await fictl(pipeline, "flush")
    assert (code, answer["done"], total(answer, "shards"), total(answer, "events")) == (0, True, 0, 0), err
    assert await pipeline.api.last_message(CONTROL, FLUSH_SUBJECT) == told
    await pipeline.settled()
    await verified(pipeline)


async def test_under_load_what_was_accepted_when_it_began_is_sealed_and_the_load_goes_on(pipeline: Pipeline) -> None:
    load = Load(workload(seed=802, events=2500))
    async with under_load(load, pipeline.client, rate_per_s=150):
        await load.reached(300)
        accepted = {attempt.event_id for attempt in load.attempts if attempt.acknowledged}
        code, answer, err = await fictl(pipeline, "flush")
        assert (code, answer["done"]) == (0, True), err
        assert accepted <= await asyncio.to_thread(sealed_ids, pipeline)
        assert total(answer, "shards") <= 2 * PARTITIONS
    await pipeline.assert_whole(load)
    await verified(pipeline)


@pytest.mark.slow
async def test_persist_killed_in_the_middle_seals_when_it_is_back(pipeline: Pipeline) -> None:
    load = Load(workload(seed=803, events=2500))
    async with under_load(load, pipeline.client, rate_per_s=400):
        await load.reached(800)
        accepted = {attempt.event_id for attempt in load.attempts if attempt.acknowledged}
        flushing = asyncio.create_task(fictl(pipeline, "flush"))
        for _ in range(3):
            await pipeline.supervisor.kill("persist-0")
            await until(lambda: works(pipeline, "persist-0"), "persist is back", 60)
        code, answer, err = await flushing
        assert (code, answer["done"]) == (0, True), err
        assert accepted <= await asyncio.to_thread(sealed_ids, pipeline)
    await pipeline.assert_whole(load)
    await verified(pipeline)


async def works(pipeline: Pipeline, name: str) -> bool:
    return any(member.name == name and member.partitions for member in await members(pipeline))


async def test_a_target_that_was_missed_is_obeyed_by_a_process_that_starts_later(pipeline: Pipeline) -> None:
    """Persist is paused after everything is committed, so nobody hears it until it goes on."""
    load = Load(workload(seed=804, events=200))
    await load.publish(pipeline.client)
    await pipeline.assert_whole(load)
    code, answer, _ = await fictl(pipeline, "flush", "--no-seal")
    assert (code, answer["done"], total(answer, "shards")) == (0, True, 0)
    assert (await fictl(pipeline, "pause", "persist"))[0] == 0
    assert not ids_of(load) <= sealed_ids(pipeline)
    code, answer, err = await fictl(pipeline, "flush", "--timeout", "2")
    assert (code, answer["done"]) == (3, False), err
    (holdup,) = answer["holdups"]
    assert (holdup["stage"], "fictl resume persist" in holdup["why"]) == ("persist", True)
    assert "wait for persist" in err or "not done" in err
    await pipeline.supervisor.kill("persist-0")
    assert (await fictl(pipeline, "resume", "persist"))[0] == 0

    async def sealed() -> bool:
        return ids_of(load) <= await asyncio.to_thread(sealed_ids, pipeline)

    await until(sealed, "what was asked for before is sealed")
    await pipeline.settled()
    await verified(pipeline)


async def test_a_paused_stage_is_named_and_one_partition_can_be_flushed_alone(pipeline: Pipeline) -> None:
    # Something of every partition is asked for.
    await Load(workload(seed=808, events=600)).publish(pipeline.client)
    assert (await fictl(pipeline, "flush"))[0] == 0
    assert (await fictl(pipeline, "pause", "hash"))[0] == 0
    load = Load(workload(seed=805, events=200))
    await load.publish(pipeline.client)
    code, answer, err = await fictl(pipeline, "flush", "--timeout", "2")
    assert (code, answer["done"]) == (3, False), err
    assert {(row["stage"], row["why"]) for row in answer["holdups"]} == {
        ("hash", "hash is paused; `fictl resume hash` goes on")
    }
    waiting = {row["partition"]: row["waiting"] for row in answer["partitions"]}
    assert sum(waiting.values()) > 0
    assert (await fictl(pipeline, "resume", "hash"))[0] == 0
    chosen = max(waiting, key=lambda partition: waiting[partition])
    others = {p: await seal_seq(pipeline, p) for p in waiting if p != chosen}
    code, answer, err = await fictl(pipeline, "flush", "--partition", str(chosen))
    assert (code, [row["partition"] for row in answer["partitions"]]) == (0, [chosen]), err
    assert total(answer, "shards") == 1
    assert {p: await seal_seq(pipeline, p) for p in others} == others
    told = await pipeline.api.last_message(CONTROL, FLUSH_SUBJECT)
    assert told is not None
    # What was asked of the others before still stands.
    assert set(decode_flush(told.data).targets) == set(range(PARTITIONS))
    await pipeline.assert_whole(load)
    assert (await fictl(pipeline, "flush", "--partition", "77"))[0] == 2


async def seal_seq(pipeline: Pipeline, partition: int) -> int:
    last = await pipeline.api.last_message(RECEIPTS, seal_subject(partition))
    return 0 if last is None else last.seq


async def test_refused_events_and_duplicates_are_done_without_a_shard(pipeline: Pipeline) -> None:
    load = Load(workload(seed=806, events=100))
    await load.publish(pipeline.client)
    assert (await fictl(pipeline, "flush"))[0] == 0
    jetstream = pipeline.client.jetstream(timeout=30)
    for number in range(40):
        await jetstream.publish(f"fi.events.clinic-1.{UUID(int=number, version=4)}", b"not JSON")
    code, answer, err = await fictl(pipeline, "flush")
    assert (code, answer["done"], total(answer, "shards"), total(answer, "sealed")) == (0, True, 0, 0), err
    assert total(answer, "events") == 0
    await pipeline.settled()
    await verified(pipeline)


@pytest.mark.slow
async def test_two_at_once_take_nothing_from_each_other(pipeline: Pipeline) -> None:
    load = Load(workload(seed=807, events=400))
    await load.publish(pipeline.client)
    both = await asyncio.gather(*(fictl(pipeline, "flush", "--partition", part) for part in ("0-1", "1-3")))
    assert [(code, answer["done"]) for code, answer, _ in both] == [(0, True)] * 2
    assert ids_of(load) <= sealed_ids(pipeline)
    await pipeline.assert_whole(load)
