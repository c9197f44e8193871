"""All that the servers had is lost, and the store survives: the cluster goes on with it, on the operator's word."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from commands import Ran, run_fictl
from pipeline import Load, Pipeline, flip, running, settings, workload

from contracts.settings import MIB
from contracts.subjects import EVENTS, HOPS, RECEIPTS, STAGES
from stages.persist.header import WATERMARK_BYTES, read_live_header
from stages.persist.names import FIRST_SHARD, list_shards, live_name
from stages.persist.store import EventStore
from stages.persist.storedir import open_store, read_store

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PARTITIONS = 2
NAMED = "--after-stores"


async def fictl(pipeline: Pipeline, *arguments: str | Path) -> Ran:
    return await run_fictl(*arguments, "--dir", pipeline.supervisor.directory)


async def lose_servers(pipeline: Pipeline) -> None:
    """Kills everything, and gives every server an empty disk."""
    supervisor = pipeline.supervisor
    for stage in STAGES:
        await supervisor.hold_down(f"{stage}-0")
    await asyncio.gather(*map(supervisor.hold_down, pipeline.servers))
    for name in pipeline.servers:
        (store,) = (path for path in (supervisor.directory / "nats").rglob("jetstream") if name in path.parts)
        shutil.rmtree(store)
    await asyncio.gather(*map(supervisor.bring_back, pipeline.servers))


async def test_a_cluster_goes_on_with_its_store_after_the_servers_lost_everything(tmp_path: Path) -> None:
    async with running(tmp_path / "run", settings(partitions=PARTITIONS)) as pipeline:
        loads = [Load(workload(seed=seed, events=200)) for seed in (70, 71, 72, 73)]
        await loads[0].publish(pipeline.client)
        await pipeline.settled()
        await pipeline.supervisor.stop_stage("persist")
        await pipeline.supervisor.start_stage("persist")
        await loads[1].publish(pipeline.client)
        held = await pipeline.settled()
        await pipeline.supervisor.hold_down("persist-0")
        await loads[2].publish(pipeline.client)
        await lose_servers(pipeline)
        # As if persist had died between a receipt and showing what it accepted: nothing but the shard has that now.
        live = [file for file in list_shards(pipeline.shards)[0] if not file.sealed][-1].path
        overwrite(live, read_live_header(live).watermark.offset, bytes(WATERMARK_BYTES))

        cluster_id = read_store(pipeline.shards).cluster_id
        for verb in ("plan", "apply"):
            code, _, err = await fictl(pipeline, "cluster", verb)
            assert (code, f"the store here is of cluster {cluster_id}" in err, NAMED in err) == (1, True, True), err
        other = tmp_path / "other"
        open_store(other, "f" * 32, now_ns=1)
        for refused, why in (
            ((NAMED, pipeline.shards, NAMED, other), "name the stores of one cluster"),
            ((NAMED, pipeline.shards, "--set", "partitions=3"), "set `partitions` and `partition_by` as they were"),
            ((NAMED, tmp_path / "none"), "is not a store"),
        ):
            code, _, err = await fictl(pipeline, "cluster", "apply", *refused)
            assert (code, why in err) == (1, True), err
        code, out, err = await fictl(pipeline, "cluster", "apply", NAMED, pipeline.shards, "--json")
        assert code == 0, err
        done = json.loads(out)
        changes = {change["stream"]: change for change in done["changes"]}
        assert done["cluster_id"] == cluster_id
        assert changes[EVENTS]["first_seq"] > origin_max(pipeline) + 2**40
        assert changes[RECEIPTS]["lost"] > "2026"
        for again in ((), (NAMED, pipeline.shards)):
            code, out, err = await fictl(pipeline, "cluster", "apply", *again, "--json")
            assert (code, json.loads(out)["changes"]) == (0, []), err
        code, _, err = await fictl(pipeline, "cluster", "apply", NAMED, other)
        assert (code, "only servers without any go on after stores" in err) == (1, True), err

        for stage in STAGES:
            await pipeline.supervisor.bring_back(f"{stage}-0")
        code, _, err = await fictl(pipeline, "partitions", "restore")
        assert (code, err.count("go on with --accept-loss")) == (1, PARTITIONS), err
        assert err.count(" of 20") == PARTITIONS, "it says since when"
        assert await pipeline.receipts() == []
        code, out, err = await fictl(pipeline, "partitions", "restore", "--accept-loss")
        assert (code, out.count(f"{EVENTS} no longer has")) == (0, PARTITIONS), err
        assert (await pipeline.totals()).persisted == held.persisted
        for load in loads:
            await load.publish(pipeline.client)
        totals = await pipeline.assert_whole(*loads)
        assert totals.persisted == held.persisted * 2
        code, out, _ = await fictl(pipeline, "verify", pipeline.shards, "--receipts")
        assert (code, "receipts were lost by" in out) == (0, True), out


async def test_nothing_goes_back_behind_where_a_stream_that_was_made_again_begins(tmp_path: Path) -> None:
    """While nothing is sealed, no record tells that it lacks anything. Then a run of that directory is gone on with."""
    run = tmp_path / "run"
    async with running(run, settings(partitions=1, seal_on_drain=False)) as pipeline:
        load = Load(workload(seed=74, events=100))
        await load.publish(pipeline.client)
        await pipeline.settled()
        for stage in STAGES:
            await pipeline.supervisor.hold_down(f"{stage}-0")
        for name in (*HOPS, EVENTS):
            await pipeline.client.jetstream(timeout=10).delete_stream(name)
        code, _, err = await fictl(pipeline, "cluster", "apply")
        assert code == 0, err
        live = pipeline.shards / live_name(0, FIRST_SHARD)
        whole = live.read_bytes()
        flip(live, read_live_header(live).index.offset + 9)
        for verb in (("rebuild",), ("partitions", "move", "0", "--shards", tmp_path / "there")):
            code, _, err = await fictl(pipeline, *verb, "--wait", "0")
            assert (code, f"cannot be taken back to origin 0: {EVENTS} no longer has" in err) == (1, True), err
        live.write_bytes(whole)
        await pipeline.supervisor.bring_back("persist-0")
        await pipeline.assert_whole(load)

    shutil.rmtree(run / "nats")
    up = ("up", "--dir", run, "--detach", "--scale", ",".join(f"{stage}=0" for stage in STAGES))
    up = (*up, "--set", "partitions=1", "--set", f"events_bytes_max={64 * MIB}", "--set", f"hop_bytes_max={16 * MIB}")
    code, _, err = await run_fictl(*up)
    assert (code, NAMED in err) == (1, True), err
    code, _, err = await run_fictl(*up, NAMED)
    try:
        assert code == 0, err
        code, out, err = await run_fictl("partitions", "restore", "--dir", run, "--accept-loss", "--json")
        assert (code, json.loads(out)[0]["events"]) == (0, len(load.attempts)), err
    finally:
        await run_fictl("down", "--dir", run)


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def origin_max(pipeline: Pipeline) -> int:
    """The highest that the store has."""
    with EventStore(pipeline.shards) as store:
        return max(end.origin or 0 for end in store.ends())
