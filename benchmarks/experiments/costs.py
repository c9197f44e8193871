"""What a piece of work cost: processor time, bytes written, bytes sent, messages stored; from /proc and the streams."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.costs import disk_bytes, read_process
from benchmarks.load import Pipeline
from contracts.subjects import EVENTS, HOPS, RECEIPTS

SERVERS, LOAD, DISK = "server", "load", "disk"
"""What costs are kept under, beside the stages' names: all servers together, this process, and the block device."""
COUNTED = (EVENTS, *HOPS, RECEIPTS)


class Spent(NamedTuple):
    """Sums since processes began.

    Attributes:
        cpu_s: user and system time by kind of process.
        written_bytes: to the block device that the pipeline's files are on, by whomever; empty where it is on none.
        network_bytes: over the loopback device, of everything on this machine.
        messages: ever stored, by stream.
    """

    cpu_s: dict[str, float]
    written_bytes: dict[str, float]
    network_bytes: float
    messages: dict[str, int]


async def spent(pipeline: Pipeline) -> Spent:
    """What the pipeline has cost so far."""
    cpu_s: dict[str, float] = {}
    for process in pipeline.supervisor.processes:
        if process.pid is not None:
            cpu_s[process.kind] = cpu_s.get(process.kind, 0) + read_process(process.pid).cpu_s
    cpu_s[LOAD] = time.process_time()
    disk = disk_bytes(pipeline.supervisor.directory)
    written = {} if disk is None else {DISK: float(disk)}
    jetstream = pipeline.observer.jetstream(timeout=10)
    messages = {stream: (await jetstream.stream_info(stream)).state.last_seq for stream in COUNTED}
    return Spent(cpu_s, written, _loopback_bytes(), messages)


def per_event(before: Spent, after: Spent, events: int) -> dict[str, Any]:
    """``{"cpu_us", "written_bytes", "network_bytes", "messages"}`` an event; all but the third by kind."""

    def each(name: str, factor: float = 1.0) -> dict[str, float]:
        old, new = getattr(before, name), getattr(after, name)
        return {kind: round((new[kind] - old[kind]) * factor / events, 4) for kind in new}

    return {
        "cpu_us": each("cpu_s", 1e6),
        "written_bytes": each("written_bytes"),
        "network_bytes": round((after.network_bytes - before.network_bytes) / events, 1),
        "messages": each("messages"),
    }


def stages_us(costs: dict[str, Any]) -> float:
    """Processor time of all stages an event, of `per_event`, in µs."""
    return float(sum(value for kind, value in costs["cpu_us"].items() if kind not in (SERVERS, LOAD)))


def _loopback_bytes() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))
