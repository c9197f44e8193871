"""A test leaves nothing behind: no task, process, container, thread, open file, port, or file where none belongs.

Always true: what a fixture of a wider scope began before the test is no business of the test's; what the test itself or
its own fixtures began must be gone when they are. Processes are known by whose children they are and by a word in their
environment, so that one that was let go of (a daemon, a grandchild) is found as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

GRACE_S: Final = 2.0
"""How long what was told to end may take."""

_MARK: Final = "FICLUSTER_TEST_RUN"
_RUN: Final = secrets.token_hex(8)
_CACHES: Final = {".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache", "__pycache__"}
_STANDARD_FD_MAX: Final = 2
_POLL_S: Final = 0.02
_EXEC_S: Final = 0.5
"""How long a process may take to become another program."""
_before: Final = pytest.StashKey["Snapshot"]()
_pending: Final[list[str]] = []
"""Tasks that were pending when their loop was closed, since the last look."""

Undo = Callable[[], None]
_undo: Final[list[Undo]] = []
_deferred: Final[dict[str, Snapshot]] = {}
"""``since``: what there was before the first test of a cluster that several share."""
_strangers: Final[dict[str, int]] = {}
"""Process id → inode in ``/proc``, of those that were found to be none of ours. No later process has the same inode."""
_directories: Final[list[Path]] = []
"""Where no file may be left: the working directory, and temporary files of this run."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What there is, by name.

    Attributes:
        processes: pids of our children and of what they started.
        threads: of this process.
        open: descriptors of this process, with what they lead to.
        files: in the working directory and among temporary files.
        containers: and networks, with our label.
    """

    processes: frozenset[int]
    threads: frozenset[threading.Thread]
    open: frozenset[tuple[int, str]]
    files: frozenset[Path]
    containers: frozenset[str]


def pytest_configure() -> None:
    """Marks what is started from now on, and looks at every loop that is closed."""
    os.environ[_MARK] = _RUN
    _directories[:] = [Path().absolute()]
    with contextlib.suppress(ImportError):
        import uvloop

        # libuv opens a pipe for itself with its first loop, and keeps it.
        uvloop.new_event_loop().close()
    close = asyncio.Runner.close

    def closing(runner: asyncio.Runner) -> None:
        _note_pending(runner)
        close(runner)

    asyncio.Runner.close = closing  # type: ignore[method-assign, assignment]
    _undo.append(lambda: setattr(asyncio.Runner, "close", close))


def pytest_collection_finish() -> None:
    """What was imported lives as long as the run: no collection, ours after a test least of all, looks at it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Leaves pytest as it was."""
    while _undo:
        _undo.pop()()
    os.environ.pop(_MARK, None)


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary files of this run in a place of its own, where those that are left can be told from other people's."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("temporary"))
    environment, os.environ["TMPDIR"] = os.environ.get("TMPDIR"), tempfile.tempdir
    _directories.append(Path(tempfile.tempdir))
    yield
    tempfile.tempdir = before
    if environment is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = environment


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest, _own_temporary_files: None) -> None:
    """Notes what there is once the fixtures of wider scopes have begun."""
    _pending.clear()
    request.node.stash[_before] = _look()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    """Once all fixtures of a test have ended, it fails if there is more than before."""
    outcome = yield
    before = item.stash.get(_before, None)
    if before is None:
        return outcome
    if _shared_cluster():
        _deferred.setdefault("since", before)
        before = None
    else:
        before = _deferred.pop("since", before)
    deadline = time.monotonic() + GRACE_S
    while (left := _left(before, _look()) if before else []) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(_POLL_S)
    left = [*_pending, *left]
    _pending.clear()
    if left:
        pytest.fail("left behind by the test or its fixtures:\n  " + "\n  ".join(left), pytrace=False)
    return outcome


def _shared_cluster() -> bool:
    """A cluster of a wider scope runs on. What a test killed in it was started anew: that is judged at its end."""
    kit = sys.modules.get("cluster.testing.ficluster")
    return kit is not None and len(kit.opened) > 0


def _look() -> Snapshot:
    return Snapshot(
        processes=frozenset(_processes()),
        # A loop's own threads for blocking calls end with the loop, which may serve a whole module.
        threads=frozenset(t for t in threading.enumerate() if not t.name.startswith("asyncio_")),
        open=frozenset(_open()),
        files=frozenset(_files()),
        containers=frozenset(_containers()),
    )


def _left(before: Snapshot, now: Snapshot) -> list[str]:
    """What is there now and was not before, in words."""
    return [
        *(f"process {pid}: {_command(pid)}" for pid in sorted(now.processes - before.processes)),
        *(f"thread {thread.name}" for thread in now.threads - before.threads),
        *(f"descriptor {number}: {_describe(what)}" for number, what in sorted(now.open - before.open)),
        *(f"file {path}" for path in sorted(now.files - before.files)),
        *(f"container or network {name}" for name in sorted(now.containers - before.containers)),
    ]


def _note_pending(runner: asyncio.Runner) -> None:
    """Notes tasks that would be cancelled unasked by the end of their loop."""
    try:
        loop = runner.get_loop()
    except RuntimeError:
        return
    deadline = time.monotonic() + GRACE_S
    while (pending := asyncio.all_tasks(loop)) and time.monotonic() < deadline:
        loop.run_until_complete(asyncio.sleep(_POLL_S))
    _pending.extend(f"task {task.get_name()}: {task.get_coro()}" for task in pending)


def _processes() -> Iterator[int]:
    if sys.platform != "linux":
        return
    own = os.getpid()
    for entry in os.scandir("/proc"):
        name = entry.name
        if not name.isdecimal() or int(name) == own or _strangers.get(name) == entry.inode():
            continue
        try:
            state, parent, started = _state(name)
            if state in "ZX":
                continue
            # What ran before us is nobody's leak.
            if started >= _BEGUN and (parent == own or _is_marked(name)):
                yield int(name)
            else:
                _strangers[name] = entry.inode()
        except OSError:
            # It ended while we looked, or is somebody else's.
            continue


def _state(name: str) -> tuple[str, int, int]:
    """A process's state, its parent, and its start in ticks since boot. Raises `OSError`."""
    with open(f"/proc/{name}/stat", "rb", buffering=0) as file:
        fields = file.read().rpartition(b")")[2].split()
    return fields[0].decode(), int(fields[1]), int(fields[19])


_BEGUN: Final = _state("self")[2] if sys.platform == "linux" else 0


def _is_marked(name: str) -> bool:
    """True when the process got our word from whoever started it. Raises `OSError`."""
    mark = f"{_MARK}={_RUN}".encode()
    deadline = time.monotonic() + _EXEC_S
    while True:
        environment = Path(f"/proc/{name}/environ").read_bytes()
        if environment or time.monotonic() > deadline:
            return mark in environment
        # While it becomes another program it has none.
        time.sleep(_POLL_S)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return "(ended)"


def _open() -> Iterator[tuple[int, str]]:
    if sys.platform != "linux":
        return
    for name in os.listdir("/proc/self/fd"):
        if int(name) <= _STANDARD_FD_MAX:
            # pytest's capture turns these to and fro.
            continue
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if not target.startswith(sys.prefix):
            # What lies among the libraries is theirs to keep open, such as fonts.
            yield int(name), target


def _describe(target: str) -> str:
    """A descriptor's target, with the port that a listening socket has."""
    if not target.startswith("socket:["):
        return target
    inode = target.removeprefix("socket:[").removesuffix("]")
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[9] == inode:
                port = int(columns[1].rpartition(":")[2], 16)
                return f"{'listens on' if columns[3] == '0A' else 'a connection from'} port {port}"
    return target


def _files() -> Iterator[Path]:
    for directory in _directories:
        try:
            yield from (directory / name for name in os.listdir(directory) if name not in _CACHES)
        except OSError:
            continue


def _containers() -> Iterator[str]:
    kit = sys.modules.get("cluster.testing.containers")
    if kit is not None and kit.clusters:
        yield from kit.containers_of(kit.owner())
