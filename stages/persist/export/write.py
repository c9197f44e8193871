"""Writing an export: to a stream, or to a file that appears whole, with its manifest, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

from contracts.errors import SettingsError
from contracts.events import format_rfc3339
from stages.persist.export.consultations import write_consultations
from stages.persist.export.formats import ExportFormat, write_csv, write_ndjson
from stages.persist.export.manifest import (
    MANIFEST_SUFFIX,
    Filters,
    Manifest,
    encode_manifest,
    file_sha256,
    manifest_path,
    with_digest,
)
from stages.persist.files import publish_file, remove_file, sync_file, write_new_file
from stages.persist.names import tmp_path
from stages.persist.output import all_or_nothing, check_output
from stages.persist.sealed import Selection
from stages.persist.store import EventStore, StoredEvent
from stages.persist.storedir import read_store

_REPORT_EVENTS = 1000
_WRITING = 0.9
"""Of all the work; the rest is to read what was written once more, for its digest."""
_STREAMS: dict[ExportFormat, Callable[[Iterable[StoredEvent], BinaryIO], int]] = {
    ExportFormat.NDJSON: write_ndjson,
    ExportFormat.CSV: write_csv,
}

Progress = Callable[[float], None]
"""Told how much is done, from 0 to 1."""


def export_stream(store: EventStore, file: BinaryIO, *, file_format: ExportFormat, wanted: Selection) -> int:
    """Writes the events that are stored now to `file`, in order of origin; gives their number.

    Args:
        store: where they are.
        file: open for writing.
        file_format: any but HDF5.
        wanted: which events.

    Raises:
        SettingsError: the format is no stream.
        ShardError: a shard cannot be read.
        OSError: `file` refused.
    """
    if file_format not in _STREAMS:
        raise SettingsError(f"{file_format} cannot be written to a stream; give it a file (--output)")
    return _STREAMS[file_format](store.select(wanted), file)


def export_file(
    store: EventStore,
    output: Path,
    *,
    file_format: ExportFormat,
    wanted: Selection,
    who: str,
    purpose: str,
    export_id: UUID,
    now_ns: int,
    on_progress: Progress = lambda done: None,
) -> Manifest:
    """Writes the events that are stored when this begins to the file `output`, and its manifest beside it.

    Both are durable at the end. If the process dies or the power fails before: `output` is what it was, or, in the last
    moment, the whole new file still without a manifest; `*.tmp` files beside it may be left and can be removed.

    Args:
        store: where the events are; persist may go on writing.
        output: replaced when it is there.
        file_format: how.
        wanted: which events.
        who, purpose: for the manifest.
        export_id: a new one.
        now_ns: the time, nanoseconds since the epoch.
        on_progress: told now and then.

    Returns:
        the manifest.

    Raises:
        SettingsError: `output` cannot be an export's name.
        OutputError: the disk refused.
        ShardError: a shard cannot be read.
    """
    check_output(output)
    if output.name.endswith(MANIFEST_SUFFIX):
        raise SettingsError(f"{output}: is the name of another export's manifest; choose another")
    identity = read_store(store.directory)
    ends = store.ends()
    found = store.select(wanted, ends)
    last_origin = max((end.origin or 0 for end in ends), default=0)
    tmp = tmp_path(output.with_name(f"{output.name}.{export_id}"))
    manifest_tmp = tmp_path(manifest_path(tmp))
    with all_or_nothing(output, tmp, manifest_tmp):
        events = _write(found, tmp, file_format, last_origin, lambda done: on_progress(done * _WRITING))
        size_bytes = tmp.stat().st_size
        sha256 = file_sha256(tmp, lambda read: on_progress(_WRITING + (1 - _WRITING) * read / size_bytes))
        manifest = with_digest(
            Manifest(
                export_id=str(export_id),
                created=format_rfc3339(now_ns),
                who=who,
                purpose=purpose,
                store=identity.store_id,
                cluster=identity.cluster_id,
                file_format=file_format,
                filters=_filters(wanted),
                snapshot=tuple(ends),
                file=output.name,
                events=events,
                bytes=size_bytes,
                sha256=sha256,
            )
        )
        write_new_file(manifest_tmp, encode_manifest(manifest) + b"\n")
        # A manifest of an earlier export must never lie beside the new file.
        remove_file(manifest_path(output))
        publish_file(tmp, output)
        publish_file(manifest_tmp, manifest_path(output))
    on_progress(1.0)
    return manifest


def _write(
    found: Iterable[StoredEvent], tmp: Path, file_format: ExportFormat, last_origin: int, on_progress: Progress
) -> int:
    """Writes and syncs the temporary file; gives the number of events."""
    if file_format is ExportFormat.HDF5_CONSULTATIONS:
        reading = _told(found, last_origin, lambda done: on_progress(done / 2))
        events = write_consultations(reading, tmp, on_written=lambda done, total: on_progress((1 + done / total) / 2))
        fd = os.open(tmp, os.O_RDONLY)
        try:
            sync_file(fd)
        finally:
            os.close(fd)
        return events
    with tmp.open("wb") as file:
        events = _STREAMS[file_format](_told(found, last_origin, on_progress), file)
        sync_file(file.fileno())
    return events


def _told(found: Iterable[StoredEvent], last_origin: int, on_progress: Progress) -> Iterator[StoredEvent]:
    """The same events; progress by origin, since how many of them are wanted is not known before."""
    for number, stored in enumerate(found, 1):
        if number % _REPORT_EVENTS == 0:
            on_progress(stored.event.origin / last_origin)
        yield stored


def _filters(wanted: Selection) -> Filters:
    return Filters(
        site=wanted.site,
        event_type=wanted.event_type,
        since=None if wanted.since_ns is None else format_rfc3339(wanted.since_ns),
        until=None if wanted.until_ns is None else format_rfc3339(wanted.until_ns),
        consultation_id=None if wanted.consultation_id is None else str(UUID(bytes=wanted.consultation_id)),
    )
