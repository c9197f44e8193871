"""The storage table: 1,000 events of 1 KB in the sources' compressions and in our shards; and append cost, as kept.

Append cost by stored events is `make bench-storage`'s: its kept figures stand beside the sources'.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np

from benchmarks.experiments.harness import Bench, Row
from benchmarks.experiments.messages import sized_messages
from benchmarks.experiments.sources import APPEND_MS, STORED_KB, STORED_MS
from benchmarks.report import RESULTS, markdown_table, spread
from benchmarks.storage.classic import DESIGNS, ClassicFile, Design
from benchmarks.storage.lane import Lane
from benchmarks.storage.samples import Sample, Samples

EVENTS = 1_000
EVENT_BYTES = 1_000
COMPRESSIONS: dict[str, tuple[str, int | None]] = {"gzip-4": ("gzip", 4), "gzip-1": ("gzip", 1), "lzf": ("lzf", None)}
AT_ONCE = "one fixed-length dataset, written at once"
OURS = "persist's shards"
KEPT = RESULTS / "storage.json"


async def measure(bench: Bench) -> list[Row]:
    """Rows of ``{"variant", "compression", "ms", "sync_ms", "kb"}``: designs take turns.

    Of ours ``ms`` is 1,000 commits, each synced, and ``sealed_ms`` and ``kb`` what sealing them made of it.
    """
    source = bench.scratch / "events.ndjson"
    events = [message.data for message in sized_messages(next(bench.seeds), EVENTS, EVENT_BYTES)]
    source.write_bytes(b"\n".join(events) + b"\n")
    samples = Samples(source)
    rows = []
    for turn in range(bench.repetitions):
        bench.say(f"turn {turn + 1} of {bench.repetitions}")
        rows += await asyncio.to_thread(_turn, bench.scratch / f"store-{turn}", samples, turn)
    return rows


def _turn(directory: Path, samples: Samples, turn: int) -> list[Row]:
    directory.mkdir()
    taken = list(samples.take(1 + turn * EVENTS, EVENTS))
    rows: list[Row] = []
    for name, (compression, level) in COMPRESSIONS.items():
        at_once = _at_once(directory / f"once-{name}.h5", taken, compression, level)
        rows.append({"variant": AT_ONCE, "compression": name, **at_once})
    rows += [_one_by_one(directory, design, taken) for design in DESIGNS if not design.swmr]
    rows.append({"variant": OURS, "compression": "gzip", **_ours(directory / "ours", samples)})
    return [{"turn": turn, **row} for row in rows]


def _at_once(path: Path, samples: Sequence[Sample], compression: str, level: int | None) -> dict[str, float]:
    """What compresses: all events as rows of one length in one dataset. It can be written only when all are there."""
    start_s = time.perf_counter()
    with h5py.File(path, "w") as file:
        lines = np.array([sample.line for sample in samples])
        file.create_dataset("events", data=lines, compression=compression, compression_opts=level)
    return {"ms": _since_ms(start_s), "kb": path.stat().st_size / 1e3}


def _one_by_one(directory: Path, design: Design, samples: Sequence[Sample]) -> Row:
    """Each event appended and flushed to the kernel, and again in another file with an fsync."""
    found: Row = {"variant": design.name, "compression": design.name.rpartition(", ")[2]}
    for kind, sync in (("ms", False), ("sync_ms", True)):
        path = directory / f"classic-{DESIGNS.index(design)}-{sync}.h5"
        file = ClassicFile(path, design)
        start_s = time.perf_counter()
        for sample in samples:
            file.append(sample, sync=sync)
        file.close()
        found[kind] = _since_ms(start_s)
        found["kb"] = path.stat().st_size / 1e3
    return found


def _ours(directory: Path, samples: Samples) -> dict[str, float]:
    with Lane(directory, samples) as lane:
        start_s = time.perf_counter()
        lane.run(EVENTS, 1)
        commits_ms = _since_ms(start_s)
        lane.files.roll()
        lane.seal_all()
        (seal,) = lane.seals
        return {"sync_ms": commits_ms, "seal_ms": seal.seconds * 1e3, "kb": seal.file_bytes / 1e3}


def _since_ms(start_s: float) -> float:
    return round((time.perf_counter() - start_s) * 1e3, 2)


def present(rows: Sequence[Row]) -> str:
    """The storage table, and the append table out of the kept storage benchmark when there is one."""
    return _storage_table(rows) + "\n" + (_append_table(KEPT) if KEPT.exists() else "Append cost: not measured yet.\n")


def _storage_table(rows: Sequence[Row]) -> str:
    lines = []
    for variant, compression in dict.fromkeys((row["variant"], row["compression"]) for row in rows):
        ours = [row for row in rows if (row["variant"], row["compression"]) == (variant, compression)]
        cells = [_spread_of(ours, kind) for kind in ("ms", "sync_ms", "seal_ms", "kb")]
        theirs = [f"{figures.get(compression, 0):g}" if variant != OURS else "–" for figures in (STORED_MS, STORED_KB)]
        lines.append([variant, compression, *cells, *theirs])
    head = ["1,000 events of 1 KB", "compression", "flushed to the kernel, ms", "each on disk, ms", "sealed, ms", "KB"]
    notes = (
        "One by one, events are strings of any length, which HDF5 does not compress whatever is asked for; the "
        "compressions show in the dataset that is written at once. Ours: each event committed, then the shard sealed; "
        "with it audit hash, Merkle tree, stage times and indexes.\n"
    )
    return markdown_table([*head, "source, ms", "source, KB"], lines) + "\n" + notes


def _spread_of(rows: Sequence[Row], kind: str) -> str:
    values = [row[kind] for row in rows if kind in row]
    return spread(values, 0) if values else "–"


def _append_table(path: Path) -> str:
    kept: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    append: dict[str, float] = kept["headline"]["append_p50_ms"]
    lines = [
        [f"{int(size):,}", f"{ms:g}", f"{APPEND_MS[int(size)]:g}" if int(size) in APPEND_MS else "–"]
        for size, ms in append.items()
    ]
    return (
        markdown_table(["stored events", "one more, on disk, ms p50", "source documents, ms"], lines)
        + f"\nOf `make bench-storage`, taken {kept['environment']['taken']}; see [storage.md](storage.md).\n"
    )
