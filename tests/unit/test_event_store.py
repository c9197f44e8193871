import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from uuid import UUID

import pytest
from shard_maker import PartitionMaker, filled_store, new_store

from contracts.errors import ShardCorruptError, ShardError
from contracts.events import Event
from stages.persist import liveindex, openshards, sealed
from stages.persist.header import HEADER_BYTES, read_live_header, read_sealed_header
from stages.persist.names import ShardFile, list_shards
from stages.persist.store import EventStore


def order(event: Event) -> tuple[int, int]:
    return event.origin, event.index


@pytest.fixture
def two_partitions(tmp_path: Path) -> tuple[Path, list[Event]]:
    store, maker = filled_store(tmp_path / "shards")
    other = PartitionMaker(store, 5)
    other.begin()
    other.commit(40)
    other.commit(11)
    other.close()
    return tmp_path, sorted(maker.events + other.events, key=order)


def test_all_events_come_in_order_of_origin_from_live_and_sealed_shards(
    two_partitions: tuple[Path, list[Event]],
) -> None:
    path, events = two_partitions
    with EventStore(path) as store:
        assert store.directory == path / "shards"
        assert store.partitions() == [3, 5]
        assert store.count() == len(events)
        stored = list(store.iterate())
        assert [order(item.event) for item in stored] == [order(event) for event in events]
        assert sorted(item.event.event_id for item in stored) == sorted(event.event_id for event in events)
        for partition in (3, 5):
            lane = list(store.iterate(partition))
            assert {item.partition for item in lane} == {partition}
            assert [item.leaf for item in lane] == list(range(len(lane)))
        assert list(store.iterate(7)) == []
        infos = store.shards()
        assert [(info.partition, info.shard, info.sealed) for info in infos] == [
            (3, 1, True),
            (3, 2, True),
            (3, 3, True),
            (3, 4, False),
            (5, 1, False),
        ]
        assert sum(info.events for info in infos) == len(events)
        assert infos[1].first_origin == (infos[0].last_origin or 0) + 1


def test_one_event_and_one_consultation_are_found_wherever_they_are(two_partitions: tuple[Path, list[Event]]) -> None:
    path, events = two_partitions
    with EventStore(path) as store:
        for event in events:
            found = store.event(UUID(bytes=event.event_id))
            assert found is not None
            assert found.event == event
        assert store.event(bytes(16)) is None
        for consultation in {event.consultation_id for event in events}:
            expected = [event for event in events if event.consultation_id == consultation]
            assert [item.event for item in store.consultation(consultation)] == expected
        assert store.consultation(UUID(int=1)) == []


def test_events_are_selected_by_site_type_and_time(two_partitions: tuple[Path, list[Event]]) -> None:
    path, events = two_partitions
    middle = events[len(events) // 2].timestamp_ns
    with EventStore(path) as store:

        def ids(**wanted: object) -> set[bytes]:
            return {item.event.event_id for item in store.by(**wanted)}  # type: ignore[arg-type]

        assert ids(site="clinic_7") == {event.event_id for event in events if event.site == "clinic_7"}
        assert ids(event_type="URGENCY_CLASSIFIED", since_ns=middle) == {
            event.event_id
            for event in events
            if event.event_type == "URGENCY_CLASSIFIED" and event.timestamp_ns >= middle
        }
        assert ids(until_ns=middle) | ids(since_ns=middle) == {event.event_id for event in events}
        assert not ids(until_ns=middle) & ids(since_ns=middle)
        assert ids(site="nowhere") == set()


def test_columns_are_those_of_the_events_in_order(two_partitions: tuple[Path, list[Event]]) -> None:
    path, _ = two_partitions
    with EventStore(path) as store:
        stored = list(store.iterate())
        columns = store.columns()
        for name in ("site", "event_type", "timestamp_ns", "origin", "index"):
            assert columns[name].tolist() == [getattr(item.event, name) for item in stored]
        for name in ("event_id", "consultation_id", "audit_hash"):
            assert [row.tobytes() for row in columns[name]] == [getattr(item.event, name) for item in stored]
        assert columns["partition"].tolist() == [item.partition for item in stored]
        assert list(store.columns(["site"])) == ["site"]
        with pytest.raises(ShardError, match="no column colour"):
            store.columns(["colour"])


def test_a_dataframe_has_a_row_for_each_event_in_order(two_partitions: tuple[Path, list[Event]]) -> None:
    # Here, because every test process loads this module, and one of them runs this test.
    import pandas

    path, events = two_partitions
    with EventStore(path) as store:
        frame = store.to_dataframe()
        stored = list(store.iterate())
    assert [*frame["event_id"]] == [str(UUID(bytes=event.event_id)) for event in events]
    assert [*frame["consultation_id"]] == [str(UUID(bytes=event.consultation_id)) for event in events]
    assert [*frame["audit_hash"]] == [event.audit_hash.hex() for event in events]
    assert [time.value for time in frame["timestamp"]] == [event.timestamp_ns for event in events]
    assert {str(time.tz) for time in frame["timestamp"]} == {"UTC"}
    assert [*frame["partition"]] == [item.partition for item in stored]
    for name in ("site", "event_type", "origin", "index"):
        assert [*frame[name]] == [getattr(event, name) for event in events]
    by_site = frame.groupby("site").size().to_dict()
    assert by_site == {site: sum(event.site == site for event in events) for site in by_site}
    hour = frame[frame["timestamp"] >= pandas.Timestamp(events[10].timestamp_ns, unit="ns", tz="UTC")]
    assert len(hour) == len(events) - 10


def test_an_empty_store_gives_an_empty_dataframe(tmp_path: Path) -> None:
    new_store(tmp_path)
    with EventStore(tmp_path) as store:
        frame = store.to_dataframe()
    assert len(frame) == 0
    assert {"event_id", "timestamp", "partition"} <= set(frame.columns)


def test_a_dataframe_without_pandas_says_what_to_install(
    two_partitions: tuple[Path, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with EventStore(two_partitions[0]) as store, pytest.raises(ShardError, match="pandas is not installed"):
        store.to_dataframe()


def test_nothing_past_the_watermark_is_shown(tmp_path: Path) -> None:
    maker = PartitionMaker(new_store(tmp_path), 3)
    live = maker.begin()
    first = maker.commit(3)
    second = maker.commit(2)
    live.set_watermark(1)
    with EventStore(tmp_path) as store:
        assert [item.event for item in store.iterate()] == first
        assert store.event(second[0].event_id) is None
        live.set_watermark(2)
        assert [item.event for item in store.iterate()] == first + second
    maker.close()


def test_a_directory_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"there is no store here .*; name a shards directory"):
        EventStore(tmp_path)


def test_a_damaged_commit_is_an_error_and_not_a_short_answer(tmp_path: Path) -> None:
    maker = PartitionMaker(new_store(tmp_path), 3)
    live = maker.begin()
    events = maker.commit(3) + maker.commit(3)
    with live.path.open("r+b") as file:
        file.seek(live.header.frames.offset + live.end_bytes - 5)
        file.write(b"\0")
    maker.close()
    with EventStore(tmp_path) as store:
        with pytest.raises(ShardCorruptError, match="commit 2 is not whole"):
            list(store.iterate())
        with pytest.raises(ShardCorruptError, match="commit 2 is not whole"):
            store.event(events[-1].event_id)


def look_up_all(store: EventStore, events: list[Event]) -> None:
    for event in events:
        found = store.event(event.event_id)
        assert found is not None
        assert found.event == event


@pytest.mark.parametrize("form", ["sealed", "live"])
def test_a_shard_cut_short_while_it_is_open_is_an_error_and_ends_no_reader(
    two_partitions: tuple[Path, list[Event]], form: str
) -> None:
    path, events = two_partitions
    with EventStore(path) as store:
        look_up_all(store, events)
        for shards in list_shards(store.directory).values():
            for shard in shards:
                if shard.sealed == (form == "sealed"):
                    os.truncate(shard.path, HEADER_BYTES)
        with pytest.raises(ShardCorruptError, match="was cut short while in use"):
            look_up_all(store, events)


def test_a_bad_sector_in_what_finds_an_event_is_an_error_and_ends_no_reader(
    two_partitions: tuple[Path, list[Event]], bad_sector: Callable[[Path, int], None]
) -> None:
    path, events = two_partitions
    with EventStore(path) as store:
        look_up_all(store, events)
        shard = list_shards(store.directory)[3][1].path
        bad_sector(shard, read_sealed_header(shard).areas["by_event_id/ids"].offset)
        with pytest.raises(ShardCorruptError, match=f"{shard}: by_event_id/ids cannot be read .*Input/output error"):
            look_up_all(store, events)
        live = list_shards(store.directory)[5][0].path
        bad_sector(live, read_live_header(live).frames.offset)
        with pytest.raises(OSError, match=f"Input/output error: '{live}'"), EventStore(path) as another:
            another.consultation(events[0].consultation_id)


def test_an_index_read_in_pieces_finds_every_event(
    two_partitions: tuple[Path, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events = two_partitions
    monkeypatch.setattr(liveindex, "_READ_BYTES", 1000)
    monkeypatch.setattr(sealed, "_IDS_AT_ONCE", 2)
    with EventStore(path) as store:
        look_up_all(store, events)
        for event in events:
            wanted = [one for one in events if one.consultation_id == event.consultation_id]
            assert [item.event for item in store.consultation(event.consultation_id)] == wanted
        assert [store.event(bytes([first]) * 16) for first in range(256)] == [None] * 256


def test_a_shard_sealed_between_listing_and_opening_is_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = PartitionMaker(new_store(tmp_path), 3)
    maker.begin()
    maker.commit(9)
    stale = list_shards(tmp_path)
    maker.seal()
    answers: list[dict[int, list[ShardFile]]] = [stale, stale, stale]
    monkeypatch.setattr(openshards, "list_shards", lambda path: answers.pop() if answers else list_shards(path))
    with EventStore(tmp_path) as store:
        assert [item.event for item in store.iterate(3)] == maker.events


def test_an_abandoned_iteration_closes_its_files(two_partitions: tuple[Path, list[Event]]) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with EventStore(two_partitions[0]) as store:
        events = store.iterate()
        next(events)
        del events
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before


def test_readers_see_a_growing_prefix_while_shards_are_written_and_sealed(tmp_path: Path) -> None:
    maker = PartitionMaker(new_store(tmp_path), 3)
    maker.begin()
    maker.commit(1)
    finished = threading.Event()

    def write() -> None:
        try:
            for _ in range(25):
                for count in (3, 1, 10):
                    maker.commit(count)
                maker.seal()
                maker.begin()
        finally:
            finished.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen: list[bytes] = []
    with EventStore(tmp_path) as store:
        while not finished.is_set():
            now = [item.event.event_id for item in store.iterate()]
            assert now[: len(seen)] == seen
            seen = now
            assert store.consultation(maker.consultations[0]) is not None
        writer.join()
        assert [item.event for item in store.iterate()] == maker.events
    maker.close()


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """This process may open so many files more."""
    more = 16
    before = getrlimit(RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/dev/fd")))
    free = [number for number in range(len(used) + more + 1) if number not in used]
    setrlimit(RLIMIT_NOFILE, (free[more], before[1]))
    try:
        yield more
    finally:
        setrlimit(RLIMIT_NOFILE, before)


def test_more_shards_than_files_may_be_open_are_read(tmp_path: Path, few_descriptors: int) -> None:
    maker = PartitionMaker(new_store(tmp_path), 0)
    for _ in range(few_descriptors + 2):
        maker.begin(capacity_bytes=1 << 14, rows=8)
        maker.commit(1)
        maker.seal()
    with EventStore(tmp_path) as store:
        assert len(store.columns(["site"])["site"]) == len(maker.events)
        assert len(list(store.iterate())) == len(maker.events)
        assert [store.event(event.event_id) for event in maker.events].count(None) == 0
        assert len(store.shards()) == len(maker.events)


@pytest.mark.parametrize("of", ["sealed", "live"])
def test_a_shard_under_the_name_of_another_lane_is_not_shown_as_its(tmp_path: Path, of: str) -> None:
    filled_store(tmp_path)
    shard = next(file for file in list_shards(tmp_path)[3] if file.sealed == (of == "sealed"))
    path = shard.path.rename(shard.path.with_name(shard.path.name.replace("p003-", "p005-")))
    with EventStore(tmp_path) as store:
        for look in (lambda: list(store.iterate(5)), lambda: store.event(bytes(16)), lambda: store.event(bytes(16))):
            with pytest.raises(ShardCorruptError, match=f"{path}: has the name of another shard"):
                look()


@pytest.mark.parametrize("name", ["p003-00000001-{:016d}-{:016d}.h5", "p003-00000009-{:016d}-{:016d}.h5"])
def test_a_shard_that_lies_there_twice_is_not_shown_twice(tmp_path: Path, name: str) -> None:
    _, maker = filled_store(tmp_path)
    first = list_shards(tmp_path)[3][0]
    with EventStore(tmp_path) as store:
        assert store.count() == len(maker.events)
        shutil.copy(first.path, tmp_path / name.format(9000, 9001))
        with pytest.raises(ShardCorruptError, match=r"has the n(umber|ame) of"):
            list(store.iterate())


def test_of_two_whole_shards_with_one_number_none_is_shown(tmp_path: Path) -> None:
    """Which of them is right only the cluster's records tell; events of the other never were."""
    for seed in (1, 2):
        maker = PartitionMaker(new_store(tmp_path / str(seed)), 0, seed)
        maker.begin()
        maker.commit(2 + seed)
        sealed_file = maker.seal().path
    shutil.move(sealed_file, tmp_path / "1")
    with pytest.raises(ShardCorruptError, match="has the number of"), EventStore(tmp_path / "1") as reader:
        reader.count()
