"""Runs `fictl` inside a test's own process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import pytest

from cluster.cli import main
from cluster.state import State, write_state
from contracts.settings import Settings
from stages.runtime.pids import process_started

Captured = pytest.CaptureFixture[str]


def fictl(*arguments: str | Path) -> int:
    """Runs `fictl` in this process and gives its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        # The command line takes the logs of its process over, which here is a test's.
        patch.setattr(logging.root, "handlers", list(logging.root.handlers))
        patch.setattr(logging.root, "level", logging.root.level)
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
    return int(exited.value.code or 0)


def leave_state(
    directory: Path, status: Literal["starting", "ready", "stopping", "stopped"], pid: int, control: str = ""
) -> None:
    """What a run of the process `pid`, which may have ended, leaves in its directory."""
    state = State(
        status=status,
        supervisor_pid=pid,
        supervisor_started=process_started(pid) or 1,
        urls=(),
        processes=(),
        settings=Settings(),
        control=control,
    )
    write_state(directory, state)
