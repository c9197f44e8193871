"""Streams in memory are made again under a running pipeline, which does not lose anything by it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from pipeline import Load, Pipeline, running, settings, under_load, workload

from cluster.testing.ficluster import FiCluster
from contracts.budgets import LEADER_GONE
from contracts.subjects import HOPS, MEMBERS
from stages.actors import actor
from stages.runtime import remake
from stages.runtime.access import Servers
from stages.runtime.process import Machine, StageProcess
from stages.runtime.remake import Remaker

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    async with running(tmp_path_factory.mktemp("remake"), settings()) as started:
        yield started


async def test_making_every_stream_in_memory_again_under_load_loses_nothing(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each had been found without a leader: the worst that a wrong look can do."""
    monkeypatch.setattr(remake, "_is_headless", lambda info: True)
    monkeypatch.setattr(remake, "LEADER_GONE", msgspec.structs.replace(LEADER_GONE, s=0.0))
    pids = {process.name: process.pid for process in pipeline.supervisor.processes}
    load = Load(workload(seed=71, events=2000))
    watch = Remaker(pipeline.api, ())
    async with under_load(load, pipeline.client, rate_per_s=500):
        for number, stream in enumerate((*HOPS, MEMBERS)):
            await load.reached(300 * number + 200)
            before = await pipeline.client.jetstream(timeout=30).stream_info(stream)
            await watch.look(stream)
            after = await pipeline.client.jetstream(timeout=30).stream_info(stream)
            assert after.created != before.created
            assert after.config.subjects == before.config.subjects
            assert after.config.storage == before.config.storage
            assert after.config.num_replicas == before.config.num_replicas
            assert after.config.allow_direct == before.config.allow_direct
    await pipeline.assert_whole(load)
    assert {process.name: process.pid for process in pipeline.supervisor.processes} == pids


async def test_streams_in_memory_that_somebody_deletes_under_load_come_back_and_nothing_is_lost(
    pipeline: Pipeline,
) -> None:
    pids = {process.name: process.pid for process in pipeline.supervisor.processes}
    jetstream = pipeline.client.jetstream(timeout=30)
    streams = (*HOPS, MEMBERS)
    before = [await jetstream.stream_info(stream) for stream in streams]
    load = Load(workload(seed=72, events=1200))
    async with under_load(load, pipeline.client, rate_per_s=100):
        # So long that every process has looked at them.
        await load.reached(900)
        for stream in streams:
            await jetstream.delete_stream(stream)
    await pipeline.assert_whole(load)
    for was in before:
        now = await jetstream.stream_info(str(was.config.name))
        assert now.created != was.created
        assert now.config == was.config
    assert {process.name: process.pid for process in pipeline.supervisor.processes} == pids


class Unasked(Machine):
    """This machine, where nobody asks the process to end."""

    def on_terminate(self, stop: Callable[[], None]) -> None:
        """Does nothing."""


async def test_a_process_whose_looks_end_for_good_ends_with_their_error(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look(remaker: Remaker, stream: str) -> None:
        raise RuntimeError(f"no look at {stream}")

    monkeypatch.setattr(Remaker, "look", look)
    process = StageProcess(
        "segment",
        Servers(pipeline.supervisor.urls),
        pipeline.settings,
        actor("segment", pipeline.shards),
        partitions=(),
        name="segment-unlucky",
        on_ready=lambda: None,
        machine=Unasked(),
    )
    with pytest.raises(RuntimeError, match="no look at"):
        async with asyncio.timeout(30):
            await process.run()


async def test_a_single_server_that_forgets_them_as_soon_as_all_is_ready_is_given_them_again(tmp_path: Path) -> None:
    async with FiCluster(tmp_path, backend="embedded", nodes=1, partitions=2) as cluster:
        await cluster.kill("n1")
        await cluster.start("n1")
        load = Load(workload(seed=73, events=200))
        await load.publish(cluster.client)
        await cluster.assert_whole(load)
