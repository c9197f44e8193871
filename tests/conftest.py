"""What all tests share: none depends on how fast the machine is."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what it runs in the background; commands that tests break off with Ctrl-C would not hear it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

PAGE_BYTES = 4096


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that mostly wait, for servers and stages, and files that mostly compute take turns.

    Test processes side by side take files in this order. By themselves they would all compute first, more processes
    than there are cores, and then all wait.
    """
    waiting: dict[Path, list[pytest.Item]] = {}
    computing: dict[Path, list[pytest.Item]] = {}
    for item in items:
        side = waiting if item.path.parent.name == "integration" else computing
        side.setdefault(item.path, []).append(item)
    turns = zip_longest(waiting.values(), computing.values(), fillvalue=())
    items[:] = [item for turn in turns for file in turn for item in file]


BadSector = Callable[[Path, int], None]


@pytest.fixture
def bad_sector(monkeypatch: pytest.MonkeyPatch) -> BadSector:
    """Of a file, a byte whose page cannot be read any more until it is written anew.

    As the kernel has it: a read that begins in the page fails, and one that reaches it is cut short without an error.
    """

    def harm(path: Path, at: int) -> None:
        file, start = path.stat().st_ino, at - at % PAGE_BYTES
        pread, pwrite = os.pread, os.pwrite
        bad = True

        def read(fd: int, size: int, offset: int) -> bytes:
            if bad and os.fstat(fd).st_ino == file:
                if start <= offset < start + PAGE_BYTES:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                if offset < start < offset + size:
                    size = start - offset
            return pread(fd, size, offset)

        def write(fd: int, data: bytes, offset: int) -> int:
            nonlocal bad
            if bad and os.fstat(fd).st_ino == file and offset < start + PAGE_BYTES and start < offset + len(data):
                if offset > start or offset + len(data) < start + PAGE_BYTES:
                    # A part of a page is put into what is read of it first.
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                bad = False
            return pwrite(fd, data, offset)

        monkeypatch.setattr(os, "pread", read)
        monkeypatch.setattr(os, "pwrite", write)

    return harm
