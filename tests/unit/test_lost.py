"""Where a partition goes on by its shards alone."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace
from shard_maker import PartitionMaker, new_store
from witnessed import take_over

from cluster.testing.disk import flip
from contracts.errors import ShardError
from contracts.events import encode_event
from contracts.hashing import MerkleFrontier
from contracts.receipts import StoreEnd, first_receipt
from contracts.settings import Settings
from stages.persist import lost, rewind
from stages.persist.header import WATERMARK_BYTES, read_live_header
from stages.persist.live import LiveReader
from stages.persist.lost import last_place
from stages.persist.names import ShardFile, list_shards
from stages.persist.records import keep_record, record_of
from stages.persist.resume import BEGINNING, resume_after
from stages.persist.rewind import Place, last_good_place
from stages.persist.seal import SealedInfo, sealed_info
from stages.persist.sealed import SealedReader


@pytest.fixture
def maker(tmp_path: Path) -> PartitionMaker:
    """A sealed shard, a full live one, and a live one of whose three commits readers were shown two."""
    maker = PartitionMaker(new_store(tmp_path / "store"), 3)
    maker.begin()
    maker.commit(4)
    maker.seal()
    maker.begin()
    maker.commit(3)
    maker.commit(0)
    live = maker.begin()
    maker.commit(2)
    maker.commit(1)
    maker.commit(5)
    live.set_watermark(2)
    maker.close()
    return maker


def files_of(maker: PartitionMaker) -> list[ShardFile]:
    return list_shards(maker.store.directory)[3]


def tree_of(maker: PartitionMaker, events: int) -> bytes:
    tree = MerkleFrontier()
    tree.extend([encode_event(event) for event in maker.events[:events]])
    return tree.to_bytes()


def test_sealed_and_full_shards_count_whole_and_a_live_one_as_far_as_it_was_shown(maker: PartitionMaker) -> None:
    place, damage = last_place(files_of(maker))
    assert damage is None
    assert (place.shard, place.commits, place.tree.size) == (3, 2, 10)
    assert (place.origin, place.stored_ns) == (maker.events[9].origin, maker.events[9].accepted_ns)
    assert place.tree.to_bytes() == tree_of(maker, 10)


def test_a_live_shard_counts_as_far_as_it_is_whole_where_nothing_else_can_give_that_again(
    maker: PartitionMaker,
) -> None:
    place, damage = last_place(files_of(maker), unshown=True)
    assert (damage, place.shard, place.commits, place.tree.size) == (None, 3, 3, 15)
    assert place.tree.to_bytes() == tree_of(maker, 15)


def test_the_last_shard_may_be_of_any_kind(maker: PartitionMaker) -> None:
    files_of(maker)[2].path.unlink()
    place, damage = last_place(files_of(maker))
    assert (damage, place.shard, place.commits, place.tree.size) == (None, 2, 2, 7)
    assert place.stored_ns == 0, "its last commit holds no event that tells it"
    files_of(maker)[1].path.unlink()
    place, damage = last_place(files_of(maker))
    assert (damage, place.shard, place.commits, place.tree.size) == (None, 2, 0, 4)
    assert last_place([])[0].shard == 1


def test_a_live_shard_of_which_nothing_was_shown_leaves_what_is_known_of_the_place_before_it(
    maker: PartitionMaker,
) -> None:
    files_of(maker)[2].path.unlink()
    _, full = files_of(maker)
    with full.path.open("r+b") as file:
        file.seek(read_live_header(full.path).watermark.offset)
        file.write(bytes(WATERMARK_BYTES))
    place, damage = last_place(files_of(maker))
    assert (damage, place.shard, place.commits, place.tree.size) == (None, 2, 0, 4)
    assert place.stored_ns == maker.events[3].accepted_ns


def test_the_totals_are_those_of_the_record_beside_a_sealed_shard_or_of_the_shard(maker: PartitionMaker) -> None:
    sealed = files_of(maker)[:1]
    place, _ = last_place(sealed)
    info = sealed_info(sealed[0].path)
    point = resume_after(BEGINNING, sealed[0].path)
    assert (place.duplicates, place.dead_lettered, place.closed) == (0, 0, b"")
    assert place.tree.to_bytes() == point.frontier
    assert place.stored_ns == point.stored_ns == maker.events[3].accepted_ns
    keep_record(sealed[0].path, record_of(info, replace(point, duplicates=7, dead_lettered=8, closed=b"memory")))
    place, _ = last_place(sealed)
    assert (place.duplicates, place.dead_lettered, place.closed) == (7, 8, b"memory")
    keep_record(sealed[0].path, replace(record_of(info, replace(point, duplicates=7)), sha256="0" * 64))
    assert last_place(sealed)[0].duplicates == 0, "the record is of another file"


@pytest.mark.parametrize(("damaged", "shard", "events"), [(0, 1, 0), (1, 2, 4), (2, 3, 7)])
def test_what_is_damaged_ends_it_and_is_named(maker: PartitionMaker, damaged: int, shard: int, events: int) -> None:
    file = files_of(maker)[damaged]
    flip(file.path, file.path.stat().st_size // 2 if file.sealed else 64)
    place, damage = last_place(files_of(maker))
    assert damage is not None
    assert (damage.file, place.shard, place.commits, place.tree.size) == (file.path, shard, 0, events)


def test_a_commit_that_readers_were_shown_and_that_is_not_whole_any_more_is_damage(maker: PartitionMaker) -> None:
    """Persist would cut it as what was never accepted."""
    live = files_of(maker)[2].path
    with LiveReader(live) as reader:
        second = reader.header.frames.offset + reader.read_rows(0, 1)[0].end_bytes
    flip(live, second + 10)
    place, damage = last_place(files_of(maker))
    assert damage is not None
    assert f"{live}: only 1 of 2 committed rows are whole" in damage.why
    assert (place.shard, place.commits) == (3, 0)


def test_a_sealed_shard_of_another_past_is_damage_though_it_agrees_with_itself(tmp_path: Path) -> None:
    """There is no receipt that its root could be held against."""
    maker = PartitionMaker(new_store(tmp_path / "store"), 3)
    for before in (MerkleFrontier(), MerkleFrontier()):
        maker.frontier = before
        maker.begin()
        maker.commit(4)
        maker.seal()
    place, damage = last_place(files_of(maker))
    assert damage is not None
    assert "does not go on from the shard before it" in damage.why
    assert (place.shard, place.tree.size) == (2, 4)


def test_a_missing_shard_ends_it(maker: PartitionMaker) -> None:
    files_of(maker)[0].path.unlink()
    place, damage = last_place(files_of(maker))
    assert damage is not None
    assert "shard 1 is missing" in damage.why
    assert (place.origin, place.tree.size) == (0, 0)


def test_a_part_that_was_taken_over_from_another_store_is_refused(tmp_path: Path, maker: PartitionMaker) -> None:
    there = new_store(tmp_path / "there")
    tree = MerkleFrontier()
    tree.extend([b"theirs"])
    take_over(there, 3, Place(9, 2, 0, tree, 0, 0, b""), Settings())
    with pytest.raises(ShardError, match="goes on from the shards of another store"):
        last_place(list_shards(there.directory)[3])


def test_a_shard_on_a_bad_sector_is_damaged_and_one_that_the_system_keeps_from_us_is_not(
    maker: PartitionMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(maker)
    store = maker.store
    receipt = replace(
        first_receipt(3, store.cluster_id, store.store_id, "w"), ends={store.store_id: StoreEnd(shard=3, commits=2)}
    )

    def fails(number: int) -> Callable[[Path], SealedInfo]:
        def read(path: Path) -> SealedInfo:
            raise OSError(number, os.strerror(number), str(path))

        return read

    for module in (lost, rewind):
        monkeypatch.setattr(module, "events_of_sealed", fails(errno.EIO))
    for _, damage in (last_place(files), last_good_place(store, 3, [receipt], [])):
        assert damage is not None
        assert (damage.file, "Input/output error" in damage.why) == (files[0].path, True)
    for module in (lost, rewind):
        monkeypatch.setattr(module, "events_of_sealed", fails(errno.EMFILE))
    with pytest.raises(OSError, match="Too many open files"):
        last_place(files)
    with pytest.raises(OSError, match="Too many open files"):
        last_good_place(store, 3, [receipt], [])


def test_a_sealed_shard_is_not_called_damaged_when_no_file_can_be_opened(maker: PartitionMaker) -> None:
    reader = SealedReader(files_of(maker)[0].path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 4, hard))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(OSError, match="Too many open files"):
            reader.read("ids")
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert list(reader.records())
    reader.close()
