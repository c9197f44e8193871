"""A cluster of containers on a Docker network of their own, by testcontainers, from the project's own image.

Containers carry the id of the test process that made them; those of processes that are gone are cleared away before a
new cluster starts, so that not even a test run that was killed leaves any for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from cluster.apply import apply
from cluster.deploy.image import NATS_SERVER, PYTHON, USER_ID, build
from cluster.nodes import (
    NodePorts,
    Wiring,
    is_healthy,
    listening_directory,
    server_config,
    wait_leader,
)
from cluster.ports import LOOPBACK, HeldPorts
from cluster.stageprocess import READY_LINE, settings_environment
from cluster.testing.backend import Backend, Plan
from cluster.testing.errors import NoEngineError, NotSupportedError
from contracts.budgets import SERVER_START, SERVER_STOP, STAGE_READY
from contracts.errors import ClusterUnavailableError
from contracts.subjects import Stage
from stages.runtime.connection import connect
from stages.runtime.pids import process_started
from stages.runtime.tasks import run_blocking, side_by_side

T = TypeVar("T")

LABEL: Final = "fi-pipeline.testing"
"""On every container and network: who made it, as ``host/pid/start of that process``."""
CLUSTER_LABEL: Final = "fi-pipeline.testing.cluster"
"""Which cluster of that process."""

clusters: Final[set[str]] = set()
"""Ids of all clusters that this process has made."""

_INSIDE: Final = NodePorts(client=4222, monitor=8222, route=6222)
_UP: Final = frozenset({"running", "paused", "restarting"})
_POLL_S: Final = 0.05
_LOG_POLL_S: Final = 0.25
"""To ask for a container's log costs the engine and us some 10 ms each."""
_ENGINE_LIMIT_S: Final = 60


def owner() -> str:
    """This process, as `LABEL` has it."""
    return f"{socket.gethostname()}/{os.getpid()}/{process_started(os.getpid())}"


@functools.cache
def engine_missing() -> str:
    """Why containers cannot be used here; empty when they can."""
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
    try:
        import docker
        import testcontainers.core.container  # noqa: F401
    except ImportError as error:
        return f"{error}; install this package with its extra `test`"
    try:
        client = docker.from_env(timeout=_ENGINE_LIMIT_S)
        try:
            client.ping()
        finally:
            client.close()
    except docker.errors.DockerException as error:
        return f"no Docker engine answers: {error}"
    return ""


@functools.cache
def image_name() -> str:
    """The project's image, which is built if this engine does not have it; looked at once a process."""
    import docker

    engine = docker.from_env(timeout=_ENGINE_LIMIT_S)
    try:
        return build(engine)
    finally:
        engine.close()


def containers_of(label: str) -> list[str]:
    """Names of the containers and networks with this owner, in whatever state."""
    import docker

    client = docker.from_env(timeout=_ENGINE_LIMIT_S)
    try:
        chosen = {"label": f"{LABEL}={label}"}
        found = [*client.containers.list(all=True, filters=chosen), *client.networks.list(filters=chosen)]
        return [str(each.name) for each in found]
    finally:
        client.close()


class DockerBackend(Backend):
    """Servers and stages as containers; the directory of the plan has the same path in all of them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._id = secrets.token_hex(8)
        self._engine: Any = None
        self._made_network: Any = None
        self._network: Any = None
        self._containers: dict[str, Any] = {}
        self._cut: set[str] = set()
        self._ports: dict[str, NodePorts] = {}
        self._held = HeldPorts()

    @property
    def urls(self) -> tuple[str, ...]:
        """See `Backend.urls`. Ports of this machine that lead to the servers."""
        return tuple(f"nats://{LOOPBACK}:{ports.client}" for ports in self._ports.values())

    @property
    def _labels(self) -> dict[str, str]:
        return {LABEL: owner(), CLUSTER_LABEL: self._id}

    async def open(self) -> None:
        """See `Backend.open`. Builds the image first, if this engine does not have it."""
        if reason := await run_blocking(engine_missing):
            raise NoEngineError(f"{reason}; choose the embedded backend, which needs none")
        try:
            image = await run_blocking(self._prepare)
            await side_by_side(*(run_blocking(self._run_server, image, name) for name in self.plan.servers()))
            await side_by_side(*(self._healthy(name) for name in self.plan.servers()))
            await wait_leader(self.urls, "see the logs of its servers")
            client = await connect(self.urls, "ficluster-start")
            try:
                await apply(client, self.plan.settings)
            finally:
                await client.close()
            await side_by_side(*(self._begin_stage(image, name) for name in self.plan.stages()))
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """See `Backend.close`. Whatever is frozen or cut off goes as well."""
        await run_blocking(self._remove)

    async def start(self, name: str) -> None:
        """See `Backend.start`."""
        if await self._state(name) in _UP:
            return
        if name in self._ports:
            await run_blocking(self._containers[name].start)
            if name not in self._cut:
                await self._healthy(name)
        else:
            await self._started_stage(name, self._containers[name].start)

    async def stop(self, name: str) -> None:
        """See `Backend.stop`."""
        await self.thaw(name)
        limit_s = SERVER_STOP.s if name in self._ports else self.plan.settings.drain_s
        await run_blocking(functools.partial(self._containers[name].stop, timeout=round(limit_s)))

    async def kill(self, name: str) -> None:
        """See `Backend.kill`. It is not started again, though a process that dies by itself is."""
        if await self._state(name) in _UP:
            await run_blocking(self._containers[name].kill)
            await run_blocking(self._containers[name].wait)

    async def freeze(self, name: str) -> None:
        """See `Backend.freeze`. The freezer of its control group."""
        if await self._state(name) == "running":
            await run_blocking(self._containers[name].pause)

    async def thaw(self, name: str) -> None:
        """See `Backend.thaw`."""
        if await self._state(name) == "paused":
            await run_blocking(self._containers[name].unpause)

    async def cut(self, name: str) -> None:
        """See `Backend.cut`. Leaves the network; a server's ports on this machine refuse meanwhile."""
        if name not in self._cut:
            self._cut.add(name)
            await run_blocking(self._network.disconnect, self._containers[name])

    async def heal(self, name: str) -> None:
        """See `Backend.heal`."""
        if name in self._cut:
            await run_blocking(functools.partial(self._network.connect, aliases=[name]), self._containers[name])
            self._cut.discard(name)

    async def slow(self, name: str, latency_s: float) -> None:
        """Not on Docker."""
        raise NotSupportedError(
            "a container's network is slowed by its kernel's netem queue, which needs root on the engine's machine and "
            "a module that many kernels lack; use the embedded backend with links=True"
        )

    def logs(self) -> dict[str, str]:
        """See `Backend.logs`."""
        return {name: c.logs().decode(errors="replace") for name, c in sorted(self._containers.items())}

    async def _state(self, name: str) -> str:
        """The engine's word for it now: it refuses to end what is down, or to halt what is halted, with an error."""
        await run_blocking(self._containers[name].reload)
        return str(self._containers[name].status)

    def _prepare(self) -> str:
        """Everything before the first container. Gives the image's name."""
        import docker
        from testcontainers.core.network import Network

        self._engine = docker.from_env(timeout=_ENGINE_LIMIT_S)
        clear_orphans(self._engine)
        image = image_name()
        directory = self.plan.directory
        servers = self.plan.servers()
        stores = {name: directory / "nats" / name for name in servers}
        listening = [listening_directory(store) for store in stores.values()]
        for path in (directory, directory / "nats", *stores.values(), *listening, self.plan.shards):
            path.mkdir(parents=True, exist_ok=True)
            if os.getuid() == 0:
                # What runs in the containers is not root.
                path.chmod(0o777)
        free = self._held.take(2 * self.plan.nodes)
        routes = [f"{name}:{_INSIDE.route}" for name in servers]
        for index, name in enumerate(servers):
            self._ports[name] = NodePorts(client=free[2 * index], monitor=free[2 * index + 1], route=_INSIDE.route)
            text = server_config(name, stores[name], _INSIDE, Wiring(routes), "0.0.0.0")
            (directory / "nats" / f"{name}.conf").write_text(text, encoding="utf-8")
        clusters.add(self._id)
        self._made_network = Network(docker_network_kw={"labels": self._labels}).create()
        self._network = self._engine.networks.get(self._made_network.id)
        return image

    def _container(self, image: str, name: str, entrypoint: list[str]) -> Any:
        from testcontainers.core.container import DockerContainer

        made: Any = DockerContainer(image, network=self._made_network, network_aliases=[name])
        if name in self._ports:
            for inside, outside in _pairs(self._ports[name]):
                # `with_bind_ports` would open them to the whole network.
                made.ports[f"{inside}/tcp"] = (LOOPBACK, outside)
        made.with_volume_mapping(self.plan.directory, str(self.plan.directory), "rw")
        user = os.getuid() or USER_ID
        made.with_kwargs(
            labels=self._labels,
            hostname=name,
            user=f"{user}:{os.getgid() if os.getuid() else USER_ID}",
            restart_policy={"Name": "on-failure"},
            entrypoint=entrypoint,
        )
        return made

    def _run_server(self, image: str, name: str) -> None:
        config = self.plan.directory / "nats" / f"{name}.conf"
        made = self._container(image, name, entrypoint=[NATS_SERVER, "-c", str(config)])
        self._keep(name, made)

    def _run_stage(self, image: str, name: str, stage: Stage) -> None:
        urls = [f"nats://{server}:{_INSIDE.client}" for server in self._ports]
        made = self._container(image, name, entrypoint=self.plan.command(PYTHON, stage, name, urls))
        made.env |= settings_environment(self.plan.settings)
        self._keep(name, made)

    def _keep(self, name: str, made: Any) -> None:
        made.start()
        self._containers[name] = made.get_wrapped_container()

    async def _begin_stage(self, image: str, name: str) -> None:
        await self._started_stage(name, functools.partial(self._run_stage, image, name, self.plan.stages()[name]))

    async def _started_stage(self, name: str, begin: Callable[[], None]) -> None:
        """Starts a stage and waits for its ready line, which is one more than its earlier runs printed."""
        before = await run_blocking(self._ready_lines, name) if name in self._containers else 0
        await run_blocking(begin)
        deadline = time.monotonic() + STAGE_READY.s
        while await run_blocking(self._ready_lines, name) <= before:
            if time.monotonic() > deadline:
                raise ClusterUnavailableError(
                    f"{name} was not ready after {STAGE_READY.s:g} s:\n{self._containers[name].logs(tail=20).decode()}"
                )
            await asyncio.sleep(_LOG_POLL_S)

    def _ready_lines(self, name: str) -> int:
        output: bytes = self._containers[name].logs(stdout=True, stderr=False)
        return output.split().count(READY_LINE)

    async def _healthy(self, name: str) -> None:
        deadline = time.monotonic() + SERVER_START.s
        while time.monotonic() < deadline:
            if await is_healthy(f"http://{LOOPBACK}:{self._ports[name].monitor}", "js-server-only"):
                return
            await asyncio.sleep(_POLL_S)
        log = (await run_blocking(self.logs)).get(name, "")[-4000:]
        raise ClusterUnavailableError(f"{name} is not healthy after {SERVER_START.s:.0f} s:\n{log}")

    def _remove(self) -> None:
        if self._engine is None:
            return
        try:
            with contextlib.suppress(OSError):
                self._save_logs()
        finally:
            for container in self._containers.values():
                container.client.close()
            self._containers.clear()
            # By label, not by what is known here: a start that failed half-way left a container too.
            _clear(self._engine, lambda labels: labels.get(CLUSTER_LABEL) == self._id)
            if self._made_network is not None:
                self._made_network._docker.client.close()
                self._made_network = None
            self._engine.close()
            self._engine = None
            self._held.release()

    def _save_logs(self) -> None:
        for name, text in self.logs().items():
            path = self.plan.directory / "logs" / f"{name}.log"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")


def _pairs(outside: NodePorts) -> list[tuple[int, int]]:
    """(port in the container, port here) of what is to be reached from here."""
    return [(_INSIDE.client, outside.client), (_INSIDE.monitor, outside.monitor)]


def clear_orphans(engine: Any) -> None:
    """Removes what test runs on this machine left that were killed. Args: `engine` is a `docker.DockerClient`."""
    _clear(engine, _orphaned)


def _clear(engine: Any, chosen: Callable[[dict[str, str]], bool]) -> None:
    """Removes our containers and networks whose labels are `chosen`, with whatever runs in them."""
    import docker

    ours = {"label": LABEL}
    for container in engine.containers.list(all=True, filters=ours):
        if chosen(container.labels):
            with contextlib.suppress(docker.errors.NotFound):
                container.remove(force=True, v=True)
    for network in engine.networks.list(filters=ours):
        if chosen(network.attrs["Labels"]):
            with contextlib.suppress(docker.errors.NotFound):
                network.remove()


def _orphaned(labels: dict[str, str]) -> bool:
    """True when the process that made it is gone from this machine."""
    host, _, process = labels[LABEL].partition("/")
    pid, _, started = process.partition("/")
    return host == socket.gethostname() and pid.isdecimal() and str(process_started(int(pid))) != started
