"""The test kit's clusters: the same test on processes and on containers, and nothing left of either."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from cluster.nodes import EmbeddedCluster, Node
from cluster.testing.embedded import EmbeddedBackend
from cluster.testing.errors import NotSupportedError
from cluster.testing.ficluster import BackendName, FiCluster
from cluster.testing.load import Load, under_load, workload
from cluster.testing.waiting import until
from contracts.errors import SettingsError
from contracts.settings import Settings
from stages.persist.names import list_shards

ON_BOTH = pytest.mark.parametrize(
    "fi_backend",
    [pytest.param("embedded", marks=pytest.mark.cluster), pytest.param("docker", marks=pytest.mark.docker)],
    indirect=True,
)
ON_BOTH_SLOWLY = pytest.mark.parametrize(
    "fi_backend",
    [
        pytest.param("embedded", marks=pytest.mark.cluster),
        pytest.param("docker", marks=[pytest.mark.docker, pytest.mark.slow]),
    ],
    indirect=True,
)
DAY_S = 86_400


@ON_BOTH
@pytest.mark.fi_cluster(partitions=2, links=True, clocks=True, scale={"segment": 2})
async def test_whatever_is_done_to_a_cluster_nothing_is_lost(fi_cluster: FiCluster) -> None:
    load = Load(workload(seed=91, events=6000))
    async with under_load(load, fi_cluster.client, rate_per_s=300):
        await load.reached(100)
        await fi_cluster.kill("n1")
        await load.reached(300)
        await fi_cluster.start("n1")
        await fi_cluster.cut("n2")
        await load.reached(500)
        await fi_cluster.heal("n2")
        await fi_cluster.freeze("segment-1")
        await load.reached(700)
        await fi_cluster.thaw("segment-1")
        await fi_cluster.cut("persist-0")
        await load.reached(900)
        await fi_cluster.heal("persist-0")
        await fi_cluster.kill("persist-0")
        await fi_cluster.move_clock("persist-0", DAY_S)
        await fi_cluster.start("persist-0")
        await fi_cluster.stop("ingest-0")
        await fi_cluster.start("ingest-0")
    totals = await fi_cluster.assert_whole(load)
    assert totals.persisted == load.accepted > 900
    assert (await fi_cluster.verdict(load)).ok
    assert len(await fi_cluster.events()) == load.accepted
    assert await fi_cluster.dead_letters() == []
    ahead_s = [receipt.committed_ns / 1e9 - time.time() for receipt in await fi_cluster.receipts()]
    assert max(ahead_s) > DAY_S / 2


@ON_BOTH_SLOWLY
async def test_a_cluster_that_is_cancelled_while_it_starts_leaves_nothing(fi_backend: BackendName) -> None:
    """The leak check of this suite is what fails here."""
    cluster = FiCluster(backend=fi_backend, nodes=1, partitions=1)
    opening = asyncio.create_task(cluster.open())
    begun = cluster.directory / "nats" / "n1.conf"
    await until(lambda: asyncio.to_thread(begun.exists), "the server is about to start")
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert not cluster.directory.exists()


@ON_BOTH_SLOWLY
async def test_a_block_that_fails_ends_the_cluster_and_tells_its_logs(fi_backend: BackendName) -> None:
    cluster = FiCluster(backend=fi_backend, nodes=1, partitions=1)
    with pytest.raises(ZeroDivisionError) as caught:
        async with cluster:
            raise ZeroDivisionError
    assert "--- persist-0" in caught.value.__notes__[0]
    assert not cluster.directory.exists()


@pytest.mark.cluster
async def test_a_server_that_is_cut_off_is_alone_until_it_is_healed(tmp_path: Path) -> None:
    async with FiCluster(tmp_path, backend="embedded", links=True, partitions=1) as cluster:
        n1, n3 = (embedded(cluster).node(name) for name in ("n1", "n3"))
        await cluster.cut("n3")

        async def parted() -> bool:
            return await meta_leader(n1) in ("n1", "n2") and not await meta_leader(n3)

        async def joined() -> bool:
            return await meta_leader(n1) == await meta_leader(n3) != ""

        await until(parted, "n3 has lost the others, and they go on")
        await cluster.heal("n3")
        await until(joined, "n3 has found the others")


@pytest.mark.cluster
async def test_a_slow_server_answers_late(tmp_path: Path) -> None:
    async with FiCluster(tmp_path, backend="embedded", nodes=1, partitions=1, links=True) as cluster:
        await cluster.client.flush(10)
        await cluster.slow("n1", 0.4)
        begun_s = time.monotonic()
        await cluster.client.flush(10)
        assert time.monotonic() - begun_s >= 0.8
        await cluster.heal("n1")
        load = Load(workload(seed=92, events=50))
        await load.publish(cluster.client)
        await cluster.assert_whole(load)


@pytest.mark.cluster
async def test_a_damaged_shard_is_found(tmp_path: Path) -> None:
    async with FiCluster(tmp_path, backend="embedded", nodes=1, partitions=1) as cluster:
        load = Load(workload(seed=93, events=50))
        await load.publish(cluster.client)
        await cluster.settled()
        await cluster.stop("persist-0")
        sealed = next(shard.path for shard in list_shards(cluster.shards)[0] if shard.sealed)
        assert (await cluster.verify()).ok
        await cluster.corrupt(sealed, flip_at=sealed.stat().st_size // 2)
        assert not (await cluster.verify()).ok
        await cluster.corrupt(sealed, flip_at=sealed.stat().st_size // 2)
        assert (await cluster.verify()).ok
        await cluster.corrupt(sealed, cut_to_bytes=sealed.stat().st_size - 1)
        assert not (await cluster.verify()).ok


async def test_what_a_backend_cannot_do_it_refuses_and_says_why(tmp_path: Path) -> None:
    plain = FiCluster(tmp_path, backend="embedded")
    for verb in (plain.cut("n1"), plain.slow("n1", 1), plain.heal("n1")):
        with pytest.raises(NotSupportedError, match="links=True"):
            await verb
    with pytest.raises(NotSupportedError, match="clocks=True"):
        await plain.move_clock("persist-0", 1)
    with pytest.raises(NotSupportedError, match="asks the kernel"):
        await plain.move_clock("n1", 1)
    with pytest.raises(NotSupportedError, match="disk_bytes"):
        await plain.fill_disk()
    with pytest.raises(NotSupportedError, match="netem"):
        await FiCluster(tmp_path, backend="docker").slow("n1", 1)
    with pytest.raises(KeyError, match="persist-0"):
        await plain.kill("persist-7")


@pytest.mark.parametrize("backend", ["embedded", "docker"])
def test_a_cluster_that_cannot_start_says_so_on_either_backend(tmp_path: Path, backend: BackendName) -> None:
    with pytest.raises(SettingsError, match="replicas = 3"):
        FiCluster(tmp_path, backend=backend, nodes=1, replicas=3)
    with pytest.raises(SettingsError, match="9 processes of segment"):
        FiCluster(tmp_path, backend=backend, nodes=1, partitions=1, scale={"segment": 9})


@ON_BOTH
@pytest.mark.fi_cluster(nodes=1, partitions=1)
async def test_a_verb_does_nothing_where_there_is_nothing_to_do(fi_cluster: FiCluster) -> None:
    await fi_cluster.kill("hash-0")
    verbs = ("kill", "stop", "freeze", "thaw", "start", "start", "thaw", "freeze", "freeze", "start", "kill", "start")
    for verb in verbs:
        await getattr(fi_cluster, verb)("hash-0")
    # The only server is not killed: streams in memory would go with it.
    for verb in ("start", "thaw", "freeze", "freeze", "start", "thaw", "thaw"):
        await getattr(fi_cluster, verb)("n1")
    load = Load(workload(seed=94, events=20))
    await load.publish(fi_cluster.client)
    await fi_cluster.assert_whole(load)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"partitons": 2}, "partitons names no setting; did you mean partitions?"),
        ({"partitions": "two"}, "partitions = 'two': Expected `int`"),
        ({"nodes": 0}, "nodes = 0: give 1, 3 or 5"),
        ({"scale": {"segmnt": 2}}, "scale names segmnt; the stages are ingest, segment"),
        ({"settings": Settings(), "partitions": 2}, "settings is given, so partitions would not count"),
    ],
)
def test_an_argument_that_is_none_is_named(arguments: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=re.escape(told)):
        FiCluster(tmp_path, backend="embedded", **arguments)


@pytest.mark.slow
@pytest.mark.docker
@pytest.mark.parametrize("fi_backend", ["docker"], indirect=True)
async def test_containers_of_a_killed_test_run_are_cleared_away(fi_backend: BackendName, tmp_path: Path) -> None:
    import docker

    from cluster.testing import containers

    script = (
        "import asyncio, os, pathlib, signal, sys\n"
        "from cluster.testing.ficluster import FiCluster\n"
        "async def main():\n"
        "    async with FiCluster(pathlib.Path(sys.argv[1]), backend='docker', nodes=1, partitions=1):\n"
        "        print(__import__('cluster.testing.containers').testing.containers.owner(), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    owner = output.decode().strip()
    assert await asyncio.to_thread(containers.containers_of, owner)
    engine = docker.from_env()
    try:
        await asyncio.to_thread(containers.clear_orphans, engine)
    finally:
        engine.close()
    assert await asyncio.to_thread(containers.containers_of, owner) == []


def embedded(cluster: FiCluster) -> EmbeddedCluster:
    assert isinstance(cluster.backend, EmbeddedBackend)
    return cluster.backend.supervisor.cluster


async def meta_leader(node: Node) -> str:
    """The name of the server that leads the cluster, as `node` sees it; empty when it sees none."""

    def ask() -> str:
        # Its own port, which no relay lies before.
        with urlopen(f"{node.monitor_url}/jsz", timeout=10) as answer:
            return str(json.load(answer)["meta_cluster"].get("leader", ""))

    return await asyncio.to_thread(ask)


def test_without_an_engine_containers_that_were_asked_for_fail_a_test_and_a_parameters_skip_it(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "async def test_asked_for(fi_cluster): ...\n"
        "@pytest.mark.parametrize('fi_backend', ['docker'], indirect=True)\n"
        "async def test_on_both(fi_cluster): ...\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rsE", "--fi-backend=docker"],
        cwd=tmp_path,
        env={**os.environ, "DOCKER_HOST": "tcp://127.0.0.1:9", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ERROR test_it.py::test_asked_for - Failed: needs a Docker engine" in done.stdout, done.stdout
    assert "1 skipped, 1 error" in done.stdout


def test_an_argument_of_the_marker_without_a_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.fi_cluster(1)\nasync def test_one_server(fi_cluster): ...\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rE", "--fi-backend=embedded"],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    told = "Failed: fi_cluster(1): write arguments by name, such as nodes=1"
    assert f"ERROR test_it.py::test_one_server - {told}" in done.stdout, done.stdout


def test_a_misspelt_backend_is_named_with_where_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("async def test_asked_for(fi_cluster): ...\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rE"],
        cwd=tmp_path,
        env={**os.environ, "FICLUSTER_BACKEND": "dokcer", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    told = "FICLUSTER_BACKEND: no backend is called 'dokcer'; use embedded, docker or auto"
    assert f"ERROR test_it.py::test_asked_for - Failed: {told}" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout
