"""The classic designs beside persist's files: one HDF5 file, ``/consultations/{id}/events``, JSON strings.

All of them store the gateway's JSON line, as it came, in a resizable chunked dataset of variable-length strings, one a
consultation. They differ in when the file is open, in the compression asked for (HDF5 compresses no variable-length
strings, only the references to them), and in what makes an event durable. HDF5's own flush never calls fsync.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import h5py

from benchmarks.report import Say, costs_ms
from benchmarks.storage.samples import Sample, Samples
from cluster.track import percentiles_ms

SIZES = (0, 100, 1_000, 10_000, 100_000)
FRESH_MAX = 1_000
"""A store of no more events is made anew for each measurement, which would else make it another size."""

_LOOKUPS = 100
_FILL_STEP = 500
_TEXT = h5py.string_dtype("utf-8")


@dataclass(frozen=True, slots=True)
class Design:
    """One classic design.

    Attributes:
        name: for tables.
        compression, level: of the datasets.
        per_event: the file is opened and closed for each event.
        swmr: it is written in single-writer-multiple-reader mode.
        killed, power: what it loses when the process is killed, and when the power fails although it syncs.
    """

    name: str
    compression: str
    level: int | None
    per_event: bool = False
    swmr: bool = False
    killed: str = ""
    power: str = ""


_KEPT_KILLED = "the whole file, in 2 of 150 kills"
_KEPT_POWER = "up to all events, in 8 % of cuts"
DESIGNS = (
    Design(
        "opened per event, gzip-4",
        "gzip",
        4,
        per_event=True,
        killed="nothing acknowledged; 1 of 150 files showed a wrong row",
        power="up to all events, in 28 % of cuts",
    ),
    Design("kept open, gzip-4", "gzip", 4, killed=_KEPT_KILLED, power=_KEPT_POWER),
    Design("kept open, gzip-1", "gzip", 1, killed=_KEPT_KILLED, power=_KEPT_POWER),
    Design("kept open, lzf", "lzf", None, killed=_KEPT_KILLED, power=_KEPT_POWER),
    Design(
        "SWMR, gzip-4",
        "gzip",
        4,
        swmr=True,
        killed="nothing, but no plain reader opens it (0 of 150) until it is repaired",
        power="up to all events, in 18 % of cuts; after the others a repair is needed",
    ),
)
"""What they lose was measured on prototypes, 150 real kills and 200 replayed power cuts of each, at a flush (for power
cuts: and an fsync) a group of events. Without fsync a power cut also takes what the kernel had not written."""


class ClassicFile:
    """A file of one design, for one writer."""

    def __init__(self, path: Path, design: Design) -> None:
        self.path = path
        self._design = design
        self._file: h5py.File | None = None
        self._datasets: dict[bytes, h5py.Dataset] = {}
        with self._opened("a") as file:
            file.require_group("consultations")

    def append(self, sample: Sample, *, sync: bool) -> None:
        """Stores one event, flushed to the kernel; on disk too with `sync`."""
        if self._design.per_event:
            with self._opened("a") as file:
                self._write(self._dataset(file, sample.consultation_id), [sample.line])
        else:
            dataset = self._kept(sample.consultation_id)
            self._write(dataset, [sample.line])
            if self._design.swmr:
                dataset.flush()
            else:
                dataset.file.flush()
        if sync:
            self.sync()

    def append_all(self, samples: Sequence[Sample]) -> None:
        """Stores events together, flushed to the kernel once: the file is opened once, and each dataset grown once."""
        lanes: dict[bytes, list[bytes]] = {}
        for sample in samples:
            lanes.setdefault(sample.consultation_id, []).append(sample.line)
        if self._design.per_event:
            with self._opened("a") as file:
                for consultation_id, lines in lanes.items():
                    self._write(self._dataset(file, consultation_id), lines)
        else:
            for consultation_id, lines in lanes.items():
                self._write(self._kept(consultation_id), lines)
            self._kept_file().flush()

    def sync(self) -> None:
        """Has the kernel write what it holds of the file."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Closes what is kept open."""
        self._datasets.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self, mode: str) -> h5py.File:
        # SWMR needs the newer format.
        return h5py.File(self.path, mode, libver=("v110", "v110") if self._design.swmr else None)

    def open_datasets(self, samples: Iterable[Sample]) -> None:
        """Opens what is there of the samples' consultations, as a writer that has run for a while has."""
        if not self._design.per_event:
            for sample in samples:
                if _name(sample.consultation_id) in self._kept_file():
                    self._kept(sample.consultation_id)

    def _kept_file(self) -> h5py.File:
        if self._file is None:
            self._file = self._opened("a")
            if self._design.swmr:
                self._file.swmr_mode = True
        return self._file

    def _kept(self, consultation_id: bytes) -> h5py.Dataset:
        dataset = self._datasets.get(consultation_id)
        if dataset is not None:
            return dataset
        if self._design.swmr and _name(consultation_id) not in self._kept_file():
            # Nothing may be created in SWMR mode: a new consultation is made with the file opened anew.
            self.close()
            with self._opened("a") as file:
                self._dataset(file, consultation_id)
        dataset = self._datasets[consultation_id] = self._dataset(self._kept_file(), consultation_id)
        return dataset

    def _dataset(self, file: h5py.File, consultation_id: bytes) -> h5py.Dataset:
        found = file.get(_name(consultation_id))
        if found is not None:
            return found
        return file.create_dataset(
            _name(consultation_id),
            (0,),
            _TEXT,
            maxshape=(None,),
            chunks=True,
            compression=self._design.compression,
            compression_opts=self._design.level,
        )

    def _write(self, dataset: h5py.Dataset, lines: Sequence[bytes]) -> None:
        rows = len(dataset)
        dataset.resize((rows + len(lines),))
        if len(lines) == 1:
            dataset[rows] = lines[0]
        else:
            dataset[rows:] = lines


def _name(consultation_id: bytes) -> str:
    return f"consultations/{UUID(bytes=consultation_id)}/events"


@dataclass(frozen=True, slots=True)
class ClassicEffort:
    """How much to measure.

    Attributes:
        sizes: stored events that append cost is measured at.
        appends: in each measurement, with and without fsync.
        cpu_s_max: a design that took more processor time to fill is stopped where it is.
    """

    sizes: tuple[int, ...] = SIZES
    appends: int = 50
    cpu_s_max: float = 90.0


class ClassicRun:
    """One design, with a file for each size that append cost is measured at.

    Attributes:
        design: which.
        filled: events in the largest file.
        points: measurements so far.
    """

    def __init__(self, scratch: Path, design: Design, samples: Samples, effort: ClassicEffort) -> None:
        """Fills the files, one event at a time; the design stops growing when that takes too long."""
        self.design = design
        self.filled = 0
        self.points: list[dict[str, Any]] = []
        self._samples = samples
        self._effort = effort
        self._kept: dict[int, tuple[ClassicFile, int]] = {}
        self._path = scratch / f"classic-{DESIGNS.index(design)}.h5"
        file = ClassicFile(self._path, design)
        start_s = time.process_time()
        for size in effort.sizes:
            while self.filled < size and time.process_time() - start_s < effort.cpu_s_max:
                count = min(_FILL_STEP, size - self.filled)
                self._append(file, self.filled, count, sync=False)
                self.filled += count
            if self.filled < size:
                break
            file.close()
            self._copy(size, size)
        file.close()

    @property
    def stopped(self) -> bool:
        """It did not reach the largest size."""
        return self.filled < self._effort.sizes[-1]

    def measure(self, size: int) -> None:
        """Appends to the file that holds `size` events, with and without fsync; does nothing where there is none."""
        if size not in self._kept:
            return
        if size <= FRESH_MAX:
            self._copy(size, f"{size}-fresh")
        file, stored = self._kept[size]
        file.open_datasets(self._samples.take(stored + 1, 2 * self._effort.appends))
        file.sync()
        for sync in (True, False):
            taken = self._append(file, stored, self._effort.appends, sync=sync)
            self.points.append({"size": size, "stored": stored, "sync": sync, **costs_ms(taken)})
            stored += len(taken)
        if size <= FRESH_MAX:
            file.close()
        else:
            self._kept[size] = (file, stored)

    def finish(self) -> dict[str, Any]:
        """All figures of the design."""
        for file, _ in self._kept.values():
            file.close()
        return {
            "design": self.design.name,
            "killed": self.design.killed,
            "power": self.design.power,
            "points": self.points,
            "filled": self.filled,
            "stopped": self.stopped,
            "bytes": round(self._path.stat().st_size / self.filled, 1),
            "lookup_ms": self._look_up(),
        }

    def _copy(self, size: int, name: int | str) -> None:
        """A copy, on disk, of the file as it is, or of that of `size` events, to be measured."""
        path = self._path.with_name(f"{self._path.stem}-{name}.h5")
        source = self._path if name == size else self._path.with_name(f"{self._path.stem}-{size}.h5")
        shutil.copyfile(source, path)
        file = ClassicFile(path, self.design)
        file.sync()
        self._kept[size] = (file, size)

    def _append(self, file: ClassicFile, stored: int, count: int, *, sync: bool) -> list[int]:
        """Appends the next events to a file; how long each took, in ns."""
        events = list(self._samples.take(stored + 1, count))
        taken = []
        for sample in events:
            start_ns = time.perf_counter_ns()
            file.append(sample, sync=sync)
            taken.append(time.perf_counter_ns() - start_ns)
        return taken

    def _look_up(self) -> dict[str, float]:
        """Opening the largest file and reading one consultation's strings, ms."""
        taken = []
        for turn in range(_LOOKUPS):
            sample = self._samples.event(1 + turn * self.filled // _LOOKUPS)
            start_ns = time.perf_counter_ns()
            with h5py.File(self._path, "r") as file:
                lines = file[_name(sample.consultation_id)][()]
            taken.append(time.perf_counter_ns() - start_ns)
            if sample.line not in lines:
                raise RuntimeError(f"{self._path}: an event is missing")
        return percentiles_ms(taken)


def fill_classics(scratch: Path, samples: Samples, effort: ClassicEffort, say: Say) -> list[ClassicRun]:
    """Every design, filled and ready to be measured."""
    runs = []
    for design in DESIGNS:
        say(f"filling: {design.name}")
        runs.append(ClassicRun(scratch, design, samples, effort))
    return runs
