"""Verifies stores as `fictl verify` does, with the shards read in this process.

A reading process takes a fifth of a second of CPU to start. What is wrong with a file is found by the same code in
either; tests of the process itself, and one of each kind of store, start it.
"""

from __future__ import annotations

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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module._Worker, "ask", ask)
        return verify_store(path, **chosen)
