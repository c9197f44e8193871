"""`fictl scale|members|pause|resume|drain` as processes of their own, on a running pipeline."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pipeline import Load, Pipeline, extra_stage, running, settings, under_load, until, workload

from cluster import control
from cluster.control import SOCKET_FILE, socket_path
from cluster.state import read_state
from contracts.subjects import STAGES

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

PARTITIONS = 4


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    async with running(tmp_path_factory.mktemp("verbs"), settings(partitions=PARTITIONS)) as started:
        yield started


async def fi(pipeline: Pipeline, *arguments: str) -> tuple[int, Any, str]:
    """Runs a verb on the pipeline's directory: exit code, what its JSON said (None without any), stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster", *arguments, "--dir", str(pipeline.supervisor.directory), "--json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if not name.startswith("FI_")},
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, json.loads(out) if out else None, err.decode()


def names(answer: dict[str, Any], stage: str) -> list[str]:
    return [member["name"] for member in answer["members"] if member["stage"] == stage]


async def test_scaling_a_running_pipeline_under_load(pipeline: Pipeline) -> None:
    load = Load(workload(seed=201, events=3000))
    async with under_load(load, pipeline.client, rate_per_s=300):
        await load.reached(200)
        code, answer, err = await fi(pipeline, "scale", "segment=3", "hash=2")
        assert code == 0, err
        assert (answer["before"]["segment"], answer["after"]["segment"], answer["settled"]) == (1, 3, True)
        assert names(answer, "segment") == ["segment-0", "segment-1", "segment-2"]
        lanes = [p for member in answer["members"] if member["stage"] == "segment" for p in member["partitions"]]
        assert sorted(lanes) == list(range(PARTITIONS))
        running_now = [process.name for process in read_state(pipeline.supervisor.directory).processes]
        assert {"segment-2", "hash-1"} <= set(running_now)
        code, answer, err = await fi(pipeline, "scale", "segment=1", "hash=1")
        assert (code, names(answer, "hash")) == (0, ["hash-0"]), err
    await pipeline.assert_whole(load)


async def test_members_shows_every_process_and_partition(pipeline: Pipeline) -> None:
    code, answer, err = await fi(pipeline, "members")
    assert (code, answer["complete"], answer["unheld"]) == (0, True, []), err
    pids = {process.name: process.pid for process in pipeline.supervisor.processes if process.kind != "server"}
    assert {member["name"]: member["pid"] for member in answer["members"]} == pids
    assert all(member["partitions"] == list(range(PARTITIONS)) for member in answer["members"])
    assert all(0 <= member["age_s"] < 60 for member in answer["members"])


async def test_members_says_why_nobody_works_on_a_partition(pipeline: Pipeline, tmp_path: Path) -> None:
    load = Load(workload(seed=202, events=200))
    await load.publish(pipeline.client)
    await pipeline.assert_whole(load)
    (store,) = {receipt.store for receipt in await pipeline.receipts()}
    async with extra_stage(pipeline, "persist", "elsewhere", shards=tmp_path / "store", partitions=None) as elsewhere:
        await elsewhere.start()
        assert (await fi(pipeline, "scale", "persist=0", "hash=0"))[0] == 0
        code, answer, _ = await fi(pipeline, "members")
        assert code == 3
        reasons = {(row["stage"], row["why"]) for row in answer["unheld"]}
        node = os.uname().nodename
        assert reasons == {
            ("hash", "no process of hash runs"),
            ("persist", f"waits for store {store[:8]} on node {node}: start persist there"),
        }
    assert (await fi(pipeline, "scale", "persist=1", "hash=1"))[0] == 0


@pytest.mark.parametrize("stage", STAGES)
async def test_a_paused_stage_stops_reading_and_goes_on_where_it_stood(pipeline: Pipeline, stage: str) -> None:
    load = Load(workload(seed=210 + STAGES.index(stage), events=1500))  # type: ignore[arg-type]
    async with under_load(load, pipeline.client, rate_per_s=500):
        await load.reached(300)
        code, answer, err = await fi(pipeline, "pause", stage)
        assert (code, answer["paused"], answer["settled"]) == (0, True, True), err
        assert [(member["state"], member["partitions"]) for member in answer["members"]] == [("paused", [])]
        await pipeline.supervisor.kill(f"{stage}-0")
        committed = (await pipeline.totals()).persisted
        await load.reached(1200)
        code, answer, _ = await fi(pipeline, "members")
        assert code == 3
        assert {row["why"] for row in answer["unheld"]} == {f"{stage} is paused; `fictl resume {stage}` goes on"}
        assert list(answer["paused"]) == [stage]
        # What was behind the paused stage flows out; nothing new may come through it.
        assert (await pipeline.totals()).persisted < committed + 700

        async def started_again() -> bool:
            _, seen, _ = await fi(pipeline, "members")
            return any(member["name"] == f"{stage}-0" and member["state"] == "paused" for member in seen["members"])

        await until(started_again, "the process that was killed is back, and obeys", 60)
        code, answer, err = await fi(pipeline, "resume", stage)
        assert (code, answer["settled"]) == (0, True), err
    await pipeline.assert_whole(load)


async def test_draining_commits_what_was_accepted_and_says_what_was_not(pipeline: Pipeline) -> None:
    load = Load(workload(seed=220, events=1500))
    await load.publish(pipeline.client)
    code, answer, err = await fi(pipeline, "drain")
    assert (code, answer["committed"], answer["waiting"]) == (0, True, 0), err
    assert answer["stopped"] == dict.fromkeys(STAGES, 1)
    assert "fictl scale ingest=1 segment=1 hash=1 persist=1" in err
    totals = await pipeline.totals()
    assert (answer["persisted"], answer["dead_lettered"]) == (totals.persisted, totals.dead_lettered)
    assert [process.kind for process in pipeline.supervisor.processes] == ["server"] * 3
    late = Load(workload(seed=221, events=40))
    await late.publish(pipeline.client, batch=1)
    code, answer, err = await fi(pipeline, "drain", "--wait", "0.5")
    assert (code, answer["committed"], answer["waiting"]) == (1, False, 40), err
    assert answer["unfinished"] == ["ingest"]
    assert (await fi(pipeline, "scale", *(f"{stage}=1" for stage in STAGES)))[0] == 0
    await pipeline.assert_whole(load)
    await pipeline.assert_whole(late)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("scale", "hash=9"), 2, "can share the partitions"),
        (("scale", "hsah=1"), 2, "with a stage of ingest, segment"),
        (("pause", "everything"), 2, "use one of ingest"),
    ],
)
async def test_what_cannot_be_done_is_refused_with_the_next_step(
    pipeline: Pipeline, arguments: tuple[str, ...], code: int, words: str
) -> None:
    got, _, err = await fi(pipeline, *arguments)
    assert (got, words in err) == (code, True), err


async def test_a_run_in_a_directory_with_a_long_name_can_be_scaled(pipeline: Pipeline, tmp_path: Path) -> None:
    assert socket_path(Path("/run/fi")) == Path("/run/fi") / SOCKET_FILE
    elsewhere = socket_path(tmp_path / ("x" * 120))
    assert len(os.fsencode(elsewhere)) < 100

    async def scale(counts: dict[Any, int]) -> control.ScaleAnswer:
        return control.ScaleAnswer({}, counts)

    server = control.ControlServer(elsewhere, scale)
    await server.start()
    try:
        assert (await control.ask_scale(str(elsewhere), {"hash": 2}, 10)).after == {"hash": 2}
        assert elsewhere.stat().st_mode & 0o777 == 0o600
        reader, writer = await asyncio.open_unix_connection(str(elsewhere))
        writer.write(b"nonsense\n")
        assert b"not a request" in await reader.readline()
        writer.close()
    finally:
        await server.close()
    assert not elsewhere.exists()
