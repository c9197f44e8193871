"""What events cost: CPU, bytes written, messages, Raft entries and memory, read before and after a load.

Always true: everything is read from outside, by nobody's own account: processes from ``/proc``, the disk from ``/sys``,
streams from their state, Raft groups and client bytes from the servers' monitoring ports. The reading itself falls
outside the load.
"""

from __future__ import annotations

import asyncio
import json
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.load import Pipeline
from contracts.subjects import STAGES, STREAMS
from stages.runtime.client import GuardedClient

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
LOAD = "load"
"""This process: the load generator and the observer."""
SERVERS = "servers"
MONITOR_S = 5.0
_SECTORS_WRITTEN = 6
"""Its place in a block device's ``stat`` (Linux, Documentation/block/stat.rst)."""
_SECTOR_BYTES = 512


class Reading(NamedTuple):
    """One process so far.

    Attributes:
        pid: a process that was started again is another one.
        cpu_s: user and system time.
        written_bytes: what it had the kernel write to a disk, as the kernel counts it: whole folios, however little of
            them is written (ext4, Linux 6.18: 1 MiB for a row of 500 bytes of which the disk gets 4.6 KB). An upper
            bound; `Snapshot.disk_bytes` is what the disk got.
        resident_bytes: memory now.
        mapped_bytes: of that, pages of mapped files: the kernel's cache, which it takes back when it needs the room.
    """

    pid: int
    cpu_s: float
    written_bytes: int
    resident_bytes: int
    mapped_bytes: int


class StreamState(NamedTuple):
    """One stream: its first and last sequence, and the bytes that it holds."""

    first_seq: int
    last_seq: int
    bytes: int


class Snapshot(NamedTuple):
    """Everything at one moment.

    Attributes:
        processes: by kind (`SERVERS`, the stages, `LOAD`) and name.
        streams: by name.
        raft: Raft group → index of its last entry.
        received_bytes: what clients have sent to the servers.
        disk_bytes: written to the block device that the pipeline's files are on, by whomever; None: it is none.
    """

    processes: Mapping[str, Mapping[str, Reading]]
    streams: Mapping[str, StreamState]
    raft: Mapping[str, int]
    received_bytes: int
    disk_bytes: int | None


def costs(before: Snapshot, after: Snapshot, events: int) -> dict[str, Any]:
    """What lies between two snapshots, for each 1,000 of `events`.

    Returns:
        ``cpu_s`` and ``written_bytes`` by kind and in all (``pipeline``: without the load generator), ``messages`` and,
        where nothing was purged meanwhile, ``bytes`` by stream, ``raft_entries``, ``received_bytes``, ``disk_bytes``
        (null where it is not known); and as they are at the end, not per event, ``resident_bytes`` by process.

    Raises:
        ValueError: no events, or a process was started anew in between.
    """
    if events < 1:
        raise ValueError("no events to share the costs")
    per = 1000 / events
    cpu_s, written = {}, {}
    for kind, processes in after.processes.items():
        pairs = [(before.processes.get(kind, {}).get(name), now) for name, now in processes.items()]
        if any(then is None or then.pid != now.pid for then, now in pairs):
            raise ValueError(f"a process of {kind} was started anew while costs were taken")
        cpu_s[kind] = per * sum(now.cpu_s - then.cpu_s for then, now in pairs if then is not None)
        written[kind] = per * sum(now.written_bytes - then.written_bytes for then, now in pairs if then is not None)
    messages, kept = {}, {}
    for name, now in after.streams.items():
        then = before.streams.get(name, StreamState(0, 0, 0))
        messages[name] = per * (now.last_seq - then.last_seq)
        if now.first_seq <= max(then.first_seq, 1):
            kept[name] = per * (now.bytes - then.bytes)
    raft = sum(index - before.raft.get(group, 0) for group, index in after.raft.items())
    known = before.disk_bytes is not None and after.disk_bytes is not None
    return {
        "disk_bytes": round(per * ((after.disk_bytes or 0) - (before.disk_bytes or 0))) if known else None,
        "cpu_s": _rounded({**cpu_s, "pipeline": _without_load(cpu_s)}, 4),
        "written_bytes": _rounded({**written, "pipeline": _without_load(written)}, 0),
        "messages": _rounded(messages, 1),
        "bytes": _rounded(kept, 0),
        "raft_entries": round(per * raft, 1),
        "received_bytes": round(per * (after.received_bytes - before.received_bytes)),
        "resident_bytes": {
            name: reading.resident_bytes
            for processes in after.processes.values()
            for name, reading in processes.items()
        },
    }


def _without_load(values: Mapping[str, float]) -> float:
    return sum(value for kind, value in values.items() if kind != LOAD)


def _rounded(values: Mapping[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}


async def snapshot(pipeline: Pipeline) -> Snapshot:
    """The pipeline now. Raises `OSError` where there is no ``/proc``, or a monitoring port does not answer."""
    processes: dict[str, dict[str, Reading]] = {SERVERS: {}, **{stage: {} for stage in STAGES}}
    for process in pipeline.supervisor.processes:
        if process.pid is not None:
            kind = SERVERS if process.kind == "server" else process.kind
            processes[kind][process.name] = read_process(process.pid)
    processes[LOAD] = {LOAD: read_process(os.getpid())}
    ports = [node.ports.monitor for node in pipeline.supervisor.cluster.nodes]
    raft: dict[str, int] = {}
    received = 0
    for port in ports:
        for groups in (await asyncio.to_thread(_monitor, port, "raftz?acc=$G")).values():
            for group, state in groups.items():
                raft[group] = max(raft.get(group, 0), state["pindex"])
        received += (await asyncio.to_thread(_monitor, port, "varz"))["in_client_bytes"]
    disk = disk_bytes(pipeline.supervisor.directory)
    return Snapshot(processes, await _streams(pipeline.observer), raft, received, disk)


def read_process(pid: int) -> Reading:
    """A process from ``/proc``. Raises `OSError` when it is gone."""
    root = Path("/proc", str(pid))
    # The command's name stands in brackets and may hold anything, so fields are counted from behind it.
    fields = (root / "stat").read_text().rpartition(")")[2].split()
    lines = dict(line.split(": ") for line in (root / "io").read_text().splitlines())
    resident = int((root / "statm").read_text().split()[1]) * PAGE_BYTES
    status = dict(line.split(":", 1) for line in (root / "status").read_text().splitlines())
    mapped = int(status.get("RssFile", "0 kB").split()[0]) * 1024
    cpu_s = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return Reading(pid, cpu_s, int(lines["write_bytes"]), resident, mapped)


def disk_bytes(path: Path) -> int | None:
    """Bytes written so far to the block device that `path` is on; None when it is on none."""
    device = path.stat().st_dev
    stat = Path("/sys/dev/block", f"{os.major(device)}:{os.minor(device)}", "stat")
    return int(stat.read_text().split()[_SECTORS_WRITTEN]) * _SECTOR_BYTES if stat.exists() else None


async def _streams(client: GuardedClient) -> dict[str, StreamState]:
    jetstream = client.jetstream(timeout=MONITOR_S)
    found = {}
    for name in STREAMS:
        state = (await jetstream.stream_info(name)).state
        found[name] = StreamState(state.first_seq, state.last_seq, state.bytes)
    return found


def _monitor(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=MONITOR_S) as answer:
        return json.load(answer)
