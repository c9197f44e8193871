"""A disk that refuses: the partition stops loudly, nothing is acknowledged that is not durable, and it goes on later.

The faults are put in below persist's file operations; what refuses HDF5's own writes is a real limit of the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from crash.lane import CLUSTER, PARTITION, Lane
from crash.source import NOW_NS
from crash.stand import Stand

from contracts.errors import ShardError, StoreFailedError
from stages.persist import files
from stages.persist.storedir import lock_partition, open_store

OPERATIONS_MIN = 30


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    """One sealed shard, one that waits to be sealed, and a live one with two commits."""
    stand = Stand(tmp_path_factory.mktemp("filled") / "shards")
    stand.fill(sealed=1, full=1, commits=2)
    return stand


@pytest.fixture
def stand(filled: Stand, tmp_path: Path) -> Stand:
    """One such stand for each test."""
    return filled.copy(tmp_path / "shards")


class FailingDisk:
    """Refuses every write, sync and change of a name from the `first`-th on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int, first: int) -> None:
        self._monkeypatch = monkeypatch
        self._error = error
        self._left = first
        self.failed = False
        calls: list[tuple[Any, str, Callable[..., Any]]] = [
            (os, "pwrite", os.pwrite),
            (os, "fsync", os.fsync),
            (files, "_fdatasync", os.fdatasync),
            (os, "rename", os.rename),
            (os, "unlink", os.unlink),
        ]
        for owner, name, real in calls:
            monkeypatch.setattr(owner, name, self._refusing(real))

    def _refusing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self._left <= 0:
                self.failed = True
                raise OSError(self._error, os.strerror(self._error))
            self._left -= 1
            return real(*arguments)

        return call

    def mend(self) -> None:
        """Space returns."""
        self._monkeypatch.undo()


def work(lane: Lane) -> None:
    """Something of everything."""
    lane.open()
    lane.commit(3)
    lane.seal_all()
    lane.prepare()
    lane.roll()
    lane.commit(3)
    lane.seal_all()
    lane.commit(3)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_whichever_disk_operation_is_refused_first_nothing_is_lost(
    filled: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """One run for every `step`-th disk operation, which is the first that fails; the two kinds of error in turn."""
    failed = True
    first = 0
    while failed:
        stand = filled.copy(tmp_path / str(first))
        lane = stand.lane()
        disk = FailingDisk(monkeypatch, (errno.ENOSPC, errno.EIO)[first // step % 2], first)
        try:
            work(lane)
        except StoreFailedError:
            assert disk.failed
        disk.mend()
        lane.close()
        assert stand.judge().notes == []
        assert stand.recover().notes == []
        failed = disk.failed
        first += step
    assert first > OPERATIONS_MIN


def test_after_a_failed_fsync_a_commit_is_not_acknowledged_and_not_tried_again(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = stand.lane()
    lane.open()
    accepted = stand.witness.receipt
    disk = FailingDisk(monkeypatch, errno.EIO, 2)
    with pytest.raises(StoreFailedError, match="nothing that is not durable was acknowledged"):
        lane.commit(3)
    disk.mend()
    with pytest.raises(StoreFailedError, match="never retry"):
        lane.commit(3)
    assert stand.witness.receipt is accepted
    lane.close()
    assert stand.recover().notes == []


@contextlib.contextmanager
def files_no_longer_than(size_bytes: int) -> Iterator[None]:
    """The kernel refuses longer files (EFBIG), to HDF5 as to us."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size_bytes", [0, 9_000, 12_000, 20_000, 60_000, 110_000])
@pytest.mark.parametrize("what", ["prepare", "roll"])
def test_no_room_for_the_next_shard_stops_the_partition(stand: Stand, what: str, size_bytes: int) -> None:
    lane = stand.lane()
    lane.open()
    with files_no_longer_than(size_bytes), pytest.raises(StoreFailedError, match="Free space or mend the disk"):
        getattr(lane, what)()
    lane.close()
    assert stand.recover().notes == []


@pytest.mark.parametrize("size_bytes", [0, 8_200, 9_000, 12_000, 14_000])
def test_no_room_for_a_sealed_shard_stops_the_partition(stand: Stand, size_bytes: int) -> None:
    lane = stand.lane()
    lane.open()
    (job,) = lane.files.to_seal
    with files_no_longer_than(size_bytes), pytest.raises(StoreFailedError, match="Free space or mend the disk"):
        lane.seal(job)
    assert job.path.exists()
    lane.close()
    assert stand.recover().notes == []


@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_directory_that_may_not_be_written_is_refused_with_what_to_do(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *arguments: Any) -> int:
        if flags & os.O_RDWR:
            raise OSError(error, os.strerror(error), path)
        return real(path, flags, *arguments)

    store = stand.store
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ShardError, match="give this user access or choose another store"):
        open_store(stand.directory, CLUSTER, now_ns=NOW_NS)
    with pytest.raises(StoreFailedError, match="Free space or mend the disk"):
        Lane(store, stand.source, stand.witness, lambda _: None).open()
    monkeypatch.undo()
    assert stand.recover().notes == []


def test_a_store_whose_file_system_has_no_locks_is_named(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="No locks") as refused:
        open_store(stand.directory, CLUSTER, now_ns=NOW_NS)
    assert refused.value.filename == str(stand.directory)


def test_a_partition_lock_that_cannot_be_written_is_let_go(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FailingDisk(monkeypatch, errno.ENOSPC, 0)
    with pytest.raises(StoreFailedError, match="No space left"):
        lock_partition(stand.store, PARTITION)
    disk.mend()
    lock_partition(stand.store, PARTITION).close()
