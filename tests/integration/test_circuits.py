"""Circuits of real processes: open while the cluster or a disk does not answer, closed once it does, nothing lost."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from lanes import going
from pipeline import Load, Pipeline, running, settings, under_load, until, workload

from cluster.health import get, read_health_files
from contracts.budgets import CIRCUIT_PAUSE_MAX
from contracts.subjects import STAGES
from contracts.telemetry import CIRCUIT_STATE, CIRCUIT_TRIPS, SENT_MESSAGES, TARGET_DISK
from stages.persist import files
from stages.persist.actor import PersistLane
from stages.persist.names import live_name
from stages.persist.storedir import open_store
from stages.runtime.api import CIRCUIT_FAILURES, Api
from stages.runtime.facts import read_cluster
from stages.runtime.meters import Meters

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

PARTITIONS = 8
WINDOW_S = 4.0


async def samples(pipeline: Pipeline, stage: str) -> dict[str, float]:
    """Series with its labels → value, of one process's `/metrics`."""
    file = next(file for file in read_health_files(pipeline.supervisor.directory) if file.name == f"{stage}-0")
    _, body = await get(f"http://{file.host}:{file.port}/metrics")
    lines = (line for line in body.decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def values(found: dict[str, float], what: str) -> list[float]:
    return [value for series, value in found.items() if series.partition("{")[0] == what]


def failed_tries(found: dict[str, float]) -> float:
    """Publishes that nobody answered; those that were refused with a meaning were answered."""
    name = SENT_MESSAGES.prometheus_name
    errors = re.compile(rf'{name}{{.*error_type="(NoRespondersError|TimeoutError|refused)"')
    return sum(value for series, value in found.items() if errors.match(series))


async def said_open(pipeline: Pipeline, stage: str) -> bool:
    """`/readyz` says not ready, and names a circuit that is open."""
    file = next(f for f in read_health_files(pipeline.supervisor.directory) if f.name == f"{stage}-0")
    report = json.loads((await get(f"http://{file.host}:{file.port}/readyz"))[1])
    circuits = report["checks"]["circuits"]
    # Half-open is not well either while the one who tries waits for an answer.
    assert circuits["ok"] or "open" in circuits["why"]
    return not report["ok"] and not circuits["ok"]


async def opened(pipeline: Pipeline, stages: Iterable[str]) -> bool:
    return all([1.0 in values(await samples(pipeline, s), CIRCUIT_STATE.prometheus_name) for s in stages])


async def all_closed(pipeline: Pipeline) -> bool:
    return not any([sum(values(await samples(pipeline, stage), CIRCUIT_STATE.prometheus_name)) for stage in STAGES])


async def test_without_a_quorum_circuits_open_and_one_lane_tries_for_all_until_the_servers_are_back(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, settings(partitions=PARTITIONS, health_port=0)) as pipeline:
        load = Load(workload(seed=61, events=6000))
        async with under_load(load, pipeline.client, rate_per_s=1500):
            await load.reached(1000)
            for server in ("n2", "n3"):
                await pipeline.supervisor.hold_down(server)

            async def tripped() -> bool:
                trips = [values(await samples(pipeline, stage), CIRCUIT_TRIPS.prometheus_name) for stage in STAGES]
                return all(sum(of_stage) >= 1 for of_stage in trips)

            await until(tripped, "a circuit of every process has opened", 60)
            begun_s = time.monotonic()
            before = [failed_tries(await samples(pipeline, stage)) for stage in STAGES]
            open_seen = False
            while time.monotonic() < begun_s + WINDOW_S:
                open_seen |= await said_open(pipeline, "persist")
                await asyncio.sleep(0.1)
            assert open_seen, "persist's /readyz names an open circuit"
            after = [failed_tries(await samples(pipeline, stage)) for stage in STAGES]
            elapsed_s = time.monotonic() - begun_s
            # Each process writes one stream here. Half of a pause is jitter, and the first ones are short.
            tries_max = elapsed_s / (CIRCUIT_PAUSE_MAX.s / 2) + 2 * CIRCUIT_FAILURES
            tries = {stage: now - then for stage, now, then in zip(STAGES, after, before, strict=True)}
            # None at all is possible: no publish was under way when the servers died, and nothing came in since.
            assert max(tries.values()) <= tries_max, tries
            for server in ("n2", "n3"):
                await pipeline.supervisor.bring_back(server)
        await pipeline.assert_whole(load)

        async def closed() -> bool:
            return await all_closed(pipeline)

        await until(closed, "every circuit is closed", 60)


@pytest.mark.slow
async def test_after_all_servers_froze_under_load_circuits_close_and_nothing_is_lost(tmp_path: Path) -> None:
    async with running(tmp_path, settings(partitions=PARTITIONS, health_port=0)) as pipeline:
        supervisor = pipeline.supervisor
        await supervisor.hold_down("ingest-0")
        load = Load(workload(seed=62, events=6000))
        await load.publish(pipeline.client, batch=1)
        await supervisor.bring_back("ingest-0")
        for server in ("n1", "n2", "n3"):
            supervisor.freeze(server)
        try:

            async def seen() -> bool:
                return await opened(pipeline, ("ingest",)) or await opened(pipeline, ("persist",))

            await until(seen, "a circuit is open", 60)
        finally:
            for server in ("n1", "n2", "n3"):
                supervisor.thaw(server)
        await pipeline.assert_whole(load)

        async def closed() -> bool:
            return await all_closed(pipeline)

        await until(closed, "every circuit is closed", 60)


async def test_a_disk_that_fails_one_partition_opens_its_circuit_alone_and_a_commit_closes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(partitions=2)
    async with running(tmp_path, chosen, {"persist": 0}) as pipeline:
        facts = await read_cluster(pipeline.client)
        store = open_store(pipeline.shards, facts.cluster_id, now_ns=1)
        meters = Meters()
        api = Api(pipeline.client, chosen, telemetry=meters)
        lanes = [PersistLane(api, store, number, f"here-{number}", lambda _: None) for number in range(2)]
        trips = meters.counter(CIRCUIT_TRIPS, {"target": TARGET_DISK})
        refused, real = 0, files._fdatasync
        name = live_name(0, 1).partition("-")[0]

        def refuse(fd: int) -> None:
            nonlocal refused
            if Path(os.readlink(f"/proc/self/fd/{fd}")).name.startswith(name):
                refused += 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(fd)

        async with going(*lanes):
            with monkeypatch.context() as patch:
                patch.setattr(files, "_fdatasync", refuse)
                load = Load(workload(seed=63, events=300))
                await load.publish(pipeline.client)

                async def others_go_on() -> bool:
                    return set(await pipeline.unsettled()) == {0} and meters.circuits().get(TARGET_DISK) == "open"

                await until(others_go_on, "partition 0 stops alone, its circuit open")

                async def tried_again() -> bool:
                    return refused >= 2

                await until(tried_again, "partition 0 tries its disk again")
                assert meters.lanes["persist", 1].disk is not None
                assert meters.lanes["persist", 1].disk.state(time.monotonic()) == "closed"
                assert trips.value == 1
            await pipeline.assert_whole(load)
            assert meters.circuits()[TARGET_DISK] == "closed"
            assert trips.value == 1
