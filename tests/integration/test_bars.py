"""Bars of commands that take longer than a moment, as a person sees them in a real terminal."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from commands import run_fictl
from terminal import needs_tmux, terminal

from cluster.state import NotRunningError, read_state

pytestmark = [pytest.mark.cluster, needs_tmux, pytest.mark.timeout(240)]


async def test_a_command_that_waits_for_a_frozen_supervisor_shows_that_it_goes_on(tmp_path: Path) -> None:
    place = ("--dir", str(tmp_path / "run"))
    async with terminal(120, 40) as window:
        try:
            await window.fictl("up", *place, "--detach", "--set", "partitions=2")
            await window.sees("ready: nats")
            supervisor = read_state(tmp_path / "run").supervisor_pid
            os.kill(supervisor, signal.SIGSTOP)
            try:
                await window.fictl("scale", "segment=2", *place)
                await window.sees("scaling ━")
            finally:
                os.kill(supervisor, signal.SIGCONT)
            await window.sees("segment: 2 processes")
        finally:
            await run_fictl("down", *place)
    with pytest.raises(NotRunningError):
        read_state(tmp_path / "run")
