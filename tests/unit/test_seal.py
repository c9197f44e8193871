import os
import signal
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pytest
from shard_maker import NOW_NS, PartitionMaker, filled_store, new_store

from contracts.errors import ShardCorruptError, ShardError
from contracts.events import encode_event
from contracts.hashing import HASH_BYTES, MerkleFrontier, leaf_hash
from stages.persist import seal as seal_module
from stages.persist.header import LiveHeader, SealedHeader, encode_header, read_header
from stages.persist.names import list_shards, sealed_name
from stages.persist.seal import SealedInfo, seal, sealed_info
from stages.persist.sealed import SealedReader, Selection


def seal_live(maker: PartitionMaker) -> SealedInfo:
    assert maker.live is not None
    return seal(maker.live.path, commits=maker.live.commits, frontier=maker.frontier, sealed_ns=NOW_NS)


@pytest.fixture
def maker(tmp_path: Path) -> PartitionMaker:
    maker = PartitionMaker(new_store(tmp_path), 3)
    maker.begin(capacity_bytes=4 << 20, rows=5000)
    for count in [1, 0, 50, 3] * 40:
        maker.commit(count)
    return maker


def test_a_sealed_shard_holds_exactly_the_live_rows(maker: PartitionMaker) -> None:
    info = seal_live(maker)
    tree = MerkleFrontier()
    for event in maker.events:
        tree.append(leaf_hash(encode_event(event)))
    assert info.path.name == sealed_name(3, 1, 1, maker.origin)
    assert (info.header.events, info.header.commits) == (len(maker.events), 160)
    assert (info.header.root, info.frontier.to_bytes()) == (tree.root().hex(), tree.to_bytes())
    reader = SealedReader(info.path)
    assert [event for _, event in reader.events()] == maker.events
    assert maker.live is not None
    assert reader.read("commits").tolist() == [list(row) for row, _ in maker.live.scan()]
    for name in ("site", "event_type", "timestamp_ns", "origin", "index"):
        assert reader.column(name).tolist() == [getattr(event, name) for event in maker.events]
    for name in ("event_id", "consultation_id", "audit_hash"):
        assert [row.tobytes() for row in reader.column(name)] == [getattr(event, name) for event in maker.events]
    for row, event in enumerate(maker.events[::97]):
        assert reader.find(event.event_id) == (row * 97, event)
    assert reader.find(bytes(16)) is None
    for consultation in [*maker.consultations, b"\xff" * 16]:
        expected = [(row, event) for row, event in enumerate(maker.events) if event.consultation_id == consultation]
        assert list(reader.consultation(consultation)) == expected
    wanted = Selection(site="clinic_7", since_ns=maker.events[10].timestamp_ns, until_ns=maker.events[-10].timestamp_ns)
    assert [event for _, event in reader.select(wanted)] == list(filter(wanted.takes, maker.events))
    assert list(reader.select(Selection(site="nowhere"))) == []
    reader.close()
    maker.close()


def test_stock_gzip_readers_decompress_it(maker: PartitionMaker) -> None:
    info = seal_live(maker)
    packed = b"".join(map(encode_event, maker.events))
    with h5py.File(info.path, "r") as file:
        assert file["records"].compression == "gzip"
        assert file["records"][()].tobytes() == packed
        _, chunk = file["records"].id.read_direct_chunk((0,))
        assert zlib.decompress(chunk) == packed[: 256 * 1024]
        assert file["names/site"][file["site"][0]].decode() == maker.events[0].site
        assert file.attrs["events"] == len(maker.events)
        assert file["by_event_id/ids"].id.get_offset() == info.header.areas["by_event_id/ids"].offset
        ids = [row.tobytes() for row in file["by_event_id/ids"]]
    assert ids == sorted(ids)
    maker.close()


@pytest.mark.parametrize("name", ["frontier", "frontier_before"])
def test_a_header_whose_frontier_is_of_no_tree_is_damage_whatever_its_checksum_says(
    maker: PartitionMaker, name: str
) -> None:
    info, live = seal_live(maker), maker.live
    assert live is not None
    files: list[tuple[Path, LiveHeader | SealedHeader]] = [(info.path, info.header)]
    files += [(live.path, live.header)] if name == "frontier_before" else []
    for path, header in files:
        with path.open("r+b") as file:
            file.write(encode_header(msgspec.structs.replace(header, **{name: b"x" * (HASH_BYTES - 1)})))
        with pytest.raises(ShardCorruptError, match=r"makes no sense \(a tree of .* rebuild it from the stream"):
            read_header(path)
    maker.close()


def test_sealing_twice_gives_the_same_file_and_heals_a_damaged_one(maker: PartitionMaker) -> None:
    first = seal_live(maker)
    stamp = first.path.stat().st_mtime_ns
    assert seal_live(maker) == first
    assert first.path.stat().st_mtime_ns == stamp
    data = bytearray(first.path.read_bytes())
    data[-100] ^= 1
    first.path.write_bytes(data)
    with pytest.raises(ShardCorruptError, match="not those that were sealed"):
        sealed_info(first.path)
    assert seal_live(maker) == first
    assert sealed_info(first.path) == first
    maker.close()


def test_a_half_written_seal_is_ignored_and_replaced(maker: PartitionMaker) -> None:
    assert maker.live is not None
    tmp = maker.live.path.with_name(sealed_name(3, 1, 1, maker.origin) + ".tmp")
    tmp.write_bytes(b"half" * 1000)
    assert [shard.sealed for shard in list_shards(tmp.parent)[3]] == [False]
    info = seal_live(maker)
    assert not tmp.exists()
    assert [shard.path for shard in list_shards(tmp.parent)[3]] == [info.path]
    maker.close()


def test_another_sealed_file_of_the_same_number_is_a_conflict(maker: PartitionMaker) -> None:
    assert maker.live is not None
    other = maker.live.path.with_name(sealed_name(3, 1, 1, maker.origin + 1))
    other.touch()
    with pytest.raises(ShardError, match="move one away"):
        seal_live(maker)
    other.unlink()
    seal_live(maker)
    with pytest.raises(ShardError, match="move one away"):
        seal(maker.live.path, commits=160, frontier=MerkleFrontier(1, [bytes(32)]), sealed_ns=NOW_NS)
    maker.close()


def test_damaged_or_missing_rows_are_never_sealed(maker: PartitionMaker) -> None:
    live = maker.live
    assert live is not None
    with pytest.raises(ShardError, match="no commit to seal"):
        seal(live.path, commits=0, frontier=maker.frontier, sealed_ns=NOW_NS)
    with pytest.raises(ShardCorruptError, match=r"only 160 of 161"):
        seal(live.path, commits=161, frontier=maker.frontier, sealed_ns=NOW_NS)
    with live.path.open("r+b") as file:
        file.seek(live.header.frames.offset + 100)
        file.write(b"\0\0")
    with pytest.raises(ShardCorruptError, match=r"only 0 of 160"):
        seal_live(maker)
    assert list_shards(live.path.parent)[3][0].sealed is False
    maker.close()


def test_a_record_that_is_no_event_is_never_sealed(tmp_path: Path) -> None:
    maker = PartitionMaker(new_store(tmp_path), 0)
    live = maker.begin()
    live.append([b"\xc1"], prev_origin=0, origin=1, duplicates=0, dead_lettered=0, committed_ns=0)
    with pytest.raises(ShardCorruptError, match="commit 1 holds what is no event"):
        seal(live.path, commits=1, frontier=maker.frontier, sealed_ns=NOW_NS)
    maker.close()


@pytest.mark.parametrize("spoiled", ["timestamp_ns", "merkle/after", "commits"])
def test_a_sealed_form_that_does_not_read_back_as_written_gets_no_name(
    maker: PartitionMaker, monkeypatch: pytest.MonkeyPatch, spoiled: str
) -> None:
    write = seal_module.write_dataset

    def bad_memory(file: Any, name: str, array: Any) -> None:
        if name == spoiled:
            array = array.copy()
            array.flat[0] ^= 1
        write(file, name, array)

    monkeypatch.setattr(seal_module, "write_dataset", bad_memory)
    with pytest.raises(ShardCorruptError, match=f"{spoiled} did not read back as written"):
        seal_live(maker)
    assert [shard.sealed for shard in list_shards(maker.store.directory)[3]] == [False]
    maker.close()


def test_a_shard_without_events_can_be_sealed(tmp_path: Path) -> None:
    maker = PartitionMaker(new_store(tmp_path), 0)
    maker.begin()
    maker.commit(0)
    info = maker.seal()
    assert (info.header.events, info.header.tree_size, info.header.root) == (0, 0, MerkleFrontier().root().hex())
    reader = SealedReader(info.path)
    assert list(reader.events()) == []
    assert reader.find(bytes(16)) is None
    assert list(reader.consultation(bytes(16))) == []
    assert reader.column("site").tolist() == []
    reader.close()


def test_the_tree_goes_on_from_shard_to_shard(tmp_path: Path) -> None:
    store, maker = filled_store(tmp_path)
    headers = [SealedReader(shard.path).header for shard in list_shards(store.directory)[3] if shard.sealed]
    assert [header.tree_size_before for header in headers] == [0, 28, 56]
    for before, after in pairwise(headers):
        assert (after.frontier_before, after.first_origin) == (before.frontier, before.last_origin + 1)
    tree = MerkleFrontier()
    for event in maker.events[:84]:
        tree.append(leaf_hash(encode_event(event)))
    assert headers[-1].root == tree.root().hex()


SEALER = """
import sys
from pathlib import Path
from contracts.hashing import MerkleFrontier
from stages.persist.seal import seal
print("ready", flush=True)
while True:
    info = seal(Path(sys.argv[1]), commits=160, frontier=MerkleFrontier(), sealed_ns=1)
    print("sealed", flush=True)
    info.path.unlink()
"""


def test_a_killed_sealer_leaves_the_live_shard_and_no_broken_sealed_one(maker: PartitionMaker) -> None:
    assert maker.live is not None
    path = maker.live.path
    before = path.read_bytes()
    for seals in (0, 1, 1, 2, 3):
        with subprocess.Popen([sys.executable, "-c", SEALER, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(1 + seals):
                assert process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        for shard in list_shards(path.parent)[3]:
            if shard.sealed:
                assert sealed_info(shard.path).header.events == len(maker.events)
                os.unlink(shard.path)
        assert path.read_bytes() == before
    assert np.array_equal(SealedReader(seal_live(maker).path).read("origin"), [event.origin for event in maker.events])
    maker.close()
