"""What lies under a shard's name is copied only if it is that shard, and whatever it is the others are copied."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from shard_maker import NOW_NS, PartitionMaker, filled_store, make_again, new_store

from contracts.backups import BACKUP_FILE
from stages.persist.backup import Backup, back_up
from stages.persist.names import ShardFile, list_shards, live_name
from stages.persist.records import keep_record, record_of, record_path
from stages.persist.seal import sealed_info
from stages.persist.storedir import Store


class Ground(NamedTuple):
    """A store with three sealed shards and a live one, and where its copies go, on another file system."""

    store: Store
    target: Path

    def run(self) -> Backup:
        return back_up(self.store.directory, self.target, now_ns=NOW_NS)

    def sealed(self) -> list[ShardFile]:
        return [file for file in list_shards(self.store.directory)[3] if file.sealed]

    def copies(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.target.glob("p*")}

    def mark(self) -> bytes:
        return (self.store.directory / BACKUP_FILE).read_bytes()


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    if not Path("/dev/shm").is_dir():
        pytest.skip("a file system in memory is Linux's")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        yield Ground(filled_store(tmp_path / "store")[0], Path(memory) / "copy")


@pytest.mark.parametrize("what", ["swapped", "of another partition", "of another store"])
def test_what_is_not_the_shard_that_its_name_says_takes_no_copys_place_and_counts_as_none(
    ground: Ground, what: str
) -> None:
    ground.run()
    kept, before = ground.copies(), ground.mark()
    first, second, _ = (file.path for file in ground.sealed())
    if what == "swapped":
        aside = first.rename(first.with_name("aside"))
        second.rename(first)
        aside.rename(second)
    else:
        is_own = what == "of another partition"
        store = ground.store if is_own else new_store(ground.store.directory.parent / "other")
        other = PartitionMaker(store, 2 if is_own else 3)
        other.begin()
        other.commit(4)
        first.unlink()
        make_again(other.seal().path, last_origin=52).rename(first)
    done = ground.run()
    wrong = {first.name, second.name} if what == "swapped" else {first.name}
    assert {problem.shard for problem in done.problems} == wrong
    assert f"{first}: is not the shard that its name and place say" in done.problems[0].why
    assert (done.copied, done.aside, done.unmarked) == (0, (), "not all of it is copied to another disk")
    assert (ground.copies(), ground.mark()) == (kept, before)


def test_an_earlier_form_of_a_shard_takes_not_the_place_of_the_one_that_was_recorded(ground: Ground) -> None:
    first = ground.sealed()[0].path
    earlier = first.read_bytes()
    make_again(first, sealed_ns=NOW_NS + 1)
    keep_record(first, record_of(sealed_info(first)))
    ground.run()
    kept = ground.copies()
    first.write_bytes(earlier)
    (problem,) = ground.run().problems
    assert problem.why == f"{first}: is not the file that the record beside it is of; run `fictl verify`"
    assert ground.copies() == kept
    # A shard that is just being sealed again may still have the record of before.
    first.with_name(live_name(3, 1)).touch()
    assert ground.run().problems == ()


@pytest.mark.parametrize("foreign", [True, False])
def test_a_record_that_is_not_the_shards_takes_no_records_place_and_keeps_no_shard_from_being_copied(
    ground: Ground, foreign: bool
) -> None:
    """Which of the two is wrong the store cannot tell, so such a shard does not count as copied."""
    first, second, _ = (file.path for file in ground.sealed())
    for path in (first, second):
        keep_record(path, record_of(sealed_info(path)))
    ground.run()
    kept, before = ground.copies(), ground.mark()
    record_path(first).write_bytes(record_path(second).read_bytes() if foreign else b"{")
    told = f"{first}: is not the file" if foreign else f"{record_path(first)}: is no record"
    done = ground.run()
    assert [(problem.shard, problem.why.startswith(told)) for problem in done.problems] == [(first.name, True)]
    assert (done.shards, done.copied, done.unmarked) == (3, 0, "not all of it is copied to another disk")
    assert (ground.copies(), ground.mark()) == (kept, before)
    fresh = ground._replace(target=ground.target.with_name("fresh"))
    done = fresh.run()
    assert (len(done.problems), done.shards, done.copied) == (1, 3, 3)
    assert fresh.copies() == {name: data for name, data in kept.items() if name != record_path(first).name}


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES])
def test_a_shard_whose_first_page_cannot_be_read_keeps_no_other_from_being_copied(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    first, second, third = (file.path for file in ground.sealed())
    opened = Path.open

    def open_path(path: Path, *how: Any, **more: Any) -> Any:
        if path in (second, record_path(third)) and how == ("rb",):
            raise OSError(error, os.strerror(error), str(path))
        return opened(path, *how, **more)

    keep_record(third, record_of(sealed_info(third)))
    monkeypatch.setattr(Path, "open", open_path)
    done = ground.run()
    assert done.copied == 2
    assert [problem.shard for problem in done.problems] == [second.name, third.name]
    for problem, path in zip(done.problems, (second, record_path(third)), strict=True):
        assert str(path) in problem.why
        assert os.strerror(error) in problem.why
    assert ground.copies().keys() == {first.name, third.name}
