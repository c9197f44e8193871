"""No change to an exported file or its manifest goes unseen."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import msgspec
import pytest
from exporting import ALL, EXPORT_ID, NAMES, exported, filled_place
from shard_maker import NOW_NS

from cluster.testing.disk import flip
from stages.persist.export.formats import ExportFormat
from stages.persist.export.manifest import (
    MANIFEST_SUFFIX,
    Manifest,
    check_export,
    encode_manifest,
    file_sha256,
    manifest_path,
    with_digest,
)
from stages.persist.export.write import export_file
from stages.persist.store import EventStore
from stages.persist.verify import verify_export, verify_store


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return filled_place(tmp_path)


def rewrite(path: Path, **changes: Any) -> None:
    """What somebody does who knows how manifests are made: changes it, and its digest with it."""
    manifest = msgspec.json.decode(manifest_path(path).read_bytes(), type=Manifest)
    manifest_path(path).write_bytes(encode_manifest(with_digest(msgspec.structs.replace(manifest, **changes))))


def edit(path: Path, old: str, new: str) -> None:
    text = manifest_path(path).read_text()
    assert text.count(old) == 1
    manifest_path(path).write_text(text.replace(old, new))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "file removed": (lambda path: path.unlink(), "is missing"),
    "bit flipped": (lambda path: flip(path, 5000), "was changed: its SHA-256"),
    "last bit flipped": (lambda path: flip(path, -1), "was changed: its SHA-256"),
    "cut short": (lambda path: os.truncate(path, 4000), "is 4000 bytes long"),
    "emptied": (lambda path: os.truncate(path, 0), "is 0 bytes long"),
    "grown": (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "bytes long"),
    "manifest removed": (lambda path: manifest_path(path).unlink(), "manifest: is missing"),
    "manifest emptied": (lambda path: manifest_path(path).write_bytes(b""), "is not a manifest"),
    "manifest not text": (lambda path: manifest_path(path).write_bytes(b'{"format":"\xff"}'), "is not a manifest"),
    "manifest of the future": (lambda path: edit(path, "fi.export.1", "fi.export.2"), "is not a manifest"),
    "purpose edited": (lambda path: edit(path, "audit 12", "audit 13"), "was changed after it was written"),
    "field added": (lambda path: edit(path, '"who"', '"why": 1, "who"'), "is not a manifest"),
    "both renamed": (
        lambda path: (manifest_path(path).rename(manifest_path(path.with_name("b"))), path.rename(path.with_name("b"))),
        "give both their names back",
    ),
    "path in the name": (lambda path: rewrite(path, file=f"../{path.parent.name}/{path.name}"), "is that of"),
    "count forged": (lambda path: rewrite(path, events=141), "holds 142 events, but its manifest says 141"),
    "format forged": (
        lambda path: rewrite(path, file_format=ExportFormat.HDF5_CONSULTATIONS),
        "is not hdf5-consultations",
    ),
    "file swapped": (
        lambda path: (path.write_bytes(b"{}\r\n" * 3), rewrite(path, sha256=file_sha256(path), bytes=12)),
        "events, but its manifest says 142",
    ),
}


@pytest.mark.parametrize("file_format", [ExportFormat.NDJSON, ExportFormat.CSV])
@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_every_change_to_an_export_or_its_manifest_is_found(
    place: Path, file_format: ExportFormat, change: Callable[[Path], object], said: str
) -> None:
    exported(place, file_format)
    path = place / NAMES[file_format]
    change(path)
    manifests = list(place.glob(f"*{MANIFEST_SUFFIX}")) or [manifest_path(path)]
    (check,) = map(check_export, manifests)
    assert not check.ok
    (finding,) = check.findings
    assert said in f"{finding.where}: {finding.what}"


def test_a_consultation_that_does_not_hold_what_it_says_is_found(place: Path) -> None:
    exported(place, ExportFormat.HDF5_CONSULTATIONS)
    path = place / "all.h5"
    with h5py.File(path, "r+") as file:
        name, group = next(iter(file["consultations"].items()))
        group.attrs["event_count"] += 1
    rewrite(path, sha256=file_sha256(path), bytes=path.stat().st_size)
    (finding,) = check_export(manifest_path(path)).findings
    assert f"consultation {name} holds" in finding.what


def test_verifying_a_store_checks_the_exports_that_lie_in_it(place: Path) -> None:
    exported(place, ExportFormat.CSV)
    for name in ("in.h5", "in.h5.copy"):
        with EventStore(place) as store:
            export_file(
                store,
                place / "shards" / name,
                file_format=ExportFormat.HDF5_CONSULTATIONS,
                wanted=ALL,
                who="",
                purpose="",
                export_id=EXPORT_ID,
                now_ns=NOW_NS,
            )
    told: list[tuple[int, int]] = []
    report = verify_store(place, on_progress=lambda done, total: told.append((done, total)))
    assert (report.problems, report.exports) == ([], 3)
    total = report.shards + report.exports
    assert told == [(done, total) for done in range(1, total + 1)]
    flip(place / "all.csv", 5)
    flip(place / "shards" / "in.h5", 5)
    assert [(problem.shard, problem.where) for problem in verify_store(place).problems] == [
        ("all.csv.manifest.json", "all.csv"),
        ("in.h5.manifest.json", "in.h5"),
    ]
    manifest_path(place / "shards" / "in.h5").unlink()
    assert "in.h5: is not the name of a shard" in [
        f"{problem.shard}: {problem.what}" for problem in verify_store(place / "shards").problems
    ]


def test_an_export_that_hangs_whoever_reads_it_is_a_problem_like_others(place: Path, tmp_path: Path) -> None:
    exported(place, ExportFormat.HDF5_CONSULTATIONS)
    path = place / "all.h5"
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(path, "r+") as file:
        file["consultations/x"] = h5py.ExternalLink(str(tmp_path / "pipe"), "/")
    rewrite(path, sha256=file_sha256(path), bytes=path.stat().st_size)
    os.mkfifo(manifest_path(place / "other.csv"))
    found = [verify_export(manifest_path(place / name), timeout_s=1) for name in ("all.h5", "other.csv")]
    assert [finding.what for (finding,) in found] == ["reading it took longer than 1 s; it is damaged"] * 2
