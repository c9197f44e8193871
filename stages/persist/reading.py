"""The process that `verify` asks: paths in (base64, they need not be text), what is wrong with each file out, by line.

A process of its own, because a damaged or hostile HDF5 file can hang or crash the library that reads it, or claim to
hold more than the machine has memory for, on which persist may be at work.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import msgspec

from contracts.wire import plain
from stages.persist.check import Finding, ShardCheck, check_shard
from stages.persist.export.manifest import MANIFEST_SUFFIX, check_export

_MEMORY_BYTES_MIN = 2 * 1024 * 1024 * 1024
_BLOCK_BYTES = 512
_MEMORY_SHARE_MAX = 32
"""Of what a file takes on the disk: its length says nothing where it has holes. An event takes 1 KB here, and 80 bytes
in a file that do not compress: its ids and hashes."""


def check_file(path: Path) -> ShardCheck:
    """Checks a shard; or, given the manifest of one, an exported file, of which only the findings are told."""
    is_export = path.name.endswith(MANIFEST_SUFFIX)
    check = ShardCheck(findings=check_export(path).findings) if is_export else check_shard(path)
    # Names in a file can be anything.
    check.findings = [Finding(plain(one.where), plain(one.what)) for one in check.findings]
    return check


def _limit_memory(path: Path) -> None:
    """What goes beyond the limit fails as `MemoryError`, and so becomes a finding."""
    try:
        found = path.stat()
        # Some file systems do not say what is taken.
        size_bytes = min(found.st_size, found.st_blocks * _BLOCK_BYTES or found.st_size)
    except OSError:
        size_bytes = 0
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = _MEMORY_BYTES_MIN + _MEMORY_SHARE_MAX * size_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _serve() -> None:
    for line in sys.stdin:
        path = Path(os.fsdecode(msgspec.json.decode(line, type=bytes)))
        _limit_memory(path)
        result = check_file(path)
        sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
