import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from shard_maker import NOW_NS, PartitionMaker, new_store

from cluster.testing.disk import flip
from contracts.errors import ShardCorruptError, ShardError, StoreFailedError
from contracts.events import encode_event
from stages.persist import files
from stages.persist.check import check_shard
from stages.persist.files import PAGE_BYTES
from stages.persist.live import LiveReader, LiveShard
from stages.persist.rows import ROW_BYTES, blob_bytes


@pytest.fixture
def maker(tmp_path: Path) -> PartitionMaker:
    return PartitionMaker(new_store(tmp_path), 3)


def append(live: LiveShard, records: list[bytes], origin: int) -> None:
    live.append(
        records, prev_origin=live.last_origin or 0, origin=origin, duplicates=1, dead_lettered=2, committed_ns=NOW_NS
    )


def test_what_was_appended_is_read_back_after_reopening(maker: PartitionMaker) -> None:
    live = maker.begin()
    groups = [maker.commit(count) for count in (1, 0, 30, 2)]
    with LiveShard(live.path) as again:
        assert (again.commits, again.end_bytes, again.last_origin) == (4, live.end_bytes, maker.origin)
        assert (again.events, again.prev_origin, again.torn) == (33, 0, False)
        scanned = list(again.scan())
    assert [records for _, records in scanned] == [[encode_event(event) for event in group] for group in groups]
    assert [row.origin for row, _ in scanned][-1] == maker.origin
    maker.close()


def test_the_disk_gives_all_the_room_of_a_shard_before_it_has_its_name(maker: PartitionMaker) -> None:
    """Or a disk that others fill would refuse commits, and each would have to journal where its blocks are."""
    live = maker.begin(capacity_bytes=1 << 20)
    with live.path.open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == live.path.stat().st_size > 1 << 20
    maker.close()


def test_an_append_past_rows_or_bytes_is_refused_and_writes_nothing(maker: PartitionMaker) -> None:
    live = maker.begin(capacity_bytes=1000, rows=2)
    assert live.fits(1000)
    assert not live.fits(1001)
    with pytest.raises(ShardError, match="is full, seal it"):
        append(live, [b"x" * 997], 5)
    append(live, [b"x" * 996], 5)
    assert not live.fits(1)
    append(live, [], 6)
    assert not live.fits(0)
    assert blob_bytes([b"x" * 996]) == 1000
    maker.close()


def test_a_commit_must_go_on_where_the_last_one_ended(maker: PartitionMaker) -> None:
    live = maker.begin()
    append(live, [b"x"], 5)
    for prev, origin in ((4, 9), (6, 9), (5, 5)):
        with pytest.raises(ShardError, match="cannot follow"):
            live.append([], prev_origin=prev, origin=origin, duplicates=0, dead_lettered=0, committed_ns=0)
    maker.close()


@pytest.mark.parametrize("part", ["blob", "row", "row-only", "end"])
def test_a_torn_tail_is_not_a_commit_and_is_cut(maker: PartitionMaker, part: str) -> None:
    live = maker.begin()
    maker.commit(3)
    maker.commit(4)
    path, index, frames = live.path, live.header.index.offset, live.header.frames.offset
    first_end = live.read_rows(0, 1)[0].end_bytes
    end = live.end_bytes
    maker.close()
    with path.open("r+b") as file:
        if part == "blob":  # the last page of the blob never reached the disk
            file.seek(frames + first_end + 10)
            file.write(bytes(end - first_end - 10))
        elif part == "row":  # half of the row
            file.seek(index + ROW_BYTES + 30)
            file.write(bytes(ROW_BYTES - 30))
        elif part == "row-only":  # the row, and nothing of the blob
            file.seek(frames + first_end)
            file.write(bytes(end - first_end))
        else:  # a row that points out of the file
            file.seek(index + ROW_BYTES + 8)
            file.write((1 << 60).to_bytes(8, "little"))
    with LiveShard(path) as torn:
        assert (torn.commits, torn.torn) == (1, True)
        with pytest.raises(ShardError, match="cut its torn tail"):
            append(torn, [b"x"], 10_000)
        assert torn.cut(1)
        assert not torn.torn
        assert torn.watermark() == 1
        append(torn, [b"again"], 10_000)
        torn.sync()
    with LiveShard(path) as healed:
        assert [records for _, records in healed.scan()][1:] == [[b"again"]]


def test_rows_after_a_torn_one_never_come_back(maker: PartitionMaker) -> None:
    """A power cut may keep row 3 and lose row 2; writing the same row 2 again must not revive row 3."""
    live = maker.begin()
    for origin, record in enumerate((b"a", b"b", b"c"), 1):
        append(live, [record], origin)
    second = live.header.index.offset + ROW_BYTES
    row = os.pread(live._fd, ROW_BYTES, second)
    path = live.path
    maker.close()
    with path.open("r+b") as file:
        file.seek(second)
        file.write(bytes(ROW_BYTES))
    with LiveShard(path) as torn:
        assert (torn.commits, torn.torn) == (1, True)
        with pytest.raises(ShardCorruptError, match="only 1 of 2 committed rows are whole; rebuild it"):
            torn.cut(2)
        torn.cut(1)
        append(torn, [b"b"], 2)
        assert os.pread(torn._fd, ROW_BYTES, second) == row
    with LiveShard(path) as again:
        assert again.commits == 2


def test_a_cut_removes_whole_commits_and_every_byte_of_them(maker: PartitionMaker) -> None:
    live = maker.begin()
    for count in (2, 3, 4):
        maker.commit(count)
    kept = list(live.scan(1))
    assert live.cut(1)
    assert (live.commits, live.watermark(), live.torn) == (1, 1, False)
    assert list(live.scan()) == kept
    frames = live.header.frames
    assert files.is_zero(live._fd, frames.offset + live.end_bytes, frames.bytes - live.end_bytes)
    assert not live.cut(1)
    with pytest.raises(ShardCorruptError, match=r"only 1 of 2 .* what is there is whole: if .*copy"):
        live.cut(2)
    maker.close()


def test_damage_to_the_file_is_named_when_it_is_opened(maker: PartitionMaker) -> None:
    live = maker.begin()
    maker.commit(3)
    path = live.path
    maker.close()
    whole = path.read_bytes()
    damaged = {
        "cut short": whole[:100],
        "is .* bytes long": whole[:-1],
        "cut short or empty": b"",
        "not a shard": b"\x89HDF\r\n\x1a\n" + whole[8:],
        "header is damaged": whole[:40] + b"X" + whole[41:],
    }
    for text, data in damaged.items():
        path.write_bytes(data)
        with pytest.raises(ShardError, match=text):
            LiveShard(path)
    # Before what is appended to, and after it.
    for at in (8192 + 70, len(whole) - 1):
        path.write_bytes(whole)
        flip(path, at)
        with pytest.raises(ShardCorruptError, match="HDF5 structure is damaged; rebuild"):
            LiveShard(path)


def test_a_newer_format_is_refused_with_what_to_do(maker: PartitionMaker) -> None:
    import zlib

    live = maker.begin()
    path = live.path
    maker.close()
    data = path.read_bytes()
    text = data[: data.index(b"\n", 9) + 1].replace(b"fi.live.1", b"fi.live.2")
    path.write_bytes((text + b"%08x\n" % zlib.crc32(text)).ljust(8192) + data[8192:])
    with pytest.raises(ShardError, match=r"'fi\.live\.2' is not known to this build"):
        LiveShard(path)


def test_the_watermark_never_passes_the_rows(maker: PartitionMaker) -> None:
    live = maker.begin()
    maker.commit(1)
    with pytest.raises(ShardError):
        live.set_watermark(2)
    maker.close()


def test_plain_h5py_reads_it_while_it_grows(maker: PartitionMaker) -> None:
    live = maker.begin()
    with h5py.File(live.path, "r", locking=False) as early:
        for count in range(1, 30):
            maker.commit(count % 4)
            with h5py.File(live.path, "r", locking=False) as file:
                shown = int(file["watermark"][0])
                assert shown == count
                row = file["index"][shown - 1]
                assert (
                    dict(zip(file["index"].attrs["columns"].split(","), row.tolist(), strict=True))["ordinal"] == shown
                )
                start = int(file["index"][shown - 2][1]) if shown > 1 else 0
                assert file["frames"][start : row[1]].tobytes() == live.read_blobs(start, live.end_bytes)
                assert file.attrs["partition"] == 3
                assert file.attrs["format"] == "fi.live.1"
        assert int(early["watermark"][0]) == 29
    maker.close()


def test_after_a_failed_fsync_nothing_more_is_written(maker: PartitionMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    live = maker.begin()
    append(live, [b"a"], 1)

    def refuse(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("stages.persist.live.sync_data", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        live.sync()
    monkeypatch.undo()
    with pytest.raises(StoreFailedError, match="never retry"):
        live.sync()
    with pytest.raises(StoreFailedError):
        append(live, [b"b"], 2)
    maker.close()


def test_after_a_failed_write_nothing_more_is_written(maker: PartitionMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    live = maker.begin()
    append(live, [b"a"], 1)
    live.sync()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stages.persist.live.write_all_at", refuse)
    with pytest.raises(OSError, match="No space left"):
        append(live, [b"b"], 2)
    monkeypatch.undo()
    with pytest.raises(StoreFailedError):
        append(live, [b"b"], 2)
    with pytest.raises(StoreFailedError):
        live.sync()
    path = live.path
    maker.close()
    with LiveShard(path) as again:
        assert (again.commits, again.torn) == (1, False)


@pytest.mark.parametrize("area", ["index", "frames"])
def test_a_bad_sector_among_commits_is_an_error_after_what_lies_before_it(
    maker: PartitionMaker, bad_sector: Callable[[Path, int], None], area: str
) -> None:
    live = maker.begin(rows=4096)
    for _ in range(200):
        maker.commit(1)
    path, rows, place = live.path, [row for row, _ in live.blobs()], getattr(live.header, area)
    maker.close()
    bad_sector(path, place.offset + PAGE_BYTES)
    ends = [row.ordinal * ROW_BYTES if area == "index" else row.end_bytes for row in rows]
    good = sum(end <= PAGE_BYTES for end in ends)
    assert 0 < good < len(rows)
    with LiveReader(path) as reader:
        assert [row for row, _ in reader.blobs(good)] == rows[:good]
        with pytest.raises(OSError, match="Input/output error"):
            list(reader.blobs(good + 1))
    (finding,) = check_shard(path).findings
    assert finding.what.endswith(f"Input/output error: '{path}'")
    with LiveShard(path) as owned:
        assert (owned.commits, owned.torn) == (good, True)
        with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
            owned.cut(good + 1)
        assert (owned.cut(good), owned.torn, owned.lost) == (True, False, None)


@pytest.mark.parametrize("area", ["index", "frames"])
def test_a_bad_sector_where_nothing_was_committed_is_written_anew(
    maker: PartitionMaker, bad_sector: Callable[[Path, int], None], area: str
) -> None:
    live = maker.begin(rows=4096)
    maker.commit(1)
    path, place, kept = live.path, getattr(live.header, area), list(live.scan())
    maker.close()
    bad_sector(path, place.offset + place.bytes // 2)
    with LiveShard(path) as again:
        assert again.cut(1)
        assert list(again.scan()) == kept
        append(again, [b"x"], 10_000)
        again.sync()
    with LiveShard(path) as healed:
        assert (healed.commits, healed.torn, healed.cut(2)) == (2, False, False)


APPENDER = """
import random, sys
from pathlib import Path
from stages.persist.live import LiveShard
live = LiveShard(Path(sys.argv[1]))
rng = random.Random(int(sys.argv[2]))
live.cut(live.commits)
while True:
    commit = live.commits + 1
    records = [commit.to_bytes(4, "big") * rng.randint(1, 600) for _ in range(rng.randint(0, 5))]
    live.append(records, prev_origin=live.last_origin or 0, origin=commit, duplicates=0, dead_lettered=0,
        committed_ns=1)
    live.sync()
    print(live.commits, flush=True)
"""


def test_a_killed_appender_loses_no_acknowledged_commit_and_tears_none(maker: PartitionMaker) -> None:
    live = maker.begin(capacity_bytes=64 << 20, rows=16384)
    path = live.path
    maker.close()
    rng = random.Random(7)
    for round_number in range(8):
        arguments = [sys.executable, "-c", APPENDER, str(path), str(round_number)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            acknowledged = [process.stdout.readline() for _ in range(rng.randint(1, 60))]
            process.send_signal(signal.SIGKILL)
            acknowledged += process.stdout.readlines()
        lines = [line for line in acknowledged if line.endswith("\n")]
        assert lines, "the appender died by itself"
        with LiveShard(path) as found:
            assert found.commits >= int(lines[-1])
            for row, records in found.scan():
                assert all(record[:4] == row.ordinal.to_bytes(4, "big") for record in records)
                assert row.origin == row.ordinal
