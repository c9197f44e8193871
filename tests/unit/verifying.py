"""Verifies stores as `fictl verify` does, with the shards read in this process, or by one that serves many stores.

A reading process takes a fifth of a second of CPU to start. What is wrong with a file is found by the same code in
all; tests of the process itself, and one of each kind of store, start it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stages.persist import verify as verify_module
from stages.persist.check import ShardCheck
from stages.persist.reading import check_file
from stages.persist.verify import VerifyReport, verify_store


def verify_here(path: Path, **chosen: Any) -> VerifyReport:
    """`verify_store` with the arguments `chosen`; its time limit does not hold."""

    def ask(_: verify_module._Worker, shard: Path, timeout_s: float) -> ShardCheck:
        return msgspec.json.decode(msgspec.json.encode(check_file(shard)), type=ShardCheck)

    return _verify_by(ask, path, chosen)


class KeptReader:
    """The reading process, with its limits of time and memory, kept from one store to the next.

    One that a file hangs or ends is replaced, as ever.
    """

    def __init__(self) -> None:
        self._worker = verify_module._Worker()
        self._ask = verify_module._Worker.ask
        self._asked = threading.Lock()

    def verify(self, path: Path, **chosen: Any) -> VerifyReport:
        """`verify_store` with the arguments `chosen`."""

        def ask(_: verify_module._Worker, shard: Path, timeout_s: float) -> ShardCheck:
            with self._asked:
                return self._ask(self._worker, shard, timeout_s)

        return _verify_by(ask, path, chosen)

    def close(self) -> None:
        """Ends it."""
        self._worker.stop()


def _verify_by(ask: Any, path: Path, chosen: dict[str, Any]) -> VerifyReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module._Worker, "ask", ask)
        return verify_store(path, **chosen)
