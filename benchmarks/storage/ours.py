"""What persist's own files cost: commits, seals, opening, looking up. All of it is the code that runs in persist."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from benchmarks.report import Say, costs_ms, percentile
from benchmarks.storage.classic import FRESH_MAX, ClassicRun
from benchmarks.storage.lane import Lane, commit_costs_ms
from benchmarks.storage.samples import Samples
from cluster.track import percentiles_ms
from contracts.settings import Settings
from stages.persist.files import sync_data, write_all_at, zero_fill
from stages.persist.liveview import LiveView
from stages.persist.names import list_shards
from stages.persist.rows import ROW_BYTES
from stages.persist.seal import SealedInfo
from stages.persist.sealed import SealedReader, Selection
from stages.persist.store import EventStore
from stages.persist.verify import verify_store
from stages.runtime.tasks import run_blocking

BATCHES = (1, 10, 100)
SEAL_BATCH = 10
PAUSES_S = (0.0, 0.003)
"""Between commits beside a seal: as fast as frames can be made, and at a moderate load."""
SIZES = (0, 100, 1_000, 10_000, 100_000, 1_000_000)
"""Stored events that append cost is measured at; more than a run has are left out."""

_NEARLY_FULL = 0.95
_SEED = 1
_ROOT = Path(__file__).parents[2]


class Effort(NamedTuple):
    """How much to measure.

    Attributes:
        events: stored in the large store.
        repetitions: of each short measurement, interleaved.
        long_repetitions: of those that take seconds.
        commits: in one of them.
        ids: event ids that opening is measured with, of shards linked under several names.
        look_ups: of one consultation each.
        shard_bytes: size of a full shard.
    """

    events: int
    repetitions: int = 11
    long_repetitions: int = 5
    commits: int = 150
    ids: int = 10_000_000
    look_ups: int = 300
    shard_bytes: int = Settings().shard_bytes

    @property
    def settings(self) -> Settings:
        """Persist's own, but for the size of a shard."""
        return Settings(shard_bytes=self.shard_bytes)


def measure_ours(
    scratch: Path, samples: Samples, effort: Effort, classics: Sequence[ClassicRun], say: Say
) -> dict[str, Any]:
    """Everything that needs no other process writing. Append cost is measured in turns with the `classics`."""
    say(f"filling a store with {effort.events:,} events")
    directory = scratch / "large"
    with Lane(directory, samples, effort.settings) as lane:
        start_s = time.perf_counter()
        rolls_ns = lane.fill(effort.events)
        fill_s = time.perf_counter() - start_s
        result: dict[str, Any] = {
            "fill": {"events": lane.stored, "seconds": round(fill_s, 2), "rolls_ms": [ns / 1e6 for ns in rolls_ns]}
        }
        result["bytes"] = _bytes_per_event(directory, samples)
        say("append cost by stored events")
        result["append"] = _append(scratch, samples, lane, effort, classics)
        say("commits by events a group, beside bare writes")
        result["commit"] = _commits(scratch, lane, effort)
        result["seal"] = [seal._asdict() for seal in lane.seals]
    say("commits while a full shard is sealed")
    result["during_seal"] = asyncio.run(_during_seal(scratch / "sealing", samples, effort))
    say("verification")
    result["verify"] = _verify(directory)
    say("start-up")
    with Lane(scratch / "live", samples, effort.settings) as lane:
        lane.fill(int(_NEARLY_FULL * effort.shard_bytes / result["bytes"]["live"]))
    result["startup"] = _startup(directory, scratch / "live", effort)
    say("look-ups")
    result["lookup"] = _lookup(directory, samples, effort)
    return result


def _append(
    scratch: Path, samples: Samples, large: Lane, effort: Effort, classics: Sequence[ClassicRun]
) -> list[dict[str, Any]]:
    """One event a commit on stores of every size. Sizes and designs take turns: other load meets all of them."""
    sizes = [size for size in SIZES if size < effort.events] + [effort.events]
    kept = {size: Lane(scratch / f"kept-{size}", samples, effort.settings) for size in sizes[:-1] if size > FRESH_MAX}
    kept[effort.events] = large
    for size, lane in kept.items():
        lane.fill(size)
    rows = []
    try:
        for repetition in range(effort.repetitions):
            for size in sizes:
                fresh = None if size in kept else Lane(scratch / f"fresh-{size}-{repetition}", samples, effort.settings)
                lane = fresh or kept[size]
                lane.fill(size)
                stored = lane.stored
                gc.collect()
                taken = lane.run(effort.commits, 1)
                rows.append({"size": size, "stored": stored, **commit_costs_ms(taken)})
                if fresh is not None:
                    fresh.close()
                for classic in classics:
                    classic.measure(size)
    finally:
        for lane in kept.values():
            if lane is not large:
                lane.close()
    return rows


def _commits(scratch: Path, lane: Lane, effort: Effort) -> list[dict[str, Any]]:
    """Commits of 1, 10 and 100 events on the large store, beside writing and syncing as many bytes and nothing else."""
    rows = []
    for _ in range(effort.repetitions):
        for batch in BATCHES:
            gc.collect()
            start_bytes = sum(len(sample.record) for sample in lane.samples.take(lane.receipt.origin + 1, batch))
            taken = lane.run(effort.commits, batch)
            bare = _bare_writes(scratch / "bare", effort.commits, start_bytes)
            rows.append({"batch": batch, "commit_ms": commit_costs_ms(taken), "bare_ms": costs_ms(bare)})
    return rows


def _bare_writes(path: Path, times: int, size_bytes: int) -> list[int]:
    """One write and one fdatasync of so many bytes into a file that has its blocks: the least a commit can cost."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        zero_fill(fd, 0, times * size_bytes)
        os.fsync(fd)
        data = random.Random(_SEED).randbytes(size_bytes)
        taken = []
        for number in range(times):
            start_ns = time.perf_counter_ns()
            write_all_at(fd, data, number * size_bytes)
            sync_data(fd)
            taken.append(time.perf_counter_ns() - start_ns)
        return taken
    finally:
        os.close(fd)
        path.unlink()


def _bytes_per_event(directory: Path, samples: Samples) -> dict[str, float]:
    """On disk, beside the events' JSON. Live: what events and commits take of the room laid out for them."""
    sealed_bytes = sealed_events = record_bytes = live_bytes = live_events = 0
    for shard in (shard for lane in list_shards(directory).values() for shard in lane):
        if shard.sealed:
            header = SealedReader(shard.path).header
            sealed_bytes += header.file_bytes
            sealed_events += header.events
            record_bytes += header.record_bytes
        else:
            view = LiveView(shard.path)
            live_bytes += view.row(view.commits - 1).end_bytes + view.commits * ROW_BYTES if view.commits else 0
            live_events += view.count
            view.close()
    result = {"json_line": samples.line_bytes, "payload_json": samples.payload_bytes}
    if sealed_events:
        result |= {"sealed": sealed_bytes / sealed_events, "record": record_bytes / sealed_events}
    if live_events:
        result["live"] = live_bytes / live_events
    return {name: round(value, 1) for name, value in result.items()}


async def _during_seal(directory: Path, samples: Samples, effort: Effort) -> list[dict[str, Any]]:
    """Commits from an event loop's worker thread, as in persist, with and without a seal in another thread."""
    rows: list[dict[str, Any]] = []
    with Lane(directory, samples, effort.settings) as lane:
        job = await run_blocking(lane.fill_shard)
        for _ in range(effort.long_repetitions):
            for pause_s in PAUSES_S:
                start_s = time.perf_counter()
                sealing = asyncio.create_task(run_blocking(lane.files.seal, job))
                beside = await _commit_until(lane, pause_s, sealing.done)
                info: SealedInfo = await sealing
                seal_s = time.perf_counter() - start_s
                # Sealing again what is sealed would give the file back as it is.
                info.path.unlink()
                waiting = asyncio.create_task(asyncio.sleep(seal_s))
                alone = await _commit_until(lane, pause_s, waiting.done)
                rows.append(
                    {
                        "pause_s": pause_s,
                        "seal_s": round(seal_s, 3),
                        "events": info.header.events,
                        "beside_ms": costs_ms(beside),
                        "alone_ms": costs_ms(alone),
                        "commits": [len(beside), len(alone)],
                    }
                )
    return rows


async def _commit_until(lane: Lane, pause_s: float, ended: Callable[[], bool]) -> list[int]:
    """Commits until `ended`; how long each took from the event loop, in ns, without rolls."""
    taken: list[int] = []
    while not ended():
        message = lane.next_message(SEAL_BATCH)
        start_ns = time.perf_counter_ns()
        took = await run_blocking(lane.commit, message)
        taken.append(time.perf_counter_ns() - start_ns - took.rolled_ns)
        if took.rolled_ns:
            await run_blocking(lane.files.prepare_next)
        await asyncio.sleep(pause_s)
    return taken


def _verify(directory: Path) -> dict[str, Any]:
    start_s = time.perf_counter()
    report = verify_store(directory)
    seconds = time.perf_counter() - start_s
    if not report.ok:
        raise RuntimeError(f"the benchmark's own store is damaged: {report.problems[:3]}")
    return {"events": report.events, "seconds": round(seconds, 2), "events_per_s": round(report.events / seconds)}


def _startup(directory: Path, live: Path, effort: Effort) -> dict[str, list[dict[str, Any]]]:
    """Opening in a process of its own: the whole store, one full live shard, the ids of many more sealed shards."""
    links = directory.with_name("links")
    _link_shards(directory, links, effort.ids)
    kinds = {"open": ("open", directory), "live": ("open", live), "ids": ("ids", links)}
    result: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for _ in range(effort.long_repetitions):
        for cold in (False, True):
            for name, (kind, where) in kinds.items():
                opening = [sys.executable, "-m", "benchmarks.storage.opening"]
                command = [*opening, kind, str(where), *(["--cold"] if cold else [])]
                done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, cwd=_ROOT)
                result[name].append({"cold": cold, **json.loads(done.stdout)})
    return result


def _link_shards(directory: Path, links: Path, ids: int) -> None:
    """Hard links to the sealed shards under new names, until they hold `ids` ids together."""
    links.mkdir()
    sealed = [shard.path for lane in list_shards(directory).values() for shard in lane if shard.sealed]
    counts = [SealedReader(path).header.events for path in sealed]
    held = number = 0
    while sealed and held < ids:
        at = number % len(sealed)
        os.link(sealed[at], links / f"{number:05d}.h5")
        held += counts[at]
        number += 1


def _lookup(directory: Path, samples: Samples, effort: Effort) -> dict[str, Any]:
    """One consultation among all, by `EventStore` and by reading every event."""
    rng = random.Random(_SEED)
    picked = [samples.event(rng.randint(1, effort.events)) for _ in range(effort.look_ups)]
    taken: list[int] = []
    first: list[int] = []
    found: list[int] = []
    with EventStore(directory) as store:
        for sample in picked:
            start_ns = time.perf_counter_ns()
            events = store.consultation(sample.consultation_id)
            taken.append(time.perf_counter_ns() - start_ns)
            found.append(len(events))
            if all(stored.event.event_id != sample.event_id for stored in events):
                raise RuntimeError(f"{UUID(bytes=sample.event_id)} is missing from its consultation")
    for sample in picked[: effort.repetitions * 4]:
        start_ns = time.perf_counter_ns()
        with EventStore(directory) as store:
            store.consultation(sample.consultation_id)
        first.append(time.perf_counter_ns() - start_ns)
    scans: list[float] = []
    for sample in picked[:2]:
        start_s = time.perf_counter()
        with EventStore(directory) as store:
            wanted = Selection(consultation_id=sample.consultation_id)
            seen = sum(wanted.takes(stored.event) for stored in store.iterate())
        scans.append(time.perf_counter() - start_s)
        if seen != found[picked.index(sample)]:
            raise RuntimeError("a look-up and a scan disagree")
    return {
        "open_store_ms": percentiles_ms(taken),
        "new_store_ms": percentiles_ms(first),
        "scan_s": [round(seconds, 2) for seconds in scans],
        "events": effort.events,
        "events_found": percentile(found, 50),
        "look_ups": len(taken),
    }
