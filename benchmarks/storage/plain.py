"""Plain h5py readers beside a writer at full speed: what any program with stock HDF5 sees of shards as they grow.

``python -m benchmarks.storage.plain DIRECTORY`` is the writer: persist's own commits without a pause, rolling and
sealing as persist does, until its input ends. The reader (`read_shard`) knows of a shard what its attributes say, opens
it with nothing but ``h5py.File(path, "r")``, and checks every row and event of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import h5py
import msgspec
import typer

from benchmarks.report import costs_ms
from benchmarks.storage.lane import PARTITION, Lane
from benchmarks.storage.samples import Samples
from contracts.events import decode_event
from contracts.settings import Settings
from stages.persist.files import write_all_at
from stages.persist.names import ShardFile, list_shards
from stages.runtime.tasks import run_blocking

ROOT = Path(__file__).parents[2]
BATCH = 10

_PROGRESS_FILE = "committed-origin"
_WAIT_S_MAX = 60.0
_COMPARED = 20
_LENGTH = struct.Struct("<I")
_COVERED = struct.Struct("<8q")
_SEED = 5


class WrongReadError(Exception):
    """A plain reader saw something that is not what was committed."""


class Shown(NamedTuple):
    """What one plain open showed: the last origin in the shard (0 without any), and how many events were checked."""

    last_origin: int
    events: int


class Tally(NamedTuple):
    """Opens by what they met.

    Attributes:
        tries, correct: opens, and how many of them showed nothing but what was committed.
        live, sealed: the correct ones by what they opened.
        sealed_meanwhile: times that a listed live shard was gone, because it had been sealed; another was opened.
        events: checked in all.
        shards: different ones met.
        wrong: what was wrong.
    """

    tries: int
    correct: int
    live: int
    sealed: int
    sealed_meanwhile: int
    events: int
    shards: int
    wrong: list[str]


def read_shard(path: Path, samples: Samples | None = None) -> Shown:
    """Opens a live or sealed shard with stock h5py and checks all that readers may see of it.

    Args:
        path: the shard.
        samples: where its events came from; the last ones and some others are then compared byte for byte.

    Raises:
        FileNotFoundError: it was sealed meanwhile.
        WrongReadError: something is not whole, not in order, or not what was written.
        Exception: whatever h5py raises for a file that it cannot read.
    """
    with h5py.File(path, "r") as file:
        records = list(_sealed_records(file) if "records" in file else _live_records(file))
    for number, (origin, record) in enumerate(records):
        event = decode_event(record)
        if event.origin != origin or origin != records[0][0] + number:
            raise WrongReadError(f"{path.name}: event {number} has origin {event.origin}, not {origin}")
    if samples is not None and records:
        others = random.Random(f"{_SEED}/{path.name}/{len(records)}").sample(records, min(_COMPARED, len(records)))
        for origin, record in [*records[-_COMPARED:], *others]:
            if samples.event(origin).record != record:
                raise WrongReadError(f"{path.name}: the event with origin {origin} is not the one that was written")
    return Shown(records[-1][0] if records else 0, len(records))


def _live_records(file: h5py.File) -> Iterator[tuple[int, bytes]]:
    """(origin, record) of the rows up to the watermark, by the rules in the file's attribute `about`."""
    commits = int(file["watermark"][0])
    if not 0 <= commits <= len(file["index"]):
        raise WrongReadError(f"the watermark is {commits} of {len(file['index'])} rows")
    rows = file["index"][:commits].tolist()
    start = 0
    last_origin = None
    frames = file["frames"][: rows[-1][1]].tobytes() if rows else b""
    for number, (ordinal, end, crc32, prev_origin, origin, events, *rest) in enumerate(rows, 1):
        blob = frames[start:end]
        covered = _COVERED.pack(ordinal, end, prev_origin, origin, events, *rest)
        if ordinal != number or zlib.crc32(blob, zlib.crc32(covered)) != crc32:
            raise WrongReadError(f"row {number} below the watermark {commits} is not whole")
        if last_origin not in (None, prev_origin) or origin - prev_origin != events:
            raise WrongReadError(f"row {number} goes from {prev_origin} to {origin} after {last_origin}")
        at = 0
        for place in range(events):
            (length,) = _LENGTH.unpack_from(blob, at)
            at += _LENGTH.size + length
            yield prev_origin + 1 + place, blob[at - length : at]
        if at != len(blob):
            raise WrongReadError(f"row {number} holds {len(blob)} bytes, of which its events are {at}")
        start, last_origin = end, origin


def _sealed_records(file: h5py.File) -> Iterator[tuple[int, bytes]]:
    offsets = file["offset"][()].tolist()
    origins = file["origin"][()].tolist()
    records = file["records"][()].tobytes()
    if not len(origins) == len(offsets) - 1 == file.attrs["events"] or offsets[-1] != len(records):
        raise WrongReadError("a sealed shard's columns contradict each other")
    for number, origin in enumerate(origins):
        yield origin, records[offsets[number] : offsets[number + 1]]


class Writer:
    """The writing process. As a context manager, ends it."""

    def __init__(self, directory: Path, shard_bytes: int, data_set: Path | None) -> None:
        directory.mkdir()
        self.directory = directory
        command = [sys.executable, "-m", "benchmarks.storage.plain", str(directory), "--shard-bytes", str(shard_bytes)]
        if data_set is not None:
            command += ["--data", str(data_set)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )

    def committed(self) -> int:
        """The last origin whose commit readers may see."""
        try:
            return int.from_bytes((self.directory / _PROGRESS_FILE).read_bytes()[:8], "little")
        except FileNotFoundError:
            return 0

    def wait_until(self, origin: int) -> None:
        """Waits until `origin` is committed and a first shard is sealed.

        Raises:
            RuntimeError: that did not happen, or the writer ended.
        """
        until_s = time.monotonic() + _WAIT_S_MAX
        while self.committed() < origin or not any(shard.sealed for shard in _shards(self.directory)):
            if self._process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"the writer reached {self.committed()}: {self._end()[1]}")
            time.sleep(0.01)

    def mark(self) -> None:
        """From now on the writer counts its commits as beside readers."""
        assert self._process.stdin is not None
        self._process.stdin.write("readers\n")
        self._process.stdin.flush()

    def finish(self) -> dict[str, Any]:
        """Ends the writing; what it says of itself.

        Raises:
            RuntimeError: it failed.
        """
        out, err = self._end()
        if self._process.returncode:
            raise RuntimeError(f"the writer failed: {err}")
        result: dict[str, Any] = msgspec.json.decode(out)
        return result

    def _end(self) -> tuple[str, str]:
        try:
            return self._process.communicate(timeout=_WAIT_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.communicate()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def open_many(writer: Writer, samples: Samples, tries: int) -> Tally:
    """Opens shards `tries` times while `writer` writes: the newest mostly, now and then another."""
    rng = random.Random(_SEED)
    wrong: list[str] = []
    met: set[int] = set()
    live = sealed = gone = events = 0
    for number in range(tries):
        committed = writer.committed()
        while True:
            shards = _shards(writer.directory)
            shard = rng.choice(shards) if number % 4 == 3 else shards[-1]
            try:
                shown = read_shard(shard.path, samples)
                if shard is shards[-1] and 0 < shown.last_origin < committed:
                    raise WrongReadError(f"{shard.path.name}: ends at {shown.last_origin}, {committed} was committed")
            except FileNotFoundError:
                gone += 1
                continue
            except Exception as error:
                wrong.append(f"open {number}: {type(error).__name__}: {error}")
            else:
                met.add(shard.shard)
                events += shown.events
                sealed += shard.sealed
                live += not shard.sealed
            break
    return Tally(tries, live + sealed, live, sealed, gone, events, len(met), wrong)


def _shards(directory: Path) -> list[ShardFile]:
    return list_shards(directory).get(PARTITION, [])


def main(
    directory: Path,
    shard_bytes: Annotated[int, typer.Option()] = 8 << 20,
    data: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Writes until its input ends; a line of input begins the second part of what is counted."""
    result = asyncio.run(_write(directory, shard_bytes, Samples(data)))
    print(msgspec.json.encode(result).decode())


async def _write(directory: Path, shard_bytes: int, samples: Samples) -> dict[str, Any]:
    ended = threading.Event()
    taken: list[list[int]] = [[], []]
    marked = threading.Event()

    def follow_input() -> None:
        for _ in sys.stdin:
            marked.set()
        ended.set()

    threading.Thread(target=follow_input, daemon=True).start()
    lock = asyncio.Lock()
    rolled = asyncio.Event()
    progress = os.open(directory / _PROGRESS_FILE, os.O_RDWR | os.O_CREAT)
    with Lane(directory, samples, Settings(shard_bytes=shard_bytes)) as lane:
        sealing = asyncio.create_task(_keep_sealing(lane, lock, rolled))
        while not ended.is_set() and not sealing.done():
            message = lane.next_message(BATCH)
            async with lock:
                start_ns = time.perf_counter_ns()
                took = await run_blocking(lane.commit, message)
                taken[marked.is_set()].append(time.perf_counter_ns() - start_ns - took.rolled_ns)
            write_all_at(progress, lane.receipt.origin.to_bytes(8, "little"), 0)
            if took.rolled_ns or lane.files.wants_next():
                rolled.set()
        sealing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sealing
        os.close(progress)
        return {
            "origin": lane.receipt.origin,
            "seals": len(lane.files.sealed),
            **{name: costs_ms(part) for name, part in zip(("alone_ms", "beside_ms"), taken, strict=True) if part},
            "commits": [len(part) for part in taken],
        }


async def _keep_sealing(lane: Lane, lock: asyncio.Lock, rolled: asyncio.Event) -> None:
    """As persist does beside its commits."""
    while True:
        for job in tuple(lane.files.to_seal):
            info = await run_blocking(lane.files.seal, job)
            async with lock:
                await run_blocking(lane.finish_seal, job, info)
        async with lock:
            await run_blocking(lane.prepare)
        rolled.clear()
        if not lane.files.to_seal:
            await rolled.wait()


if __name__ == "__main__":
    typer.run(main)
