"""Exports small stores, and reads the files back as other programs would."""

from __future__ import annotations

import csv
import functools
import json
import tempfile
from pathlib import Path
from typing import Any
from uuid import UUID

import h5py
from shard_maker import NOW_NS, PartitionMaker, filled_store

from stages.persist.export.formats import ExportFormat, encode_line
from stages.persist.export.manifest import (
    Manifest,
)
from stages.persist.export.write import export_file
from stages.persist.sealed import Selection
from stages.persist.store import EventStore

EXPORT_ID = UUID(int=7)
ALL = Selection()
NAMES = {
    ExportFormat.NDJSON: "all.ndjson",
    ExportFormat.CSV: "all.csv",
    ExportFormat.HDF5_CONSULTATIONS: "all.h5",
}


def filled_place(directory: Path) -> Path:
    """A directory with a store of two partitions and 142 events in it, and room for exports beside it."""
    (directory / "shards").mkdir()
    for name, data in _filled().items():
        (directory / "shards" / name).write_bytes(data)
    return directory


@functools.cache
def _filled() -> dict[str, bytes]:
    """The files of such a store: to make them takes ten times as long as to write them."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "shards"
        store, maker = filled_store(directory)
        other = PartitionMaker(store, 5)
        other.begin()
        other.commit(40)
        other.seal()
        other.begin()
        other.commit(0)
        # The same consultation in two partitions and five shards.
        other.consultations = maker.consultations
        other.commit(11)
        other.close()
        return {path.name: path.read_bytes() for path in directory.iterdir()}


def exported(place: Path, file_format: ExportFormat, wanted: Selection = ALL, **said: Any) -> Manifest:
    with EventStore(place) as store:
        given: dict[str, Any] = {"who": "ana", "purpose": "audit 12", "export_id": EXPORT_ID, "now_ns": NOW_NS} | said
        return export_file(store, place / NAMES[file_format], file_format=file_format, wanted=wanted, **given)


def expected(place: Path, wanted: Selection = ALL) -> list[dict[str, Any]]:
    with EventStore(place) as store:
        return [json.loads(encode_line(stored)) for stored in store.iterate() if wanted.takes(stored.event)]


def read_back(place: Path, file_format: ExportFormat) -> list[dict[str, Any]]:
    """What another program makes of the file, in order of origin."""
    path = place / NAMES[file_format]
    if file_format is ExportFormat.NDJSON:
        return [json.loads(line) for line in path.read_text().splitlines()]
    if file_format is ExportFormat.CSV:
        with path.open(newline="", encoding="utf-8") as file:
            return [from_row(row) for row in csv.DictReader(file)]
    with h5py.File(path) as file:
        found = [json.loads(text) for group in file["consultations"].values() for text in group["events"].asstr()[()]]
    return sorted(found, key=lambda fields: (fields["origin"], fields["partition"]))


def from_row(row: dict[str, str]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: text for name, text in row.items() if text}
    for name in ("payload", "metadata", "partition", "origin", "index", "leaf", "policy_version"):
        fields[name] = json.loads(fields[name])
    fields["times"] = {name: fields.pop(name) for name in ("accepted", "ingest", "segment", "hash")}
    return fields
