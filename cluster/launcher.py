"""Becomes another program that cannot outlive the process that started it.

Run as ``python -I -S launcher.py PARENT_PID TIMER_SLACK_NS COMMAND ARGS…``; it imports nothing of ours so that it
costs only a few milliseconds. On Linux the kernel kills the program (SIGKILL) the moment its parent is gone, however
the parent went, and its sleeps may last longer by the timer slack (0: the system's own); elsewhere this is a plain exec
and only an orderly stop cleans up. The kernel's "parent" is the thread that started the child: start children from a
thread that lives as long as they may.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29
EXIT_ORPHAN = 125
EXIT_NOT_FOUND = 127


def main(arguments: list[str]) -> int:
    """Ties this process to its parent, then execs the command; returns only when that is impossible.

    Args:
        arguments: pid of the expected parent, nanoseconds of timer slack, then the command and its arguments.

    Returns:
        `EXIT_ORPHAN` if the parent had died already, `EXIT_NOT_FOUND` if the command cannot be executed.
    """
    parent, timer_slack_ns, command = int(arguments[0]), int(arguments[1]), arguments[2:]
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(timer_slack_ns), 0, 0, 0)
    # The parent may have died before the line above: then nobody would ever send the signal.
    if os.getppid() != parent:
        return EXIT_ORPHAN
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot execute {command[0]}: {error}", file=sys.stderr)
        return EXIT_NOT_FOUND


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
