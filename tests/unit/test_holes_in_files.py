"""A file that is mostly hole is long and takes no room on the disk: nor may it take memory to read."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import msgspec
import pytest
from shard_maker import filled_store

from contracts.errors import ShardCorruptError
from stages.persist.header import encode_header, read_live_header
from stages.persist.live import LiveReader
from stages.persist.names import list_shards

MIB = 1024 * 1024


def test_a_live_shard_with_a_hole_at_its_end_is_read_piece_by_piece(tmp_path: Path) -> None:
    filled_store(tmp_path)
    path = list_shards(tmp_path)[3][-1].path
    header = read_live_header(path)
    forged = msgspec.structs.replace(header, file_bytes=header.file_bytes + 256 * MIB)
    with path.open("r+b") as file:
        file.write(encode_header(forged))
        file.truncate(forged.file_bytes)
    tracemalloc.start()
    try:
        with pytest.raises(ShardCorruptError, match="structure is damaged"):
            LiveReader(path)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()


def test_the_memory_to_read_a_file_is_measured_by_what_it_takes_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "hole.h5"
    path.write_bytes(os.urandom(MIB))
    os.truncate(path, 1024 * 1024 * MIB)
    limit = (
        "import pathlib, resource, sys; import stages.persist.reading as reading; "
        "reading._limit_memory(pathlib.Path(sys.argv[1])); "
        "print(resource.getrlimit(resource.RLIMIT_DATA)[0] - reading._MEMORY_BYTES_MIN)"
    )
    told = subprocess.run([sys.executable, "-c", limit, str(path)], capture_output=True, check=True, timeout=60)
    assert 32 * MIB <= int(told.stdout) < 64 * MIB
