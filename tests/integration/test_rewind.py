"""Damaged shards rebuilt from the stream, and partitions taken over by another store, on a running pipeline."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import UUID

import msgspec
import pytest
import pytest_asyncio
from commands import Ran, run_fictl
from pipeline import Load, Pipeline, extra_stage, flip, running, settings, until, workload

from cluster import rewind
from cluster.audit import audit_store
from cluster.rewind import Rewinder
from cluster.testing.checker import check
from contracts.backups import BACKUP_FILE, LastBackup, decode_last_backup, encode_last_backup
from contracts.budgets import REWIND_LOCK
from contracts.errors import NotOursError
from contracts.events import Event
from contracts.receipts import decode_seal, encode_receipt
from contracts.subjects import EVENTS, HOPS, raw_filter
from contracts.telemetry import EVENT_WORKER_STARTED
from stages.persist.aside import ASIDE
from stages.persist.header import read_live_header
from stages.persist.names import FIRST_SHARD, ShardFile, list_shards, live_name, lock_name
from stages.persist.records import record_path
from stages.persist.rows import ROW_BYTES
from stages.persist.store import EventStore, ShardInfo
from stages.persist.storedir import existing_store, open_store
from stages.runtime.access import Servers
from stages.runtime.facts import read_cluster

pytestmark = pytest.mark.cluster
in_module_loop = pytest.mark.asyncio(loop_scope="module")

PARTITIONS = 2


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    """One partition, for tests after which its store is whole; the last one moves it away."""
    async with running(tmp_path_factory.mktemp("rewind"), settings(partitions=1)) as started:
        yield started


async def fictl(pipeline: Pipeline, *arguments: str | Path) -> Ran:
    """Runs a verb on the pipeline's directory."""
    return await run_fictl(*arguments, "--dir", pipeline.supervisor.directory)


async def published(pipeline: Pipeline, seed: int, events: int = 200) -> Load:
    load = Load(workload(seed=seed, events=events))
    await load.publish(pipeline.client)
    await pipeline.settled()
    return load


async def sealed(pipeline: Pipeline) -> None:
    """Stops and starts persist, which seals what is committed."""
    await pipeline.supervisor.stop_stage("persist")
    await pipeline.supervisor.start_stage("persist")


async def assert_agrees(pipeline: Pipeline, shards: Path) -> int:
    """The store agrees with the receipts; gives how often its partitions went back."""
    report = await audit_store(shards, Servers(pipeline.supervisor.urls))
    assert report.store.ok, report.store.problems
    return len(report.rewinds)


async def test_damaged_and_deleted_live_shards_are_made_again_from_the_stream(tmp_path: Path) -> None:
    async with running(tmp_path, settings(partitions=PARTITIONS, seal_on_drain=False)) as pipeline:
        earlier, load = [await published(pipeline, seed) for seed in (30, 31)]
        await pipeline.supervisor.hold_down("persist-0")
        damaged, deleted = (pipeline.shards / live_name(partition, FIRST_SHARD) for partition in range(PARTITIONS))
        with EventStore(pipeline.shards) as store:
            commits = next(info.commits for info in store.shards() if info.partition == 0)
            event_id = UUID(bytes=next(store.iterate(0)).event.event_id)
        flip(damaged, read_live_header(damaged).index.offset + (commits // 2) * ROW_BYTES + 9)
        deleted.unlink()
        await pipeline.supervisor.bring_back("persist-0")
        code, out, err = await fictl(pipeline, "rebuild", "--dry-run", "--json")
        assert code == 0, err
        kept, begun_anew = (row["events"] for row in json.loads(out))
        assert (kept > 0, begun_anew) == (True, 0)
        code, out, err = await fictl(pipeline, "rebuild")
        assert code == 0, err
        assert f"{kept} events stay" in out
        more = await published(pipeline, seed=32)
        await pipeline.assert_whole(earlier, load, more)
        assert await assert_agrees(pipeline, pipeline.shards) == PARTITIONS
        (aside,) = (pipeline.shards / ASIDE).glob("*.h5.*")
        assert aside.name.startswith(damaged.name)
        assert (await fictl(pipeline, "prove", str(event_id)))[0] == 0


async def test_what_was_taken_back_is_made_again_though_no_hop_held_a_frame_and_nothing_new_comes(
    tmp_path: Path,
) -> None:
    """Then no stage is refused: that the partition went back, its receipts alone tell."""
    async with running(tmp_path, settings(partitions=1, seal_on_drain=False)) as pipeline:
        load = await published(pipeline, seed=34)
        await pipeline.supervisor.hold_down("persist-0")
        path = pipeline.shards / live_name(0, FIRST_SHARD)
        flip(path, read_live_header(path).index.offset + 9)
        logs = [pipeline.supervisor.directory / "logs" / f"{stage}-0.log" for stage in ("ingest", "segment", "hash")]
        begun = [log.read_text().count(EVENT_WORKER_STARTED) for log in logs]
        for hop in HOPS:
            await pipeline.client.jetstream(timeout=10).purge_stream(hop)
        for log, before in zip(logs, begun, strict=True):
            await until(
                lambda log=log, before=before: log.read_text().count(EVENT_WORKER_STARTED) > before,
                f"{log.stem} goes on from the receipt",
                60,
            )
        facts = await read_cluster(pipeline.client, wait_s=10)
        told = await Rewinder(pipeline.api, existing_store(pipeline.shards, facts.cluster_id)).rebuild(0)
        assert told is not None
        assert (told.origin, told.again) == (0, told.committed_events)
        await pipeline.supervisor.bring_back("persist-0")
        await pipeline.assert_whole(load)


@in_module_loop
async def test_a_partition_that_persist_works_on_is_passed_over_and_nothing_is_called_well(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    await published(pipeline, seed=29)
    code, out, err = await fictl(pipeline, "rebuild", "--json")
    assert code == 1
    assert [(row["partition"], "persist works on it" in row["passed_over"]) for row in json.loads(out)] == [(0, True)]
    assert "partition 0 is passed over" in err
    with monkeypatch.context() as patch:
        patch.setattr(rewind, "REWIND_LOCK", msgspec.structs.replace(REWIND_LOCK, s=600.0))
        store = existing_store(pipeline.shards, (await read_cluster(pipeline.client)).cluster_id)
        async with asyncio.timeout(60):
            with pytest.raises(NotOursError, match="A persister works on partition 0"):
                await Rewinder(pipeline.api, store).rebuild(0, dry_run=True)
    for verb in (("rebuild",), ("partitions", "move")):
        code, out, err = await fictl(pipeline, *verb, "99")
        assert (code, out) == (2, "")
        assert "partition 99: the cluster has 0 to 0" in err
    assert not (pipeline.shards / lock_name(99)).exists()


@in_module_loop
async def test_a_look_at_what_would_be_done_makes_no_store_and_no_lock(pipeline: Pipeline, tmp_path: Path) -> None:
    await published(pipeline, seed=28)
    there = tmp_path / "there"
    for verb in (("rebuild",), ("rebuild", "0", "--dry-run")):
        code, _, err = await fictl(pipeline, *verb, "--shards", there)
        assert (code, "is not a store" in err) == (1, True)
    move = ("partitions", "move", "0", "--dry-run", "--shards", there)
    code, out, err = await fictl(pipeline, *move)
    assert (code, "would go back" in out) == (0, True), err
    assert not there.exists()
    open_store(there, (await read_cluster(pipeline.client)).cluster_id, now_ns=1)
    before = set(there.iterdir())
    code, out, err = await fictl(pipeline, *move)
    assert (code, "would go back" in out) == (0, True), err
    assert set(there.iterdir()) == before
    code, out, err = await fictl(pipeline, "rebuild", "--dry-run", "--shards", there)
    assert (code, "owns no partition" in out) == (0, True), err
    await pipeline.supervisor.hold_down("persist-0")
    code, out, err = await fictl(pipeline, "rebuild", "--dry-run")
    assert (code, "every file is as the records say" in out) == (0, True), err
    await pipeline.supervisor.bring_back("persist-0")


@in_module_loop
async def test_what_was_in_a_deleted_sealed_shard_can_be_proved_once_it_is_made_again(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """Its seal record was left lying, and is not that of the new file of the same name."""
    load = await published(pipeline, seed=41)
    await sealed(pipeline)
    (before,) = (file.path for file in list_shards(pipeline.shards)[0] if file.sealed)
    await pipeline.supervisor.hold_down("persist-0")
    mark = pipeline.shards / BACKUP_FILE
    mark.write_bytes(encode_last_backup(LastBackup(at_ns=1, to="/mnt", copied={0: 1})))
    before.unlink()
    code, _, err = await fictl(pipeline, "rebuild", "--wait", "0")
    assert code == 0, err
    # What is made again is not what was copied.
    assert decode_last_backup(mark.read_bytes()).copied == {0: 0}
    await pipeline.supervisor.bring_back("persist-0")
    await pipeline.assert_whole(load)
    await sealed(pipeline)
    (after,) = (file.path for file in list_shards(pipeline.shards)[0] if file.sealed)
    assert after == before
    assert await assert_agrees(pipeline, pipeline.shards) == 1
    wanted = str(UUID(bytes=stored(pipeline.shards)[0].event_id))
    planted = record_path(after)
    planted.write_bytes(encode_receipt(msgspec.structs.replace(decode_seal(planted.read_bytes()), root="0" * 64)))
    code, _, err = await fictl(pipeline, "prove", wanted, "--output", tmp_path / "proof.json")
    assert (code, err.count("no receipt")) == (0, 0), err
    assert (await run_fictl("check-proof", tmp_path / "proof.json"))[0] == 0


@in_module_loop
async def test_what_was_moved_is_shown_also_when_nobody_works_on_it_in_time(pipeline: Pipeline, tmp_path: Path) -> None:
    await published(pipeline, seed=48)
    there = tmp_path / "there"
    code, out, err = await fictl(pipeline, "partitions", "move", "0", "--shards", there, "--wait", "0.1")
    assert (code, "partition 0: from store" in out, "have not caught up" in err) == (3, True, True), err


@pytest.fixture
def another_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on another file system than `tmp_path`."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("a file system in memory is Linux's")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        yield Path(memory)


async def test_a_store_whose_disk_was_lost_is_whole_again_from_its_backup_and_the_stream(
    tmp_path: Path, another_disk: Path
) -> None:
    async with running(tmp_path, settings(partitions=PARTITIONS)) as pipeline:
        loads, copies = [], another_disk / "backup"
        for seed in (42, 43):
            loads.append(await published(pipeline, seed))
            await sealed(pipeline)
        assert (await run_fictl("backup", pipeline.shards, copies)).code == 0
        # By default the stream keeps one sealed shard of a partition.
        for seed in (44, 45, 46):
            loads.append(await published(pipeline, seed))
            await sealed(pipeline)
        loads.append(await published(pipeline, seed=47))
        for partition, files in list_shards(pipeline.shards).items():
            await trimmed(pipeline, partition, [file for file in files if file.sealed][2])
        await pipeline.supervisor.hold_down("persist-0")
        shutil.rmtree(pipeline.shards)
        shutil.copytree(copies, pipeline.shards)
        code, out, err = await fictl(pipeline, "rebuild", "--wait", "0")
        assert (code, out.count("are made again from the stream")) == (0, PARTITIONS), err
        await pipeline.supervisor.bring_back("persist-0")
        await pipeline.assert_whole(*loads)
        assert await assert_agrees(pipeline, pipeline.shards) == PARTITIONS
        told = json.loads((await run_fictl("backup", pipeline.shards, copies, "--json")).out)
        assert (told["problems"], told["aside"]) == ([], [])


@pytest.mark.slow
async def test_the_newest_sealed_shard_is_made_again_and_an_older_one_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, settings(partitions=PARTITIONS)) as pipeline:
        loads = []
        for seed in (33, 34, 35):
            loads.append(await published(pipeline, seed))
            await sealed(pipeline)
        loads.append(await published(pipeline, seed=36))
        for partition, files in list_shards(pipeline.shards).items():
            await trimmed(pipeline, partition, [file for file in files if file.sealed][-1])
        await pipeline.supervisor.hold_down("persist-0")
        shards = list_shards(pipeline.shards)
        newest, oldest = ([file for file in shards[lane] if file.sealed][at].path for lane, at in ((0, -1), (1, 0)))
        whole = oldest.read_bytes()
        flip(newest, newest.stat().st_size // 2)
        flip(oldest, oldest.stat().st_size // 2)
        code, out, err = await fictl(pipeline, "rebuild", "--wait", "0")
        assert code == 1
        assert "partition 0: " in out
        assert f"FI_EVENTS no longer has what {oldest} holds" in err
        oldest.write_bytes(whole)
        await pipeline.supervisor.bring_back("persist-0")
        await pipeline.assert_whole(*loads)
        assert await assert_agrees(pipeline, pipeline.shards) == 1
        await sealed(pipeline)
        assert await assert_agrees(pipeline, pipeline.shards) == 1


async def trimmed(pipeline: Pipeline, partition: int, newest: ShardFile) -> None:
    """Waits until `FI_EVENTS` holds nothing from before the newest sealed shard but the message that it follows."""

    async def gone() -> bool:
        first = await pipeline.api.first_message(EVENTS, raw_filter(partition))
        return first is not None and first.seq + 1 >= (newest.first_origin or 0)

    await until(gone, f"partition {partition} is trimmed")


@pytest.mark.slow
async def test_another_store_takes_over_from_a_node_that_is_gone(tmp_path: Path) -> None:
    async with running(tmp_path, settings(partitions=PARTITIONS)) as pipeline:
        loads = [await published(pipeline, seed=37)]
        await sealed(pipeline)
        loads.append(await published(pipeline, seed=38))
        await pipeline.supervisor.hold_down("persist-0")
        there = tmp_path / "there"
        async with extra_stage(pipeline, "persist", "persist-there", shards=there) as successor:
            await successor.start()
            assert "not mounted? Start persist there, or `fictl partitions move 0`" in successor.log_text()
            code, _, err = await fictl(pipeline, "partitions", "move", "0", "1", "--shards", there)
            assert code == 0, err
            late = Load(workload(seed=39, events=200))
            await late.publish(pipeline.client)
            loads.append(late)
            await settled(pipeline, there)
            await pipeline.supervisor.bring_back("persist-0")
            assert all(file.sealed for files in list_shards(pipeline.shards).values() for file in files)
            assert len(list((pipeline.shards / ASIDE).glob("*.live.h5.*"))) == PARTITIONS
            # The owner saw a stranger's receipt, and goes on.
            loads.append(await published_there(pipeline, there, seed=40))
            for load in loads:
                verdict = check(load.attempts, _ours(load, [*stored(pipeline.shards), *stored(there)]))
                assert verdict.ok, verdict
                assert verdict.stored == verdict.attempted
            assert await assert_agrees(pipeline, there) == PARTITIONS
            assert await assert_agrees(pipeline, pipeline.shards) == PARTITIONS
            code, out, _ = await fictl(pipeline, "partitions", "ls", "--json")
            assert {row["store"] for row in json.loads(out)} == {
                json.loads((there / "store.json").read_bytes())["store_id"]
            }


async def published_there(pipeline: Pipeline, there: Path, seed: int) -> Load:
    load = Load(workload(seed=seed, events=100))
    await load.publish(pipeline.client)
    await settled(pipeline, there)
    return load


async def settled(pipeline: Pipeline, there: Path) -> None:
    """Waits until everything is committed and can be read in the store at `there`."""

    async def done() -> bool:
        if await pipeline.unsettled():
            return False
        ends = {info.partition: info.last_origin for info in shown(there)}
        return all(ends[receipt.partition] == receipt.origin for receipt in await pipeline.receipts())

    await until(done, "the other store shows everything that is committed")


def shown(shards: Path) -> list[ShardInfo]:
    with EventStore(shards) as store:
        return store.shards()


def stored(shards: Path) -> list[Event]:
    with EventStore(shards) as store:
        return [row.event for row in store.iterate()]


def _ours(load: Load, events: list[Event]) -> list[Event]:
    ours = {attempt.consultation_id for attempt in load.attempts}
    return sorted((e for e in events if e.consultation_id in ours), key=lambda event: (event.origin, event.index))
