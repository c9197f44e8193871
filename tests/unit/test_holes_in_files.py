"""A file that is mostly hole is long and takes no room on the disk: nor may it take memory to read."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from shard_maker import filled_store

from contracts.errors import ShardCorruptError
from stages.persist.files import has_hole, write_all_at
from stages.persist.header import (
    Area,
    LiveHeader,
    SealedHeader,
    encode_header,
    read_live_header,
    read_sealed_header,
    structure_crc32,
)
from stages.persist.live import LiveReader
from stages.persist.names import list_shards
from stages.persist.rows import ROW_BYTES, CommitRow, encode_row
from stages.persist.store import EventStore

MIB = 1024 * 1024
HOLE_BYTES = 64 * MIB


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


def end_in_hole(path: Path, header: LiveHeader | SealedHeader) -> None:
    """Writes the header, and makes the file as long as it says."""
    with path.open("r+b") as file:
        file.truncate(header.file_bytes)
        if isinstance(header, LiveHeader):
            areas = [header.frames, header.index, header.watermark]
            crc32 = structure_crc32(file.fileno(), path, header.file_bytes, areas)
            header = msgspec.structs.replace(header, structure_crc32=crc32)
        file.write(encode_header(header))


def with_long_commit(store: Path) -> None:
    """Its first commit is as long as the hole. The checksum in its row is not asked for before it is read."""
    path = list_shards(store)[3][-1].path
    header = read_live_header(path)
    size = header.file_bytes
    frames = Area(size, HOLE_BYTES)
    end_in_hole(path, msgspec.structs.replace(header, frames=frames, file_bytes=size + HOLE_BYTES))
    with path.open("r+b") as file:
        row = CommitRow(1, HOLE_BYTES, 0, 0, 7, 1, 0, 0, 1)
        write_all_at(file.fileno(), encode_row(row), header.index.offset)


def with_many_commits(store: Path) -> None:
    """As many as have room in the hole are shown."""
    path = list_shards(store)[3][-1].path
    header = read_live_header(path)
    size, rows = header.file_bytes, HOLE_BYTES // ROW_BYTES
    index = Area(size, rows * ROW_BYTES)
    end_in_hole(path, msgspec.structs.replace(header, index=index, file_bytes=size + index.bytes))
    with path.open("r+b") as file:
        write_all_at(file.fileno(), rows.to_bytes(8, "little"), header.watermark.offset)


def with_many_events(store: Path) -> None:
    """A sealed shard that has as many as have their ids in the hole."""
    path = list_shards(store)[3][0].path
    header = read_sealed_header(path)
    size = header.file_bytes + HOLE_BYTES
    end_in_hole(path, msgspec.structs.replace(header, events=size // 16, file_bytes=size))


@pytest.mark.parametrize("forge", [with_long_commit, with_many_commits, with_many_events])
def test_a_store_with_a_shard_that_is_mostly_hole_is_read_with_little_memory(
    tmp_path: Path, forge: Callable[[Path], None]
) -> None:
    reads: list[Callable[[EventStore], object]] = [
        lambda store: list(store.iterate()),
        lambda store: store.consultation(bytes(16)),
        lambda store: list(store.by(site="nowhere", since_ns=1)),
        lambda store: store.columns(),
    ]
    filled_store(tmp_path)
    forge(tmp_path)
    tracemalloc.start()
    try:
        for read in reads:
            with EventStore(tmp_path) as store, pytest.raises(ShardCorruptError, match=r"hole|is not whole"):
                read(store)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()


def test_a_hole_counts_only_where_it_is_long_and_in_the_part_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("w+b") as file:
        for at in (0, MIB, 5 * MIB):
            write_all_at(file.fileno(), bytes(4096), at)
        found = [has_hole(file.fileno(), *part) for part in ((0, MIB), (0, 2 * MIB), (0, 4 * MIB), (4 * MIB, 2 * MIB))]
        assert found == [False, False, True, False]
        assert has_hole(file.fileno(), 0, 9 * MIB)


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
