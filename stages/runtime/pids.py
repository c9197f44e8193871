"""Telling a process from a later one that got the same id: ids come again, soon after a reboot and in a container."""

from __future__ import annotations

import os
from pathlib import Path


def process_started(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None if it does not exist or the system has no ``/proc``."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field, the command in parentheses, may itself hold spaces and parentheses.
    return int(stat.rpartition(")")[2].split()[19])


def process_lives(pid: int, started: int | None) -> bool:
    """True while the process with this id runs that began at `started` (see `process_started`).

    None, from a system or a build that does not say: true while any process has the id.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return started is None or process_started(pid) == started
