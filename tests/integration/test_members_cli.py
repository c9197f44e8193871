"""`fictl scale|members|pause|resume|drain` as processes of their own, on a running pipeline."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from commands import at_servers
from pipeline import Load, Pipeline, extra_stage, fictl, members, running, settings, under_load, until, workload

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


def names(answer: dict[str, Any], stage: str) -> list[str]:
    return [member["name"] for member in answer["members"] if member["stage"] == stage]


async def test_scaling_a_running_pipeline_under_load(pipeline: Pipeline) -> None:
    load = Load(workload(seed=201, events=3000))
    async with under_load(load, pipeline.client, rate_per_s=300):
        await load.reached(200)
        code, answer, err = await fictl(pipeline, "scale", "segment=3", "hash=2")
        assert code == 0, err
        assert (answer["before"]["segment"], answer["after"]["segment"], answer["settled"]) == (1, 3, True)
        assert names(answer, "segment") == ["segment-0", "segment-1", "segment-2"]
        lanes = [p for member in answer["members"] if member["stage"] == "segment" for p in member["partitions"]]
        assert sorted(lanes) == list(range(PARTITIONS))
        running_now = [process.name for process in read_state(pipeline.supervisor.directory).processes]
        assert {"segment-2", "hash-1"} <= set(running_now)
        code, answer, err = await fictl(pipeline, "scale", "segment=1", "hash=1")
        assert (code, names(answer, "hash")) == (0, ["hash-0"]), err
    await pipeline.assert_whole(load)


async def test_restarting_every_stage_under_load_replaces_each_process_and_loses_nothing(pipeline: Pipeline) -> None:
    assert (await fictl(pipeline, "scale", "hash=2"))[0] == 0
    before = {process.name: process.pid for process in pipeline.supervisor.processes}
    load = Load(workload(seed=204, events=4000))
    async with under_load(load, pipeline.client, rate_per_s=300):
        await load.reached(200)
        code, answer, err = await fictl(pipeline, "restart")
        assert code == 0, err
        assert answer["replaced"] == {"ingest": 1, "segment": 1, "hash": 2, "persist": 1}
        assert answer["settled"]
    await pipeline.assert_whole(load)
    after = {process.name: process.pid for process in pipeline.supervisor.processes}
    assert set(before.values()) & set(after.values()) == {before[server] for server in ("n1", "n2", "n3")}
    # Whatever the order, each stage once. The tests below want the first names.
    assert (await fictl(pipeline, "scale", "hash=0"))[0] == 0
    code, answer, err = await fictl(pipeline, "restart", "persist", "ingest", "persist", "segment", "hash")
    assert (code, answer["replaced"]) == (0, {"persist": 1, "ingest": 1, "segment": 1, "hash": 0}), err
    assert (await fictl(pipeline, "scale", "hash=1"))[0] == 0
    assert {process.name for process in pipeline.supervisor.processes} == set(before) - {"hash-1"}
    code, _, err = await fictl(pipeline, "restart", "nothing")
    assert (code, "no stage is called" in err) == (2, True)


async def test_a_restart_whose_new_process_does_not_come_up_leaves_the_old_one_at_work(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [process for process in pipeline.supervisor.processes if process.kind == "segment"]
    command = pipeline.supervisor._command
    monkeypatch.setattr(
        pipeline.supervisor,
        "_command",
        lambda stage, name: ["false"] if stage == "segment" else command(stage, name),
    )
    code, answer, err = await fictl(pipeline, "restart", "segment", "hash")
    assert (code, answer["replaced"]) == (1, {"segment": 0, "hash": 1})
    assert "segment-" in err
    assert [process for process in pipeline.supervisor.processes if process.kind == "segment"] == before
    load = Load(workload(seed=205, events=100))
    await load.publish(pipeline.client)
    await pipeline.assert_whole(load)


async def test_members_shows_every_process_and_partition(pipeline: Pipeline) -> None:
    code, answer, err = await fictl(pipeline, "members")
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
        assert (await fictl(pipeline, "scale", "persist=0", "hash=0"))[0] == 0
        code, answer, _ = await fictl(pipeline, "members")
        assert code == 3
        reasons = {(row["stage"], row["why"]) for row in answer["unheld"]}
        node = os.uname().nodename
        waits = f"waits for store {store[:8]} on node {node}: start persist there"
        assert reasons == {
            ("hash", "no process of hash announces itself"),
            ("persist", f"{waits}; elsewhere has another store there: is the disk mounted? Then restart it"),
        }
    assert (await fictl(pipeline, "scale", "persist=1", "hash=1"))[0] == 0

    async def forgotten() -> bool:
        return "elsewhere" not in [member.name for member in await members(pipeline)]

    await until(forgotten, "the announcement of the process that was killed expires", 60)


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=[] if stage == "persist" else [pytest.mark.slow]) for stage in STAGES]
)
async def test_a_paused_stage_stops_reading_and_goes_on_where_it_stood(pipeline: Pipeline, stage: str) -> None:
    load = Load(workload(seed=210 + STAGES.index(stage), events=1500))  # type: ignore[arg-type]
    async with under_load(load, pipeline.client, rate_per_s=500):
        await load.reached(300)
        code, answer, err = await fictl(pipeline, "pause", stage)
        assert (code, answer["paused"], answer["settled"]) == (0, True, True), err
        assert [(member["state"], member["partitions"]) for member in answer["members"]] == [("paused", [])]
        await pipeline.supervisor.kill(f"{stage}-0")
        committed = (await pipeline.totals()).persisted
        await load.reached(1200)
        code, answer, _ = await fictl(pipeline, "members")
        assert code == 3
        assert {row["why"] for row in answer["unheld"]} == {f"{stage} is paused; `fictl resume {stage}` goes on"}
        assert list(answer["paused"]) == [stage]
        # What was behind the paused stage flows out; nothing new may come through it.
        assert (await pipeline.totals()).persisted < committed + 700

        async def started_again() -> bool:
            return (f"{stage}-0", "paused") in [(member.name, member.state) for member in await members(pipeline)]

        await until(started_again, "the process that was killed is back, and obeys", 60)
        code, answer, err = await fictl(pipeline, "resume", stage)
        assert (code, answer["settled"]) == (0, True), err
    await pipeline.assert_whole(load)


async def test_a_user_id_without_a_name_may_ask_for_what_is_recorded_under_a_name(pipeline: Pipeline) -> None:
    code = (
        "import os, pwd, sys, cluster.cli\n"
        "for name in ('LOGNAME', 'USER', 'LNAME', 'USERNAME'): os.environ.pop(name, None)\n"
        "def nobody(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')\n"
        "pwd.getpwuid = nobody\n"
        "cluster.cli.main(sys.argv[1:])\n"
    )
    urls = at_servers(pipeline.supervisor.urls)
    try:
        for verb in (("pause", "segment"), ("flush",), ("policy", "set", "closed_remembered=77")):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", code, *verb, *urls), stderr=asyncio.subprocess.PIPE
            )
            _, err = await process.communicate()
            assert process.returncode == 0, err.decode()
    finally:
        assert (await fictl(pipeline, "resume", "segment"))[0] == 0
    _, answer, _ = await fictl(pipeline, "policy", "show")
    assert answer["by"] == f"uid {os.getuid()}@{socket.gethostname()}"


@pytest.mark.slow
async def test_draining_commits_what_was_accepted_and_says_what_was_not(pipeline: Pipeline) -> None:
    load = Load(workload(seed=220, events=1500))
    await load.publish(pipeline.client)
    code, answer, err = await fictl(pipeline, "drain")
    assert (code, answer["committed"], answer["waiting"]) == (0, True, 0), err
    assert answer["stopped"] == dict.fromkeys(STAGES, 1)
    assert "fictl scale ingest=1 segment=1 hash=1 persist=1" in err
    totals = await pipeline.totals()
    assert (answer["persisted"], answer["dead_lettered"]) == (totals.persisted, totals.dead_lettered)
    assert [process.kind for process in pipeline.supervisor.processes] == ["server"] * 3
    late = Load(workload(seed=221, events=40))
    await late.publish(pipeline.client, batch=1)
    code, answer, err = await fictl(pipeline, "drain", "--wait", "0.5")
    assert (code, answer["committed"], answer["waiting"]) == (1, False, 40), err
    assert answer["unfinished"] == ["ingest"]
    assert (await fictl(pipeline, "scale", *(f"{stage}=1" for stage in STAGES)))[0] == 0
    await pipeline.assert_whole(load, late)


async def test_a_drain_that_is_broken_off_says_how_to_start_what_it_stopped(pipeline: Pipeline) -> None:
    where = ("--dir", str(pipeline.supervisor.directory))
    assert (await fictl(pipeline, "scale", "segment=2"))[0] == 0
    assert (await fictl(pipeline, "pause", "hash"))[0] == 0
    load = Load(workload(seed=222, events=40))
    await load.publish(pipeline.client)
    drain = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster", "drain", *where), stderr=asyncio.subprocess.PIPE
    )

    def stages() -> set[str]:
        return {process.kind for process in read_state(pipeline.supervisor.directory).processes}

    await until(lambda: stages() == {"server", "hash", "persist"}, "ingest and segment are stopped, and hash waits")
    drain.send_signal(signal.SIGINT)
    _, err = await drain.communicate()
    assert drain.returncode == 130
    assert f"`fictl scale ingest=1 segment=2 --dir {where[1]}`" in err.decode()

    code, answer, err = await fictl(pipeline, "drain", "--wait", "0.1")
    assert (code, answer["stopped"]) == (1, {"ingest": 0, "segment": 0, "hash": 1, "persist": 1})
    assert "fictl scale hash=1 persist=1 --dir" in err
    assert "ingest, segment had no process here before this" in err
    assert "fictl scale ingest=N segment=N --dir" in err
    assert (await fictl(pipeline, "resume", "hash"))[0] == 0
    assert (await fictl(pipeline, "scale", *(f"{stage}=1" for stage in STAGES)))[0] == 0
    await pipeline.assert_whole(load)


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
    got, _, err = await fictl(pipeline, *arguments)
    assert (got, words in err) == (code, True), err


async def test_a_run_in_a_directory_with_a_long_name_can_be_scaled(pipeline: Pipeline, tmp_path: Path) -> None:
    assert socket_path(Path("/run/fi")) == Path("/run/fi") / SOCKET_FILE
    elsewhere = socket_path(tmp_path / ("x" * 120))
    assert len(os.fsencode(elsewhere)) < 100

    async def scale(counts: dict[Any, int]) -> control.ScaleAnswer:
        return control.ScaleAnswer({}, counts)

    async def restart(stages: tuple[Any, ...]) -> control.RestartAnswer:
        return control.RestartAnswer(dict.fromkeys(stages, 1))

    server = control.ControlServer(elsewhere, scale, restart)
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
