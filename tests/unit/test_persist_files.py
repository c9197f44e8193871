import os
from pathlib import Path

import pytest
from shard_maker import CLUSTER, NOW_NS, new_store

from contracts.errors import NotOursError, ShardCorruptError, ShardError
from stages.persist import files
from stages.persist.names import list_leftovers, list_shards, live_name, next_name, parse_name, sealed_name
from stages.persist.storedir import STORE_FILE, lock_partition, open_store


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data[:3]), offset))
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    try:
        files.write_all_at(fd, b"0123456789", 2)
        assert os.pread(fd, 100, 0) == b"\0\x000123456789"
    finally:
        os.close(fd)


def test_dirty_bytes_are_zeroed_and_clean_ones_left(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"keep" + bytes(3_000_000) + b"dirt" + bytes(10))
    fd = os.open(path, os.O_RDWR)
    try:
        assert not files.is_zero(fd, 4, 3_000_014)
        assert files.zero_dirty(fd, 4, 3_000_014)
        assert files.is_zero(fd, 4, 3_000_014)
        assert not files.zero_dirty(fd, 4, 3_000_014)
        assert os.pread(fd, 4, 0) == b"keep"
    finally:
        os.close(fd)


def test_a_shard_name_tells_partition_number_and_origins() -> None:
    sealed = parse_name(Path(sealed_name(3, 7, 120, 4711)))
    assert sealed is not None
    assert (sealed.partition, sealed.shard, sealed.sealed, sealed.first_origin, sealed.last_origin) == (
        3,
        7,
        True,
        120,
        4711,
    )
    live = parse_name(Path(live_name(1023, 8)))
    assert live is not None
    assert (live.partition, live.shard, live.sealed) == (1023, 8, False)
    for name in ("p003-00000001.next.h5", "p003-00000001.live.h5.tmp", "x.h5", "p3-1.live.h5", "p٠٠٣-00000001.live.h5"):
        assert parse_name(Path(name)) is None


def test_the_sealed_form_of_a_live_shard_wins_and_the_rest_is_leftover(tmp_path: Path) -> None:
    names = [
        live_name(3, 2),
        sealed_name(3, 2, 11, 20),
        sealed_name(3, 1, 1, 10),
        live_name(3, 3),
        next_name(3, 4),
        live_name(0, 1),
        sealed_name(3, 3, 21, 30) + ".tmp",
        "notes.txt",
    ]
    for name in names:
        (tmp_path / name).touch()
    shards = list_shards(tmp_path)
    assert list(shards) == [0, 3]
    assert [shard.path.name for shard in shards[3]] == [names[2], names[1], names[3]]
    assert {path.name for path in list_leftovers(tmp_path, 3)} == {names[0], names[4], names[6]}


def test_a_store_keeps_its_identity(tmp_path: Path) -> None:
    store = new_store(tmp_path / "a" / "b")
    assert new_store(tmp_path / "a" / "b") == store
    assert len(bytes.fromhex(store.store_id)) == 16


def test_a_store_of_another_cluster_or_a_newer_format_is_refused(tmp_path: Path) -> None:
    new_store(tmp_path)
    with pytest.raises(ShardError, match="belongs to cluster cluster-1"):
        open_store(tmp_path, "cluster-2", now_ns=NOW_NS)
    (tmp_path / STORE_FILE).write_text('{"format": 2, "other": true}')
    with pytest.raises(ShardError, match="use the version that wrote it"):
        new_store(tmp_path)
    (tmp_path / STORE_FILE).write_text("{")
    with pytest.raises(ShardCorruptError):
        open_store(tmp_path, CLUSTER, now_ns=NOW_NS)


def test_a_partition_is_locked_once(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    lock = lock_partition(store, 3)
    other = lock_partition(store, 4)
    with pytest.raises(NotOursError, match=f"held by process {os.getpid()}"):
        lock_partition(store, 3)
    lock.close()
    lock.close()
    lock_partition(store, 3).close()
    other.close()
