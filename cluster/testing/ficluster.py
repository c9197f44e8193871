"""A whole pipeline for a test: three servers, four stages, real shards, in one line, with verbs to hurt it.

    async with FiCluster(tmp_path) as cluster:
        await load.publish(cluster.client)
        await cluster.kill("n1")
        await cluster.assert_whole(load)

It runs as containers where there is a Docker engine and as processes where there is none; a test cannot tell.
Always true: inside the block all servers and stages are ready; after it nothing of them is left, however it ended.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from cluster.supervisor import check_run
from cluster.testing.backend import Backend, Plan
from cluster.testing.clock import set_offset
from cluster.testing.disk import SmallDisk, flip
from cluster.testing.embedded import EmbeddedBackend
from cluster.testing.errors import NotSupportedError
from cluster.testing.reading import Reading
from cluster.testing.stage import failing as failing_flag
from contracts.errors import SettingsError
from contracts.settings import MIB, Settings, SettingsFile, load_settings
from contracts.subjects import STAGES, Stage
from stages.runtime.api import Api
from stages.runtime.connection import connect

BackendName = Literal["auto", "embedded", "docker"]
ENVIRONMENT: Final = "FICLUSTER_BACKEND"
"""Names the backend where nothing else does. (``FI_…`` names settings of stages alone.)"""
_CONNECT_LIMIT_S: Final = 30.0
_NOT_OPEN: Final = "the cluster is not open: use `async with FiCluster(…) as cluster`, or `await cluster.open()`"

opened: weakref.WeakSet[FiCluster] = weakref.WeakSet()
"""Those that run now: whose logs belong to a test that fails."""


def quick_settings(**changes: Any) -> Settings:
    """Small shards, few partitions, and quick checks of idle lanes: what a short test needs. `changes` by name.

    Raises:
        SettingsError: `changes` name no setting, or a value of the wrong type or out of range.
    """
    quick = {"partitions": 4, "shard_bytes": 16 * MIB, "trim_s": 0.2, "probe_s": 1.0}
    return load_settings({}, file=SettingsFile("FiCluster", {**quick, **changes}))


def choose_backend(wanted: str) -> Literal["embedded", "docker"]:
    """``auto`` → ``docker`` where an engine answers, else ``embedded``. Raises `NotSupportedError`: no such backend."""
    if wanted == "auto":
        from cluster.testing.containers import engine_missing

        return "embedded" if engine_missing() else "docker"
    if wanted == "embedded":
        return "embedded"
    if wanted == "docker":
        return "docker"
    raise NotSupportedError(f"no backend is called {wanted!r}; use embedded, docker or auto")


class FiCluster(Reading):
    """Servers and stages of a test, and one connection to them.

    Attributes:
        directory: shards, logs and server stores.
        client, api, shards: see `Reading`.
        disk_bytes: size of the file system they lie on; None: it is the machine's.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        backend: BackendName | None = None,
        nodes: int = 3,
        scale: Mapping[Stage, int] | None = None,
        settings: Settings | None = None,
        links: bool = False,
        clocks: bool = False,
        disk_bytes: int | None = None,
        **changes: Any,
    ) -> None:
        """Describes a cluster; `open`, or ``async with``, starts it.

        Args:
            directory: everything is kept there and stays; None: in a temporary one that goes with the cluster.
            backend: where it runs; None: what the variable ``FICLUSTER_BACKEND`` says, else ``auto``.
            nodes: nats-servers: 1, 3 or 5.
            scale: processes of each stage; 1 where nothing is said, 0 runs none.
            settings: of all stages and of the topology; None: `quick_settings` with `changes`.
            links: embedded processes are connected so that `cut` and `slow` work. (Containers always are, for `cut`.)
            clocks: stages get wall clocks of their own, for `move_clock`, and disks for `fail_fsync`.
            disk_bytes: the shards lie on a real file system of this size, for `fill_disk`. Needs root.
            changes: settings by name, e.g. ``partitions=2``.

        Raises:
            NotSupportedError: no such backend.
            SettingsError: more replicas than nodes, or more processes of a stage than partitions; an argument that is
                none, or out of range.
        """
        self._temporary = directory is None
        if directory is None:
            directory = Path(tempfile.gettempdir()) / f"ficluster-{secrets.token_hex(6)}"
        self.directory = directory.absolute()
        if nodes not in (1, 3, 5):
            raise SettingsError(f"FiCluster: nodes = {nodes}: give 1, 3 or 5")
        if strangers := sorted(set(scale or {}) - set(STAGES)):
            raise SettingsError(f"FiCluster: scale names {', '.join(strangers)}; the stages are {', '.join(STAGES)}")
        if disk_bytes is not None and disk_bytes <= 0:
            raise SettingsError(f"FiCluster: disk_bytes = {disk_bytes}: give a size, or leave it out")
        if settings is not None and changes:
            raise SettingsError(f"FiCluster: settings is given, so {', '.join(changes)} would not count; leave one out")
        chosen = settings or quick_settings(**{"replicas": min(3, nodes), **changes})
        counts = {stage: (scale or {}).get(stage, 1) for stage in STAGES}
        check_run(chosen, counts, nodes)
        self._plan = Plan(self.directory, nodes, counts, chosen, links, clocks)
        self.shards = self._plan.shards
        self.backend = self._make(choose_backend(backend or os.environ.get(ENVIRONMENT, "auto")))
        self.disk_bytes = disk_bytes
        self._disk = None if disk_bytes is None else SmallDisk(self.shards, disk_bytes)
        self._mounted = False
        self._connected = False

    def _make(self, backend: Literal["embedded", "docker"]) -> Backend:
        if backend == "embedded":
            return EmbeddedBackend(self._plan)
        from cluster.testing.containers import DockerBackend

        return DockerBackend(self._plan)

    @property
    def settings(self) -> Settings:
        """What the cluster was started with."""
        return self._plan.settings

    @property
    def urls(self) -> tuple[str, ...]:
        """Client URLs of all servers, running or not: what a gateway under test connects to."""
        return self.backend.urls

    @property
    def servers(self) -> tuple[str, ...]:
        """Names of the servers: ``n1`` …"""
        return self._plan.servers()

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stage processes, in flow order: ``ingest-0`` …"""
        return tuple(self._plan.stages())

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                error.add_note(await self.logs())
        finally:
            await self.close()

    async def open(self) -> None:
        """Starts everything and returns once every server and stage is ready, and `client` is connected.

        Does nothing when it is open.

        Raises:
            FiError: something did not come up; says what. Nothing is left running.
            NotSupportedError: there is no Docker engine, or `disk_bytes` needs root.
        """
        if self in opened:
            return
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._disk is not None:
                self._disk.mount()
                self._mounted = True
            for name in self.stages if self._plan.clocks else ():
                set_offset(self._plan.clock(name), 0)
            await self.backend.open()
            self.client = await connect(self.urls, "ficluster", wait_s=_CONNECT_LIMIT_S)
            self.api = Api(self.client, self.settings)
            self._connected = True
            opened.add(self)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Ends everything, in whatever state it is. Does nothing when nothing runs."""
        opened.discard(self)
        try:
            if self._connected:
                self._connected = False
                await self.client.close()
        finally:
            try:
                await self.backend.close()
            finally:
                await asyncio.to_thread(self._clean)

    def _clean(self) -> None:
        if self._mounted and self._disk is not None:
            self._mounted = False
            self._disk.unmount()
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    async def stop(self, name: str) -> None:
        """SIGTERM to a server or stage, which finishes what it has in hand; it stays down until `start`.

        Raises, as `start`, `kill`, `freeze` and `thaw`: `KeyError` for a name that is none; `RuntimeError` while the
        cluster is not open.
        """
        await self.backend.stop(self._running(name))

    async def start(self, name: str) -> None:
        """Starts what was stopped or killed, and returns once it is ready."""
        await self.backend.start(self._running(name))

    async def kill(self, name: str) -> None:
        """SIGKILL to a server or stage; it stays down until `start`."""
        await self.backend.kill(self._running(name))

    async def freeze(self, name: str) -> None:
        """Halts a server or stage where it is: it keeps its connections and beliefs, and does nothing until `thaw`."""
        await self.backend.freeze(self._running(name))

    async def thaw(self, name: str) -> None:
        """Lets what was frozen go on."""
        await self.backend.thaw(self._running(name))

    async def cut(self, name: str) -> None:
        """Cuts a server or stage off from all others and from this test, until `heal`.

        Raises:
            NotSupportedError: embedded, and not built with ``links=True``.
        """
        await self.backend.cut(self._known(name))

    async def heal(self, name: str) -> None:
        """Connects what was cut off or slowed. Raises as `cut`."""
        await self.backend.heal(self._known(name))

    async def slow(self, name: str, latency_s: float) -> None:
        """Every byte to or from a server or stage takes so many seconds longer, until `heal`.

        Raises:
            NotSupportedError: as `cut`; and on Docker always.
            ValueError: `latency_s` is negative, or no number.
        """
        if not 0 <= latency_s < math.inf:
            raise ValueError(f"latency_s = {latency_s}: give seconds from 0 on")
        await self.backend.slow(self._known(name), latency_s)

    async def fill_disk(self, left_bytes: int = 0) -> None:
        """Takes all of the space for shards but `left_bytes`. Raises `NotSupportedError` without `disk_bytes`."""
        await asyncio.to_thread(self._small_disk().fill, left_bytes)

    async def free_disk(self) -> None:
        """Gives back what `fill_disk` took."""
        await asyncio.to_thread(self._small_disk().free)

    async def corrupt(self, path: Path, *, flip_at: int | None = None, cut_to_bytes: int | None = None) -> None:
        """Damages a file, of a shard for instance: flips one bit of the byte at `flip_at`, or cuts the file short.

        Args:
            path: absolute, or in the shards' directory.
            flip_at: offset in bytes; negative from the end.
            cut_to_bytes: the length that is left.

        Raises:
            ValueError: neither or both were given.
        """
        if (flip_at is None) == (cut_to_bytes is None):
            raise ValueError("give flip_at or cut_to_bytes")
        file = self.shards / path
        if flip_at is not None:
            await asyncio.to_thread(flip, file, flip_at)
        elif cut_to_bytes is not None:
            await asyncio.to_thread(os.truncate, file, cut_to_bytes)

    async def move_clock(self, name: str, by_s: float) -> None:
        """Sets a stage's wall clock `by_s` seconds before this machine's (negative: after), from now on.

        Raises:
            NotSupportedError: built without ``clocks=True``, or `name` is a server.
        """
        if self._known(name) in self.servers:
            raise NotSupportedError(
                f"{name} is a nats-server, which asks the kernel for the time, past anything that can be put in its way"
            )
        if not self._plan.clocks:
            raise NotSupportedError("the stages go by the machine's clock: give clocks=True to move theirs")
        set_offset(self._plan.clock(name), round(by_s * 1e9))

    async def fail_fsync(self, name: str, *, failing: bool) -> None:
        """Every fdatasync that a persister asks of its disk fails with EIO, or no longer does.

        Raises:
            NotSupportedError: built without ``clocks=True``: the stages run as they are.
        """
        if self._known(name) not in self.stages or not self._plan.clocks:
            raise NotSupportedError(f"{name} has the machine's own disk: give clocks=True to have a persister's fail")
        flag = failing_flag(self._plan.clock(name))
        if failing:
            flag.touch()
        else:
            flag.unlink(missing_ok=True)

    async def logs(self, lines: int = 12) -> str:
        """`read_logs`, beside the event loop."""
        return await asyncio.to_thread(self.read_logs, lines)

    def read_logs(self, lines: int = 12) -> str:
        """The last `lines` lines of every process's log, and where the whole ones are (or will be, at the end)."""
        where = "" if self._temporary else f" (whole: {self.directory / 'logs'} and {self.directory / 'nats'})"
        texts = [f"the end of each log{where}:"]
        for name, text in self.backend.logs().items():
            tail = text.splitlines()[-lines:]
            texts.append("\n".join([f"--- {name}", *(line[:400] for line in tail)]))
        return "\n".join(texts)

    def _known(self, name: str) -> str:
        if name not in self.servers and name not in self.stages:
            raise KeyError(f"{name!r} is none of {', '.join((*self.servers, *self.stages))}")
        return name

    def _running(self, name: str) -> str:
        """A `_known` name, while there is something to do it to."""
        known = self._known(name)
        if self not in opened:
            raise RuntimeError(_NOT_OPEN)
        return known

    def __getattr__(self, name: str) -> Any:
        # Only for what is not there: these are from `open` on.
        if name in ("client", "api"):
            raise AttributeError(_NOT_OPEN, name=name, obj=self)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def _small_disk(self) -> SmallDisk:
        if self._disk is None:
            raise NotSupportedError("the shards lie on the machine's own disk: give disk_bytes to fill it")
        return self._disk
