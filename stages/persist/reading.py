"""The process that `verify` asks: paths in, what is wrong with each file out, one JSON value a line.

A process of its own, because a damaged or hostile HDF5 file can hang or crash the library that reads it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from stages.persist.check import ShardCheck, check_shard
from stages.persist.export.manifest import MANIFEST_SUFFIX, check_export


def check_file(path: Path) -> ShardCheck:
    """Checks a shard; or, given the manifest of one, an exported file, of which only the findings are told."""
    if path.name.endswith(MANIFEST_SUFFIX):
        return ShardCheck(findings=check_export(path).findings)
    return check_shard(path)


def _serve() -> None:
    for line in sys.stdin:
        result = check_file(Path(msgspec.json.decode(line, type=str)))
        sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
