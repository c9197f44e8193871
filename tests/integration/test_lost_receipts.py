"""`FI_RECEIPTS` is lost under a running pipeline: nobody begins anew, and the store says where it goes on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from commands import Ran, at_servers, run_fictl
from pipeline import Load, Pipeline, extra_stage, flip, running, settings, under_load, until, workload

from cluster.audit import audit_store
from contracts.receipts import Receipt, Signature
from contracts.subjects import EVENTS, HOPS, RECEIPTS
from stages.persist.aside import ASIDE
from stages.persist.keys import create_key
from stages.persist.names import list_shards
from stages.persist.store import EventStore
from stages.runtime.access import Servers
from stages.runtime.checkpoint import last_receipt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

PARTITIONS = 2
WAITS = "the receipts of partition {} were lost"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    """Its partitions are owned, and have their receipts, when a test begins and when it ends."""
    async with running(tmp_path_factory.mktemp("receipts"), settings(partitions=PARTITIONS)) as started:
        yield started


async def fictl(pipeline: Pipeline, *arguments: str | Path) -> Ran:
    return await run_fictl(*arguments, "--dir", pipeline.supervisor.directory)


async def delete_receipts(pipeline: Pipeline) -> None:
    await pipeline.client.jetstream(timeout=10).delete_stream(RECEIPTS)


async def apply(pipeline: Pipeline) -> None:
    """What every message about a missing stream recommends."""
    code, out, err = await fictl(pipeline, "cluster", "apply")
    assert (code, RECEIPTS in out) == (0, True), err


async def published(pipeline: Pipeline, seed: int) -> Load:
    load = Load(workload(seed=seed, events=200))
    await load.publish(pipeline.client)
    await pipeline.settled()
    return load


def records(shards: Path) -> list[list[bytes]]:
    with EventStore(shards) as store:
        return [[record for _, record in store.records(partition)] for partition in range(PARTITIONS)]


async def receipt(pipeline: Pipeline, partition: int) -> Receipt | None:
    return (await last_receipt(pipeline.api, partition))[0]


def own_log(pipeline: Pipeline) -> Callable[[], str]:
    """Gives what the supervised persister has logged since this was called."""
    log = pipeline.supervisor.directory / "logs" / "persist-0.log"
    begun = len(log.read_text())
    return lambda: log.read_text()[begun:]


def said(log: Callable[[], str], partition: int = 0) -> Callable[[], Awaitable[bool]]:
    async def waits() -> bool:
        return WAITS.format(partition) in log()

    return waits


@pytest.mark.parametrize(("purged", "seed"), [("fi.receipts.0", 59), (">", 63)])
async def test_receipts_that_somebody_purges_are_told_again_by_the_store_with_the_shards_and_begun_by_no_other(
    pipeline: Pipeline, tmp_path: Path, purged: str, seed: int
) -> None:
    """The first one here: once the stream was made again, a mark on it tells of that, whatever was purged."""
    lost = range(PARTITIONS) if purged == ">" else [0]
    loads = [await published(pipeline, seed)]
    await pipeline.supervisor.stop_stage("persist")
    await pipeline.supervisor.start_stage("persist")
    loads.append(Load(workload(seed + 1, events=600)))
    async with (
        extra_stage(pipeline, "persist", "persist-there", shards=tmp_path / "there") as other,
        under_load(loads[1], pipeline.client, rate_per_s=200),
    ):
        await loads[1].reached(100)
        log = own_log(pipeline)
        # A receipt that is on its way can be let in behind the purge: then nothing is lost.
        pipeline.supervisor.freeze("persist-0")
        await pipeline.receipts()
        await pipeline.client.jetstream(timeout=10).purge_stream(RECEIPTS, subject=purged)
        pipeline.supervisor.thaw("persist-0")
        for partition in lost:
            await until(said(log, partition), "persist waits", 60)
        await pipeline.supervisor.hold_down("persist-0")
        await other.start()
        for partition in lost:
            await until(said(other.log_text, partition), "a store without the shards does not begin anew", 60)
            assert await receipt(pipeline, partition) is None
        code, out, err = await fictl(pipeline, "partitions", "restore")
        assert (code, out.count("its receipts were lost")) == (0, len(lost)), err
        await pipeline.supervisor.bring_back("persist-0")
    await pipeline.assert_whole(*loads)


async def test_the_stores_say_where_they_go_on_and_nothing_is_lost_doubled_or_made_again(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    loads = [await published(pipeline, seed=50)]
    await pipeline.supervisor.stop_stage("persist")
    await pipeline.supervisor.start_stage("persist")
    loads.append(await published(pipeline, seed=51))
    await loads[0].publish(pipeline.client)
    await pipeline.client.jetstream(timeout=10).publish("fi.events.clinic-1.nobody", b"{}")
    await pipeline.settled()
    before = await pipeline.receipts()
    assert sum(one.dead_lettered for one in before) == 1
    held = records(pipeline.shards)
    there, log = tmp_path / "there", own_log(pipeline)
    late = Load(workload(seed=52, events=600))
    async with (
        extra_stage(pipeline, "persist", "persist-there", shards=there) as other,
        under_load(late, pipeline.client, rate_per_s=200),
    ):
        await delete_receipts(pipeline)
        await late.reached(100)
        await apply(pipeline)
        for partition in range(PARTITIONS):
            await until(said(log, partition), "persist waits", 60)
        # Nobody's any more, they are shared anew once another comes.
        await other.start()
        for partition in range(PARTITIONS):
            await until(said(other.log_text, partition), "a store without the shards does not begin anew", 60)
        code, out, err = await fictl(pipeline, "status", "--json")
        assert (code, json.loads(out)["problems"][0]["kind"]) == (3, "receipts_lost"), err
        code, out, err = await fictl(pipeline, "partitions", "restore", "--shards", there)
        assert (code, "nothing to do" in out) == (0, True), err
        code, _, err = await fictl(pipeline, "partitions", "restore", "0", "--shards", there)
        assert (code, "has no shard of partition 0" in err) == (1, True), err
        code, out, err = await fictl(pipeline, "partitions", "restore", "--dry-run", "--json")
        assert code == 0, err
        told = json.loads(out)
        assert [row["again"] for row in told] == [0] * PARTITIONS
        assert all(row["origin"] >= one.origin for row, one in zip(told, before, strict=True))
        assert [await receipt(pipeline, partition) for partition in range(PARTITIONS)] == [None, None]
        code, out, err = await fictl(pipeline, "partitions", "restore")
        assert (code, out.count("its receipts were lost")) == (0, PARTITIONS), err
    await pipeline.assert_whole(*loads, late)
    totals = await pipeline.receipts()
    assert sum(one.dead_lettered for one in totals) == 1
    assert sum(one.duplicates for one in totals) == sum(one.duplicates for one in before)
    assert [now[: len(then)] for now, then in zip(records(pipeline.shards), held, strict=True)] == held
    report = await audit_store(pipeline.shards, Servers(pipeline.supervisor.urls))
    assert (report.store.ok, report.rewinds) == (True, []), report.store.problems
    code, out, _ = await fictl(pipeline, "verify", pipeline.shards, "--receipts")
    assert (code, "receipts were lost by" in out) == (0, True), out
    code, out, _ = await fictl(pipeline, "partitions", "restore")
    assert (code, "nothing to do" in out) == (0, True)


async def test_what_a_restored_partition_goes_on_from_is_what_its_last_receipt_said(pipeline: Pipeline) -> None:
    await published(pipeline, seed=53)
    await pipeline.supervisor.stop_stage("persist")
    await pipeline.supervisor.start_stage("persist")
    await published(pipeline, seed=54)
    before = await pipeline.receipts()
    await pipeline.supervisor.hold_down("persist-0")
    await delete_receipts(pipeline)
    await apply(pipeline)
    code, _, err = await fictl(pipeline, "partitions", "restore")
    assert code == 0, err
    for then in before:
        now = await receipt(pipeline, then.partition)
        assert now is not None
        assert now.takeover
        told = {name: getattr(then, name) for name in ("writer", "node", "trail", "committed_ns", "takeover")}
        assert msgspec.structs.replace(now, **told) == then
    code, _, err = await fictl(pipeline, "partitions", "restore", "0")
    assert (code, "has its receipts" in err) == (1, True), err
    await pipeline.supervisor.bring_back("persist-0")


async def test_a_damaged_shard_must_be_put_right_unless_the_stream_still_has_what_it_held(pipeline: Pipeline) -> None:
    loads = []
    for seed in (55, 56):
        loads.append(await published(pipeline, seed))
        await pipeline.supervisor.stop_stage("persist")
        await pipeline.supervisor.start_stage("persist")
    loads.append(await published(pipeline, seed=57))
    await pipeline.supervisor.hold_down("persist-0")
    await delete_receipts(pipeline)
    await apply(pipeline)
    shards = list_shards(pipeline.shards)
    first, newest = shards[0][0].path, [file for file in shards[1] if file.sealed][-1].path
    whole = first.read_bytes()
    flip(first, first.stat().st_size // 2)
    flip(newest, newest.stat().st_size // 2)
    code, out, err = await fictl(pipeline, "partitions", "restore")
    assert code == 1
    assert f"put {first} right from a copy" in err
    assert f"partition 1: {newest}: its bytes are not those that were sealed" in out
    assert await receipt(pipeline, 0) is None
    first.write_bytes(whole)
    code, _, err = await fictl(pipeline, "partitions", "restore")
    assert code == 0, err
    await pipeline.supervisor.bring_back("persist-0")
    await pipeline.assert_whole(*loads)
    assert [path.name.split(".h5")[0] for path in (pipeline.shards / ASIDE).glob(f"{newest.name}.*")]


async def test_a_partition_of_which_no_store_has_a_shard_is_begun_only_when_told_so(tmp_path: Path) -> None:
    async with running(tmp_path, settings(partitions=PARTITIONS), {"persist": 0}) as pipeline:
        load = Load(workload(seed=58, events=200))
        await load.publish(pipeline.client)
        await delete_receipts(pipeline)
        await apply(pipeline)
        assert (await pipeline.client.jetstream(timeout=10).stream_info(EVENTS)).state.messages > 0
        async with extra_stage(pipeline, "persist", "persist-0") as persist:
            await persist.start()
            for partition in range(PARTITIONS):
                await until(said(persist.log_text, partition), "nothing is begun", 60)
            assert (await fictl(pipeline, "partitions", "restore", "--begin-anew"))[0] == 2
            for partition in map(str, range(PARTITIONS)):
                code, _, err = await fictl(pipeline, "partitions", "restore", partition)
                assert (code, "--begin-anew if none has" in err) == (1, True), err
                code, _, err = await fictl(pipeline, "partitions", "restore", partition, "--begin-anew")
                assert code == 0, err
            await pipeline.assert_whole(load)


async def test_a_partition_that_is_owned_late_is_no_lost_one(tmp_path: Path) -> None:
    """Its place was kept, so that what left the streams meanwhile says nothing of it."""
    async with running(tmp_path, settings(partitions=PARTITIONS, receipts_kept=1), {"persist": 0}) as pipeline:
        load = Load(workload(seed=62, events=200))
        await load.publish(pipeline.client)
        async with extra_stage(pipeline, "persist", "persist-early", partitions="0") as early:
            await early.start()
            stream = pipeline.client.jetstream(timeout=10)

            async def trimmed() -> bool:
                state = (await stream.stream_info(RECEIPTS)).state
                return state.messages < state.last_seq

            await until(trimmed, "receipts leave the stream", 60)
            assert await last_receipt(pipeline.api, 1) != (None, 0)
            assert await receipt(pipeline, 1) is None
            async with extra_stage(pipeline, "persist", "persist-late", partitions="1") as late:
                await late.start()
                await pipeline.assert_whole(load)


async def test_where_the_store_has_signed_records_the_restored_receipt_must_be_signed_too(tmp_path: Path) -> None:
    key = create_key(tmp_path / "signing.pem").public_key
    chosen = settings(partitions=PARTITIONS, signing_key_file=str(tmp_path / "signing.pem"))
    async with running(tmp_path, chosen) as pipeline:
        await published(pipeline, seed=63)
        await pipeline.supervisor.stop_stage("persist")
        await pipeline.supervisor.start_stage("persist")
        await published(pipeline, seed=64)
        await pipeline.supervisor.hold_down("persist-0")
        await delete_receipts(pipeline)
        await apply(pipeline)
        there = ("--shards", pipeline.shards, *at_servers(pipeline.supervisor.urls))
        code, _, err = await run_fictl("partitions", "restore", *there)
        assert (code, err.count(f"are signed with key {key}")) == (1, PARTITIONS), err
        assert [await receipt(pipeline, partition) for partition in range(PARTITIONS)] == [None] * PARTITIONS
        code, _, err = await run_fictl("partitions", "restore", *there, FI_SIGNING_KEY_FILE=chosen.signing_key_file)
        assert code == 0, err
        for one in await pipeline.receipts():
            assert isinstance(one.signature, Signature)
            assert one.signature.key == key


async def test_where_receipts_were_purged_no_stream_is_made_that_would_count_anew(tmp_path: Path) -> None:
    """What it gave a settled sequence would be passed over."""
    async with running(tmp_path, settings(partitions=PARTITIONS)) as pipeline:
        await published(pipeline, seed=65)
        for stage in ("ingest", "segment", "hash", "persist"):
            await pipeline.supervisor.hold_down(f"{stage}-0")
        stream = pipeline.client.jetstream(timeout=10)
        for name in (*HOPS, EVENTS):
            await stream.delete_stream(name)
        for purged in ("fi.receipts.0", ">"):
            await stream.purge_stream(RECEIPTS, subject=purged)
            code, _, err = await fictl(pipeline, "cluster", "apply")
            assert code == 1
            assert f"{EVENTS} is gone, and so are receipts that said how far it had counted" in err
