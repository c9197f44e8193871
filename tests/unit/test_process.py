"""A child process of ours that is ended by a signal."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from cluster.process import ManagedProcess


class Sleeper(ManagedProcess):
    def command(self) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", "print('up', flush=True); import time; time.sleep(60)"]

    async def _wait_serving(self) -> None:
        while "up" not in self.log_tail():
            assert self.running


async def test_signals_that_come_too_late_leave_the_exit_code_to_who_waits(tmp_path: Path) -> None:
    sleeper = Sleeper("sleeper", tmp_path / "sleeper.log")
    for _ in range(20):
        await sleeper.start()
        sleeper.send(signal.SIGKILL)
        for _ in range(1000):
            sleeper.send(signal.SIGCONT)
        assert await sleeper.wait() == -signal.SIGKILL
