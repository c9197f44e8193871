"""Copies of sealed shards: made once, whole or not there, of one store only, and never deleted."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pytest
from commandline import Captured, fictl
from shard_maker import NOW_NS, PartitionMaker, filled_store, make_again
from verifying import verify_here

from cluster.testing.disk import flip
from contracts.backups import BACKUP_FILE, LastBackup, decode_last_backup
from contracts.errors import NotOursError, ShardError
from stages.persist import backup as module
from stages.persist.aside import ASIDE
from stages.persist.backup import Backup, back_up, copied_shard, forget_copies
from stages.persist.header import read_sealed_header
from stages.persist.names import ShardFile, list_shards
from stages.persist.names import tmp_path as unfinished
from stages.persist.newlive import create_live
from stages.persist.records import keep_record, record_of, record_path
from stages.persist.seal import sealed_info
from stages.persist.store import EventStore
from stages.persist.storedir import Store


class Ground(NamedTuple):
    """A store with three sealed shards and a live one, and where its copies go."""

    store: Store
    maker: PartitionMaker
    target: Path

    def run(self, **given: Any) -> Backup:
        return back_up(self.store.directory, self.target, now_ns=NOW_NS, **given)

    def sealed(self) -> list[ShardFile]:
        return [file for file in list_shards(self.store.directory)[3] if file.sealed]

    def copies(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.target.glob("p*")}


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(*filled_store(tmp_path / "store"), tmp_path / "disk" / "copy")


def test_what_is_sealed_is_copied_once_and_can_be_read(ground: Ground) -> None:
    told: list[tuple[int, int]] = []
    keep_record(ground.sealed()[0].path, record_of(sealed_info(ground.sealed()[0].path)))
    done = ground.run(on_progress=lambda *seen: told.append(seen))
    names = [file.path.name for file in ground.sealed()]
    size = sum(file.path.stat().st_size for file in ground.sealed())
    assert (done.shards, done.copied, done.bytes, done.problems) == (3, 3, size, ())
    assert told[-1] == (size, size)
    first_record = record_path(ground.sealed()[0].path)
    assert ground.copies() == {
        name: (ground.store.directory / name).read_bytes() for name in (*names, first_record.name)
    }
    report = verify_here(ground.target)
    assert (report.ok, report.events) == (True, 84)
    with EventStore(ground.target) as copy:
        assert [stored.event for stored in copy.iterate()] == ground.maker.events[:84]

    before = {path.name: path.stat().st_mtime_ns for path in ground.target.iterdir()}
    again = ground.run()
    assert (again.shards, again.copied, again.bytes) == (3, 0, 0)
    assert {path.name: path.stat().st_mtime_ns for path in ground.target.iterdir()} == before

    # A record comes after its shard.
    keep_record(ground.sealed()[1].path, record_of(sealed_info(ground.sealed()[1].path)))
    assert ground.run().copied == 0
    assert record_path(ground.target / names[1]).exists()


def test_what_is_copied_is_known_to_persist_and_an_unreadable_mark_counts_for_nothing(
    ground: Ground, elsewhere: Ground, caplog: pytest.LogCaptureFixture
) -> None:
    store = ground.store.directory
    assert copied_shard(store, 3) is None
    elsewhere.run()
    assert [copied_shard(store, partition) for partition in (2, 3)] == [0, 3]
    assert caplog.text == ""
    (store / BACKUP_FILE).write_bytes(b"{}")
    assert copied_shard(store, 3) == 0
    assert f"{store / BACKUP_FILE}: {BACKUP_FILE} cannot be read by this build" in caplog.text


def test_copies_that_are_gone_are_missed_and_not_begun_anew_where_their_disk_was(
    ground: Ground, elsewhere: Ground
) -> None:
    elsewhere.run()
    elsewhere.target.rename(elsewhere.target.with_name("unmounted"))
    with pytest.raises(ShardError, match=r"the copies of 2023-.*Z are not there; is its disk mounted\?"):
        elsewhere.run()
    assert not elsewhere.target.exists()
    (ground.store.directory / BACKUP_FILE).unlink()
    assert elsewhere.run().copied == 3


def test_a_store_that_goes_away_meanwhile_is_no_complete_backup(ground: Ground, elsewhere: Ground) -> None:
    away = ground.store.directory.with_name("away")

    def unmount(done: int, total: int) -> None:
        if 0 < done < total and not away.exists():
            ground.store.directory.rename(away)
            ground.store.directory.mkdir()

    with pytest.raises(ShardError, match="is not a store"):
        elsewhere.run(on_progress=unmount)
    assert list(ground.store.directory.iterdir()) == []


@pytest.mark.parametrize("where", [".", "..", "copies"])
def test_copies_lie_neither_in_the_store_nor_around_it(ground: Ground, where: str) -> None:
    with pytest.raises(ShardError, match="choose another directory"):
        ground._replace(target=ground.store.directory / where).run()
    assert not (ground.store.directory / "copies").exists()


def test_a_run_that_was_broken_off_left_nothing_under_a_shards_name(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = ground.sealed()[0].path

    def full(fd: int, data: bytes, offset: int) -> None:
        os.pwrite(fd, data[: len(data) // 2], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_all_at", full)
        with pytest.raises(OSError, match="No space left") as refused:
            ground.run()
    assert refused.value.filename == str(unfinished(ground.target / copied.name))
    assert ground.copies() == {}
    # Killed, it leaves what is unfinished.
    unfinished(ground.target / copied.name).write_bytes(b"half")
    assert ground.run().copied == 3
    assert not list(ground.target.glob("*.tmp"))
    assert verify_here(ground.target).ok


@pytest.fixture
def second_file(ground: Ground) -> Iterator[BinaryIO]:
    """The second sealed shard, open."""
    with ground.sealed()[1].path.open("rb") as file:
        yield file


def test_a_damaged_shard_is_told_of_and_the_others_are_copied(
    ground: Ground, second_file: BinaryIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (file.path for file in ground.sealed())
    flip(first, first.stat().st_size // 2)
    opened, bad = Path.open, second.read_bytes()

    class BadSector(io.BytesIO):
        name = str(second)
        fileno = second_file.fileno

        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(size)

    def open_path(path: Path, *how: Any, **more: Any) -> Any:
        return BadSector(bad) if path == second and how == ("rb",) else opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", open_path)
    done = ground.run()
    assert (done.shards, done.copied) == (1, 1)
    assert [problem.shard for problem in done.problems] == [first.name, second.name]
    assert "are not those that were sealed; run `fictl rebuild`" in done.problems[0].why
    assert "Input/output error; run `fictl rebuild`" in done.problems[1].why
    assert ground.copies().keys() == {third.name}


def test_a_copy_that_is_not_the_stores_any_more_is_moved_aside(ground: Ground) -> None:
    ground.run()
    second, third = (file.path for file in ground.sealed()[1:])
    # Made again: the same name and other bytes; and another name.
    assert make_again(second, sealed_ns=NOW_NS + 1) == second
    assert make_again(third, last_origin=read_sealed_header(third).last_origin + 1) != third
    remade = second.read_bytes()
    done = ground.run()
    assert (done.copied, len(done.aside)) == (2, 2)
    assert sorted(name.rpartition(".")[0] for name in done.aside) == [second.name, third.name]
    assert {path.name for path in (ground.target / ASIDE).iterdir()} == set(done.aside)
    assert (ground.target / second.name).read_bytes() == remade
    assert [file.path.name for file in list_shards(ground.target)[3]] == [file.path.name for file in ground.sealed()]
    assert ground.run().aside == ()


def test_copies_of_one_store_are_not_mixed_with_another_or_with_a_store_in_use(ground: Ground, tmp_path: Path) -> None:
    ground.run()
    kept = ground.copies()
    another, _ = filled_store(tmp_path / "another")
    for source, target, words in (
        (another.directory, ground.target, "holds copies of store .* Was the disk lost"),
        (ground.store.directory, another.directory, "a persister works in it"),
        (ground.store.directory, ground.store.directory / ".", "lies in it; choose another"),
        (tmp_path, ground.target, "there is no store here"),
    ):
        with pytest.raises(ShardError, match=words):
            back_up(source, target, now_ns=NOW_NS)
    (ground.target / "store.json").unlink()
    with pytest.raises(ShardError, match="nobody knows of which store"):
        ground.run()
    assert ground.copies() == kept


def test_two_runs_do_not_copy_to_one_place_at_once(ground: Ground) -> None:
    ground.run()
    with (ground.target / "backup.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(NotOursError, match="another backup is at work"):
            ground.run()
    ground.run()


@pytest.fixture
def elsewhere(ground: Ground) -> Iterator[Ground]:
    """Copies go to another file system."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("a file system in memory is Linux's")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        yield ground._replace(target=Path(memory) / "copy")


def last_backup(ground: Ground) -> LastBackup | None:
    mark = ground.store.directory / BACKUP_FILE
    return decode_last_backup(mark.read_bytes()) if mark.exists() else None


def test_the_store_is_marked_once_nothing_of_it_is_left_to_copy_to_another_disk(
    ground: Ground, elsewhere: Ground
) -> None:
    done = ground.run()
    assert done.same_disk
    assert done.unmarked == "not all of it is copied to another disk"
    assert last_backup(ground) is None

    flip(ground.sealed()[1].path, -40)
    done = elsewhere.run()
    assert not done.same_disk
    assert len(done.problems) == 1
    assert done.unmarked == "not all of it is copied to another disk"
    assert last_backup(ground) is None

    flip(ground.sealed()[1].path, -40)
    assert elsewhere.run().unmarked == ""
    assert last_backup(ground) == LastBackup(at_ns=NOW_NS, to=str(elsewhere.target), copied={3: 3})


def test_a_store_that_is_put_back_from_its_copies_keeps_what_is_not_copied_from_its_first_moment_on(
    ground: Ground, elsewhere: Ground
) -> None:
    mark = elsewhere.target / BACKUP_FILE
    flip(ground.sealed()[1].path, -40)
    elsewhere.run()
    assert not mark.exists(), "copies that lack a shard are no backup"
    flip(ground.sealed()[1].path, -40)
    elsewhere.run()

    store = ground.store.directory
    shutil.rmtree(store)
    elsewhere.target.rename(elsewhere.target.with_name("moved"))
    shutil.copytree(elsewhere.target.with_name("moved"), store)
    assert last_backup(ground) == LastBackup(at_ns=NOW_NS, to=str(elsewhere.target), copied={})
    assert copied_shard(store, 3) == 0, "who moves the copies back has no others"
    with pytest.raises(ShardError, match=r"the copies of 2023-.*Z are not there; is its disk mounted\?"):
        elsewhere.run()
    elsewhere.target.with_name("moved").rename(elsewhere.target)
    assert elsewhere.run().copied == 0
    assert copied_shard(store, 3) == 3


@pytest.mark.parametrize("shard", [1, 2, 3])
def test_a_shard_that_is_missing_is_told_of_and_does_not_count_as_copied(
    ground: Ground, elsewhere: Ground, shard: int
) -> None:
    path = ground.sealed()[shard - 1].path
    aside = path.rename(path.with_name("aside"))
    done = elsewhere.run()
    (problem,) = done.problems
    assert (problem.shard, done.shards) == (f"shard {shard} of partition 3", 2)
    assert problem.why == f"is missing in {ground.store.directory}; run `fictl rebuild`"
    assert (done.unmarked, last_backup(ground)) == ("not all of it is copied to another disk", None)

    aside.rename(path)
    assert elsewhere.run().problems == ()
    path.unlink()
    (problem,) = elsewhere.run().problems
    assert problem.why.endswith(f"; put the copy {elsewhere.target / path.name} in its place")


def test_what_lies_before_the_shard_with_which_a_store_took_over_is_not_missing(
    ground: Ground, elsewhere: Ground
) -> None:
    for file in ground.sealed()[1:]:
        file.path.unlink()
    live = list_shards(ground.store.directory)[3][-1].path
    live.unlink()
    create_live(
        live,
        store=ground.store,
        partition=3,
        shard=4,
        capacity_bytes=4096,
        rows=4,
        created_ns=NOW_NS,
        begins_after=ground.maker.frontier,
    )
    assert elsewhere.run().problems == ()


def test_what_is_taken_back_counts_as_copied_no_more(ground: Ground, elsewhere: Ground) -> None:
    forget_copies(ground.store.directory, 3, 2)
    assert last_backup(ground) is None
    elsewhere.run()
    before = last_backup(ground)
    for partition, shard in ((2, 1), (3, 4)):
        forget_copies(ground.store.directory, partition, shard)
        assert last_backup(ground) == before
    forget_copies(ground.store.directory, 3, 2)
    assert copied_shard(ground.store.directory, 3) == 1
    elsewhere.run()
    assert last_backup(ground) == before


def test_a_store_that_may_not_be_written_is_backed_up_and_the_command_says_that_persist_does_not_know(
    ground: Ground, elsewhere: Ground, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        if path.parent == ground.store.directory:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        write(path, data)

    write = module.write_new_file
    monkeypatch.setattr(module, "write_new_file", refuse)
    assert fictl("backup", ground.store.directory, elsewhere.target) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"fi: all is copied, but persist does not know: {ground.store.directory}/backup.json: Permission denied; so "
        "fi.backup.age does not tell it, nor does FI_EVENTS keep what is not copied yet. Let this user write there"
    ]
    assert len(elsewhere.copies()) == 3
    assert not (elsewhere.target / BACKUP_FILE).exists(), "nor would a store that is put back from them be marked anew"


def test_a_shard_that_a_rebuild_gives_up_meanwhile_is_passed_over(ground: Ground) -> None:
    second = ground.sealed()[1].path
    done = ground.run(on_progress=lambda done, total: second.unlink(missing_ok=True) if done else None)
    assert (done.shards, done.copied, done.problems) == (2, 2, ())
    assert done.unmarked


def test_the_command_says_what_it_did_and_that_both_are_on_one_disk(ground: Ground, capsys: Captured) -> None:
    assert fictl("backup", ground.store.directory, ground.target) == 0
    seen = capsys.readouterr()
    assert "3 shards copied" in seen.out
    assert seen.err.splitlines() == [
        f"fi: {ground.target} is on the disk of the store, and is lost with it; is the other disk mounted there?"
    ]
    for _ in range(2):
        ground.maker.begin()
        ground.maker.commit(3)
        ground.maker.seal()
    assert fictl("backup", ground.store.directory, ground.target, "--json") == 0
    seen = capsys.readouterr()
    told = json.loads(seen.out)
    assert (told["copied"], told["shards"], told["store"]) == (2, 5, ground.store.store_id)
    flip(ground.sealed()[0].path, 9000)
    shutil.rmtree(ground.target)
    assert fictl("backup", ground.store.directory, ground.target) == 4
    assert "are not those that were sealed" in capsys.readouterr().out
    file = ground.target.parent / "file"
    file.touch()
    assert fictl("backup", ground.store.directory, file) == 2
    assert "is no directory" in capsys.readouterr().err
