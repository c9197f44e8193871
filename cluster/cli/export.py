"""`fictl export`: a store's events for other programs; and `fictl verify` of what it wrote."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID, uuid4

import typer

from cluster.cli.common import CORRUPT, StoreArgument, login_name, print_json, print_lines, progress_bar, say
from contracts.errors import SettingsError
from contracts.events import parse_rfc3339
from contracts.policy import EVENT_TYPES
from contracts.subjects import is_token
from stages.persist.export.formats import ExportFormat

if TYPE_CHECKING:
    from stages.persist.sealed import Selection


def export(
    directory: StoreArgument,
    format: Annotated[
        ExportFormat, typer.Option(help="A JSON object or a CSV row an event, or HDF5 with a group a consultation.")
    ] = ExportFormat.NDJSON,
    output: Annotated[
        Path | None,
        typer.Option(help="Write to this file, which appears when it is whole, with a manifest. Default: stdout."),
    ] = None,
    site: Annotated[str | None, typer.Option(help="Only events from this site.")] = None,
    event_type: Annotated[str | None, typer.Option("--type", help="Only events of this type.")] = None,
    since: Annotated[str | None, typer.Option(metavar="RFC3339", help="Only events at this time or later.")] = None,
    until: Annotated[str | None, typer.Option(metavar="RFC3339", help="Only events before this time.")] = None,
    consultation: Annotated[str | None, typer.Option(metavar="UUID", help="Only events of this one.")] = None,
    purpose: Annotated[str | None, typer.Option(help="What the export is for, for the manifest.")] = None,
    who: Annotated[str | None, typer.Option(help="Who exports, for the manifest. Default: the login name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest on stdout; with --output.")] = False,
) -> None:
    """Writes the events that are stored now in order of origin, also while the pipeline writes.

    With --output a manifest is written beside the file: what was exported, when, by whom and what for, how far each
    partition reached, and the file's SHA-256. `fictl verify FILE` checks it.

    Example: fictl export .fi --format csv --type SOAP_GENERATION_COMPLETED --output notes.csv --purpose "audit 12"
    """
    from stages.persist.export.write import export_file, export_stream
    from stages.persist.store import EventStore

    wanted = _selection(site, event_type, since, until, consultation)
    if output is None:
        for name, given in (("--purpose", purpose), ("--who", who), ("--json", as_json)):
            if given:
                raise SettingsError(f"{name} is for the manifest, which only a file has: give --output too")
        if format is ExportFormat.HDF5_CONSULTATIONS:
            raise SettingsError(f"--format {format} cannot be written to stdout: give --output too")
        with EventStore(directory) as store:
            export_stream(store, sys.stdout.buffer, file_format=format, wanted=wanted)
        return
    with EventStore(directory) as store, progress_bar("exporting") as progress:
        manifest = export_file(
            store,
            output,
            file_format=format,
            wanted=wanted,
            who=login_name() if who is None else who,
            purpose=purpose or "",
            export_id=uuid4(),
            now_ns=time.time_ns(),
            on_progress=lambda done: progress(done, 1.0),
        )
    say(f"{manifest.events} events written to {output}")
    if as_json:
        print_json(manifest)


def verify_export(path: Path, as_json: bool, timeout_s: float) -> None:
    """Holds an exported file against its manifest, prints what is wrong, and exits 4 if anything is."""
    from contracts.errors import ProofError, WireFormatError
    from stages.persist.export.manifest import decode_manifest
    from stages.persist.verify import verify_export

    with progress_bar("verifying"):
        findings = verify_export(path, timeout_s=timeout_s)
    manifest = None
    if path.is_file():
        with contextlib.suppress(OSError, ProofError, WireFormatError):
            manifest = decode_manifest(path.read_bytes())
    if as_json:
        print_json({"path": str(path), "ok": not findings, "problems": findings, "manifest": manifest})
    else:
        for finding in findings:
            print_lines(f"{path.name}: {finding.where}: {finding.what}")
        if manifest is not None and not findings:
            who = manifest.who or "nobody named"
            print_lines(f"{manifest.file}: {manifest.events} events, exported {manifest.created} by {who}: all is well")
    if findings:
        raise typer.Exit(CORRUPT)


def _selection(
    site: str | None, event_type: str | None, since: str | None, until: str | None, consultation: str | None
) -> Selection:
    from stages.persist.sealed import Selection

    if site is not None and not is_token(site):
        raise SettingsError(f"--site {site}: a site is 1 to 64 of A-Z a-z 0-9 _ -")
    if event_type is not None and event_type not in EVENT_TYPES:
        raise SettingsError(f"--type {event_type}: there is no such type; `fictl schema` shows them")
    since_ns, until_ns = _time("--since", since), _time("--until", until)
    if since_ns is not None and until_ns is not None and since_ns >= until_ns:
        raise SettingsError(f"--since {since} --until {until}: no time is in between; --until must be later")
    try:
        consultation_id = None if consultation is None else UUID(consultation).bytes
    except ValueError:
        raise SettingsError(
            f"--consultation {consultation}: is not a UUID; `fictl export` shows those stored"
        ) from None
    return Selection(site, event_type, since_ns, until_ns, consultation_id)


def _time(option: str, text: str | None) -> int | None:
    try:
        return None if text is None else parse_rfc3339(text)
    except ValueError as error:
        raise SettingsError(f"{option} {text}: {error}; write e.g. 2026-01-31T08:00:00Z") from None
