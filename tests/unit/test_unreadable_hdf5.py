"""A disk that does not give what HDF5 asks for: that is told from damage, and ends no process."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
from shard_maker import NOW_NS, PartitionMaker, new_store

from contracts.errors import ShardCorruptError, ShardLostError, StoreFailedError
from stages.persist import agreement
from stages.persist import seal as seal_module
from stages.persist.resume import BEGINNING, resume_after
from stages.persist.seal import seal
from stages.persist.sealed import SealedReader
from stages.persist.storedir import disk_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what cannot be read is /proc/self/mem")


@pytest.fixture
def maker(tmp_path: Path) -> Iterator[PartitionMaker]:
    maker = PartitionMaker(new_store(tmp_path / "store"), 3)
    maker.begin()
    for count in (1, 7, 20):
        maker.commit(count)
    yield maker
    maker.close()


@contextlib.contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Whoever has the file open gets EIO from the system, whatever part of it is read."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    fds = [int(link.name) for link in links if link.is_symlink() and os.readlink(link) == str(path)]
    kept = [os.dup(fd) for fd in fds]
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    for fd in fds:
        os.dup2(memory, fd)
    try:
        yield
    finally:
        for fd, before in zip(fds, kept, strict=True):
            os.dup2(before, fd)
            os.close(before)
        os.close(memory)


@pytest.mark.parametrize("name", ["commits", "no such dataset", "records"])
def test_what_the_disk_does_not_give_of_a_sealed_shard_stops_a_partition_until_it_does(
    maker: PartitionMaker, name: str
) -> None:
    path = maker.seal().path
    point = resume_after(BEGINNING, path)
    with contextlib.closing(SealedReader(path)) as reader:
        reader.read("origin")
        with (
            unreadable(path),
            pytest.raises(ShardLostError, match=rf"^{path}: {name} .*\(Input/output error\); rebuild"),
        ):
            reader.read(name)
        told = pytest.raises(StoreFailedError, match=r"goes on by itself.* on a bad sector, run `fictl rebuild`")
        with unreadable(path), told as stopped, disk_of(maker.store):
            reader.read(name)
        cause = stopped.value.__cause__
        assert isinstance(cause, OSError), "by which persist's errors are counted"
        assert cause.errno == errno.EIO
    assert resume_after(BEGINNING, path) == point


def test_a_shard_whose_first_page_is_not_given_is_named(tmp_path: Path) -> None:
    path = tmp_path / "shard.h5"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error") as refused:
        SealedReader(path)
    assert refused.value.filename == str(path)


def test_a_file_that_makes_no_sense_is_damaged_and_not_unreadable(maker: PartitionMaker) -> None:
    path = maker.seal().path
    with contextlib.closing(SealedReader(path)) as reader, pytest.raises(ShardCorruptError) as damaged:
        reader.read("no such dataset")
    assert not isinstance(damaged.value, ShardLostError)


@pytest.mark.parametrize("after", [0, 1, 5, "to find its arrays"])
def test_a_sealed_form_that_the_disk_does_not_give_back_is_the_disks_fault(
    maker: PartitionMaker, monkeypatch: pytest.MonkeyPatch, after: int | str
) -> None:
    live = maker.live
    assert live is not None

    class File(h5py.File):
        """Not to be read any more once `after` datasets were."""

        opened = 0
        bad = contextlib.ExitStack()

        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            File.opened += 1
            self.left = after
            if isinstance(after, str) and File.opened == 2:
                self.bad.enter_context(unreadable(Path(self.filename)))

        def __getitem__(self, name: Any) -> Any:
            if self.left == 0:
                self.bad.enter_context(unreadable(Path(self.filename)))
            self.left = self.left - 1 if isinstance(self.left, int) else self.left
            return super().__getitem__(name)

        def __exit__(self, *error: Any) -> None:
            self.bad.close()
            super().__exit__(*error)

    def sealing() -> Any:
        return seal(live.path, commits=live.commits, frontier=maker.frontier, sealed_ns=NOW_NS)

    with monkeypatch.context() as patch:
        for module in (seal_module, agreement):
            patch.setattr(
                module, "h5py", type("h5py", (), {"File": File, "Dataset": h5py.Dataset, "Group": h5py.Group})
            )
        with pytest.raises(OSError, match="Input/output error") as refused:
            sealing()
    assert str(refused.value.filename).endswith(".h5.tmp")
    assert sealing().header.events == 28
