"""One child process of ours: started through the launcher, in a session of its own, its output in a log file.

Always true: a child gets no Ctrl-C from the terminal (its own session), so that it is stopped in order by whoever
started it; and on Linux it dies with the process that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from contracts.budgets import KILLED
from contracts.errors import DefiniteError

_LAUNCHER = Path(__file__).with_name("launcher.py")
LOG_TAIL_BYTES = 4096


class ProcessError(DefiniteError):
    """A child process could not be started, or ended when it should not. Holds the end of its log."""


class ManagedProcess(ABC):
    """A process that can be started, stopped, killed and frozen, any number of times.

    Attributes:
        name: unique within its supervisor.
        log: file that standard output and error are appended to.
        timer_slack_ns: how much longer its sleeps may last on Linux; 0: the system's own.
    """

    timer_slack_ns = 0

    def __init__(self, name: str, log: Path, *, inherited_fds: Sequence[int] = ()) -> None:
        """Args: `inherited_fds` stay open in the child (lock files that must outlive the parent)."""
        self.name = name
        self.log = log
        self._inherited_fds = tuple(inherited_fds)
        self._process: asyncio.subprocess.Process | None = None
        self._log_offset = 0

    @abstractmethod
    def command(self) -> list[str]:
        """The program and its arguments, asked for at every start."""

    def environment(self) -> Mapping[str, str]:
        """The child's whole environment, asked for at every start."""
        return os.environ

    @property
    def pid(self) -> int | None:
        """Process id while it runs (or is frozen), else None."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        """True from start until the process has ended and was collected."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Starts it and waits until it serves. Does nothing when it runs already.

        Raises:
            ProcessError: it could not be started, or ended before it served. Nothing is left running.
        """
        if self.running:
            return
        try:
            try:
                await self._spawn()
            except OSError as error:
                raise ProcessError(f"{self.name} cannot be started: {error}") from error
            await self._wait_serving()
        except BaseException:
            await self.kill()
            raise

    async def _spawn(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_offset = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), str(self.timer_slack_ns)),
                *self.command(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=self._stdout(log.fileno()),
                stderr=log.fileno(),
                env=dict(self.environment()),
                start_new_session=True,
                pass_fds=self._inherited_fds,
            )

    def _stdout(self, log_fd: int) -> int:
        return log_fd

    @abstractmethod
    async def _wait_serving(self) -> None:
        """Returns once the process does its work; raises `ProcessError` if it ends first."""

    async def wait(self) -> int:
        """Waits for the end of the current run.

        Returns:
            Exit code, or minus the number of the signal that ended it.

        Raises:
            ProcessError: it was never started.
        """
        if self._process is None:
            raise ProcessError(f"{self.name} was never started")
        return await self._process.wait()

    async def stop(self, limit_s: float) -> bool:
        """SIGTERM, then SIGKILL after `limit_s`. Does nothing when it does not run.

        Returns:
            True if it ended by itself within the limit.
        """
        if not self.running:
            return True
        self.send(signal.SIGTERM)
        # A frozen process would see the SIGTERM only when thawed.
        self.send(signal.SIGCONT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self.wait()
                return True
        await self.kill()
        return False

    async def kill(self) -> None:
        """SIGKILL, and waits until the process is gone. Does nothing when it does not run.

        Raises:
            ProcessError: the kernel has not ended it after `KILLED`.
        """
        self.send(signal.SIGKILL)
        if self.running:
            try:
                async with asyncio.timeout(KILLED.s):
                    await self.wait()
            except TimeoutError:
                raise ProcessError(f"{self.name} survives SIGKILL: is its disk hanging?") from None

    def freeze(self) -> None:
        """SIGSTOP: it keeps its sockets and its beliefs, and does nothing until `thaw`."""
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT after `freeze`."""
        self.send(signal.SIGCONT)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal; does nothing when it does not run."""
        if self._process is None or not self.running:
            return
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            if not hasattr(os, "waitid"):  # macOS
                self._process.send_signal(number)
            # `send_signal` looks whether it has ended, and then takes the exit code from asyncio, which waits for it.
            elif os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.kill(self._process.pid, number)

    def log_tail(self) -> str:
        """The end of what the current (or last) run wrote, at most `LOG_TAIL_BYTES`; empty when it cannot be read."""
        try:
            with self.log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_offset, size - LOG_TAIL_BYTES))
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    def last_log_line(self) -> str:
        """The last line that is not blank of the current (or last) run, or an empty string."""
        lines = [line for line in self.log_tail().splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""

    def died(self, code: int) -> ProcessError:
        """The error for an end that was not asked for, with the end of the log."""
        return ProcessError(f"{self.name} {describe_exit(code)}; end of {self.log}:\n{self.log_tail()}")


def describe_exit(code: int) -> str:
    """``-9`` → ``was ended by SIGKILL``; ``3`` → ``exited with code 3``."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
