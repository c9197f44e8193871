"""What a start makes of every state a store can be found in: healed, or refused with the file and what to do."""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from crash.lane import PARTITION, SETTINGS
from crash.source import NOW_NS
from crash.stand import Stand

from cluster.testing.disk import flip
from contracts.errors import ShardCorruptError, ShardError, StoreFailedError
from stages.persist.files import PAGE_BYTES
from stages.persist.header import HEADER_BYTES, encode_header, read_live_header, read_sealed_header
from stages.persist.live import LiveShard
from stages.persist.names import live_name, next_name, tmp_path
from stages.persist.partition import PartitionFiles
from stages.persist.rows import ROW_BYTES
from stages.persist.verify import verify_store

BadSector = Callable[[Path, int], None]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    """Shards 1 and 2 are sealed, 3 is full, 4 is live with four commits."""
    stand = Stand(tmp_path_factory.mktemp("filled") / "shards")
    stand.fill(sealed=2, full=1)
    return stand


@pytest.fixture
def stand(filled: Stand, tmp_path: Path) -> Stand:
    """One such stand for each test."""
    return filled.copy(tmp_path / "shards")


def refused(stand: Stand, *texts: str, kind: type[ShardError] = ShardCorruptError) -> None:
    """Opening is refused in these words, and changes no shard."""
    before = {path.name: path.read_bytes() for path in stand.directory.glob("*.h5")}
    lane = stand.lane()
    with pytest.raises(kind) as caught:
        lane.open()
    for text in texts:
        assert text in str(caught.value)
    assert {path.name: path.read_bytes() for path in stand.directory.glob("*.h5")} == before


def healed(stand: Stand) -> None:
    """Opening succeeds, nothing accepted is missing or changed, and work goes on."""
    assert stand.recover().notes == []


def append_unaccepted(stand: Stand) -> Path:
    lane = stand.lane()
    lane.open()
    lane.append(5)
    lane.close()
    return stand.path(4)


def test_a_commit_without_its_receipt_is_cut_and_stored_again(stand: Stand) -> None:
    path = append_unaccepted(stand)
    with LiveShard(path) as live:
        assert live.commits == 5
    lane = stand.lane()
    lane.open()
    assert lane.files.cut_commits
    lane.close()
    with LiveShard(path) as live:
        assert live.commits == 4
    healed(stand)


@pytest.mark.parametrize("messages", [0, 5])
def test_a_shard_begun_after_a_sealed_one_is_gone_on_with_and_what_was_not_accepted_in_it_is_cut(
    stand: Stand, messages: int
) -> None:
    """No receipt speaks of it yet."""
    lane = stand.lane()
    lane.open()
    lane.roll()
    lane.seal_all()
    if messages:
        lane.append(messages)
    lane.close()
    healed(stand)


@pytest.mark.parametrize("part", ["row", "blob"])
def test_a_torn_tail_is_cut(stand: Stand, part: str) -> None:
    path = append_unaccepted(stand)
    header = read_live_header(path)
    with LiveShard(path) as live:
        blob_end = live.end_bytes
    flip(path, header.index.offset + 4 * ROW_BYTES + 9 if part == "row" else header.frames.offset + blob_end - 1)
    with LiveShard(path) as live:
        assert live.commits == 4
        assert live.torn
    healed(stand)


def test_a_bad_sector_in_what_was_never_accepted_is_cut(stand: Stand, bad_sector: BadSector) -> None:
    with LiveShard(stand.path(4)) as live:
        last = live.last_origin or 0
        beyond = live.header.frames.offset + live.end_bytes + PAGE_BYTES
        live.append(
            [bytes(2 * PAGE_BYTES)],
            prev_origin=last,
            origin=last + 1,
            duplicates=0,
            dead_lettered=0,
            committed_ns=NOW_NS,
        )
        live.sync()
    bad_sector(stand.path(4), beyond)
    healed(stand)


def test_an_owner_that_died_between_seal_and_record_is_made_good(stand: Stand) -> None:
    lane = stand.lane()
    lane.open()
    lane.seal(lane.files.to_seal[0])
    lane.close()
    assert (stand.directory / live_name(PARTITION, 3)).exists()
    healed(stand)
    assert stand.verify().notes == []
    assert [seal.shard for seal in stand.witness.seals][:3] == [1, 2, 3]
    assert not (stand.directory / live_name(PARTITION, 3)).exists()


def both_forms(stand: Stand) -> tuple[Path, Path]:
    lane = stand.lane()
    lane.open()
    sealed = lane.seal(lane.files.to_seal[0]).path
    lane.close()
    return stand.directory / live_name(PARTITION, 3), sealed


@pytest.mark.parametrize("hurt", ["body", "header", "cut short"])
def test_a_damaged_sealed_form_is_made_again_from_the_live_one_beside_it(
    stand: Stand, hurt: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, sealed = both_forms(stand)
    if hurt == "cut short":
        os.truncate(sealed, sealed.stat().st_size - 1)
    else:
        flip(sealed, 20_000 if hurt == "body" else 100)
    healed(stand)
    assert stand.verify().notes == []
    assert sealed.name in caplog.text
    assert "sealed again" in caplog.text


def test_a_damaged_sealed_form_of_the_last_shard_receipts_speak_of_is_made_again(tmp_path: Path) -> None:
    stand = Stand(tmp_path / "shards")
    stand.fill(commits=4)
    lane = stand.lane()
    lane.open()
    lane.roll()
    sealed = lane.seal(lane.files.to_seal[0]).path
    lane.close()
    flip(sealed, 20_000)
    healed(stand)


def test_a_damaged_live_form_of_a_sealed_shard_does_not_matter(stand: Stand) -> None:
    live, _ = both_forms(stand)
    flip(live, 100)
    healed(stand)


@pytest.mark.parametrize("content", [b"", b"half of a sealed shard" * 1000])
def test_unfinished_and_prepared_files_are_removed(stand: Stand, content: bytes) -> None:
    leftovers = [
        tmp_path(stand.path(2)),
        tmp_path(stand.path(4)),
        stand.directory / next_name(PARTITION, 5),
        tmp_path(stand.directory / next_name(PARTITION, 5)),
    ]
    for path in leftovers:
        path.write_bytes(content)
    healed(stand)
    assert not any(path.exists() for path in leftovers)


def test_a_next_shard_of_which_nothing_was_accepted_is_removed_whatever_it_holds(stand: Stand) -> None:
    (stand.directory / live_name(PARTITION, 5)).write_bytes(b"")
    healed(stand)


@pytest.mark.parametrize("shard", [2, 3, 4])
@pytest.mark.parametrize("size", [0, 100, HEADER_BYTES, -1])
def test_a_cut_short_or_empty_shard_is_refused(stand: Stand, shard: int, size: int) -> None:
    path = stand.path(shard)
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    refused(stand, str(path), "rebuild it from the stream")


@pytest.mark.parametrize("shard", [2, 3, 4])
def test_a_bit_flipped_in_a_header_is_refused(stand: Stand, shard: int) -> None:
    flip(stand.path(shard), 40)
    refused(stand, str(stand.path(shard)), "rebuild it from the stream")


@pytest.mark.parametrize("where", ["structure", "row", "blob"])
def test_a_bit_flipped_in_what_a_live_shard_committed_is_refused(stand: Stand, where: str) -> None:
    path = stand.path(4)
    header = read_live_header(path)
    offsets = {
        "structure": HEADER_BYTES + 20,
        "row": header.index.offset + ROW_BYTES + 30,
        "blob": header.frames.offset + 300,
    }
    flip(path, offsets[where])
    refused(stand, str(path), "rebuild it from the stream")


def test_a_bit_flipped_in_a_full_shard_is_refused(stand: Stand) -> None:
    path = stand.path(3)
    flip(path, read_live_header(path).frames.offset + 300)
    refused(stand, str(path), "rebuild it from the stream")


@pytest.mark.parametrize("watermark", ["as it was", "taken back"])
@pytest.mark.parametrize("shard", [3, 4])
def test_a_bad_sector_among_accepted_commits_is_told_as_what_it_is(
    stand: Stand, shard: int, watermark: str, bad_sector: BadSector
) -> None:
    header = read_live_header(stand.path(shard))
    if watermark == "taken back":
        with stand.path(shard).open("r+b") as file:
            file.seek(header.watermark.offset)
            file.write(bytes(8))
    bad_sector(stand.path(shard), header.frames.offset)
    with pytest.raises(StoreFailedError, match=f"Input/output error: '{stand.path(shard)}'.*`fictl rebuild`"):
        stand.lane().open()


def test_a_bit_flipped_in_a_sealed_body_is_named_by_verification(stand: Stand) -> None:
    path = stand.path(1)
    flip(path, path.stat().st_size - 100)
    report = verify_store(stand.directory)
    assert {problem.shard for problem in report.problems} == {path.name}


@pytest.mark.parametrize("shard", [1, 2, 3, 4])
def test_a_missing_shard_is_refused_by_its_number(stand: Stand, shard: int) -> None:
    stand.path(shard).unlink()
    refused(stand, f"shard {shard} of partition {PARTITION} is missing", "`fictl rebuild`")


@pytest.mark.parametrize("shard", [2, 3, 4])
def test_a_shard_of_another_cluster_is_refused(stand: Stand, shard: int, tmp_path: Path) -> None:
    other = Stand(tmp_path / "other")
    other.fill(sealed=2, full=1)
    shutil.copy(other.path(shard), stand.path(shard))
    refused(stand, str(stand.path(shard)), other.store.store_id, "move it out", kind=ShardError)


def test_a_shard_under_another_ones_name_is_refused(stand: Stand) -> None:
    shutil.copy(stand.path(3), stand.path(4))
    refused(stand, str(stand.path(4)), "is shard 3", kind=ShardError)


@pytest.mark.parametrize("shard", [2, 4])
def test_a_shard_of_a_newer_format_is_refused(stand: Stand, shard: int) -> None:
    path = stand.path(shard)
    data = path.read_bytes()
    text = data[:HEADER_BYTES].split(b"\n")
    head = b"\n".join(text[:2]).replace(b"fi.sealed.1", b"fi.sealed.2").replace(b"fi.live.1", b"fi.live.2") + b"\n"
    block = (head + b"%08x\n" % zlib.crc32(head)).ljust(HEADER_BYTES)
    path.write_bytes(block + data[HEADER_BYTES:])
    refused(stand, str(path), "use the version that wrote it", kind=ShardError)


def test_a_sealed_shard_that_does_not_go_on_from_the_one_before_is_refused(stand: Stand) -> None:
    path = stand.path(2)
    header = read_sealed_header(path)
    other = msgspec.structs.replace(header, frontier_before=bytes(len(header.frontier_before)))
    path.write_bytes(encode_header(other) + path.read_bytes()[HEADER_BYTES:])
    refused(stand, str(path), "does not go on from the shard before it", "fictl verify")


def test_another_root_than_the_receipts_is_refused(stand: Stand) -> None:
    assert stand.witness.receipt is not None
    stand.witness.receipt = msgspec.structs.replace(stand.witness.receipt, root="00" * 32)
    refused(stand, str(stand.directory), "its last receipt says", "fictl verify")


def older_by_commits(stand: Stand) -> None:
    receipt = stand.witness.receipt
    assert receipt is not None
    end = msgspec.structs.replace(receipt.ends[receipt.store], commits=2)
    stand.witness.receipt = msgspec.structs.replace(receipt, ends={receipt.store: end})


def older_by_a_shard(stand: Stand) -> None:
    receipt = stand.witness.receipt
    assert receipt is not None
    end = msgspec.structs.replace(receipt.ends[receipt.store], shard=3, commits=4)
    stand.witness.receipt = msgspec.structs.replace(receipt, ends={receipt.store: end})


def older_by_what_follows_a_seal(stand: Stand) -> None:
    receipt = stand.witness.receipt
    assert receipt is not None
    end = msgspec.structs.replace(receipt.ends[receipt.store], shard=2, commits=4)
    stand.witness.receipt = msgspec.structs.replace(receipt, ends={receipt.store: end})


@pytest.mark.parametrize(
    ("older", "shown"), [(older_by_commits, 4), (older_by_a_shard, 4), (older_by_what_follows_a_seal, 3)]
)
def test_commits_that_readers_were_shown_are_never_cut(
    stand: Stand, older: Callable[[Stand], None], shown: int
) -> None:
    older(stand)
    refused(stand, str(stand.path(shown)), "receipts are older than the store")


def test_readers_see_all_of_a_full_shard_again_after_its_watermark_was_lost(stand: Stand) -> None:
    path = stand.path(3)
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, bytes(8), read_live_header(path).watermark.offset)
    os.close(fd)
    lane = stand.lane()
    lane.open()
    lane.close()
    with LiveShard(path) as live:
        assert live.watermark() == live.commits == 4


def test_a_live_shard_is_old_after_an_hour_and_when_the_clock_was_put_back(stand: Stand) -> None:
    lane = stand.lane()
    lane.open()
    lane.commit(3)
    lane.close()
    limit_ns = int(SETTINGS.shard_age_s_max * 1e9)
    for elapsed_ns in (0, limit_ns - 1, limit_ns, 1 - limit_ns, -limit_ns):
        now_ns = NOW_NS + elapsed_ns
        with contextlib.closing(
            PartitionFiles.open(stand.store, PARTITION, lane.receipt, SETTINGS, lambda now_ns=now_ns: now_ns)
        ) as files:
            assert files.is_old() is (abs(elapsed_ns) == limit_ns), elapsed_ns
            assert files.is_old(share=0) is not files.is_empty()
