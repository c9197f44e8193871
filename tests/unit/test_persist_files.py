import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from shard_maker import CLUSTER, NOW_NS, PartitionMaker, new_store

from contracts.errors import NotOursError, ShardCorruptError, ShardError, StoreFailedError
from stages.persist import files, storedir
from stages.persist.files import sync_dir, write_new_file
from stages.persist.hdf5 import _Disk
from stages.persist.live import LiveReader
from stages.persist.names import (
    list_leftovers,
    list_shards,
    live_name,
    next_name,
    parse_name,
    partition_state,
    sealed_name,
)
from stages.persist.sealed import SealedReader
from stages.persist.storedir import (
    STORE_FILE,
    Store,
    existing_store,
    lock_partition,
    open_store,
    planned_store,
    probe_disk,
)


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data[:3]), offset))
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    try:
        files.write_all_at(fd, b"0123456789", 2)
        assert os.pread(fd, 100, 0) == b"\0\x000123456789"
    finally:
        os.close(fd)


def test_a_short_read_is_continued_and_a_file_that_ends_too_soon_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: real(fd, min(size, 3), offset))
    fd = os.open(path, os.O_RDONLY)
    try:
        assert files.read_all_at(fd, 7, 2, path) == b"2345678"
        assert files.read_all_at(fd, 0, 2, path) == b""
        with pytest.raises(ShardCorruptError, match=f"{path}: was cut short while in use, to 10 bytes"):
            files.read_all_at(fd, 9, 2, path)
    finally:
        os.close(fd)


def test_a_close_that_the_system_says_failed_is_one_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = PartitionMaker(new_store(tmp_path), 3)
    maker.begin()
    maker.commit(3)
    close, closed = os.close, []

    def refuse(fd: int) -> None:
        close(fd)
        closed.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    live, lock = LiveReader(next(tmp_path.glob("*.live.h5"))), lock_partition(maker.store, 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", refuse)
        for _ in range(2):
            live.close()
            lock.close()
    assert len(closed) == 2
    sealed = SealedReader(maker.seal().path)
    sealed.read("origin")
    (link,) = [link for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link) == str(sealed.path)]
    os.close(int(link.name))
    sealed.close()


@pytest.mark.parametrize("write", [lambda path: write_new_file(path, b"x"), lambda path: sync_dir(path.parent)])
def test_what_the_disk_does_not_take_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    def refuse(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left") as refused:
        write(tmp_path / "file")
    assert refused.value.filename in (str(tmp_path / "file"), str(tmp_path))


def test_a_read_that_ends_at_a_bad_sector_is_an_error_that_names_the_file(
    tmp_path: Path, bad_sector: Callable[[Path, int], None]
) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * 64)
    bad_sector(path, 8192)
    fd = os.open(path, os.O_RDONLY)
    try:
        window = files.Window(fd, path, 100, 16_000)
        # What was only read ahead is not missed.
        assert window.take(0, 8000) == path.read_bytes()[100:8100]
        for read in (lambda: files.read_all_at(fd, 8192, 1, path), lambda: window.take(8000, 8100)):
            with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
                read()
        assert window.take(12_288, 12_300) == path.read_bytes()[12_388:12_400]
    finally:
        os.close(fd)


def test_what_hdf5_reads_back_while_it_writes_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: real(fd, [views[0][:3]], offset))
    with contextlib.closing(_Disk(tmp_path / "f")) as disk:
        disk.write(b"0123456789")
        disk.seek(2)
        found = bytearray(b"x" * 10)
        assert disk.readinto(found) == 10
        assert found == b"23456789\0\0"


def test_a_page_of_what_is_to_be_zero_that_cannot_be_read_is_written_anew(
    tmp_path: Path, bad_sector: Callable[[Path, int], None]
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"keep" + bytes(3_000_000))
    bad_sector(path, 2_000_000)
    fd = os.open(path, os.O_RDWR)
    try:
        assert not files.is_zero(fd, 4, 3_000_000)
        assert files.zero_dirty(fd, 4, 3_000_000)
        assert files.is_zero(fd, 4, 3_000_000)
        assert os.pread(fd, 5, 0) == b"keep\0"
    finally:
        os.close(fd)


def test_what_shares_a_page_that_cannot_be_read_is_left_as_it_is(
    tmp_path: Path, bad_sector: Callable[[Path, int], None]
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"keep" + bytes(9000))
    bad_sector(path, 0)
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(OSError, match="Input/output error"):
            files.zero_dirty(fd, 4, 9000)
    finally:
        os.close(fd)
    assert path.read_bytes()[:4] == b"keep"


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


@pytest.mark.parametrize("way", [shutil.copy2, lambda good, path: good.rename(path)], ids=["over it", "in its place"])
def test_a_shard_that_is_put_right_with_its_times_is_seen_to_have_changed(
    tmp_path: Path, way: Callable[[Path, Path], object]
) -> None:
    """What a disk damages keeps its length and times, and `cp -p` and most restores give them back."""
    path, good, clock = tmp_path / live_name(3, 1), tmp_path / "good", tmp_path / "clock"
    path.write_bytes(b"good")
    shutil.copy2(path, good)
    stat = path.stat()
    path.write_bytes(b"baad")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    before, changed_ns = partition_state(tmp_path, 3), path.stat().st_ctime_ns
    assert partition_state(tmp_path, 3) == before
    clock.touch()
    while clock.stat().st_ctime_ns == changed_ns:
        clock.touch()
    way(good, path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (b"good", stat.st_mtime_ns)
    assert partition_state(tmp_path, 3) != before


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


@pytest.mark.parametrize("opened", [open_store, planned_store, existing_store])
def test_the_directory_around_a_store_is_not_taken_for_one(tmp_path: Path, opened: Callable[..., Store]) -> None:
    (tmp_path / "shards").mkdir()
    new_store(tmp_path / "shards")
    more = {"now_ns": NOW_NS} if opened is open_store else {}
    with pytest.raises(ShardError, match=f"is not a store, but {tmp_path / 'shards'} is; name that one"):
        opened(tmp_path, CLUSTER, **more)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
    # One that was made there by an earlier build stays one.
    (tmp_path / STORE_FILE).write_bytes((tmp_path / "shards" / STORE_FILE).read_bytes())
    assert opened(tmp_path, CLUSTER, **more).directory == tmp_path


def test_all_who_open_a_new_store_at_once_find_the_same_one(tmp_path: Path) -> None:
    """Several persisters of a node start together on an empty disk."""
    at_once = threading.Barrier(8)

    def opened(_: int) -> Store:
        at_once.wait(60)
        return new_store(tmp_path / "store")

    with ThreadPoolExecutor(8) as pool:
        (store,) = set(pool.map(opened, range(8)))
    assert existing_store(tmp_path / "store", CLUSTER) == store


def test_a_store_has_its_identity_only_once_its_place_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a power cut could take a store away that receipts speak of."""
    synced: set[Path] = set()

    def sync_dir(path: Path) -> None:
        assert not (tmp_path / "a" / "b" / STORE_FILE).exists()
        synced.add(path)
        files.sync_dir(path)

    monkeypatch.setattr(storedir, "sync_dir", sync_dir)
    new_store(tmp_path / "a" / "b")
    assert synced == {tmp_path, tmp_path / "a"}


def test_another_store_in_its_place_is_not_worked_with(tmp_path: Path) -> None:
    """Another disk was mounted there, or the backup was."""
    store, other = new_store(tmp_path / "a"), new_store(tmp_path / "b")
    store.directory.rename(tmp_path / "away")
    other.directory.rename(store.directory)
    before = sorted(store.directory.iterdir())
    for use in (lambda: lock_partition(store, 3), lambda: probe_disk(store, 3, 0)):
        with pytest.raises(StoreFailedError, match=f"holds store {other.store_id} now, not {store.store_id}"):
            use()
    assert sorted(store.directory.iterdir()) == before


def test_a_disk_is_well_again_only_with_room_for_what_comes_next(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    before = sorted(tmp_path.iterdir())
    probe_disk(store, 3, 0)
    with pytest.raises(StoreFailedError, match=f"bytes are free, {1 << 62} are needed"):
        probe_disk(store, 3, 1 << 62)
    assert sorted(tmp_path.iterdir()) == before


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
