"""``python -m benchmarks.storage.opening open|ids DIRECTORY [--cold]``: a start, measured in a process of its own.

`open` is what persist does when it takes a partition over, `ids` the part of it that grows with what is stored: the
event ids of sealed shards. Prints one JSON object. `--cold` has the kernel forget the files first.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from benchmarks.storage.lane import PARTITION, read_receipt
from cluster.track import percentiles_ms
from contracts.settings import Settings
from stages.persist.header import read_sealed_header
from stages.persist.ids import SeenIds
from stages.persist.partition import PartitionFiles
from stages.persist.sealed import SealedReader
from stages.persist.storedir import read_store

_ASKED = 100
"""Ids at once, as in a group of so many events."""
_TRIES = 200
_SEED = 3


def main(kind: str, directory: Path, cold: Annotated[bool, typer.Option()] = False) -> None:
    """Measures one start."""
    if cold:
        for path in directory.glob("*.h5"):
            _forget(path)
    gc.collect()
    result = _open(directory) if kind == "open" else _ids(directory)
    print(msgspec.json.encode(result).decode())


def _open(directory: Path) -> dict[str, Any]:
    store = read_store(directory)
    receipt = read_receipt(store)
    before_bytes = _resident_bytes()
    start_s = time.perf_counter()
    files = PartitionFiles.open(store, PARTITION, receipt, Settings(), time.time_ns)
    seconds = time.perf_counter() - start_s
    grown_bytes = _resident_bytes() - before_bytes
    sealed_events = sum(read_sealed_header(path).events for path in files.sealed.values())
    start_s = time.perf_counter()
    again = SeenIds()
    for path in files.sealed.values():
        again.add_sealed(path)
    ids_s = time.perf_counter() - start_s
    files.close()
    return {
        "events": files.frontier.size,
        "sealed_events": sealed_events,
        "seconds": seconds,
        "sealed_ids_s": ids_s,
        "filter_bytes": files.seen.filter_bytes,
        "resident_growth_bytes": grown_bytes,
    }


def _ids(directory: Path) -> dict[str, Any]:
    paths = sorted(directory.glob("*.h5"))
    before_bytes = _resident_bytes()
    start_s = time.perf_counter()
    seen = SeenIds()
    for path in paths:
        seen.add_sealed(path)
    seconds = time.perf_counter() - start_s
    grown_bytes = _resident_bytes() - before_bytes
    known = SealedReader(paths[-1]).read("event_id")
    rng = random.Random(_SEED)
    asked = {
        "new": [[rng.randbytes(16) for _ in range(_ASKED)] for _ in range(_TRIES)],
        "known": [[known[rng.randrange(len(known))].tobytes() for _ in range(_ASKED)] for _ in range(_TRIES)],
    }
    return {
        "shards": len(paths),
        "ids": sum(read_sealed_header(path).events for path in paths),
        "seconds": seconds,
        "filter_bytes": seen.filter_bytes,
        "resident_growth_bytes": grown_bytes,
        **{f"ask_{name}_ms": percentiles_ms(_ask(seen, groups, name == "known")) for name, groups in asked.items()},
    }


def _ask(seen: SeenIds, groups: list[list[bytes]], expected: bool) -> list[int]:
    taken = []
    for ids in groups:
        start_ns = time.perf_counter_ns()
        answers = seen.seen(ids)
        taken.append(time.perf_counter_ns() - start_ns)
        if answers != [expected] * len(ids):
            raise RuntimeError("a wrong answer about ids")
    return taken


def _resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _forget(path: Path) -> None:
    """Has the kernel drop the file's pages from its cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


if __name__ == "__main__":
    typer.run(main)
