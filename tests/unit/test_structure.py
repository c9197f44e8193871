"""A shard that verifies shows the same to every HDF5 program as to us: its structure may hold nothing but its format.

The forger has made every checksum in the file right again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import msgspec
import pytest
from shard_maker import PartitionMaker, filled_store
from verifying import verify_here

from stages.persist import verify as verify_module
from stages.persist.agreement import areas_of
from stages.persist.header import HEADER_BYTES, LiveHeader, SealedHeader, encode_header, read_header, structure_crc32
from stages.persist.sealed import Selection
from stages.persist.store import EventStore
from stages.persist.verify import verify_store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PartitionMaker]:
    directory = tmp_path_factory.mktemp("made") / "store"
    return directory, filled_store(directory)[1]


@pytest.fixture
def store(made: tuple[Path, PartitionMaker], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "store"))


def sealed_in(store: Path) -> Path:
    return min(store.glob("p003-00000001-*.h5"))


def live_in(store: Path) -> Path:
    return next(store.glob("*.live.h5"))


def rewritten(path: Path, change: Callable[[h5py.File], None]) -> None:
    """Changes a shard by HDF5's own means, and makes its header and checksums fit."""
    header = read_header(path)
    with h5py.File(path, "r+", locking=False) as file:
        change(file)
    reheaded(path, header)


def reheaded(path: Path, header: LiveHeader | SealedHeader, **changes: Any) -> None:
    data = path.read_bytes()
    if isinstance(header, SealedHeader):
        changes["body_sha256"] = hashlib.sha256(data[HEADER_BYTES:]).hexdigest()
        changes["areas"] = areas_of(path)
    else:
        fd = os.open(path, os.O_RDONLY)
        arrays = [header.frames, header.index, header.watermark]
        changes["structure_crc32"] = structure_crc32(fd, path, len(data), arrays)
        os.close(fd)
    header = msgspec.structs.replace(header, file_bytes=len(data), **changes)
    path.write_bytes(encode_header(header) + data[HEADER_BYTES:])


def told(store: Path) -> str:
    return "\n".join(f"{one.shard}: {one.where}: {one.what}" for one in verify_here(store).problems)


def remade(name: str, change: Callable[[Any], Any] = lambda values: values, **arguments: Any) -> Any:
    """The same values, stored otherwise, with the attributes they had."""

    def apply(file: h5py.File) -> None:
        values, attributes = change(file[name][()]), dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, data=values, **arguments).attrs.update(attributes)

    return apply


def unpacked_for_others(file: h5py.File) -> None:
    """We unpack the chunk as it was; HDF5 takes its bytes, and what was put behind them, for the values themselves."""
    _, packed = file["records"].id.read_direct_chunk((0,))
    size = file["records"].chunks[0]
    file["records"].id.write_direct_chunk((0,), packed.ljust(size, b"!"), 1)


def longer_records(file: h5py.File) -> None:
    file["records"].resize((len(file["records"]) + 9,))


def fewer_bits(file: h5py.File) -> None:
    """The same chunk, of which HDF5 takes the lower half of each byte for the value."""
    old = file["records"]
    (_, packed), made, attributes = old.id.read_direct_chunk((0,)), old.id.get_create_plist(), dict(old.attrs)
    kind, space = h5py.h5t.STD_U8LE.copy(), old.id.get_space()
    kind.set_precision(4)
    del file["records"]
    h5py.h5d.create(file.id, b"records", kind, space, made).write_direct_chunk((0,), packed)
    file["records"].attrs.update(attributes)


SEALED: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "chunk not packed for others": (unpacked_for_others, "records: is marked as not packed from 0 on"),
    "offsets shuffled": (
        remade("offset", chunks=(29,), compression="gzip", shuffle=True),
        "offset: is stored through filters [2, 1], not through gzip alone",
    ),
    "wider type": (remade("event_id", lambda ids: ids.astype("<u2")), "event_id: is of type uint16, not uint8"),
    "fewer bits": (fewer_bits, "records: is of type uint8, but not of all its bits"),
    "hidden records": (longer_records, "records: is of shape"),
    "further dataset": (lambda file: file.create_dataset("event_id2", data=[1]), "event_id2: does not belong"),
    "name with lines": (lambda file: file.create_dataset("x\n\x1b[2J", data=[1]), "x··[2J: does not belong"),
    "further group": (lambda file: file.create_group("consultations"), "consultations: does not belong"),
    "further index": (lambda file: file.create_dataset("merkle/x", data=[1]), "merkle/x: does not belong"),
    "link out": (lambda file: file.__setitem__("x", h5py.ExternalLink("/etc/x", "/")), "x: does not belong"),
    "second name": (lambda file: file.__setitem__("x", file["records"]), "x: does not belong"),
    "group's note": (lambda file: file["names"].attrs.update(x=1), "names: attribute x: does not belong"),
    "file's note": (lambda file: file.attrs.update(patient="x"), "attribute patient: does not belong"),
    "column's note": (lambda file: file["origin"].attrs.update(x=1), "origin: attribute x: does not belong"),
    "no explanation": (lambda file: file["origin"].attrs.pop("about"), "origin: attribute about: is missing"),
    "other columns": (lambda file: file["commits"].attrs.update(columns="a,b"), "attribute columns: is a,b, it should"),
    "other time": (lambda file: file.attrs.update(created="1999-01-01T00:00:00Z"), "attribute created: is 1999"),
    "other format": (lambda file: file.attrs.update(format="fi.sealed.9"), "attribute format: is fi.sealed.9, it"),
    "many partitions": (lambda file: file.attrs.update(partition=[3, 3]), "attribute partition: is [3 3], it should"),
}


@pytest.mark.parametrize("name", SEALED)
def test_what_other_programs_would_read_in_a_sealed_shard_is_found(store: Path, name: str) -> None:
    change, expected = SEALED[name]
    path = sealed_in(store)
    rewritten(path, change)
    assert f"{path.name}: {expected}" in told(store) or f": {expected}" in told(store)


def elsewhere(file: h5py.File) -> None:
    size, about = len(file["frames"]), dict(file["frames"].attrs)
    del file["frames"]
    file.create_dataset("frames", (size,), "u1", external=[("/etc/hostname", 0, size)]).attrs.update(about)


def moved(file: h5py.File) -> None:
    """A copy of the frames, to be changed at leisure: ours are read from where the header places them."""
    file["copy"] = file["frames"][()]
    del file["frames"]
    file.move("copy", "frames")


LIVE: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "stored elsewhere": (elsewhere, "frames: does not lie in the file as the arrays of a shard do"),
    "copied": (moved, "frames: begins at byte"),
    "linked": (
        lambda file: (file.move("frames", "kept"), file.__setitem__("frames", h5py.SoftLink("/kept"))),
        "frames: is a link to somewhere else",
    ),
    "other rows": (remade("index", lambda rows: rows.T), "index: is of shape (9, 256), not (256, 9)"),
    "other columns": (
        lambda file: file["index"].attrs.update(columns="a"),
        "index: attribute columns: is a, it should",
    ),
    "further dataset": (lambda file: file.create_dataset("x", data=[1]), "x: does not belong in a shard"),
    "other partition": (lambda file: file.attrs.update(partition=9), "attribute partition: is 9, it should be 3"),
    "no store": (lambda file: file.attrs.pop("store"), "attribute store: is missing"),
}


@pytest.mark.parametrize("name", LIVE)
def test_what_other_programs_would_read_in_a_live_shard_is_found(store: Path, name: str) -> None:
    change, expected = LIVE[name]
    path = live_in(store)
    rewritten(path, change)
    assert f"{path.name}: {expected}" in told(store)


def test_a_header_that_hides_events_from_a_search_by_time_is_found(
    store: Path, made: tuple[Path, PartitionMaker]
) -> None:
    path = sealed_in(store)
    since_ns = min(event.timestamp_ns for event in made[1].events)

    def found() -> int:
        with EventStore(store) as opened:
            return len(list(opened.select(Selection(since_ns=since_ns))))

    assert found() == len(made[1].events)
    header = read_header(path)
    reheaded(path, header, timestamp_ns_max=since_ns - 1)
    assert found() < len(made[1].events)
    assert f"{path.name}: header: says timestamp_ns_max is {since_ns - 1}, the events say" in told(store)
    reheaded(path, header, record_bytes=1)
    assert f"{path.name}: header: says record_bytes is 1, the events say" in told(store)
    reheaded(path, header)
    assert told(store) == ""


@pytest.mark.parametrize("of", [sealed_in, live_in])
def test_what_is_written_behind_a_header_is_found(store: Path, of: Callable[[Path], Path]) -> None:
    path = of(store)
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES - 100)
        file.write(b"\x89HDF\r\n\x1a\n")
    assert f"{path.name}: header: is followed by something" in told(store)


def test_a_shard_that_claims_more_than_memory_holds_does_not_take_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sealed_in(store)
    header = read_header(path)
    with h5py.File(path, "r+", locking=False) as file:
        attributes = dict(file["commits"].attrs)
        del file["commits"]
        # Chunks that were never written take no room in the file.
        rows = file.create_dataset("commits", (2_000_000, 9), "<i8", chunks=(1000, 9), compression="gzip")
        rows.attrs.update(attributes)
    with path.open("ab") as longer:
        longer.write(bytes(200_000))
    reheaded(path, header)
    little = "import stages.persist.reading as r; r._MEMORY_BYTES_MIN = 300 << 20; r._serve()"
    monkeypatch.setattr(verify_module, "READER_COMMAND", [sys.executable, "-c", little])
    report = verify_store(store)
    assert [(one.shard, one.what) for one in report.problems if "memory" in one.what] == [
        (path.name, "takes more memory to read than any shard of its length; it was forged")
    ]
    assert report.events == 28 + 28 + 7
