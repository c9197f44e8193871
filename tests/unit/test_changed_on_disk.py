"""What somebody changed on disk under a persister, down to its last checksum, gets no seal record from it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pytest
from shard_maker import NOW_NS, make_event, new_store

from contracts.errors import ShardCorruptError, StoreFailedError
from contracts.events import decode_event, encode_event
from contracts.hashing import audit_hash
from contracts.receipts import Receipt, first_receipt
from contracts.settings import MIB, Settings
from stages.persist.check import check_shard
from stages.persist.core import Group
from stages.persist.files import write_all_at
from stages.persist.header import HEADER_BYTES, decode_header, encode_header
from stages.persist.live import LiveReader
from stages.persist.lost import last_place
from stages.persist.names import list_shards, live_name
from stages.persist.partition import PartitionFiles
from stages.persist.rewind import last_good_place
from stages.persist.rows import ROW_BYTES, encode_row, pack_blob, row_crc32, split_blob
from stages.persist.seal import events_of_sealed, seal, sealed_info
from stages.persist.storedir import Store

PARTITION = 3
SETTINGS = Settings(shard_bytes=MIB)
CHANGE = b"mo est", b"mo EST"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path)


@pytest.fixture
def files(store: Store) -> Iterator[PartitionFiles]:
    """Open, with three commits of two events each, all shown."""
    files = PartitionFiles.open(store, PARTITION, receipt_of(store), SETTINGS, lambda: NOW_NS)
    rng = random.Random(5)
    for origin in (2, 4, 6):
        events = [make_event(rng, origin - 1), make_event(rng, origin)]
        ids, records = [event.event_id for event in events], [encode_event(event) for event in events]
        files.commit(Group(origin - 2, origin, records, ids, 0, 0, (1, 1, 1), b""))
        files.accepted()
    yield files
    files.close()


def receipt_of(store: Store, files: PartitionFiles | None = None) -> Receipt:
    receipt = first_receipt(PARTITION, store.cluster_id, store.store_id, "w")
    if files is None:
        return receipt
    size, root = files.frontier.size, files.frontier.root().hex()
    return msgspec.structs.replace(receipt, ends={store.store_id: files.end}, origin=6, persisted=size, root=root)


def forge_live(path: Path) -> None:
    """Changes an event of the second commit, and the row's checksum with it."""
    with LiveReader(path) as reader:
        first, row = reader.read_rows(0, 2)
        header, records = reader.header, split_blob(reader.read_blobs(first.end_bytes, row.end_bytes))
    event = decode_event(records[1])
    payload = event.payload.replace(*CHANGE)
    event = msgspec.structs.replace(event, payload=payload, audit_hash=audit_hash(json.loads(payload)))
    blob = pack_blob([records[0], encode_event(event)])
    assert len(blob) == row.end_bytes - first.end_bytes
    with path.open("r+b") as file:
        write_all_at(file.fileno(), blob, header.frames.offset + first.end_bytes)
        row = row._replace(crc32=row_crc32(row, blob))
        write_all_at(file.fileno(), encode_row(row), header.index.offset + ROW_BYTES)


def forge_sealed(path: Path) -> None:
    """Changes the events. The root stays the one that was committed."""
    with h5py.File(path, "r+") as file:
        records = file["records"][()].tobytes()
        assert records.count(CHANGE[0]) == 6
        file["records"][...] = np.frombuffer(records.replace(*CHANGE), "u1")
    sum_up(path)


def forge_times(path: Path) -> None:
    """Has readers find the second event an hour earlier. The events stay what they are."""
    with h5py.File(path, "r+") as file:
        times = file["timestamp_ns"][()]
        times[1] -= 3600 * 10**9
        file["timestamp_ns"][...] = times
    sum_up(path)


def forge_attribute(path: Path) -> None:
    """Has other programs read another root."""
    with h5py.File(path, "r+") as file:
        file.attrs["root"] = "11" * 32
    sum_up(path)


def forge_commits(path: Path) -> None:
    """Says that it is of more commits than its rows are."""
    sum_up(path, commits=4)


def forge_place(path: Path) -> None:
    """Has who looks for an event's id, to tell whether it was there before, look where it is not."""
    with path.open("r+b") as file:
        areas = decode_header(file.read(HEADER_BYTES), path).areas
        ids = msgspec.structs.replace(areas["by_event_id/ids"], offset=file.seek(0, os.SEEK_END))
        file.write(b"\xff" * ids.bytes)
    sum_up(path, areas=areas | {"by_event_id/ids": ids})


def forge_records(old: bytes, new: bytes, path: Path) -> None:
    """Puts in the records' place what is no event, or one that no column holds."""
    with h5py.File(path, "r+") as file:
        records = file["records"][()].tobytes()
        assert old in records
        file["records"][...] = np.frombuffer(records.replace(old, new), "u1")
    sum_up(path)


FORGED = [
    (forge_commits, "commits are 3, the header says 4"),
    (forge_place, "header does not place the arrays where they are"),
    (partial(forge_records, b"\xdc\x00\x14", b"\xc1\x00\x14"), "holds what is no event"),
    (partial(forge_records, b"hospital-norte", "hospital-norñ".encode()), "is not a site or type of 1 to"),
    (forge_sealed, "its events are not those under the root that it says"),
    (forge_times, "differs from the events' records; it was changed since it was sealed"),
    (forge_attribute, "attribute root is 1111"),
]


def sum_up(path: Path, **said: Any) -> None:
    """Makes the file's own checksum right again; `said` of its header differs."""
    data = path.read_bytes()
    digest = hashlib.sha256(data[HEADER_BYTES:]).hexdigest()
    header = decode_header(data[:HEADER_BYTES], path)
    with path.open("r+b") as file:
        file.write(encode_header(msgspec.structs.replace(header, body_sha256=digest, file_bytes=len(data), **said)))


@pytest.mark.parametrize("how", ["removed", "an older copy"])
def test_nothing_is_committed_to_a_live_shard_that_nobody_finds_any_more(
    store: Store, files: PartitionFiles, how: str
) -> None:
    live = store.directory / live_name(PARTITION, 1)
    kept = live.read_bytes()
    away = live.rename(live.with_name("away"))
    if how == "an older copy":
        live.write_bytes(kept)
    why = "another file has its name" if live.exists() else "No such file"
    with pytest.raises(StoreFailedError, match=rf"{live}: is no longer the file .*{why}.*run `fictl rebuild`"):
        files.commit(Group(6, 7, [], [], 0, 0, (1, 1, 1), b""))
    assert away.read_bytes() == kept


def test_a_live_shard_of_which_the_disk_tells_nothing_is_not_called_replaced(
    files: PartitionFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **more: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(StoreFailedError, match="Input/output error") as stopped:
        files.commit(Group(6, 7, [], [], 0, 0, (1, 1, 1), b""))
    assert "no longer the file" not in str(stopped.value)


def test_an_event_that_was_changed_while_its_shard_was_live_is_not_sealed(store: Store, files: PartitionFiles) -> None:
    live = store.directory / live_name(PARTITION, 1)
    forge_live(live)
    files.roll()
    with pytest.raises(
        ShardCorruptError, match=rf"{live}: holds 6 events with root .*was changed since; run `fictl re"
    ):
        files.seal(files.to_seal[0])
    assert [file.sealed for file in list_shards(store.directory)[PARTITION]] == [False, False]


@pytest.mark.parametrize("forge", [forge for forge, _ in FORGED])
def test_a_forged_sealed_form_beside_the_live_one_gives_way_to_it(
    store: Store, files: PartitionFiles, forge: Callable[[Path], None]
) -> None:
    files.roll()
    (job,) = files.to_seal
    true = files.seal(job)
    forge(true.path)
    assert sealed_info(true.path).sha256 != true.sha256
    assert files.seal(job) == sealed_info(true.path) == true
    forge(true.path)
    receipt = receipt_of(store, files)
    files.close()
    with contextlib.closing(PartitionFiles.open(store, PARTITION, receipt, SETTINGS, lambda: NOW_NS + 1)) as again:
        # With the time that is in its record, it is the recorded file to the last byte.
        assert again.seal(*again.to_seal, true.header.sealed_ns) == sealed_info(true.path) == true


def test_the_live_form_stays_until_the_sealed_one_is_known_to_be_what_was_committed(
    store: Store, files: PartitionFiles
) -> None:
    """One that agrees with itself in everything, its root too, is whole: only the receipt tells the two apart."""
    files.roll()
    (job,) = files.to_seal
    true = job.path.read_bytes()
    forge_live(job.path)
    seal(job.path, commits=job.commits, frontier=job.frontier, sealed_ns=NOW_NS)
    job.path.write_bytes(true)
    receipt = receipt_of(store, files)
    files.close()
    with pytest.raises(ShardCorruptError, match="its last receipt says"):
        PartitionFiles.open(store, PARTITION, receipt, SETTINGS, lambda: NOW_NS)
    assert job.path.read_bytes() == true
    _, damage = last_good_place(store, PARTITION, [receipt], [])
    assert damage is not None
    assert "are not those that were committed" in damage.why


@pytest.mark.parametrize("forged", ["root", "frontier", "tree_size"])
def test_a_tree_that_is_not_that_of_the_events_gets_no_record(store: Store, files: PartitionFiles, forged: str) -> None:
    files.roll()
    info = files.seal(files.to_seal[0])
    # Trees of 5 and 6 events have frontiers of the same length, and the root does not tell them apart.
    value = {"root": "11" * 32, "frontier": bytes(len(info.header.frontier)), "tree_size": 5}[forged]
    with info.path.open("r+b") as file:
        file.write(encode_header(msgspec.structs.replace(info.header, **{forged: value})))
    with pytest.raises(ShardCorruptError, match="are not those under the root that it says"):
        events_of_sealed(info.path)


@pytest.mark.parametrize(
    ("forged", "why"),
    [
        ({"first_origin": 2}, "commits cover origins 1-6, the header says 2-6"),
        ({"last_origin": 7}, "commits cover origins 1-6, the header says 1-7"),
        ({"timestamp_ns_min": 1}, "header says timestamp_ns_min is 1, the events say"),
    ],
)
def test_a_header_that_says_more_than_its_commits_and_events_gets_no_record(
    store: Store, files: PartitionFiles, forged: dict[str, int], why: str
) -> None:
    files.roll()
    path = files.seal(files.to_seal[0]).path
    sum_up(path, **forged)
    with pytest.raises(ShardCorruptError, match=why):
        events_of_sealed(path)


def test_events_that_all_agrees_with_but_the_root_are_found(store: Store, files: PartitionFiles) -> None:
    """Somebody changed one, its hash, each column and checksum, and left the tree as it was committed."""
    files.roll()
    (job,) = files.to_seal
    root, frontier = files.frontier.root().hex(), files.frontier.to_bytes()
    forge_live(job.path)
    path = seal(job.path, commits=job.commits, frontier=job.frontier, sealed_ns=NOW_NS).path
    with h5py.File(path, "r+") as file:
        file.attrs["root"] = root
        file["merkle/after"][...] = np.frombuffer(frontier, "u1").reshape(-1, 32)
    sum_up(path, root=root, frontier=frontier)
    (finding,) = check_shard(path).findings
    assert (finding.where, finding.what[-64:]) == ("merkle", root)
    with pytest.raises(ShardCorruptError, match="are not those under the root that it says"):
        events_of_sealed(path)


@pytest.mark.parametrize(("forge", "why"), FORGED)
def test_a_sealed_shard_that_was_changed_before_it_got_its_record_gets_none(
    store: Store, files: PartitionFiles, forge: Callable[[Path], None], why: str
) -> None:
    """The persister died between the two; the live form is gone as soon as the next one starts."""
    files.roll()
    sealed = files.seal(files.to_seal[0]).path
    receipt = receipt_of(store, files)
    files.close()
    with contextlib.closing(PartitionFiles.open(store, PARTITION, receipt, SETTINGS, lambda: NOW_NS)) as again:
        assert again.sealed_info(1).path == sealed
        forge(sealed)
        assert sealed_info(sealed).header.root == receipt.root
        with pytest.raises(ShardCorruptError, match=f"{sealed}: .*{why}.*; run `fictl rebuild`"):
            again.sealed_info(1)
    _, damage = last_good_place(store, PARTITION, [receipt], [])
    assert damage is not None
    assert (damage.shard, damage.file, why in damage.why) == (1, sealed, True)
    assert last_place(list_shards(store.directory)[PARTITION])[1] == damage
