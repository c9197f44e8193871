"""What every stage keeps to on real streams: it goes on from its output, is fenced, refuses what it cannot read, stops.

The pure half is `tests/conformance/test_stages.py`; that a repeated publish keeps its message id is in
`test_runtime.py`, and what a stage does between a lost acknowledgement and its next frame is the simulation's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio
from pipeline import Load, Pipeline, extra_stage, running, settings, under_load, until, workload

from cluster.drain import output_reaches
from contracts.frames import decode_frame_head
from contracts.subjects import (
    EVENTS,
    HOPS,
    OUTPUT_STREAM,
    READER,
    STAGES,
    WRITER,
    Stage,
    input_filter,
    output_subject,
    raw_filter,
)
from stages.runtime.checkpoint import last_receipt
from stages.runtime.messages import StoredMessage

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

PARTITIONS = 2
LATER = msgspec.msgpack.encode([3, {"what": "a frame of a later version"}])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    async with running(tmp_path_factory.mktemp("conformance"), settings(partitions=PARTITIONS)) as started:
        yield started


def log_of(pipeline: Pipeline, stage: Stage) -> str:
    return (pipeline.supervisor.directory / "logs" / f"{stage}-0.log").read_text(errors="replace")


@pytest.mark.parametrize("stage", STAGES)
async def test_a_stage_whose_output_another_writes_too_is_fenced_and_nothing_is_made_twice(
    pipeline: Pipeline, stage: Stage
) -> None:
    """Two owners of every partition on purpose, then a kill: both go on from what is there."""
    load = Load(workload(seed=40 + STAGES.index(stage), events=700))
    async with (
        extra_stage(pipeline, stage, f"{stage}-rival") as rival,
        under_load(load, pipeline.client, rate_per_s=200),
    ):
        await load.reached(100)
        await rival.start()
        await load.reached(350)
        await pipeline.supervisor.kill(f"{stage}-0")
        await load.reached(550)
        await rival.kill()
    await pipeline.assert_whole(load)


@pytest.mark.parametrize("hop", HOPS)
async def test_a_later_wire_version_stops_its_readers_loudly_and_nothing_is_skipped(
    pipeline: Pipeline, hop: str
) -> None:
    """Both neighbours: the stage that reads it, and the one whose checkpoint it has become."""
    reader, writer = READER[hop], WRITER[hop]
    before = {stage: log_of(pipeline, stage).count("may be of a later version") for stage in (reader, writer)}
    receipts = [await last_receipt(pipeline.api, partition) for partition in range(PARTITIONS)]
    pids = {process.name: process.pid for process in pipeline.supervisor.processes}
    for partition in range(PARTITIONS):
        await pipeline.client.jetstream(timeout=10).publish(input_filter(reader, partition), LATER)
    load = Load(workload(seed=50 + HOPS.index(hop), events=60))
    await load.publish(pipeline.client)

    async def refused() -> bool:
        return all(
            log_of(pipeline, stage).count("may be of a later version") > count for stage, count in before.items()
        )

    await until(refused, f"{reader} and {writer} say that they cannot read on")
    for partition in range(PARTITIONS):
        last = await pipeline.api.last_message(hop, input_filter(reader, partition))
        assert last is not None
        assert last.data == LATER, "a stage wrote after what it could not read"
        receipt, _ = await last_receipt(pipeline.api, partition)
        assert receipt is not None
        earlier = receipts[partition][0]
        assert earlier is not None
        assert receipt.origin == earlier.origin
    assert {process.name: process.pid for process in pipeline.supervisor.processes} == pids

    for partition in range(PARTITIONS):
        await pipeline.api.purge(hop, input_filter(reader, partition))
    await pipeline.assert_whole(load)


@pytest.mark.parametrize("stage", STAGES)
async def test_told_to_end_a_stage_finishes_what_it_has_in_hand_and_its_successor_goes_on(
    pipeline: Pipeline, stage: Stage
) -> None:
    load = Load(workload(seed=60 + STAGES.index(stage), events=500))
    async with under_load(load, pipeline.client, rate_per_s=250):
        await load.reached(150)
        # Returns when the process has ended; killed for being late, it would be started again with a warning.
        await asyncio.wait_for(pipeline.supervisor.stop_stage(stage), pipeline.supervisor.settings.drain_s + 30)
        assert "did not drain" not in log_of(pipeline, stage)
        await load.reached(350)
        await pipeline.supervisor.start_stage(stage)
    await pipeline.assert_whole(load)


async def test_every_frame_joins_on_to_the_one_before_it_and_is_bounded(pipeline: Pipeline) -> None:
    # While persist is down nothing is trimmed.
    await pipeline.supervisor.stop_stage("persist")
    lanes = [(stage, partition) for stage in STAGES[:-1] for partition in range(PARTITIONS)]
    loads = [Load(workload(seed=seed, events=750)) for seed in (70, 71)]
    for load in loads:
        await load.publish(pipeline.client)
        made = {lane: await frames_of_all(pipeline, *lane) for lane in lanes}
    for frames in made.values():
        heads = [decode_frame_head(frame.data) for frame in frames]
        assert len(heads) > 1
        assert all(head.prev < head.first <= head.last for head in heads)
        assert [head.prev for head in heads[1:]] == [head.last for head in heads[:-1]]
        assert max(len(frame.data) for frame in frames) < 4 * pipeline.supervisor.settings.frame_bytes_max
    await pipeline.supervisor.start_stage("persist")
    await pipeline.assert_whole(*loads)


async def frames_of_all(pipeline: Pipeline, stage: Stage, partition: int) -> list[StoredMessage]:
    """What a stage's output holds of a partition, once it covers all that was accepted."""
    api = pipeline.api
    last = await api.last_message(EVENTS, raw_filter(partition))
    assert last is not None

    async def covered() -> bool:
        return await output_reaches(api, stage, partition) >= last.seq

    await until(covered, f"{stage} has made frames of all of partition {partition}")
    frames: list[StoredMessage] = []
    seq = 0
    stream, subject = OUTPUT_STREAM[stage], output_subject(stage, partition)
    while (message := await api.first_message(stream, subject, from_seq=seq + 1)) is not None:
        frames.append(message)
        seq = message.seq
    return frames
