"""A stage as a child process: what it is told, and when it is ready."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from cluster.process import ManagedProcess, ProcessError
from contracts.budgets import STAGE_READY
from contracts.settings import CONFIG_VARIABLE, ENV_PREFIX, Settings
from contracts.subjects import Stage
from stages.runtime.tasks import end_tasks

READY_LINE = b"READY"

StageCommand = Callable[[Stage, str], list[str]]
"""(stage, process name) → the command to run. It prints ``READY`` once its share of the partitions runs."""


def settings_environment(settings: Settings) -> dict[str, str]:
    """The ``FI_…`` variables that make a process take `settings`, whatever settings file lies in its directory."""
    defaults = Settings()
    changed = {
        name: value for name, value in msgspec.structs.asdict(settings).items() if value != getattr(defaults, name)
    }
    return {CONFIG_VARIABLE: ""} | {ENV_PREFIX + name.upper(): str(value) for name, value in changed.items()}


class StageProcess(ManagedProcess):
    """One process of a stage. Serving means: it said ``READY``.

    Attributes:
        stage: which stage.
    """

    def __init__(
        self,
        stage: Stage,
        name: str,
        *,
        log: Path,
        settings: Settings,
        command: StageCommand,
        inherited_fds: Sequence[int],
    ) -> None:
        super().__init__(name, log, inherited_fds=inherited_fds)
        self.stage: Stage = stage
        self._settings = settings
        self._command = command
        self._ready = asyncio.Event()
        self._output_fd = -1
        self._output: asyncio.Task[None] | None = None

    def command(self) -> list[str]:
        """As the supervisor was told."""
        return self._command(self.stage, self.name)

    def environment(self) -> Mapping[str, str]:
        """Ours, with exactly the settings of this run."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}
        return inherited | settings_environment(self._settings)

    def _stdout(self, log_fd: int) -> int:
        return self._output_fd

    async def _spawn(self) -> None:
        self._close_output()
        self._ready.clear()
        # A pipe of our own: asyncio's would make `wait` wait for whoever else holds it open.
        read_fd, self._output_fd = os.pipe()
        pipe = os.fdopen(read_fd, "rb", buffering=0)
        try:
            await super()._spawn()
        except BaseException:
            pipe.close()
            raise
        finally:
            os.close(self._output_fd)
        self._output = asyncio.create_task(self._read(pipe), name=f"output of {self.name}")

    async def _wait_serving(self) -> None:
        ready = asyncio.create_task(self._ready.wait())
        ended = asyncio.create_task(self.wait())
        try:
            await asyncio.wait({ready, ended}, timeout=STAGE_READY.s, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise self.died(ended.result())
            if not ready.done():
                raise ProcessError(f"{self.name} was not ready after {STAGE_READY.s:g} s; see {self.log}")
        finally:
            await end_tasks(ready, ended)

    async def kill(self) -> None:
        """See `ManagedProcess.kill`."""
        await super().kill()
        self._close_output()

    async def stop(self, limit_s: float) -> bool:
        """See `ManagedProcess.stop`."""
        in_time = await super().stop(limit_s)
        self._close_output()
        return in_time

    def _close_output(self) -> None:
        if self._output is not None:
            self._output.cancel()

    async def _read(self, pipe: BinaryIO) -> None:
        """Waits for the ready line; whatever else is printed goes to the log."""
        output = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), pipe
        )
        try:
            with self.log.open("ab", buffering=0) as log:
                while line := await _line(output):
                    if line.strip() == READY_LINE:
                        self._ready.set()
                    else:
                        log.write(line)
        finally:
            transport.close()


async def _line(output: asyncio.StreamReader) -> bytes:
    """One line, or as much of an overlong one as is buffered; empty at the end."""
    try:
        return await output.readuntil(b"\n")
    except asyncio.IncompleteReadError as end:
        return end.partial
    except asyncio.LimitOverrunError as overrun:
        return await output.readexactly(overrun.consumed)
