"""Threads of a stage process share one arena of the C library."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_COUNT = """
import ctypes, sys, threading
from stages.runtime.allocator import share_arena
if sys.argv[1] == "shared":
    assert share_arena()
held = threading.Barrier(5)
def allocate():
    block = bytes(50_000)  # Python's own allocator leaves so much to the C library.
    held.wait()
    held.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
held.wait()
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
held.wait()
"""


def _arenas(how: str) -> int:
    found = subprocess.run([sys.executable, "-c", _COUNT, how], capture_output=True, text=True, check=True)
    return found.stdout.count("<heap nr=")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas")
def test_threads_share_one_arena() -> None:
    assert _arenas("shared") == 1
    assert _arenas("own") > 1
