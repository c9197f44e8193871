"""Reads whole stores as their readers do, one directory a line, each with an answer in one line of JSON.

A process of its own with bounded memory: what is under test is a library in C that a damaged file may hang or crash.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contracts.errors import FiError
from stages.persist.ids import SeenIds
from stages.persist.names import list_shards
from stages.persist.store import EventStore

MEMORY_BYTES_MAX = 4 * 1024**3


def readings(directory: Path) -> dict[str, Callable[[], Any]]:
    """Every way in which a store is read."""

    def with_store(use: Callable[[EventStore], Any]) -> Callable[[], Any]:
        def read() -> Any:
            with EventStore(directory) as store:
                return use(store)

        return read

    def seen() -> int:
        ids = SeenIds()
        for shards in list_shards(directory).values():
            for shard in shards:
                if shard.sealed:
                    ids.add_sealed(shard.path)
        return sum(ids.seen([bytes([n]) * 16 for n in range(256)]))

    return {
        "iterate": with_store(lambda store: sum(1 for _ in store.iterate())),
        "columns": with_store(lambda store: len(store.columns()["origin"])),
        "ends": with_store(lambda store: len(store.ends())),
        "event": with_store(lambda store: store.event(bytes(16)) is None),
        "consultation": with_store(lambda store: len(store.consultation(bytes(16)))),
        "by": with_store(lambda store: sum(1 for _ in store.by(site="clinic_7", since_ns=1))),
        "seen": seen,
    }


def main() -> None:
    """Until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    for line in sys.stdin:
        words = {}
        for name, read in readings(Path(json.loads(line))).items():
            try:
                words[name] = str(read())
            except (FiError, OSError) as error:
                words[name] = f"{type(error).__name__}: {error}"
            except Exception as error:
                words[name] = f"FOUND OUT {type(error).__name__}: {error}"
        print(json.dumps(words), flush=True)


if __name__ == "__main__":
    main()
