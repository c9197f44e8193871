"""The health port of real processes, and `fictl health`."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from commands import run_fictl
from pipeline import Load, Pipeline, running, settings, until, workload

from cluster.health import get, look, read_health_files
from contracts.subjects import STAGES
from contracts.telemetry import CATALOGUE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

EVENTS = 300


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    """`EVENTS` are committed and not sealed. Each test leaves every process at work; the last one ends persist."""
    async with running(tmp_path_factory.mktemp("health"), settings(health_port=0, drain_s=60.0)) as started:
        await Load(workload(7, EVENTS)).publish(started.client)
        await started.settled()
        # A client that tries to reconnect to a frozen server leaks its socket (nats-py 2.16); ours is not needed.
        await started.client.close()
        yield started


async def ask(pipeline: Pipeline, name: str, path: str) -> tuple[int, Any]:
    """Status and JSON of a path of one process's health port."""
    files = {file.name: file for file in read_health_files(pipeline.supervisor.directory)}
    status, body = await get(f"http://{files[name].host}:{files[name].port}{path}")
    return status, json.loads(body)


def pid_of(pipeline: Pipeline, name: str) -> int:
    return next(process.pid for process in pipeline.supervisor.processes if process.name == name and process.pid)


async def test_a_process_that_works_is_live_and_ready_and_its_metrics_parse(pipeline: Pipeline) -> None:
    for stage in STAGES:
        status, live = await ask(pipeline, f"{stage}-0", "/livez")
        assert (status, live["ok"], live["process"]) == (200, True, f"{stage}-0")
        status, ready = await ask(pipeline, f"{stage}-0", "/readyz")
        assert (status, ready["ok"]) == (200, True), ready
        disk = {"disk"} if stage == "persist" else set()
        always = {"connected", "streams", "lanes", "circuits", "control", "members", "running"}
        assert set(ready["checks"]) == always | disk

    directory = pipeline.supervisor.directory
    file = next(f for f in read_health_files(directory) if f.stage == "persist")
    status, text = await get(f"http://{file.host}:{file.port}/metrics")
    assert status == 200
    families = parse_exposition(text.decode())
    assert sum(families["fi_events_appended_total"].values()) == EVENTS
    assert families["fi_commit_events_sum"].popitem()[1] == EVENTS
    assert sum(families["fi_persist_latency_seconds_count"].values()) > 0
    names = {what.prometheus_name for what in CATALOGUE.values()} | {"target_info"}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) if name not in names else name for name in families} <= names

    segment = next(f for f in read_health_files(directory) if f.stage == "segment")
    families = parse_exposition((await get(f"http://{segment.host}:{segment.port}/metrics"))[1].decode())
    assert families["fi_policy_version"].popitem()[1] == 1
    assert families["fi_policy_cache_misses_total"].popitem()[1] == 0
    frames = families["fi_frame_events_count"].popitem()[1]
    assert families["fi_policy_cache_hits_total"].popitem()[1] >= frames > 0

    assert (await get(f"http://{file.host}:{file.port}/nothing"))[0] == 404
    code, out, _ = await run_fictl("health", "--dir", str(directory), "--json")
    told = json.loads(out)
    assert (code, told["ready"]) == (0, True), told
    assert {process["name"] for process in told["processes"]} == {"n1", "n2", "n3", *(f"{s}-0" for s in STAGES)}
    code, out, _ = await run_fictl("health", "--dir", str(directory))
    assert code == 0
    assert "persist-0" in out


def parse_exposition(text: str) -> dict[str, dict[str, float]]:
    """Sample name → labels → value, by the rules of Prometheus' text format."""
    samples: dict[str, dict[str, float]] = {}
    typed = set()
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("#"):
            kind, name = line.split(" ")[1:3]
            assert kind in ("HELP", "TYPE")
            if kind == "TYPE":
                assert name not in typed
                typed.add(name)
            continue
        label = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
        match = re.fullmatch(rf"([a-zA-Z_:][a-zA-Z0-9_:]*)(\{{{label}(?:,{label})*\}})? (\S+)", line)
        assert match is not None, line
        name, labels, value = match.groups()
        of_name = samples.setdefault(name, {})
        assert (labels or "") not in of_name, line
        of_name[labels or ""] = float(value)
    return samples


async def test_without_servers_a_process_is_live_but_not_ready_and_says_why(pipeline: Pipeline) -> None:
    supervisor = pipeline.supervisor
    for server in ("n1", "n2", "n3"):
        supervisor.freeze(server)
    try:

        async def not_ready() -> Any:
            status, report = await ask(pipeline, "segment-0", "/readyz")
            return report if status == 503 else None

        report = await until(not_ready, "not ready when no server answers", 30)
        bad = {name for name, check in report["checks"].items() if not check["ok"]}
        assert bad & {"connected", "streams"}
        assert (await ask(pipeline, "segment-0", "/livez"))[0] == 200

        async def gone() -> bool:
            _, report = await ask(pipeline, "segment-0", "/readyz")
            return not report["checks"]["connected"]["ok"]

        await until(gone, "the lost connection is noticed", 30)
        code, _, err = await run_fictl("health", "--dir", str(supervisor.directory))
        assert code == 3
        assert "segment-0" in err
    finally:
        for server in ("n1", "n2", "n3"):
            supervisor.thaw(server)

    async def all_ready() -> bool:
        return all(process.ready for process in await look(supervisor.directory))

    await until(all_ready, "ready again once the servers are back", 60)


async def test_a_frozen_and_a_dead_process_are_told_apart_from_ready_ones(pipeline: Pipeline) -> None:
    supervisor = pipeline.supervisor
    supervisor.freeze("hash-0")
    await supervisor.hold_down("segment-0")
    code, out, _ = await run_fictl("health", "--dir", str(supervisor.directory), "--json")
    assert code == 3
    found = {process["name"]: process for process in json.loads(out)["processes"]}
    assert not found["hash-0"]["ready"]
    assert "does not answer within" in found["hash-0"]["why"]
    assert found["segment-0"]["why"] == "is down"
    assert found["ingest-0"]["ready"]
    supervisor.thaw("hash-0")
    await supervisor.bring_back("segment-0")

    async def all_ready() -> bool:
        return all(process.ready for process in await look(supervisor.directory))

    await until(all_ready, "ready again", 60)


async def test_a_draining_process_is_live_and_not_ready(pipeline: Pipeline) -> None:
    files = {file.name: file for file in read_health_files(pipeline.supervisor.directory)}
    # Without the servers persist cannot publish the seal record of what it holds, so its drain lasts.
    for server in ("n1", "n2", "n3"):
        pipeline.supervisor.freeze(server)
    try:
        os.kill(pid_of(pipeline, "persist-0"), signal.SIGTERM)

        async def draining() -> Any:
            status, body = await get(f"http://{files['persist-0'].host}:{files['persist-0'].port}/readyz")
            checks = json.loads(body)["checks"]
            return (status, checks) if not checks["running"]["ok"] else None

        status, checks = await until(draining, "draining is told", 20)
        assert (status, checks["running"]["why"]) == (503, "draining")
        assert (await ask(pipeline, "persist-0", "/livez"))[0] == 200
    finally:
        for server in ("n1", "n2", "n3"):
            pipeline.supervisor.thaw(server)
