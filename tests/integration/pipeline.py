"""Helpers for tests on real processes: the test kit on its embedded backend, and processes beside the supervised ones.

Nothing here waits for time to pass: every wait is for a condition of the streams, under a generous limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

from commands import run_fictl

from cluster.members import MemberStatus, look
from cluster.stageprocess import settings_environment
from cluster.supervisor import Supervisor
from cluster.testing.disk import flip
from cluster.testing.embedded import EmbeddedBackend
from cluster.testing.ficluster import FiCluster, quick_settings
from cluster.testing.load import Load, under_load, workload
from cluster.testing.waiting import SETTLED_LIMIT_S, until
from cluster.track import Totals
from contracts.settings import Settings
from contracts.subjects import Stage

__all__ = [
    "ALL",
    "DATA",
    "SETTLED_LIMIT_S",
    "Extra",
    "Load",
    "Pipeline",
    "Totals",
    "extra_stage",
    "flip",
    "members",
    "running",
    "settings",
    "stage_names",
    "under_load",
    "until",
    "workload",
]

DATA = Path(__file__).parents[3] / "shared" / "data" / "primock57.ndjson"
settings = quick_settings


class Pipeline(FiCluster):
    """A `FiCluster` of processes, with the supervisor that looks after them."""

    def __init__(
        self, directory: Path, chosen: Settings, scale: Mapping[Stage, int] | None = None, disk_bytes: int | None = None
    ) -> None:
        super().__init__(directory, backend="embedded", settings=chosen, scale=scale, disk_bytes=disk_bytes)

    @property
    def supervisor(self) -> Supervisor:
        """Starts again whatever dies; unlike the verbs of `FiCluster`, after which a process stays down."""
        assert isinstance(self.backend, EmbeddedBackend)
        return self.backend.supervisor


@contextlib.asynccontextmanager
async def running(
    directory: Path, chosen: Settings, scale: Mapping[Stage, int] | None = None
) -> AsyncIterator[Pipeline]:
    """A pipeline of real processes; all of them are gone when the block ends, however it ends."""
    pipeline = Pipeline(directory, chosen, scale)
    async with pipeline:
        yield pipeline


ALL = "all"


class Extra:
    """A stage process that no supervisor looks after, told which partitions to hold: None for its share."""

    def __init__(self, pipeline: Pipeline, stage: Stage, name: str, shards: Path, partitions: str | None) -> None:
        supervisor = pipeline.supervisor
        urls = [part for url in supervisor.urls for part in ("--nats", url)]
        self._command = [sys.executable, "-m", "cluster", "run", stage, *urls, "--name", name, "--shards", str(shards)]
        if partitions is not None:
            every = ",".join(map(str, range(supervisor.settings.partitions)))
            self._command += ["--partitions", every if partitions == ALL else partitions]
        self._environment = os.environ | settings_environment(supervisor.settings)
        self._log = supervisor.directory / f"{name}.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Starts it; returns once it says that it has tried to open all its partitions."""
        with self._log.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdout=asyncio.subprocess.PIPE, stderr=output, env=self._environment
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            assert (await self._process.stdout.readline()).strip() == b"READY", self.log_text()[-2000:]

    def log_text(self) -> str:
        """Everything it wrote to its log."""
        return self._log.read_text(errors="replace")

    async def kill(self) -> None:
        """SIGKILL, if it was started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.communicate()


@contextlib.asynccontextmanager
async def extra_stage(
    pipeline: Pipeline,
    stage: Stage,
    name: str,
    *,
    shards: Path | None = None,
    frozen: str = "",
    partitions: str | None = ALL,
) -> AsyncIterator[Extra]:
    """One more process of `stage`, to be started within the block and killed when it ends.

    A supervised process named `frozen` is thawed then, whatever happened.
    """
    extra = Extra(pipeline, stage, name, shards or pipeline.shards, partitions)
    try:
        yield extra
    finally:
        await extra.kill()
        if frozen:
            pipeline.supervisor.thaw(frozen)


def stage_names(pipeline: Pipeline) -> Iterator[str]:
    """Names of the supervised stage processes, in flow order."""
    return (process.name for process in pipeline.supervisor.processes if process.kind != "server")


async def members(pipeline: Pipeline) -> tuple[MemberStatus, ...]:
    """What `fictl members` shows, for who asks again and again: each command would start a process."""
    return (await look(pipeline.api)).members


async def fictl(pipeline: Pipeline, *arguments: str) -> tuple[int, Any, str]:
    """Runs a verb on the pipeline's directory: exit code, what its JSON said (None without any), stderr."""
    code, out, err = await run_fictl(*arguments, "--dir", str(pipeline.supervisor.directory), "--json")
    return code, json.loads(out) if out else None, err
