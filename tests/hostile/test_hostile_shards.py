"""Damaged and forged shard files: every reader gives what is whole, or an error that names the file, and ends."""

from __future__ import annotations

import json
import random
import selectors
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pytest

from contracts.errors import ShardCorruptError, ShardError
from contracts.events import encode_event
from contracts.hashing import leaf_hash
from contracts.receipts import StoreEnd, first_receipt
from contracts.settings import Settings
from stages.persist.header import HEADER_BYTES, SealedHeader, encode_header, read_sealed_header
from stages.persist.partition import PartitionFiles
from stages.persist.store import EventStore
from stages.persist.storedir import Store
from tests.unit.shard_maker import NOW_NS, PartitionMaker, filled_store
from tests.unit.verifying import KeptReader

ROOT = Path(__file__).parents[2]
READ_S_MAX = 90.0
"""For one store, on a busy machine. A reader that hangs takes for ever."""
PARTITION = 3


class Readers:
    """A process that reads stores."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.fuzz.shardreader"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def read(self, directory: Path) -> dict[str, str]:
        """What each way of reading gives; the test fails when the process hangs or dies."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(str(directory)) + "\n")
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            ready = selector.select(READ_S_MAX)
        line = process.stdout.readline() if ready else ""
        if not line:
            self.close()
            self._start()
            raise AssertionError(f"the reader died ({process.returncode})" if ready else "the reader hangs")
        words: dict[str, str] = json.loads(line)
        return words

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def readers() -> Iterator[Readers]:
    process = Readers()
    yield process
    process.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PartitionMaker]:
    directory = tmp_path_factory.mktemp("made") / "store"
    _, maker = filled_store(directory)
    return directory, maker


@pytest.fixture(scope="module")
def verifier(made: tuple[Path, PartitionMaker]) -> Iterator[KeptReader]:
    """`fictl verify`, which reads by one process from test to test."""
    reader = KeptReader()
    try:
        assert reader.verify(made[0]).ok
        yield reader
        assert reader.verify(made[0]).ok, "what it has read keeps it from telling a whole store from others"
    finally:
        reader.close()


@pytest.fixture
def store(made: tuple[Path, PartitionMaker], tmp_path: Path) -> Path:
    """A copy to damage: three sealed shards and a live one."""
    return Path(shutil.copytree(made[0], tmp_path / "store"))


def sealed_in(store: Path) -> Path:
    return sorted(path for path in store.glob("*.h5") if ".live." not in path.name)[1]


def live_in(store: Path) -> Path:
    return next(store.glob("*.live.h5"))


def check_reasons(words: dict[str, str], damaged: Path) -> int:
    """Every refusal names the file; gives how many there were."""
    refused = 0
    for name, text in words.items():
        assert "FOUND OUT" not in text, f"{name}: {text}"
        if "Error" in text:
            assert damaged.name in text, f"{name}: {text}"
            refused += 1
    return refused


def reheaded(path: Path, **changes: Any) -> None:
    """Gives a sealed shard another header whose own checksum is right."""
    header = msgspec.structs.replace(read_sealed_header(path), **changes)
    with path.open("r+b") as file:
        file.write(encode_header(header))


def rewritten(path: Path, change: Callable[[h5py.File], None]) -> None:
    """Changes a shard by HDF5's own means, and says in its header how long it is now."""
    header = read_sealed_header(path)
    with h5py.File(path, "r+", locking=False) as file:
        change(file)
    with path.open("r+b") as file:
        file.write(encode_header(msgspec.structs.replace(header, file_bytes=path.stat().st_size)))


def replace_dataset(name: str, **arguments: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **arguments)

    return change


def linked(name: str, link: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = link

    return change


@cache
def bomb_bytes() -> bytes:
    return zlib.compress(bytes(200 << 20), 9)


def chunk_of(packed: Callable[[], bytes]) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file["records"]
        data = file.create_dataset("records", (1 << 18,), "u1", maxshape=(None,), chunks=(1 << 18,), compression="gzip")
        data.id.write_direct_chunk((0,), packed())

    return change


HUGE = 1 << 50
STRUCTURES: dict[str, Callable[[h5py.File], None]] = {
    "huge-dimensions": replace_dataset("offset", shape=(HUGE,), dtype="<i8", chunks=(1024,), compression="gzip"),
    "huge-contiguous": replace_dataset("timestamp_ns", shape=(1 << 40,), dtype="<i8"),
    "huge-chunks": replace_dataset("records", shape=(1 << 31,), dtype="u1", chunks=(1 << 31,), compression="gzip"),
    "no-dimensions": replace_dataset("offset", data=7),
    "empty-dataset": replace_dataset("offset", data=h5py.Empty("<i8")),
    "two-dimensions": replace_dataset("site", data=np.zeros((3, 3), "<u2")),
    "text-for-numbers": replace_dataset("timestamp_ns", data=np.array([b"x"] * 28)),
    "floats-for-numbers": replace_dataset("site", data=np.full(28, np.nan)),
    "codes-out-of-range": replace_dataset("event_type", data=np.full(28, 60_000, "<u2")),
    "negative-offsets": replace_dataset("offset", data=np.full(29, -1, "<i8")),
    "falling-offsets": replace_dataset("offset", data=np.arange(29, 0, -1, dtype="<i8")),
    "offsets-beyond": replace_dataset("offset", data=np.arange(29, dtype="<i8") << 40),
    "names-not-utf-8": replace_dataset("names/site", data=np.array([b"\xff\xfe", b"x"])),
    "variable-length-text": replace_dataset("names/site", data=["a", "b"], dtype=h5py.string_dtype()),
    "compound-type": replace_dataset("commits", data=np.zeros(4, [("a", "<i8")])),
    "group-for-a-dataset": lambda file: (file.pop("offset"), file.create_group("offset"))[0],
    "type-for-a-dataset": linked("offset", np.dtype("<i8")),
    "soft-link-loop": lambda file: loop(file),
    "soft-link-to-nothing": linked("records", h5py.SoftLink("/nowhere")),
    "external-link": linked("records", h5py.ExternalLink("/etc/hostname", "/")),
    "external-link-to-itself": linked("offset", h5py.ExternalLink(".", "/offset")),
    "external-storage": replace_dataset(
        "timestamp_ns", shape=(28,), dtype="<i8", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
    ),
    "filter-that-nobody-has": replace_dataset(
        "offset", shape=(29,), dtype="<i8", chunks=(29,), compression=32_000, allow_unknown_filter=True
    ),
    "another-filter": replace_dataset("records", data=np.zeros(4096, "u1"), chunks=(4096,), compression="lzf"),
    "chunks-never-written": replace_dataset(
        "records", shape=(1 << 18,), dtype="u1", chunks=(1 << 18,), compression="gzip"
    ),
    "no-chunks": replace_dataset("records", data=np.zeros(4096, "u1")),
    "zip-bomb": chunk_of(bomb_bytes),
    "empty-chunk": chunk_of(lambda: zlib.compress(b"")),
    "short-chunk": chunk_of(lambda: zlib.compress(bytes(1 << 17))),
    "virtual-dataset-of-itself": lambda file: virtual(file),
}


def loop(file: h5py.File) -> None:
    del file["offset"]
    file["offset"] = h5py.SoftLink("/a")
    file["a"] = h5py.SoftLink("/offset")


def virtual(file: h5py.File) -> None:
    del file["offset"]
    layout = h5py.VirtualLayout((29,), "<i8")
    layout[:] = h5py.VirtualSource(".", "offset", (29,))
    file.create_virtual_dataset("offset", layout)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_forged_structure_is_refused_by_name_or_not_needed(
    store: Path, readers: Readers, verifier: KeptReader, name: str
) -> None:
    path = sealed_in(store)
    whole = readers.read(store)
    rewritten(path, STRUCTURES[name])
    words = readers.read(store)
    assert check_reasons(words, path) > 0 or words == whole, words
    report = verifier.verify(store, shard_timeout_s=READ_S_MAX)
    assert {problem.shard for problem in report.problems} >= {path.name}


def test_a_chunk_larger_than_any_of_ours_is_not_unpacked(store: Path) -> None:
    path = sealed_in(store)
    rewritten(path, STRUCTURES["huge-chunks"])
    with EventStore(store) as opened, pytest.raises(ShardCorruptError, match=f"its chunks are of {1 << 31} bytes"):
        list(opened.iterate())


HEADERS: dict[str, dict[str, Any]] = {
    "more-events": {"events": 1 << 40},
    "no-events": {"events": 0},
    "one-event-less": {"events": 27},
    "many-commits": {"commits": 1 << 50},
    "huge-tree": {"tree_size": (1 << 62) + 1},
    "odd-frontier": {"frontier": b"x"},
    "odd-frontier-before": {"frontier_before": b"x" * 33},
    "no-areas": {"areas": {}},
    "other-partition": {"partition": 999},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_forged_header_with_a_right_checksum_never_crashes_a_reader(
    store: Path, readers: Readers, verifier: KeptReader, name: str
) -> None:
    path = sealed_in(store)
    reheaded(path, **HEADERS[name])
    check_reasons(readers.read(store), path)
    report = verifier.verify(store, shard_timeout_s=READ_S_MAX)
    assert not report.ok
    assert path.name in {problem.shard for problem in report.problems}


@pytest.mark.parametrize(
    "area", ["by_event_id/ids", "by_event_id/filter", "by_consultation/start", "by_consultation/rows"]
)
def test_an_area_of_an_odd_place_or_length_never_crashes_a_reader(store: Path, readers: Readers, area: str) -> None:
    path = sealed_in(store)
    before = read_sealed_header(path)
    assert area in before.areas
    place = before.areas[area]
    for changed in (
        msgspec.structs.replace(place, bytes=0),
        msgspec.structs.replace(place, bytes=max(1, place.bytes - 1)),
        msgspec.structs.replace(place, offset=HEADER_BYTES, bytes=1),
        msgspec.structs.replace(place, offset=before.file_bytes - 1, bytes=1),
        msgspec.structs.replace(place, offset=before.file_bytes, bytes=1 << 60),
    ):
        with path.open("r+b") as file:
            file.write(encode_header(msgspec.structs.replace(before, areas=before.areas | {area: changed})))
        check_reasons(readers.read(store), path)


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bits_of_a_sealed_shard_are_found_or_harmless(store: Path, readers: Readers, seed: int) -> None:
    path = sealed_in(store)
    whole = path.read_bytes()
    rng = random.Random(seed)
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4, 32))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        check_reasons(readers.read(store), path)


def test_flipped_bits_of_a_live_shard_are_found_or_harmless(store: Path, readers: Readers) -> None:
    path = live_in(store)
    whole = path.read_bytes()
    used = [at for at in range(len(whole)) if whole[at]]
    rng = random.Random(5)
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.choice(used)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        check_reasons(readers.read(store), path)


@pytest.mark.parametrize("of", [sealed_in, live_in])
def test_a_shard_cut_short_anywhere_is_refused_by_name(
    store: Path, readers: Readers, verifier: KeptReader, of: Callable[[Path], Path]
) -> None:
    path = of(store)
    whole = path.read_bytes()
    for size in (0, 1, 9, 511, HEADER_BYTES - 1, HEADER_BYTES, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert check_reasons(readers.read(store), path) > 0, size
        assert path.name in {problem.shard for problem in verifier.verify(store).problems}


def receipt_for(made: tuple[Path, PartitionMaker], store: Store) -> Any:
    maker = made[1]
    frontier = maker.frontier.copy()
    with_live = maker.events[frontier.size :]
    for event in with_live:
        frontier.append(leaf_hash(encode_event(event)))
    receipt = first_receipt(PARTITION, store.cluster_id, store.store_id, "w")
    return msgspec.structs.replace(
        receipt,
        ends={store.store_id: StoreEnd(shard=4, commits=2)},
        origin=maker.origin,
        persisted=frontier.size,
        root=frontier.root().hex(),
    )


def opened(made: tuple[Path, PartitionMaker], store: Store) -> str:
    """Why persist cannot open the partition; empty when it can."""
    try:
        PartitionFiles.open(store, PARTITION, receipt_for(made, store), Settings(), lambda: NOW_NS).close()
    except ShardError as error:
        return str(error)
    return ""


def test_persist_opens_a_damaged_partition_with_an_error_that_names_a_file_or_not_at_all(
    made: tuple[Path, PartitionMaker], tmp_path: Path
) -> None:
    """Both the opening that works, which shows that the receipt is right, and every one that must not."""
    rng = random.Random(7)
    refused = 0
    for number in range(60):
        directory = Path(shutil.copytree(made[0], tmp_path / str(number)))
        store = Store(directory, made[1].store.store_id, made[1].store.cluster_id)
        if number:
            path = rng.choice([sealed_in(directory), live_in(directory)])
            data = bytearray(path.read_bytes())
            used = [at for at in range(len(data)) if data[at]]
            if rng.random() < 0.3:
                del data[rng.randrange(len(data)) :]
            else:
                for _ in range(rng.choice((1, 8))):
                    data[rng.choice(used)] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        why = opened(made, store)
        assert not why or str(directory) in why
        assert number or not why, why
        refused += bool(why)
        shutil.rmtree(directory)
    assert refused > 10


def test_the_headers_of_the_forgeries_are_what_a_reader_takes_for_real(store: Path) -> None:
    """Or the tests above would only show that headers are checked."""
    path = sealed_in(store)
    rewritten(path, STRUCTURES["zip-bomb"])
    assert isinstance(read_sealed_header(path), SealedHeader)
