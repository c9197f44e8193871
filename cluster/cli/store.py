"""`fictl events`, `fictl shards`, `fictl verify`: what is in a store.

None of them needs a running cluster, but for `fictl verify --receipts`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from cluster.cli.common import (
    CORRUPT,
    DEFAULT_DIRECTORY,
    JsonOption,
    NatsOption,
    PublicKeyOption,
    StoreArgument,
    console,
    find_servers,
    finite,
    make_table,
    print_json,
    print_lines,
    progress_bar,
    run_async,
    trusted_keys,
)
from cluster.cli.export import verify_export
from contracts.budgets import SHARD_CHECK
from contracts.errors import DefiniteError, SettingsError, ShardError
from stages.runtime.access import Servers

if TYPE_CHECKING:
    from cluster.audit import AuditReport
    from stages.persist.store import StoredEvent
    from stages.persist.verify import VerifyReport

_TEXT_CHARS_MAX = 100

VerifyArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DIR|FILE",
        help="A shards directory, the directory of `fictl up`, or an exported file or its manifest.",
        show_default=False,
    ),
]
StoreOption = Annotated[Path, typer.Option("--dir", help="A shards directory, or the directory of `fictl up`.")]


def events(
    consultation_id: Annotated[str, typer.Argument(help="UUID of the consultation.", show_default=False)],
    directory: StoreOption = DEFAULT_DIRECTORY,
    as_json: JsonOption = False,
) -> None:
    """Shows the stored events of one consultation in order, also while the pipeline writes.

    On a terminal a table; with --json, or when redirected, one JSON object a line. Exits 1 when none is stored.

    Example: fictl events aac18039-54dd-5c5d-a12f-d0aaa1882a18 --dir .fi --json
    """
    from stages.persist.export.formats import write_ndjson
    from stages.persist.store import EventStore

    try:
        wanted = UUID(consultation_id)
    except ValueError:
        raise SettingsError(
            f"{consultation_id!r} is not a UUID; `fictl export` shows the ids that are stored"
        ) from None
    with EventStore(directory) as store, progress_bar("reading shards"):
        found = store.consultation(wanted)
    if not found:
        raise DefiniteError(
            f"no event of consultation {wanted} is stored in {directory}; was it published to this cluster?"
        )
    if as_json or not sys.stdout.isatty():
        write_ndjson(found, sys.stdout.buffer)
    else:
        _show_events(found)


def shards(directory: StoreArgument, as_json: JsonOption = False) -> None:
    """Lists the shard files of a store.

    Example: fictl shards .fi
    """
    from stages.persist.store import EventStore

    with EventStore(directory) as store, progress_bar("reading shards"):
        found = store.shards()
    if as_json:
        print_json([{**asdict(info), "path": str(info.path)} for info in found])
        return
    table = make_table("file", "state", "partition", "origins", "commits", "events", "bytes")
    for info in found:
        origins = "" if info.first_origin is None else f"{info.first_origin} to {info.last_origin}"
        state = "sealed" if info.sealed else "live"
        counts = (str(number) for number in (info.commits, info.events, info.bytes))
        table.add_row(info.path.name, state, str(info.partition), origins, *counts)
    console().print(table)


def verify(
    path: VerifyArgument,
    receipts: Annotated[
        bool, typer.Option("--receipts", help="Hold the shards against the receipts and seal records in the cluster.")
    ] = False,
    cluster: Annotated[
        Path | None,
        typer.Option("--dir", help="With --receipts: what `fictl up --dir DIR` started. Default: DIR itself."),
    ] = None,
    nats: NatsOption = None,
    public_key: PublicKeyOption = None,
    shard_timeout: Annotated[
        float,
        typer.Option(
            min=1, max=86_400, callback=finite, metavar="S", help="Longest a shard may take, or 256 MiB of an export."
        ),
    ] = SHARD_CHECK.s,
    as_json: JsonOption = False,
) -> None:
    """Reads every shard, recomputes every audit hash and checksum, and checks order and continuity.

    So far the store is held against itself and the seal records beside it: that finds damage and careless changes. Who
    can write the store can forge all of it so that it agrees, and remove events from its end.

    With --public-key every sealed shard must have a record beside it, and from the first one that is signed by that key
    on each must be: its root is over all that came before. This needs no cluster, and leaves open only whether newer
    shards are missing, and live ones. Repeat it for several keys.

    With --receipts every receipt and seal record that the cluster retains must agree too: totals, origins, Merkle
    roots, files, and the rows that say when each commit came. That leaves open what somebody can forge who publishes
    and deletes receipts. With both, the last receipt, and everything after the first record signed by that key, must
    be signed by it.

    A file that `fictl export --output` wrote is held against its manifest; so are those that lie in DIR.

    Works while the pipeline writes. Exits 4 if anything is wrong.

    Example: fictl verify .fi --receipts --public-key fi.pub
    """
    from stages.persist.export.manifest import find_manifest
    from stages.persist.verify import verify_store

    if (manifest := find_manifest(path)) is not None:
        if receipts:
            raise SettingsError("--receipts is for a store; an exported file is held against its manifest")
        if public_key:
            raise SettingsError("--public-key is for a store; an exported file is not signed")
        verify_export(manifest, as_json, shard_timeout)
        return
    if path.is_file():
        raise ShardError(f"{path}: has no manifest beside it to be held against; `fictl export --output` writes both")
    trusted = trusted_keys(public_key)
    servers = find_servers(cluster or path, nats) if receipts else Servers(())
    with progress_bar("verifying") as progress:
        audit: AuditReport | None = None
        if receipts:
            from cluster.audit import audit_store

            audit = run_async(
                audit_store(path, servers, trusted=trusted, shard_timeout_s=shard_timeout, on_progress=progress)
            )
            report = audit.store
        else:
            report = verify_store(path, trusted=trusted, shard_timeout_s=shard_timeout, on_progress=progress)
    if as_json:
        print_json(report if audit is None else audit)
    else:
        _show_report(report, audit)
    if not report.ok:
        raise typer.Exit(CORRUPT)


def _show_events(found: list[StoredEvent]) -> None:
    from contracts.events import format_rfc3339

    table = make_table("time", "type", "payload", "audit hash", "origin")
    for stored in found:
        event = stored.event
        payload = event.payload.decode()
        short = payload if len(payload) <= _TEXT_CHARS_MAX else f"{payload[:_TEXT_CHARS_MAX]}…"
        time, digest = format_rfc3339(event.timestamp_ns), event.audit_hash.hex()[:12]
        table.add_row(time, event.event_type, short, digest, str(event.origin))
    console().print(table)


def _show_report(report: VerifyReport, audit: AuditReport | None) -> None:
    for problem in report.problems:
        print_lines(f"{problem.shard}: {problem.where}: {problem.what}")
    verdict = "all is well" if report.ok else f"{len(report.problems)} problems"
    exports = f", {report.exports} exports" if report.exports else ""
    print_lines(f"{report.shards} shards, {report.events} events{exports}: {verdict}")
    if audit is not None:
        _show_audit(audit)
        return
    print_lines(
        f"held against itself and {report.seal_records} seal records beside the shards, "
        f"{report.signed_records} of them signed; --receipts finds what that cannot"
    )


def _show_audit(audit: AuditReport) -> None:
    from contracts.events import format_rfc3339

    print_lines(
        f"held against {audit.receipts} receipts and {audit.seals} seal records of this store, {audit.signed} of them "
        "signed"
    )
    for partition, owner in audit.elsewhere.items():
        print_lines(f"partition {partition} belongs to {owner}: what is there was not read")
    for partition, what in audit.unshown.items():
        print_lines(f"partition {partition}: {what}")
    if audit.lost:
        print_lines(
            f"the cluster's receipts were lost by {audit.lost} and begun again from the stores: for what was stored "
            "before, they say no more than the stores said then"
        )
    for rewind in audit.rewinds:
        print_lines(
            f"partition {rewind.partition} went back to origin {rewind.origin} ({rewind.persisted} events) on "
            f"{rewind.node} at {format_rfc3339(rewind.committed_ns)}; what was committed after that was made again"
        )
