import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

import h5py
import msgspec
import pytest
from shard_maker import PartitionMaker, filled_store, id_text, new_store
from verifying import verify_here

from cluster.testing.disk import flip
from contracts.budgets import SHARD_READER
from contracts.events import decode_event, encode_event
from contracts.hashing import MerkleFrontier, leaf_hash
from stages.persist import verify as verify_module
from stages.persist.check import ShardCheck
from stages.persist.header import HEADER_BYTES, encode_header, read_sealed_header
from stages.persist.names import ShardFile, list_shards, next_name
from stages.persist.newlive import create_live
from stages.persist.rows import ROW_BYTES, CommitRow, pack_blob, row_crc32
from stages.persist.verify import VerifyReport, verify_store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PartitionMaker]:
    directory = tmp_path_factory.mktemp("made")
    return directory, filled_store(directory)[1]


@pytest.fixture
def filled(made: tuple[Path, PartitionMaker], tmp_path: Path) -> tuple[Path, PartitionMaker]:
    """A copy to damage, and who made it: three sealed shards and a live one."""
    return Path(shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)), made[1]


def shards(path: Path) -> list[ShardFile]:
    return list_shards(path)[3]


def reseal(path: Path) -> None:
    """What a careful forger does: makes the file's own checksum right again."""
    header = read_sealed_header(path)
    data = path.read_bytes()
    body = data[HEADER_BYTES:]
    header = msgspec.structs.replace(header, body_sha256=hashlib.sha256(body).hexdigest())
    path.write_bytes(encode_header(header) + body)


def told(report: VerifyReport) -> str:
    assert not report.ok
    return "\n".join(f"{problem.shard}: {problem.where}: {problem.what}" for problem in report.problems)


def test_a_clean_store_is_ok_and_tells_where_it_ends(filled: tuple[Path, PartitionMaker]) -> None:
    path, maker = filled
    progress: list[tuple[int, int]] = []
    report = verify_store(path, on_progress=lambda done, total: progress.append((done, total)))
    tree = MerkleFrontier()
    for event in maker.events:
        tree.append(leaf_hash(encode_event(event)))
    assert report.problems == []
    assert (report.ok, report.shards, report.events, report.unseen_commits) == (True, 4, len(maker.events), 0)
    (end,) = report.partitions
    assert (end.partition, end.origin, end.tree_size, end.root) == (3, maker.origin, tree.size, tree.root().hex())
    assert progress[-1] == (4, 4)


def test_a_store_that_is_being_written_is_ok(tmp_path: Path) -> None:
    maker = PartitionMaker(new_store(tmp_path), 3)
    live = maker.begin()
    for _ in range(3):
        maker.commit(2)
    live.set_watermark(2)
    report = verify_store(tmp_path)
    assert (report.ok, report.events, report.unseen_commits) == (True, 4, 1)
    maker.close()


def edit_records(path: Path, change: Callable[[list[bytes]], None]) -> None:
    """Rewrites the records of a sealed shard (same total length) as somebody with h5py would."""
    with h5py.File(path, "r+") as file:
        offsets = file["offset"][()].tolist()
        data = file["records"][()].tobytes()
        records = [data[start:end] for start, end in pairwise(offsets)]
        change(records)
        file["records"][:] = memoryview(b"".join(records))
        file["offset"][1:] = list(accumulate(map(len, records)))
    reseal_size(path)


def reseal_size(path: Path) -> None:
    data = path.read_bytes()
    end = data.index(b"\n", 9)
    fields = json.loads(data[9:end])
    fields["file_bytes"] = len(data)
    text = data[:9] + json.dumps(fields).encode() + b"\n"
    path.write_bytes((text + b"%08x\n" % zlib.crc32(text)).ljust(HEADER_BYTES - 1) + b"\n" + data[HEADER_BYTES:])
    reseal(path)


def test_a_changed_payload_in_a_sealed_shard_is_named(filled: tuple[Path, PartitionMaker]) -> None:
    path, maker = filled
    victim = maker.events[28 + 12]

    def change(records: list[bytes]) -> None:
        assert decode_event(records[12]) == victim
        records[12] = records[12].replace(b'x"', b'y"') if b'x"' in records[12] else records[12].replace(b"0.", b"1.")

    edit_records(shards(path)[1].path, change)
    text = told(verify_store(path))
    assert f"commit 4, event {id_text(victim)}: its payload hashes to" in text
    assert "its events do not match its checksum" in text
    assert "merkle: the events give a tree of 56" in text


def test_two_swapped_events_are_named(filled: tuple[Path, PartitionMaker]) -> None:
    path, maker = filled

    def swap(records: list[bytes]) -> None:
        records[3], records[4] = records[4], records[3]

    edit_records(shards(path)[0].path, swap)
    text = told(verify_here(path))
    assert f"commit 2, event {id_text(maker.events[3])}: has origin and index" in text


def test_records_that_are_no_events_are_named(filled: tuple[Path, PartitionMaker]) -> None:
    path, _ = filled

    def spoil(records: list[bytes]) -> None:
        records[3] = b"\xc1" + records[3][1:]

    edit_records(shards(path)[0].path, spoil)
    assert "commit 2, event 4 of the shard: is not an event" in told(verify_here(path))


def test_a_changed_column_is_named(filled: tuple[Path, PartitionMaker]) -> None:
    path, maker = filled
    file_path = shards(path)[0].path
    for name in ("timestamp_ns", "consultation_id", "site", "audit_hash"):
        before = file_path.read_bytes()
        with h5py.File(file_path, "r+") as file:
            values = file[name][()]
            values[5] ^= 1
            file[name][...] = values
        reseal_size(file_path)
        assert f"{name}, event {id_text(maker.events[5])}: differs" in told(verify_here(path))
        file_path.write_bytes(before)
    assert verify_here(path).ok


def test_a_changed_attribute_of_a_sealed_shard_is_named(filled: tuple[Path, PartitionMaker]) -> None:
    path, _ = filled
    sealed = shards(path)[1].path
    for name in (
        "partition",
        "shard",
        "store",
        "cluster",
        "first_origin",
        "last_origin",
        "events",
        "tree_size",
        "root",
    ):
        before = sealed.read_bytes()
        with h5py.File(sealed, "r+") as file:
            value = file.attrs[name]
            file.attrs[name] = f"{value}x" if isinstance(value, str) else value + 1
        reseal_size(sealed)
        assert f"attribute {name}: is" in told(verify_here(path))
        sealed.write_bytes(before)
    assert verify_here(path).ok


@pytest.mark.parametrize("name", ["merkle/before", "merkle/after"])
def test_a_changed_frontier_in_a_sealed_shard_is_found(filled: tuple[Path, PartitionMaker], name: str) -> None:
    path, _ = filled
    sealed = shards(path)[1].path
    with h5py.File(sealed, "r+") as file:
        file[name][0, 0] ^= 1
    reseal_size(sealed)
    assert "the frontiers in the file differ from those in its header" in told(verify_here(path))


def test_a_header_that_places_an_array_elsewhere_is_found(filled: tuple[Path, PartitionMaker]) -> None:
    path, _ = filled
    sealed = shards(path)[1].path
    header = read_sealed_header(sealed)
    one, other = "by_event_id/rows", "by_consultation/rows"
    assert header.areas[one].bytes == header.areas[other].bytes
    swapped = {**header.areas, one: header.areas[other], other: header.areas[one]}
    body = sealed.read_bytes()[HEADER_BYTES:]
    sealed.write_bytes(encode_header(msgspec.structs.replace(header, areas=swapped)) + body)
    assert "header: does not place the arrays where they are" in told(verify_here(path))


def test_a_commit_that_says_another_end_under_a_right_checksum_is_found(filled: tuple[Path, PartitionMaker]) -> None:
    path, maker = filled
    sealed = shards(path)[0].path
    with h5py.File(sealed, "r+") as file:
        row = CommitRow(*file["commits"][0].tolist())
        assert row.events == 1
        row = row._replace(end_bytes=row.end_bytes + 1)
        file["commits"][0] = row._replace(crc32=row_crc32(row, pack_blob([encode_event(maker.events[0])])))
    reseal_size(sealed)
    assert f"commit 1, events {id_text(maker.events[0])}: its events do not match" in told(verify_here(path))


def test_a_dropped_event_is_found(filled: tuple[Path, PartitionMaker]) -> None:
    path, _ = filled
    with h5py.File(shards(path)[0].path, "r+") as file:
        file["records"].resize((int(file["offset"][-2]),))
    reseal_size(shards(path)[0].path)
    assert "commit 4" in told(verify_here(path))


def test_a_flipped_bit_anywhere_is_found(filled: tuple[Path, PartitionMaker]) -> None:
    path, _ = filled
    sealed = shards(path)[1]
    whole = sealed.path.read_bytes()
    for offset in (20, 300, HEADER_BYTES + 9, HEADER_BYTES + 600, len(whole) // 2, len(whole) - 3):
        flip(sealed.path, offset)
        assert sealed.path.name in told(verify_here(path))
        sealed.path.write_bytes(whole)
    assert verify_here(path).ok


def test_a_damaged_chunk_names_the_events_in_it(filled: tuple[Path, PartitionMaker]) -> None:
    path, maker = filled
    sealed = shards(path)[0]
    with h5py.File(sealed.path, "r") as file:
        chunk = file["records"].id.get_chunk_info(0)
    flip(sealed.path, chunk.byte_offset + chunk.size // 2)
    text = told(verify_here(path))
    assert f"commit 1, event {id_text(maker.events[0])}: " in text
    assert f"events {id_text(maker.events[8])} to {id_text(maker.events[27])}" in text


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_deleted_shard_is_named(filled: tuple[Path, PartitionMaker], number: int) -> None:
    path, _ = filled
    shards(path)[number].path.unlink()
    assert f"before it: shard {number + 1} of partition 3 is missing" in told(verify_here(path))


def test_a_cut_short_or_empty_shard_is_found(filled: tuple[Path, PartitionMaker]) -> None:
    path, _ = filled
    for shard in (shards(path)[2], shards(path)[3]):
        whole = shard.path.read_bytes()
        for size in (0, 100, len(whole) // 2, len(whole) - 1):
            shard.path.write_bytes(whole[:size])
            assert shard.path.name in told(verify_here(path))
        shard.path.write_bytes(whole)


def test_a_changed_live_commit_is_named(filled: tuple[Path, PartitionMaker]) -> None:
    path, maker = filled
    live = shards(path)[3].path
    data = live.read_bytes()
    flip(live, data.index(maker.events[-1].payload))
    assert "commit 2: is empty or fails its checksum, though commits up to 2 were accepted" in told(verify_here(path))


def test_a_live_watermark_beyond_its_rows_is_found(filled: tuple[Path, PartitionMaker]) -> None:
    path, _ = filled
    live = shards(path)[3].path
    with h5py.File(live, "r+") as file:
        file["watermark"][0] = 3
    assert "commit 3: is empty" in told(verify_here(path))
    with h5py.File(live, "r+") as file:
        file["watermark"][0] = -1
    assert "watermark: is -1" in told(verify_here(path))


def test_a_commit_that_does_not_go_on_from_the_last_is_found(filled: tuple[Path, PartitionMaker]) -> None:
    path, _ = filled
    with h5py.File(shards(path)[0].path, "r+") as file:
        rows = file["commits"][()]
        rows[2, 3] -= 1
        file["commits"][...] = rows
    reseal_size(shards(path)[0].path)
    text = told(verify_here(path))
    assert "commit 3: goes on from origin" in text
    assert len(rows.tobytes()) == 4 * ROW_BYTES


def test_an_event_id_stored_twice_is_named(tmp_path: Path) -> None:
    maker = PartitionMaker(new_store(tmp_path), 3)
    maker.begin()
    first = maker.commit(4)[2]
    maker.seal()
    live = maker.begin()
    again = msgspec.structs.replace(first, origin=maker.origin + 1)
    live.append(
        [encode_event(again)],
        prev_origin=maker.origin,
        origin=maker.origin + 1,
        duplicates=0,
        dead_lettered=0,
        committed_ns=0,
    )
    live.sync()
    live.set_watermark(1)
    assert f"event {id_text(first)}: is stored before in this partition" in told(verify_here(tmp_path))
    maker.close()


def test_a_shard_of_another_store_or_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    filled_store(tmp_path / "a")
    store, _ = filled_store(tmp_path / "b")
    foreign, own = shards(tmp_path / "b")[1].path, shards(tmp_path / "a")[1].path
    own.write_bytes(foreign.read_bytes())
    assert "belongs to store" in told(verify_here(tmp_path / "a"))
    moved = shards(tmp_path / "b")[3].path
    os.rename(moved, moved.with_name("p004-00000001.live.h5"))
    (tmp_path / "b" / "copy of p003.h5").touch()
    (tmp_path / "b" / "copy.next.h5").touch()
    prepared = tmp_path / "b" / next_name(5, 1)
    prepared.write_bytes(foreign.read_bytes())
    text = told(verify_here(tmp_path / "b"))
    assert "copy.next.h5: file name: is not the name of a shard" in text
    assert f"{prepared.name}: header: is no prepared shard" in text
    for shard in (2, 1):
        create_live(prepared, store=store, partition=5, shard=shard, capacity_bytes=1 << 14, rows=8, created_ns=1)
        text = told(verify_here(tmp_path / "b"))
        assert (f"{prepared.name}: header: is shard 2 of partition 5" in text) == (shard == 2)
    assert prepared.name not in text
    assert "but its name says another" in text
    assert "copy of p003.h5: file name: is not the name of a shard" in text


@pytest.mark.parametrize(
    ("reader", "expected"),
    [
        ("import time; time.sleep(60)", "took longer than 0.3 s"),
        ("import os; os.abort()", "its reader died (exit -6)"),
        ("print('{\"findings', end='')", "its reader died (exit 0)"),
    ],
)
def test_a_reader_that_hangs_or_dies_is_a_problem(
    filled: tuple[Path, PartitionMaker], monkeypatch: pytest.MonkeyPatch, reader: str, expected: str
) -> None:
    monkeypatch.setattr(verify_module, "READER_COMMAND", [sys.executable, "-c", reader])
    report = verify_store(filled[0], shard_timeout_s=0.3 if "sleep" in reader else 20)
    assert len(report.problems) >= 4
    assert expected in told(report)


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Every reading process that is started."""
    started: list[subprocess.Popen[bytes]] = []
    start = verify_module._Worker._start

    def noted(worker: verify_module._Worker) -> subprocess.Popen[bytes]:
        started.append(start(worker))
        return started[-1]

    monkeypatch.setattr(verify_module._Worker, "_start", noted)
    return started


@pytest.mark.parametrize(("pays_after_s", "count"), [(0.0, 2), (3600.0, 1)])
def test_a_second_reader_is_started_where_one_is_not_soon_done(
    filled: tuple[Path, PartitionMaker],
    monkeypatch: pytest.MonkeyPatch,
    readers: list[subprocess.Popen[bytes]],
    pays_after_s: float,
    count: int,
) -> None:
    path, _ = filled
    monkeypatch.setattr(verify_module, "SHARD_READER", msgspec.structs.replace(SHARD_READER, s=pays_after_s))
    assert verify_store(path).ok
    assert len(readers) == count


def test_a_verification_that_is_broken_off_leaves_no_reader(
    filled: tuple[Path, PartitionMaker], readers: list[subprocess.Popen[bytes]]
) -> None:
    def enough(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_store(filled[0], on_progress=enough)
    assert readers
    assert all(reader.poll() is not None for reader in readers)


def test_a_verification_that_is_broken_off_wakes_whoever_waits_for_a_reader(
    filled: tuple[Path, PartitionMaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = (
        f"import signal; input(); print({msgspec.json.encode(ShardCheck()).decode()!r}, flush=True); signal.pause()"
    )
    monkeypatch.setattr(verify_module, "READER_COMMAND", [sys.executable, "-c", answer])

    def enough(*_: object) -> None:
        raise KeyboardInterrupt

    # Which of two sees the end of the process first is chance.
    for _ in range(10):
        begun_s = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            verify_store(filled[0], shard_timeout_s=30, on_progress=enough)
        assert time.monotonic() - begun_s < 30, "a thread slept until the shard's time was up"
