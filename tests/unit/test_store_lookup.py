"""Looking one consultation or event up, held against a scan over everything, while the store changes between calls."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest
from shard_maker import NOW_NS, PartitionMaker, make_event, new_store

from contracts.errors import ShardCorruptError
from contracts.events import Event, encode_event
from stages.persist import store as store_module
from stages.persist.header import HEADER_BYTES
from stages.persist.names import list_shards
from stages.persist.openshards import OpenShards
from stages.persist.rows import LENGTH_BYTES, ROW_BYTES, ROW_COLUMNS
from stages.persist.seal import CHUNK_BYTES
from stages.persist.sealed import SealedReader
from stages.persist.store import EventStore

FOLD = 0x9E3779B97F4A7C15


def add(maker: PartitionMaker, events: list[Event], *, shown: bool = True) -> None:
    """Commits exactly these events, whose origins follow what is there."""
    live = maker.live
    assert live is not None
    last = events[-1].origin if events else maker.origin + 1
    live.append(
        [encode_event(event) for event in events],
        prev_origin=maker.origin,
        origin=last,
        duplicates=0,
        dead_lettered=0,
        committed_ns=NOW_NS,
    )
    live.sync()
    maker.origin = last
    if shown:
        live.set_watermark(live.commits)
        maker.events += events


class Scenario:
    """Some partitions that grow, roll and are sealed at random."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        store = new_store(directory)
        self.makers = [PartitionMaker(store, number, seed) for number in (0, 3, 4)]
        # Zero bytes at an id's end, and ids that differ in one byte only.
        base = self.rng.randbytes(15)
        self.consultations = [bytes(16), base + b"\0", base + b"\1", base[:13] + b"\0\0\0"]
        self.consultations += [self.rng.randbytes(16) for _ in range(6)]
        for maker in self.makers:
            maker.origin = self.rng.choice([0, 100, 2**16 - 20, 2**32 - 50])
            maker.begin()

    def step(self) -> None:
        maker = self.rng.choice(self.makers)
        live = maker.live
        assert live is not None
        if live.events and self.rng.random() < 0.15:
            maker.seal()
            maker.begin()
            return
        origin = maker.origin
        events = []
        for _ in range(self.rng.choice([0, 1, 1, 1, 2, 5, 60])):
            origin += self.rng.randint(1, 5)
            index = self.rng.choice([0, 0, 0, 5, 200, 70_000])
            consultation = self.rng.choice(self.consultations) if self.rng.random() < 0.8 else None
            events.append(make_event(self.rng, origin, index=index, consultation=consultation))
        add(maker, events)

    @property
    def events(self) -> list[Event]:
        found = [event for maker in self.makers for event in maker.events]
        return sorted(found, key=lambda event: (event.origin, event.index))

    def close(self) -> None:
        for maker in self.makers:
            maker.close()


def check_lookups(store: EventStore, events: list[Event], consultations: list[bytes], rng: random.Random) -> None:
    scanned = {stored.event.event_id: stored for stored in store.iterate()}
    for consultation in consultations:
        expected = [event for event in events if event.consultation_id == consultation]
        found = store.consultation(consultation)
        assert [stored.event for stored in found] == expected
        assert found == [scanned[event.event_id] for event in expected]
    for event in rng.sample(events, min(len(events), 20)):
        assert store.event(event.event_id) == scanned[event.event_id]
    assert store.event(rng.randbytes(16)) is None
    assert store.consultation(rng.randbytes(16)) == []


@pytest.mark.parametrize("seed", range(4))
def test_what_is_looked_up_is_what_a_scan_finds_while_the_store_grows_rolls_and_is_sealed(
    tmp_path: Path, seed: int
) -> None:
    scenario = Scenario(tmp_path, seed)
    with EventStore(tmp_path) as kept:
        for _ in range(12):
            for _ in range(scenario.rng.randint(1, 12)):
                scenario.step()
            check_lookups(kept, scenario.events, scenario.consultations, scenario.rng)
        with EventStore(tmp_path) as fresh:
            check_lookups(fresh, scenario.events, scenario.consultations, scenario.rng)
    scenario.close()


@pytest.fixture
def maker(tmp_path: Path) -> Iterator[PartitionMaker]:
    maker = PartitionMaker(new_store(tmp_path), 3)
    maker.begin()
    yield maker
    maker.close()


def of(events: list[Event], consultation: bytes) -> list[Event]:
    return [event for event in events if event.consultation_id == consultation]


def found(store: EventStore, consultation: bytes) -> list[Event]:
    return [stored.event for stored in store.consultation(consultation)]


def test_a_lookup_never_shows_what_is_past_the_watermark(tmp_path: Path, maker: PartitionMaker) -> None:
    wanted = maker.consultations[0]
    first = [make_event(maker.rng, 1, consultation=wanted)]
    hidden = [make_event(maker.rng, 2, consultation=wanted)]
    assert maker.live is not None
    with EventStore(tmp_path) as store:
        add(maker, first)
        assert found(store, wanted) == first
        add(maker, hidden, shown=False)
        assert found(store, wanted) == first
        assert store.event(hidden[0].event_id) is None
        maker.live.set_watermark(2)
        assert found(store, wanted) == first + hidden
        maker.live.set_watermark(1)
        assert found(store, wanted) == first


def test_a_live_shard_begun_anew_under_its_name_is_not_taken_for_the_old_one(
    tmp_path: Path, maker: PartitionMaker
) -> None:
    assert maker.live is not None
    path = maker.live.path
    with EventStore(tmp_path) as store:
        assert store.consultation(maker.consultations[0]) == []
        maker.close()
        path.unlink()
        maker.number = 0
        maker.begin()
        events = maker.commit(20)
        assert maker.live.path == path
        assert found(store, maker.consultations[0]) == of(events, maker.consultations[0])


def test_a_sealed_shard_put_back_is_read_again(tmp_path: Path, maker: PartitionMaker) -> None:
    events = maker.commit(20)
    path = maker.seal().path
    whole = path.read_bytes()
    with EventStore(tmp_path) as store:
        assert store.event(events[0].event_id) is not None
        path.unlink()
        assert store.event(events[0].event_id) is None
        path.write_bytes(whole)
        assert store.event(events[0].event_id) is not None


def test_lookups_in_the_middle_of_an_iteration_disturb_neither(tmp_path: Path, maker: PartitionMaker) -> None:
    wanted = maker.consultations[0]
    for _ in range(3):
        for _ in range(4):
            maker.commit(9)
        maker.seal()
        maker.begin()
    maker.commit(9)
    with EventStore(tmp_path) as store:
        seen = []
        for number, stored in enumerate(store.iterate()):
            if number == 50:
                maker.commit(5)
            if number == 100:
                maker.seal()
                maker.begin()
            assert found(store, wanted) == of(maker.events, wanted)
            seen.append(stored.event)
        assert seen == maker.events[: len(seen)]
        assert len(seen) >= 117


def test_records_across_many_chunks_are_found_also_in_the_middle_of_an_iteration(tmp_path: Path) -> None:
    maker = PartitionMaker(new_store(tmp_path), 3)
    maker.begin(capacity_bytes=4 << 20)
    for _ in range(8):
        maker.commit(250)
    assert maker.seal().header.record_bytes > 3 * CHUNK_BYTES
    with EventStore(tmp_path) as store:
        seen = []
        for number, stored in enumerate(store.iterate()):
            seen.append(stored.event)
            if number % 400 == 0:
                wanted = maker.consultations[number // 400]
                assert found(store, wanted) == of(maker.events, wanted)
                assert store.event(maker.events[-1 - number].event_id) is not None
        assert seen == maker.events


def test_a_shard_sealed_while_it_is_looked_into_is_still_read(
    tmp_path: Path, maker: PartitionMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = maker.commit(30)
    listed = OpenShards.shards
    with EventStore(tmp_path) as store:

        def list_then_seal(self: OpenShards, *, again: bool = False) -> object:
            shards = listed(self, again=again)
            if maker.live is not None:
                maker.seal()
            return shards

        monkeypatch.setattr(OpenShards, "shards", list_then_seal)
        for consultation in maker.consultations:
            assert found(store, consultation) == of(events, consultation)
        assert [shard.sealed for shard in list_shards(tmp_path)[3]] == [True]


def test_ids_that_fold_alike_are_told_apart(tmp_path: Path, maker: PartitionMaker) -> None:
    def alike(low: int, high: int) -> bytes:
        low ^= (high * FOLD) % 2**64
        return low.to_bytes(8, "little") + high.to_bytes(8, "little")

    ids = [alike(77, high) for high in range(40)]
    events = [make_event(maker.rng, origin, consultation=wanted) for origin, wanted in enumerate(ids, 1)]
    add(maker, events)
    with EventStore(tmp_path) as store:
        for event in events:
            assert found(store, event.consultation_id) == [event]


def test_a_store_with_few_file_descriptors_is_read_all_the_same(
    tmp_path: Path, maker: PartitionMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(12):
        maker.commit(3)
        maker.seal()
        maker.begin()
    with EventStore(tmp_path) as store:
        monkeypatch.setattr(store_module, "getrlimit", lambda _: (4 * 5, 4 * 5))
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        for consultation in maker.consultations:
            assert found(store, consultation) == of(maker.events, consultation)
        after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        # Five mapped shards; a live one, open and mapped.
        assert after - before <= 5 + 2


def damage(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("commits", [3, 50])
@pytest.mark.parametrize("record", range(3))
@pytest.mark.parametrize("change", [-(2**31), -1, 1, 2**31])
def test_a_damaged_length_in_a_live_shard_is_an_error_whatever_is_looked_up(
    tmp_path: Path, maker: PartitionMaker, commits: int, record: int, change: int
) -> None:
    live = maker.live
    assert live is not None
    maker.commit(3)
    at = live.end_bytes
    for event in maker.commit(3)[:record]:
        at += LENGTH_BYTES + len(encode_event(event))
    for _ in range(commits - 2):
        maker.commit(3)
    at += live.header.frames.offset
    length = int.from_bytes(live.path.read_bytes()[at : at + LENGTH_BYTES], "little")
    damage(live.path, at, ((length + change) % 2**32).to_bytes(LENGTH_BYTES, "little"))
    with EventStore(tmp_path) as store, pytest.raises(ShardCorruptError, match="commit 2 is not whole"):
        store.consultation(bytes(16))


@pytest.mark.parametrize("column", ["ordinal", "end_bytes", "events"])
def test_a_damaged_row_in_a_live_shard_is_an_error_whatever_is_looked_up(
    tmp_path: Path, maker: PartitionMaker, column: str
) -> None:
    live = maker.live
    assert live is not None
    for _ in range(3):
        maker.commit(3)
    damage(live.path, live.header.index.offset + ROW_BYTES + 8 * ROW_COLUMNS.index(column), b"\xf7" * 7)
    with EventStore(tmp_path) as store, pytest.raises(ShardCorruptError, match="commit 2 is not whole"):
        store.consultation(bytes(16))


@pytest.mark.parametrize("at", [0, 3, 4, 9])
def test_bytes_that_are_no_event_in_a_live_shard_are_an_error_whatever_is_looked_up(
    tmp_path: Path, maker: PartitionMaker, at: int
) -> None:
    """Damages the array's header, the version tag, the origin and the mark before the event id."""
    live = maker.live
    assert live is not None
    maker.origin = 2**16
    maker.commit(2)
    assert live.read_blobs(LENGTH_BYTES, LENGTH_BYTES + 5)[3:] == b"\x01\xce"
    damage(live.path, live.header.frames.offset + LENGTH_BYTES + at, b"\xa0")
    with EventStore(tmp_path) as store, pytest.raises(ShardCorruptError, match="commit 1 is not whole"):
        store.event(bytes(16))


@pytest.mark.parametrize("name", ["by_consultation/rows", "by_event_id/rows"])
@pytest.mark.parametrize("value", [b"\xff\xff\xff\xff", b"\1\0\0\0"])
def test_a_search_index_that_points_wrong_is_an_error_and_no_other_event(
    tmp_path: Path, maker: PartitionMaker, name: str, value: bytes
) -> None:
    events = sorted((make_event(maker.rng, origin) for origin in range(1, 6)), key=lambda event: event.origin)
    add(maker, events)
    path = maker.seal().path
    area = SealedReader(path).header.areas[name]
    damage(path, area.offset, value * 5)
    with EventStore(tmp_path) as store, pytest.raises(ShardCorruptError, match="cannot be read"):
        _ = store.event(events[0].event_id) if "event_id" in name else store.consultation(events[0].consultation_id)


@pytest.mark.parametrize("name", ["records", "offset"])
def test_a_damaged_chunk_is_an_error(tmp_path: Path, maker: PartitionMaker, name: str) -> None:
    events = maker.commit(20)
    path = maker.seal().path
    with h5py.File(path, "r", locking=False) as file:
        packed = file[name].id.read_direct_chunk((0,))[1]
    at = path.read_bytes().index(packed)
    assert at > HEADER_BYTES
    damage(path, at + len(packed) // 2, b"\x55\xaa\x55\xaa")
    with EventStore(tmp_path) as store, pytest.raises(ShardCorruptError, match=f"{name} cannot be read"):
        store.event(events[0].event_id)


def test_a_sealed_shard_cut_short_is_an_error_also_after_it_was_opened(tmp_path: Path, maker: PartitionMaker) -> None:
    events = maker.commit(20)
    path = maker.seal().path
    with EventStore(tmp_path) as store:
        assert store.count() == 20
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(ShardCorruptError, match="was cut short while in use"):
            store.event(events[0].event_id)
