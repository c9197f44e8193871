import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shard_maker import NOW_NS, PartitionMaker, new_store

from contracts.errors import ShardCorruptError
from contracts.events import Event, encode_event
from stages.persist.header import Area, read_sealed_header
from stages.persist.idfilter import build_filter, hash_ids, masks_of, word_indices
from stages.persist.ids import PAGE_IDS, IdGroup, SeenIds
from stages.persist.live import LiveShard
from stages.persist.names import live_name
from stages.persist.newlive import create_live
from stages.persist.seal import seal

STORE_ID = "00112233445566778899aabbccddeeff"

# Few distinct values, and many that differ in one byte or end in zeros.
IDS = st.one_of(
    st.integers(0, 40).map(lambda n: n.to_bytes(16, "big")),
    st.integers(0, 40).map(lambda n: n.to_bytes(16, "little")),
    st.binary(min_size=16, max_size=16),
)


@settings(max_examples=25)
@given(
    shards=st.lists(st.tuples(st.lists(IDS, max_size=12), st.integers(0, 2), st.booleans()), max_size=6),
    live=st.lists(IDS, max_size=8),
    asked=st.lists(IDS, max_size=30),
)
@example(shards=[([bytes(15) + b"1"], 0, False), ([bytes(15) + b"2"], 0, True)], live=[], asked=[])
def test_answers_are_those_of_a_set(
    tmp_path_factory: pytest.TempPathFactory,
    shards: list[tuple[list[bytes], int, bool]],
    live: list[bytes],
    asked: list[bytes],
) -> None:
    """After each shard some summaries are made, as they may be late; groups are of two shards of one store."""
    makers = [PartitionMaker(new_store(tmp_path_factory.mktemp("store")), 0) for _ in range(2)]
    seen = SeenIds(group_shards=2)
    known: set[bytes] = set()
    for ids, summaries, others in shards:
        maker = makers[others]
        shard = maker.begin(capacity_bytes=1 << 14, rows=4)
        records = [encode_event(event_with(event_id, row)) for row, event_id in enumerate(ids)]
        shard.append(
            records, prev_origin=maker.origin, origin=maker.origin + 100, duplicates=0, dead_lettered=0, committed_ns=0
        )
        maker.origin += 100
        seen.add(maker.number, ids)
        number, info = maker.number, maker.seal()
        seen.replace_live(number, info.path)
        known.update(ids)
        for _ in range(summaries):
            if (summary := seen.unsummarized()) is not None:
                summary.make()
                summary.take()
    seen.add(99, live)
    known.update(live)
    wanted = asked + [event_id for ids, *_ in shards for event_id in ids] + live
    assert seen.seen(wanted) == [event_id in known for event_id in wanted]
    assert seen.seen([]) == []
    seen.forget_live(99)
    sealed_only = {event_id for ids, *_ in shards for event_id in ids}
    assert seen.seen(wanted) == [event_id in sealed_only for event_id in wanted]


def test_a_group_with_a_summary_is_asked_only_where_that_says_perhaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    maker = PartitionMaker(new_store(tmp_path), 0)
    seen = SeenIds(group_shards=4)
    stored: list[bytes] = []
    for _ in range(9):
        shard = maker.begin(capacity_bytes=1 << 16, rows=4)
        ids = [rng.bytes(16) for _ in range(200)]
        shard.append(
            [encode_event(event_with(event_id, row)) for row, event_id in enumerate(ids)],
            prev_origin=maker.origin,
            origin=maker.origin + 200,
            duplicates=0,
            dead_lettered=0,
            committed_ns=0,
        )
        maker.origin += 200
        seen.add_sealed(maker.seal().path)
        stored += ids
    asked: list[int] = []
    find = IdGroup.find
    monkeypatch.setattr(IdGroup, "find", lambda group, rows, text: asked.append(len(rows)) or find(group, rows, text))
    strangers = [rng.bytes(16) for _ in range(1000)]
    assert not any(seen.seen(strangers))
    assert asked == [1000, 1000, 1000]
    while (summary := seen.unsummarized()) is not None:
        summary.make()
        summary.take()
    asked.clear()
    assert not any(seen.seen(strangers))
    # The last group is not full. Of the other two, a summary is wrong about one id in two hundred.
    assert asked[0] == 1000
    assert sum(asked[1:]) < 50
    assert all(seen.seen(stored))


@pytest.mark.parametrize("area", ["by_event_id/filter", "by_event_id/ids"])
def test_a_bad_sector_among_a_shards_ids_is_an_error_and_no_id_is_taken_for_new(
    tmp_path: Path, area: str, bad_sector: Callable[[Path, int], None]
) -> None:
    maker = PartitionMaker(new_store(tmp_path), 0)
    maker.begin(capacity_bytes=16 << 20)
    ids = [event.event_id for _ in range(10) for event in maker.commit(400)]
    path = maker.seal().path
    place = read_sealed_header(path).areas[area]
    bad_sector(path, place.offset + place.bytes - 1)

    def ask() -> list[bool]:
        seen = SeenIds()
        seen.add_sealed(path)
        return seen.seen(ids)

    with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
        ask()


def test_ids_that_come_in_short_reads_are_all_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = PartitionMaker(new_store(tmp_path), 0)
    maker.begin()
    ids = [event.event_id for event in maker.commit(400)]
    path = maker.seal().path
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: real(fd, min(size, 1000), offset))
    seen = SeenIds()
    seen.add_sealed(path)
    assert all(seen.seen(ids))


@pytest.mark.parametrize("harm", [lambda path: os.truncate(path, 9000), os.unlink], ids=["cut short", "removed"])
def test_a_shard_that_is_no_longer_whole_is_named_when_its_group_is_summarized(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    maker = PartitionMaker(new_store(tmp_path), 0)
    seen = SeenIds(group_shards=1)
    shard = maker.begin(capacity_bytes=1 << 16, rows=4)
    records = [encode_event(event_with(row.to_bytes(16, "big"), row)) for row in range(100)]
    shard.append(records, prev_origin=0, origin=100, duplicates=0, dead_lettered=0, committed_ns=0)
    path = maker.seal().path
    seen.add_sealed(path)
    harm(path)
    summary = seen.unsummarized()
    assert summary is not None
    with pytest.raises((ShardCorruptError, OSError), match=path.name):
        summary.make()


def event_with(event_id: bytes, row: int) -> Event:
    return Event(
        1 + row,
        0,
        event_id,
        bytes(16),
        "s",
        "CORE_ERROR_OCCURRED",
        NOW_NS,
        True,
        b"{}",
        b"{}",
        NOW_NS,
        audit_hash=bytes(32),
    )


@pytest.mark.parametrize("kind", ["counter", "time-ordered", "same-low-half", "random"])
def test_the_filter_misses_nothing_and_is_rarely_wrong(kind: str) -> None:
    rng = np.random.default_rng(1)
    count = 20_000
    ids = np.zeros((2 * count, 16), np.uint8)
    order = np.arange(2 * count, dtype=">u8")
    if kind == "counter":
        ids[:, 8:] = order.view(np.uint8).reshape(-1, 8)
    elif kind == "time-ordered":
        ids[:, :8] = (order.astype("u8") * 1000 + (1 << 60)).astype(">u8").view(np.uint8).reshape(-1, 8)
        ids[:, 8:] = rng.integers(0, 256, (2 * count, 8))
    elif kind == "same-low-half":
        ids[:, :8] = rng.integers(0, 256, (2 * count, 8))
        ids[:, 8:] = 7
    else:
        ids[:] = rng.integers(0, 256, (2 * count, 16))
    words = build_filter(ids[:count], STORE_ID)
    hashes = hash_ids(ids, STORE_ID)
    masks = masks_of(hashes)
    perhaps = (words[word_indices(hashes, np.uint64(len(words)))] & masks) == masks
    assert perhaps[:count].all()
    assert perhaps[count:].mean() < 0.02
    assert words.nbytes <= 1.6 * count


def test_sealed_ids_hold_at_most_two_bytes_an_event_in_memory(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    rng = np.random.default_rng(2)
    count = 20_000
    path = tmp_path / live_name(0, 1)
    create_live(path, store=store, partition=0, shard=1, capacity_bytes=8 << 20, rows=4, created_ns=NOW_NS)
    ids = [rng.bytes(16) for _ in range(count)]
    with LiveShard(path) as live:
        live.append(
            [encode_event(event_with(event_id, row)) for row, event_id in enumerate(ids)],
            prev_origin=0,
            origin=count,
            duplicates=0,
            dead_lettered=0,
            committed_ns=0,
        )
    from contracts.hashing import MerkleFrontier

    info = seal(path, commits=1, frontier=MerkleFrontier(), sealed_ns=0)
    tracemalloc.start()
    try:
        seen = SeenIds()
        before = tracemalloc.get_traced_memory()[0]
        for shard in range(4):
            seen.add(shard, ids)
            seen.replace_live(shard, info.path)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert used <= 2 * 4 * count
    assert all(seen.seen(ids[:500]))
    assert not any(seen.seen([rng.bytes(16) for _ in range(500)]))


def test_a_cut_short_sealed_shard_is_refused(tmp_path: Path) -> None:
    maker = PartitionMaker(new_store(tmp_path), 0)
    maker.begin()
    maker.commit(3)
    path = maker.seal().path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardCorruptError, match="bytes long"):
        SeenIds().add_sealed(path)


@pytest.mark.parametrize("area", ["filter", "ids"])
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda area: Area(area.offset, 0), "contradicts itself"),
        (lambda area: Area(area.offset, area.bytes - 1), "contradicts itself"),
        (lambda area: Area(1 << 20, area.bytes), "does not place by_event_id/"),
        (lambda _: None, "does not place by_event_id/"),
    ],
    ids=["empty", "a byte less", "behind the file", "none"],
)
def test_a_header_that_places_ids_where_they_cannot_be_is_refused(
    tmp_path: Path, area: str, harm: Callable[[Area], Area | None], words: str
) -> None:
    """Or ids that are stored would be taken for new ones."""
    maker = PartitionMaker(new_store(tmp_path), 0)
    maker.begin()
    maker.commit(3)
    path = maker.seal().path
    header = read_sealed_header(path)
    name = f"by_event_id/{area}"
    areas = {**header.areas, name: harm(header.areas[name])}
    header = msgspec.structs.replace(header, areas={key: place for key, place in areas.items() if place is not None})
    with pytest.raises(ShardCorruptError, match=words):
        IdGroup(header.store).add(path, header)


def test_descriptors_do_not_grow_with_the_sealed_shards(tmp_path: Path) -> None:
    maker = PartitionMaker(new_store(tmp_path), 0)
    seen = SeenIds()
    ids: list[bytes] = []
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        maker.begin()
        ids.append(maker.commit(1)[0].event_id)
        seen.add_sealed(maker.seal().path)
    assert all(seen.seen(ids))
    assert not any(seen.seen([event_id[::-1] for event_id in ids]))
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_ids_of_many_pages_are_found_one_by_one_and_their_neighbours_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a shard that was asked before, for a page each."""
    maker = PartitionMaker(new_store(tmp_path), 0)
    shard = maker.begin(capacity_bytes=1 << 18, rows=4)
    numbers = range(1000, 1000 + 4 * PAGE_IDS, 2)
    records = [encode_event(event_with(number.to_bytes(16, "big"), row)) for row, number in enumerate(numbers)]
    shard.append(records, prev_origin=0, origin=len(records), duplicates=0, dead_lettered=0, committed_ns=0)
    seen = SeenIds()
    seen.add_sealed(maker.seal().path)
    # Past the filter, which would answer for nearly all that are not there.
    (group,) = seen._groups
    (place,) = group._sorted
    asked = range(numbers[0] - 1, numbers[-1] + 2)
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: read.append(size) or pread(fd, size, at))
    for _ in range(2):
        read.clear()
        for number in asked:
            wanted = np.frombuffer(number.to_bytes(16, "big"), "S16")
            assert place.hold(wanted).tolist() == [number in numbers]
    assert set(read) == {PAGE_IDS * 16}


def test_an_id_is_where_one_begins_and_nowhere_between(tmp_path: Path) -> None:
    """Its bytes may stand across two ids; and where one begins, they may begin a byte earlier too.

    An event taken for a duplicate would be lost, and one taken for new would be stored twice.
    """
    maker = PartitionMaker(new_store(tmp_path), 0)
    shard = maker.begin(capacity_bytes=1 << 16, rows=4)
    stored = [bytes([4] * 15 + [5]), bytes([5] * 16), bytes(range(6, 22)), bytes(range(7, 23)), bytes([8] * 16)]
    records = [encode_event(event_with(event_id, row)) for row, event_id in enumerate(stored)]
    shard.append(records, prev_origin=0, origin=len(records), duplicates=0, dead_lettered=0, committed_ns=0)
    seen = SeenIds()
    seen.add_sealed(maker.seal().path)
    # Past the filter, which would answer for nearly all that are not there; the second time by page.
    (place,) = seen._groups[0]._sorted
    joined = b"".join(stored)
    for _ in range(2):
        for at in range(len(joined) - 15):
            asked = joined[at : at + 16]
            assert place.hold(np.frombuffer(asked, "S16")).tolist() == [asked in stored], at


@pytest.mark.parametrize(
    ("harm", "words"), [(Path.unlink, "was removed"), (lambda path: os.truncate(path, 0), "or written to while in use")]
)
def test_ids_that_are_not_there_any_more_are_an_error_and_not_the_end_of_the_process(
    tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    """A mapped page that is gone, or that a disk cannot read, is a SIGBUS."""
    maker = PartitionMaker(new_store(tmp_path), 0)
    maker.begin()
    (event,) = maker.commit(1)
    path = maker.seal().path
    seen = SeenIds()
    seen.add_sealed(path)
    assert seen.seen([event.event_id]) == [True]
    harm(path)
    with pytest.raises((ShardCorruptError, OSError), match=words):
        seen.seen([event.event_id])


@pytest.mark.parametrize("how", ["swapped", "written anew", "an equal copy"])
@pytest.mark.parametrize("asked", [1, 60])
def test_ids_are_not_looked_for_in_another_file_than_the_one_that_was_added(
    tmp_path: Path, how: str, asked: int
) -> None:
    """Where another's lie otherwise, ids that are stored would be taken for new, and their events stored again."""
    maker, seen = PartitionMaker(new_store(tmp_path), 0), SeenIds()
    paths = []
    for count in (60, 80):
        maker.begin()
        maker.commit(count)
        paths.append(maker.seal().path)
        seen.add_sealed(paths[-1])
    ids = [event.event_id for event in maker.events[:60]]
    for _ in range(2):
        assert all(seen.seen(ids[:asked]))
    first, second = paths
    if how == "swapped":
        aside = first.rename(tmp_path / "aside")
        second.rename(first)
        aside.rename(second)
    elif how == "written anew":
        first.write_bytes(second.read_bytes())
    else:
        shutil.copyfile(first, tmp_path / "copy")
        (tmp_path / "copy").rename(first)
    with pytest.raises(OSError, match="was replaced or written to while in use") as refused:
        seen.seen(ids[:asked])
    assert refused.value.filename == str(first)
    again = SeenIds()
    for path in paths:
        again.add_sealed(path)
    assert all(again.seen(ids[:asked])) or how == "written anew"
