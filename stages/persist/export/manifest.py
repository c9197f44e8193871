"""The manifest that lies beside an exported file: what was exported, when, by whom and what for, and how to check it.

A manifest shows every change to the file and every careless one to itself. Somebody who can write both can make a new
pair: whoever must rule that out keeps the manifest's digest elsewhere, or holds `snapshot` against signed receipts
(its roots are those that receipts of the same tree sizes carry).
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import msgspec

from contracts.errors import ProofError, WireFormatError
from contracts.events import MESSAGE_BYTES_MAX
from contracts.wire import UNREADABLE
from stages.persist.check import Finding
from stages.persist.export.formats import ExportFormat
from stages.persist.store import PartitionEnd

MANIFEST_SUFFIX = ".manifest.json"

_CHUNK_BYTES = 1024 * 1024
_HDF5_ERRORS = (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError)


class Filters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which events were wanted; None: any.

    Attributes:
        site, event_type, consultation_id: exactly these; the id as UUID text.
        since, until: since <= timestamp < until, RFC 3339 in UTC.
    """

    site: str | None = None
    event_type: str | None = None
    since: str | None = None
    until: str | None = None
    consultation_id: str | None = None


class Manifest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="format", tag="fi.export.1"
):
    """What an exported file is.

    Attributes:
        export_id: UUID text.
        created: when the export began, RFC 3339 in UTC.
        who, purpose: as the caller said; may be empty.
        store, cluster: ids the events are from.
        file_format: how the file is written.
        filters: which events were wanted.
        snapshot: how far each partition reached when the export began; nothing after it is in the file.
        file: its name; it lies beside the manifest.
        events: in the file.
        bytes: length of the file.
        sha256: of the file, hex.
        digest: SHA-256 of the manifest's compact JSON with this field empty, hex.
    """

    export_id: str
    created: str
    who: str
    purpose: str
    store: str
    cluster: str
    file_format: ExportFormat
    filters: Filters
    snapshot: tuple[PartitionEnd, ...]
    file: str
    events: int
    bytes: int
    sha256: str
    digest: str = ""


@dataclass(frozen=True, slots=True)
class ExportCheck:
    """What `check_export` found.

    Attributes:
        path: of the manifest.
        manifest: what it says; None when it cannot be read.
        ok: nothing is wrong.
        findings: what is; `where` is the file or the manifest.
    """

    path: Path
    manifest: Manifest | None
    ok: bool
    findings: list[Finding]


def manifest_path(exported: Path) -> Path:
    """Where the manifest of the file `exported` lies."""
    return exported.with_name(exported.name + MANIFEST_SUFFIX)


def exported_path(manifest: Path) -> Path:
    """The file that the manifest is of, by its own name."""
    return manifest.with_name(manifest.name.removesuffix(MANIFEST_SUFFIX))


def with_digest(manifest: Manifest) -> Manifest:
    """The manifest with the digest that belongs to its other fields."""
    return msgspec.structs.replace(manifest, digest=_digest(manifest))


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON that people can read too."""
    return msgspec.json.format(msgspec.json.encode(manifest))


def decode_manifest(data: bytes) -> Manifest:
    """Inverse of `encode_manifest`.

    Raises:
        WireFormatError: not a manifest of a version that this build reads.
        ProofError: it is not what was written.
    """
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except UNREADABLE as error:
        raise WireFormatError(f"is not a manifest that this build reads ({error})") from error
    if manifest.digest != _digest(manifest):
        raise ProofError("was changed after it was written: it does not have the digest it says")
    return manifest


def find_manifest(path: Path) -> Path | None:
    """The manifest that `path` is, or that lies beside the (perhaps missing) file `path`; None when there is none."""
    if path.name.endswith(MANIFEST_SUFFIX) and not path.is_dir():
        return path
    return beside if path.name and (beside := manifest_path(path)).is_file() else None


def list_manifests(directory: Path) -> list[Path]:
    """The manifests that lie in `directory`, by name. Raises `OSError`."""
    return [directory / name for name in sorted(os.listdir(directory)) if name.endswith(MANIFEST_SUFFIX)]


def check_export(path: Path) -> ExportCheck:
    """Holds an exported file against the manifest at `path`. Whatever is wrong is a finding, not an exception."""
    try:
        manifest = decode_manifest(path.read_bytes())
    except OSError as error:
        return ExportCheck(path, None, False, [Finding("manifest", _unreadable(error))])
    except (WireFormatError, ProofError) as error:
        return ExportCheck(path, None, False, [Finding("manifest", str(error))])
    if manifest_path(path.with_name(Path(manifest.file).name)) != path or Path(manifest.file).name != manifest.file:
        what = f"is that of {manifest.file!r}, not of what lies beside it under this name; give both their names back"
        return ExportCheck(path, manifest, False, [Finding("manifest", what)])
    wrong = _wrong(path.with_name(manifest.file), manifest)
    return ExportCheck(path, manifest, wrong is None, [] if wrong is None else [Finding(manifest.file, wrong)])


def file_sha256(path: Path, on_read: Callable[[int], None] = lambda size_bytes: None) -> str:
    """SHA-256 of a file, hex; `on_read` is told how many bytes were read so far. Raises `OSError`."""
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
            on_read(size_bytes)
    return digest.hexdigest()


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(manifest, digest=""))).hexdigest()


def _wrong(file: Path, manifest: Manifest) -> str | None:
    """What is wrong with the file. Its content is only looked into when it is what was written."""
    try:
        size = file.stat().st_size
        found = file_sha256(file)
    except OSError as error:
        return _unreadable(error)
    if size != manifest.bytes:
        return f"is {size} bytes long, but was exported with {manifest.bytes}"
    if found != manifest.sha256:
        return f"was changed: its SHA-256 is {found}, not {manifest.sha256}"
    try:
        events = _COUNTERS[manifest.file_format](file)
    except ValueError as error:
        return f"is not {manifest.file_format}: {error}"
    return None if events == manifest.events else f"holds {events} events, but its manifest says {manifest.events}"


def _unreadable(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"


def _count_lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def _count_rows(file: Path) -> int:
    csv.field_size_limit(MESSAGE_BYTES_MAX)
    with file.open(encoding="utf-8", newline="") as text:
        try:
            return sum(1 for _ in csv.reader(text)) - 1
        except csv.Error as error:
            raise ValueError(str(error)) from error


def _count_consultations(file: Path) -> int:
    try:
        with h5py.File(file, "r", locking=False) as opened:
            count = 0
            for name, group in opened["consultations"].items():
                found = len(group["events"])
                if found != group.attrs["event_count"]:
                    raise ValueError(f"consultation {name} holds {found} events, not {group.attrs['event_count']}")
                count += found
            return count
    except _HDF5_ERRORS as error:
        raise ValueError(str(error)) from error


_COUNTERS = {
    ExportFormat.NDJSON: _count_lines,
    ExportFormat.CSV: _count_rows,
    ExportFormat.HDF5_CONSULTATIONS: _count_consultations,
}
