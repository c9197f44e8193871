"""One user at a time for a directory, also across crashes.

The lock is handed to child processes as an open file: it is free only when the process that took it *and* all its
children are gone. Who gets it can be sure that no process of a previous run still writes there.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from pathlib import Path

from contracts.budgets import LOCK_POLL
from contracts.errors import DefiniteError


class DirectoryBusyError(DefiniteError):
    """Another run uses the directory."""


class DirectoryLock:
    """An exclusive advisory lock (flock) on a file, kept until `release` or the end of all its holders."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    @property
    def fds(self) -> tuple[int, ...]:
        """File descriptors for children to inherit: one while held, else none."""
        return () if self._fd is None else (self._fd,)

    async def acquire(self, wait_s: float) -> None:
        """Takes the lock, waiting at most `wait_s` seconds for children of a run that crashed to be gone.

        Raises:
            DirectoryBusyError: it is still held after that.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + wait_s
        try:
            while not _try_lock(fd):
                if time.monotonic() > deadline:
                    raise DirectoryBusyError(
                        f"{self._path.parent} is in use by another run; stop it with `fictl down --dir "
                        f"{self._path.parent}`, or choose another directory"
                    )
                await asyncio.sleep(LOCK_POLL.s)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def release(self) -> None:
        """Gives up this process's hold. Does nothing when it has none."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
