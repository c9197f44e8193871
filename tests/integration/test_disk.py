"""Disks that fail under a running pipeline: the partition stops loudly, others go on, and so does it once mended."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import pytest_asyncio
from lanes import going
from pipeline import Load, Pipeline, flip, running, settings, under_load, until, workload

from cluster.testing.errors import NotSupportedError
from contracts.settings import MIB
from contracts.telemetry import EVENT_PERSIST_FAILED
from stages.persist import files
from stages.persist.actor import PersistLane
from stages.persist.disk import LOCAL, Disk, Turns
from stages.persist.header import read_live_header
from stages.persist.names import FIRST_SHARD, list_shards, live_name, partition_state
from stages.persist.partition import PartitionFiles
from stages.persist.rows import ROW_BYTES
from stages.persist.seal import SealedInfo
from stages.persist.storedir import open_store
from stages.runtime.api import Api
from stages.runtime.facts import read_cluster

pytestmark = pytest.mark.cluster
in_module_loop = pytest.mark.asyncio(loop_scope="module")

PARTITIONS = 2
DISK_BYTES = 160 * MIB
LEFT_BYTES = 4 * MIB
PADDING_BYTES = 40_000
PADDED_EVENTS = 900


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    """Without a persister of its own: `lanes_here` takes its place, one test after the other."""
    async with running(tmp_path_factory.mktemp("disk"), settings(partitions=PARTITIONS), {"persist": 0}) as started:
        yield started


def persist_log(pipeline: Pipeline) -> str:
    return (pipeline.supervisor.directory / "logs" / "persist-0.log").read_text(errors="replace")


def pid_of(pipeline: Pipeline, name: str) -> int | None:
    return next(process.pid for process in pipeline.supervisor.processes if process.name == name)


async def test_a_full_disk_stops_the_partition_and_it_goes_on_when_space_returns(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, settings(partitions=PARTITIONS), disk_bytes=DISK_BYTES)
    try:
        await pipeline.open()
    except NotSupportedError as error:
        pytest.skip(str(error))
    async with pipeline:
        pid = pid_of(pipeline, "persist-0")
        await pipeline.fill_disk(LEFT_BYTES)
        load = Load(workload(seed=21, events=PADDED_EVENTS, padding_bytes=PADDING_BYTES))
        async with under_load(load, pipeline.client):

            async def stopped() -> bool:
                return EVENT_PERSIST_FAILED in persist_log(pipeline)

            await until(stopped, "the partition says that it stops")
            assert "No space left" in persist_log(pipeline)
            await pipeline.free_disk()
        await pipeline.assert_whole(load)
        assert pid_of(pipeline, "persist-0") == pid


async def make_lanes(
    pipeline: Pipeline, disk: Disk = LOCAL, turns: Turns | None = None, **changes: Any
) -> list[PersistLane]:
    """Persist's lanes for this process, where its file functions can be made to fail; `changes` of settings by name."""
    facts = await read_cluster(pipeline.client)
    store = open_store(pipeline.shards, facts.cluster_id, now_ns=1)
    api, nonce = Api(pipeline.client, settings(partitions=PARTITIONS, **changes)), secrets.token_hex(6)
    return [
        PersistLane(api, store, number, f"here-{nonce}-{number}", lambda _: None, turns=turns, disk=disk)
        for number in range(PARTITIONS)
    ]


@contextlib.asynccontextmanager
async def lanes_here(
    pipeline: Pipeline, disk: Disk = LOCAL, turns: Turns | None = None, **changes: Any
) -> AsyncIterator[list[asyncio.Task[None]]]:
    """`make_lanes`, at work."""
    async with going(*await make_lanes(pipeline, disk, turns, **changes)) as tasks:
        yield tasks


@in_module_loop
async def test_after_a_failed_fsync_nothing_more_is_acknowledged_until_the_disk_is_mended(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with lanes_here(pipeline):
        first = Load(workload(seed=22, events=100))
        await first.publish(pipeline.client)
        await pipeline.settled()
        before = await pipeline.totals()

        def refuse(fd: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(files, "_fdatasync", refuse)
            second = Load(workload(seed=23, events=200))
            await second.publish(pipeline.client)

            async def stopped() -> bool:
                return sum(record.message == EVENT_PERSIST_FAILED for record in caplog.records) >= PARTITIONS

            await until(stopped, "every partition says that it stops")
            assert await pipeline.totals() == before
        await pipeline.assert_whole(second, first)


class Callers:
    """Which threads use files of `directory`: by path where a name is given, else by what the descriptor leads to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.threads: set[threading.Thread] = set()
        self._directory = str(directory)
        for name in ("pread", "pwrite", "fsync", "open", "rename", "unlink", "stat", "listdir"):
            monkeypatch.setattr(os, name, self._noting(getattr(os, name)))
        monkeypatch.setattr(files, "_fdatasync", self._noting(os.fdatasync))

    def _noting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            place = arguments[0] if arguments else "."
            path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else str(place)
            if path.startswith(self._directory):
                self.threads.add(threading.current_thread())
            return real(*arguments, **named)

        return call


@in_module_loop
@pytest.mark.skipif(sys.platform != "linux", reason="the path of a descriptor is read from /proc")
async def test_no_lane_uses_its_files_on_the_event_loop_which_a_hanging_disk_would_stop(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = await make_lanes(pipeline, shard_events_max=50, seal_on_drain=True)
    load = Load(workload(seed=29, events=500))
    with monkeypatch.context() as patch:
        callers = Callers(patch, pipeline.shards)
        async with going(*lanes):
            await load.publish(pipeline.client)
            await pipeline.settled()
    assert callers.threads
    assert threading.main_thread() not in callers.threads
    await pipeline.assert_whole(load)


@in_module_loop
async def test_sealed_ids_that_cannot_be_read_stop_their_partition_alone_until_they_can(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    failing = threading.Event()

    def opened(*arguments: Any) -> PartitionFiles:
        files = PartitionFiles.open(*arguments)
        seen = files.seen.seen

        def unreadable(ids: Sequence[bytes]) -> list[bool]:
            if failing.is_set() and arguments[1] == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return seen(ids)

        files.seen.seen = unreadable  # type: ignore[method-assign]
        return files

    async with lanes_here(pipeline, LOCAL._replace(open=opened)) as tasks:
        failing.set()
        load = Load(workload(seed=27, events=200))
        await load.publish(pipeline.client)

        async def only_one_is_behind() -> bool:
            return set(await pipeline.unsettled()) == {0}

        await until(only_one_is_behind, "the other partition goes on")

        async def stopped() -> bool:
            return any(record.message == EVENT_PERSIST_FAILED for record in caplog.records)

        await until(stopped, "the partition says that it stops")
        assert not any(task.done() for task in tasks)
        failing.clear()
        await pipeline.assert_whole(load)


@in_module_loop
async def test_a_store_that_goes_away_while_a_damaged_shard_is_waited_for_ends_no_lane(
    pipeline: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load = Load(workload(seed=28, events=200))
    async with lanes_here(pipeline, seal_on_drain=False):
        await load.publish(pipeline.client)
        await pipeline.settled()
    path = list_shards(pipeline.shards)[0][-1].path
    whole = path.read_bytes()
    flip(path, read_live_header(path).index.offset + ROW_BYTES // 2)
    missed = threading.Event()

    def look(directory: Path, partition: int) -> object:
        try:
            return partition_state(directory, partition)
        except OSError:
            missed.set()
            raise

    async with lanes_here(pipeline, LOCAL._replace(state=look), seal_on_drain=False) as tasks:

        async def stopped() -> bool:
            return any("rebuild it" in record.__dict__.get("reason", "") for record in caplog.records)

        await until(stopped, "the partition says that it stops")
        pipeline.shards.rename(tmp_path / "away")
        assert await asyncio.to_thread(missed.wait, 60)
        (tmp_path / "away").rename(pipeline.shards)
        path.write_bytes(whole)
        await pipeline.assert_whole(load)
        assert not any(task.done() for task in tasks)


class CountedLock(asyncio.Lock):
    """A lock that tells when every partition's lane has asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0
        self.all_asked = threading.Event()

    async def acquire(self) -> Literal[True]:
        self._asked += 1
        if self._asked == PARTITIONS:
            self.all_asked.set()
        return await super().acquire()


@in_module_loop
async def test_lanes_of_a_process_seal_one_after_the_other(pipeline: Pipeline) -> None:
    turns, sealing = Turns(), CountedLock()
    turns.sealing = sealing
    under_way: set[PartitionFiles] = set()
    most: list[int] = []

    def opened(*arguments: Any) -> PartitionFiles:
        files = PartitionFiles.open(*arguments)
        seal = files.seal

        def watched(*job: Any) -> SealedInfo:
            under_way.add(files)
            assert sealing.all_asked.wait(60)
            most.append(len(under_way))
            try:
                return seal(*job)
            finally:
                under_way.discard(files)

        files.seal = watched  # type: ignore[method-assign]
        return files

    load = Load(workload(seed=26, events=100))
    async with lanes_here(pipeline, LOCAL._replace(open=opened), turns, seal_on_drain=True):
        await load.publish(pipeline.client)
        await pipeline.settled()
    assert most == [1] * PARTITIONS
    await pipeline.assert_whole(load)


@pytest.mark.slow
async def test_a_damaged_shard_stops_its_partition_alone_until_it_is_put_right(tmp_path: Path) -> None:
    chosen = settings(partitions=PARTITIONS, seal_on_drain=False)
    async with running(tmp_path, chosen) as pipeline:
        load = Load(workload(seed=24, events=200))
        await load.publish(pipeline.client)
        await pipeline.settled()
        await pipeline.supervisor.hold_down("persist-0")
        path = pipeline.shards / live_name(0, FIRST_SHARD)
        whole = path.read_bytes()
        flip(path, read_live_header(path).index.offset + ROW_BYTES // 2)
        await pipeline.supervisor.bring_back("persist-0")
        more = Load(workload(seed=25, events=200))
        await more.publish(pipeline.client)

        async def only_one_is_behind() -> bool:
            return set(await pipeline.unsettled()) == {0}

        await until(only_one_is_behind, "partition 1 goes on")
        assert "rebuild it from the stream" in persist_log(pipeline)
        path.write_bytes(whole)
        await pipeline.assert_whole(more, load)
