"""Keeps the state file of a run as it is, in a thread: a disk that hangs must not keep processes from being watched."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from cluster.state import State, write_state
from contracts.budgets import STATE_PAUSE, STATE_WRITE
from stages.runtime.tasks import end_tasks, run_blocking

log = logging.getLogger(__name__)


class StateWriter:
    """Writes what `current` gives whenever it is told that this changed: the newest only, one write at a time.

    Always true: what a full disk refuses is tried again, and ends nothing: not what will free the disk.

    Args:
        directory: of the run; whoever calls has its lock from before `open` until `close` has returned.
        current: the state now.
    """

    def __init__(self, directory: Path, current: Callable[[], State]) -> None:
        self._directory = directory
        self._current = current
        self._is_open = False
        self._is_stale = False
        self._writing: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Writes the state once, and from then on when told to. Raises `OSError`: the disk refuses even this."""
        await run_blocking(write_state, self._directory, self._current())
        self._is_open = True

    def changed(self) -> None:
        """The state has changed. Does nothing unless open: the file may be another supervisor's."""
        self._forget_again()
        if not self._is_open:
            return
        self._is_stale = True
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), name="state file")

    async def tried(self) -> None:
        """Returns when the state as it is now is in the file or was refused once, and soon also if the disk hangs."""
        if self._writing is not None:
            await asyncio.wait((self._writing,), timeout=STATE_WRITE.s)

    async def close(self) -> None:
        """Writes nothing more, once what has changed was tried. Waits for a write under way, which would come later."""
        try:
            if self._writing is not None:
                await asyncio.wait((self._writing,))
        finally:
            self._is_open = False
            self._forget_again()
            if self._writing is not None:
                await end_tasks(self._writing)

    def _forget_again(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None

    async def _write(self) -> None:
        while self._is_stale:
            self._is_stale = False
            try:
                await run_blocking(write_state, self._directory, self._current())
            except OSError as error:
                log.error("the state file cannot be written, and will be tried again: %s", error)
                self._again = asyncio.get_running_loop().call_later(STATE_PAUSE.s, self.changed)
