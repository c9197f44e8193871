"""A child process of ours that is ended by a signal."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from cluster.process import ManagedProcess


class Waiting(ManagedProcess):
    def command(self) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"]

    async def _wait_serving(self) -> None:
        """It serves nobody."""


async def test_signals_that_come_too_late_leave_the_exit_code_to_who_waits(tmp_path: Path) -> None:
    waiting = Waiting("waiting", tmp_path / "waiting.log")
    for _ in range(20):
        await waiting.start()
        waiting.send(signal.SIGKILL)
        for _ in range(1000):
            waiting.send(signal.SIGCONT)
        assert await waiting.wait() == -signal.SIGKILL
