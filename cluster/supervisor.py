"""Starts a whole pipeline on this machine, keeps it running, and stops it in flow order.

Always true: one supervisor for each directory; a process that dies is started again until it is stopped on purpose;
stopping goes ingest → segment → hash → persist → servers, so that what was accepted can flow out; and nothing is left
running when `stop` returns, when `start` fails, or (on Linux) when the supervisor itself is killed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cluster.apply import apply
from cluster.control import ControlServer, RestartAnswer, ScaleAnswer, socket_path
from cluster.health import clear_stale
from cluster.keeper import Keeper, OnEvent, ProcessEvent
from cluster.lock import DirectoryLock
from cluster.nodes import EmbeddedCluster, Wire, direct
from cluster.process import ManagedProcess
from cluster.stageprocess import StageCommand, StageProcess
from cluster.state import NotRunningError, ProcessState, State, read_state
from cluster.statewriter import StateWriter
from contracts.budgets import DIRECTORY_LOCK, SERVER_STOP
from contracts.errors import FiError, SettingsError
from contracts.settings import Settings
from contracts.subjects import STAGES, Stage
from stages.persist.names import SHARDS
from stages.persist.remains import Remains, read_remains
from stages.persist.storedir import STORE_FILE, read_store
from stages.runtime.connection import connect
from stages.runtime.pids import process_started
from stages.runtime.tasks import end_tasks, side_by_side

log = logging.getLogger(__name__)


def run_command(directory: Path) -> StageCommand:
    """How a stage is run from `directory`: ``python -m cluster run STAGE …``."""

    def command(stage: Stage, name: str) -> list[str]:
        return [sys.executable, "-P", "-m", "cluster", "run", stage, "--dir", str(directory), "--name", name]

    return command


def check_run(settings: Settings, scale: Mapping[Stage, int], servers: int) -> None:
    """Holds that a run can be so. Raises `SettingsError`: more replicas than servers, or as `check_count`."""
    if settings.replicas > servers:
        raise SettingsError(f"replicas = {settings.replicas} needs as many servers; there are {servers}")
    for stage, count in scale.items():
        check_count(settings, stage, count)


def check_count(settings: Settings, stage: Stage, count: int) -> None:
    """Holds that a stage can have `count` processes. Raises `SettingsError`: more than partitions, or below 0."""
    if not 0 <= count <= settings.partitions:
        raise SettingsError(f"{count} processes of {stage}: 0 to {settings.partitions} can share the partitions")


class Supervisor:
    """Embedded servers and stage processes of one directory."""

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        scale: Mapping[Stage, int] | None = None,
        servers: int = 3,
        on_event: OnEvent = lambda event: None,
        command: StageCommand | None = None,
        wire: Wire = direct,
        *,
        after_stores: bool = False,
    ) -> None:
        """Describes a run; `start` begins it.

        Args:
            directory: state, logs, stores and shards live here.
            settings: for the topology and, as environment, for every stage process.
            scale: processes of each stage; 1 where nothing is said. 0 runs none.
            servers: nats-server processes; must be at least `settings.replicas`.
            on_event: told of every start, death and stop.
            command: what to run for a stage process; the default is ``python -m cluster run``.
            wire: how the servers find each other.
            after_stores: where the servers have no streams, go on with the cluster of the store in `directory`.

        Raises:
            SettingsError: more replicas than servers, or more processes of a stage than partitions.
        """
        check_run(settings, scale or {}, servers)
        self.directory = directory.absolute()
        self.settings = settings
        self.cluster = EmbeddedCluster(self.directory, servers, wire)
        self._scale: dict[Stage, int] = {**dict.fromkeys(STAGES, 1), **(scale or {})}
        self._control: ControlServer | None = None
        self._on_event = on_event
        self._command = command or run_command(self.directory)
        self._after_stores = after_stores
        self._lock = DirectoryLock(self.directory / "lock")
        self._servers: list[Keeper] = []
        self._stages: dict[Stage, list[Keeper]] = {stage: [] for stage in STAGES}
        self._status: Literal["starting", "ready", "stopping", "stopped"] = "stopped"
        self._stop_requested = asyncio.Event()
        self._force = asyncio.Event()
        self._stopped = asyncio.Event()
        self._state = StateWriter(self.directory, self._current)

    @property
    def urls(self) -> tuple[str, ...]:
        """Client URLs of the servers."""
        return self.cluster.urls

    @property
    def processes(self) -> tuple[ProcessState, ...]:
        """Everything looked after: servers, then stages in flow order."""
        found = ((kind, keeper.process) for kind, keeper in self._keepers())
        return tuple(ProcessState(name=process.name, kind=kind, pid=process.pid) for kind, process in found)

    async def __aenter__(self) -> Supervisor:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Starts servers, applies the topology, starts all stages, and returns once every stage process is ready.

        Raises:
            FiError: something did not come up; says what, with the end of its log. Nothing is left running.
            OSError: the state file cannot be written.
        """
        # One that ends, or was killed, is waited for; one at work would have to be stopped first.
        await self._lock.acquire(0 if self._is_at_work() else DIRECTORY_LOCK.s)
        self._stopped.clear()
        try:
            self._status = "starting"
            # On a disk that refuses even this nothing would come up.
            await self._state.open()
            clear_stale(self.directory)
            await self.cluster.start()
            self._servers = [Keeper(node, self._told) for node in self.cluster.nodes]
            await side_by_side(*(keeper.start() for keeper in self._servers))
            client = await connect(self.urls, "fi-supervisor")
            try:
                after, beside = await asyncio.to_thread(self._store)
                await apply(client, self.settings, after=after, beside=beside)
            finally:
                await client.close()
            await side_by_side(*(self.start_stage(stage) for stage in STAGES))
            self._control = ControlServer(socket_path(self.directory), self._scale_all, self._restart_all)
            await self._control.start()
            self._set_status("ready")
            await self._state.tried()
        except BaseException:
            self._force.set()
            await self.stop()
            raise

    def _store(self) -> tuple[Remains | None, str]:
        """What the store says, if its cluster is to be gone on with; and its cluster's id. Raises as `read_remains`."""
        shards = self.directory / SHARDS
        if not (shards / STORE_FILE).exists():
            return None, ""
        return read_remains([shards]) if self._after_stores else None, read_store(shards).cluster_id

    def _is_at_work(self) -> bool:
        """Another supervisor says that it runs what is in the directory, and lives."""
        try:
            return read_state(self.directory).status in ("starting", "ready")
        except NotRunningError:
            return False

    def request_stop(self) -> None:
        """For signal handlers: the first call ends `wait_stop_requested`, a second one makes `stop` kill at once.

        It counts from whenever it is called, also before and during `start`, to the end of the next `stop`.
        """
        if self._stop_requested.is_set():
            self._force.set()
        self._stop_requested.set()

    async def wait_stop_requested(self) -> None:
        """Returns when `request_stop` was called."""
        await self._stop_requested.wait()

    async def stop(self) -> None:
        """Stops stages in flow order, then servers: SIGTERM, and SIGKILL after `settings.drain_s` for each stage.

        Does nothing when nothing runs. Called again while it works, or after a second `request_stop`, it kills what
        is left.
        """
        if not self._lock.fds:
            return
        if self._status == "stopping":
            self._force.set()
            await self._stopped.wait()
            return
        try:
            control, self._control = self._control, None
            self._set_status("stopping")
            if control is not None:
                await control.close()
            for stage in STAGES:
                await self.stop_stage(stage)
            await self._stop_keepers(self._servers, SERVER_STOP.s)
        except BaseException:
            await asyncio.gather(*(keeper.stop(0) for _, keeper in self._keepers()))
            raise
        finally:
            try:
                await self.cluster.stop()
            finally:
                self._set_status("stopped")
                try:
                    await self._state.close()
                finally:
                    self._lock.release()
                    # What asked for this end asks for none of what is started next.
                    self._stop_requested.clear()
                    self._force.clear()
                    self._stopped.set()

    async def stop_stage(self, stage: Stage) -> None:
        """Stops all processes of a stage, which drain first; they stay down until `start_stage`."""
        await self._stop_keepers(self._stages[stage], self.settings.drain_s)
        await self._write_state()

    async def start_stage(self, stage: Stage) -> None:
        """Starts the processes of a stage and waits until all are ready. Does nothing to those that run.

        Raises:
            ProcessError: one of them did not come up; holds the end of its log.
        """
        keepers = self._stages[stage]
        while len(keepers) < self._scale[stage]:
            keepers.append(self._new_keeper(stage))
        await side_by_side(*(keeper.start() for keeper in keepers))
        await self._write_state()

    async def scale(self, stage: Stage, count: int) -> None:
        """Runs a stage with `count` processes from now on: starts new ones, or stops the last ones, which drain.

        Raises:
            SettingsError: more processes than partitions.
            ProcessError: as `start_stage`.
        """
        check_count(self.settings, stage, count)
        self._scale[stage] = count
        await self._stop_keepers(self._stages[stage][count:], self.settings.drain_s)
        del self._stages[stage][count:]
        await self.start_stage(stage)

    async def restart(self, stage: Stage, on_replaced: Callable[[], None] = lambda: None) -> None:
        """Replaces every process of a stage, one at a time: the new one is ready before the old one drains.

        So a partition always has a process to go to, and waits for a hand-over alone, not for a process to start.

        Args:
            stage: which.
            on_replaced: called after each.

        Raises:
            ProcessError: a new process did not come up. The old one goes on, and no further one is touched.
        """
        keepers = self._stages[stage]
        for old in tuple(keepers):
            new = self._new_keeper(stage)
            keepers.append(new)
            try:
                await new.start()
            except BaseException:
                keepers.remove(new)
                raise
            await self._stop_keepers([old], self.settings.drain_s)
            keepers.remove(old)
            await self._write_state()
            on_replaced()

    async def _restart_all(self, stages: tuple[Stage, ...]) -> RestartAnswer:
        """`restart` for several stages, against the flow (ADR 0032), on behalf of another process."""
        replaced = dict.fromkeys(stages, 0)

        def count(stage: Stage) -> None:
            replaced[stage] += 1

        try:
            for stage in reversed(STAGES):
                if stage in replaced:
                    await self.restart(stage, partial(count, stage))
        except FiError as error:
            return RestartAnswer(replaced, str(error))
        return RestartAnswer(replaced)

    async def _scale_all(self, counts: dict[Stage, int]) -> ScaleAnswer:
        """`scale` for several stages, in flow order, on behalf of another process."""
        before = dict(self._scale)
        try:
            for stage, count in counts.items():
                check_count(self.settings, stage, count)
            for stage in STAGES:
                if stage in counts:
                    await self.scale(stage, counts[stage])
        except FiError as error:
            return ScaleAnswer(before, dict(self._scale), str(error), isinstance(error, SettingsError))
        return ScaleAnswer(before, dict(self._scale))

    async def kill(self, name: str) -> None:
        """SIGKILL to a process, which is then started again like after any death. Raises `KeyError`."""
        await self._process(name).kill()

    def freeze(self, name: str) -> None:
        """SIGSTOP to a process. Raises `KeyError`."""
        self._process(name).freeze()

    def thaw(self, name: str) -> None:
        """SIGCONT to a process. Raises `KeyError`."""
        self._process(name).thaw()

    async def hold_down(self, name: str, limit_s: float = 0) -> None:
        """Ends a process, which is not started again until `bring_back`.

        SIGKILL at once; with a limit, SIGTERM first and SIGKILL after so many seconds. Raises `KeyError`.
        """
        await self._keeper(name).stop(limit_s)
        await self._write_state()

    async def bring_back(self, name: str) -> None:
        """Starts a process after `hold_down` and waits until it serves. Raises `KeyError`, `ProcessError`."""
        await self._keeper(name).start()
        await self._write_state()

    def _new_keeper(self, stage: Stage) -> Keeper:
        taken = {keeper.process.name for keeper in self._stages[stage]}
        name = next(name for index in itertools.count() if (name := f"{stage}-{index}") not in taken)
        process = StageProcess(
            stage,
            name,
            log=self.directory / "logs" / f"{name}.log",
            settings=self.settings,
            command=self._command,
            inherited_fds=self._lock.fds,
        )
        return Keeper(process, self._told)

    async def _stop_keepers(self, keepers: Sequence[Keeper], limit_s: float) -> None:
        """Stops them side by side; once `_force` is set, what is left is killed."""
        if self._force.is_set():
            limit_s = 0
        stopping = asyncio.gather(*(keeper.stop(limit_s) for keeper in keepers))
        forced = asyncio.create_task(self._force.wait())
        ends: set[asyncio.Future[Any]] = {stopping, forced}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                await asyncio.gather(*(keeper.process.kill() for keeper in keepers))
            await stopping
        finally:
            await end_tasks(forced)

    def _keepers(self) -> list[tuple[str, Keeper]]:
        staged = [(str(stage), keeper) for stage in STAGES for keeper in self._stages[stage]]
        return [("server", keeper) for keeper in self._servers] + staged

    def _keeper(self, name: str) -> Keeper:
        return {keeper.process.name: keeper for _, keeper in self._keepers()}[name]

    def _process(self, name: str) -> ManagedProcess:
        return self._keeper(name).process

    def _told(self, event: ProcessEvent) -> None:
        self._state.changed()
        self._on_event(event)

    def _set_status(self, status: Literal["starting", "ready", "stopping", "stopped"]) -> None:
        self._status = status
        self._state.changed()

    async def _write_state(self) -> None:
        self._state.changed()
        await self._state.tried()

    def _current(self) -> State:
        pid = os.getpid()
        return State(
            status=self._status,
            supervisor_pid=pid,
            supervisor_started=process_started(pid),
            urls=self.urls,
            processes=self.processes,
            settings=self.settings,
            control="" if self._control is None else str(self._control.path),
        )
