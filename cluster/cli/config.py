"""`fictl config show|check`: what a process started here would be told, and whether that holds."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from cluster.cli.common import (
    DEFAULT_DIRECTORY,
    DirectoryOption,
    JsonOption,
    NatsOption,
    NotReadyError,
    SetOption,
    connected,
    console,
    exit_code,
    find_servers,
    find_settings,
    given_file,
    given_settings,
    make_table,
    print_json,
    progress_bar,
    run_async,
    say,
)
from cluster.config import DEFAULT_FILE
from cluster.state import NotRunningError
from cluster.words import expiry
from contracts.budgets import GREETING, TOPOLOGY_PLAN
from contracts.errors import ClusterUnavailableError, DefiniteError, FiError, TopologyError
from contracts.settings import CONFIG_VARIABLE, Settings, hide_credentials, shown_value
from stages.persist.names import SHARDS

if TYPE_CHECKING:
    from contracts.settings import SettingsFile, Source
    from stages.runtime.access import Access, Servers
    from stages.runtime.client import GuardedClient

DRIFTS_SHOWN_MAX = 3
_RECEIPT_BYTES = 3 * 1024
"""Of a receipt with 64 committed consultations in it (`closed_remembered`): 2,588, and what a stream adds."""
_PROBE_BYTES = 4096


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that `fictl config check` looked at.

    Attributes:
        name: what.
        result: ``not checked`` when something before it stands in the way, or nothing was given to look at.
        detail: what was found; for a failure, what to do.
        exit_code: that stands for the failure; 0 without one.
    """

    name: str
    result: str
    detail: str
    exit_code: int = 0


def show(chosen: SetOption = None, as_json: JsonOption = False) -> None:
    """Shows every setting, and where its value came from: default, file, environment or command line.

    The file is the one of `fictl --config FILE`, else of FI_CONFIG, else fi.toml in the working directory; an empty
    name stands for no file. Passwords in URLs are hidden.

    Example: fictl --config /etc/fi.toml config show --json
    """
    resolved = given_settings(chosen)
    file = given_file()
    rows = {
        name: (shown_value(name, value), resolved.sources[name])
        for name, value in msgspec.structs.asdict(resolved.settings).items()
    }
    if as_json:
        settings = {
            name: {"value": value, "layer": source.layer, "source": source.name}
            for name, (value, source) in rows.items()
        }
        print_json({"file": None if file is None else str(Path(file.name).absolute()), "settings": settings})
        return
    console().print(f"settings file: {_file_words(file)}", soft_wrap=True)
    table = make_table("setting", "value", "from")
    for name, (value, source) in rows.items():
        table.add_row(name, msgspec.json.encode(value).decode(), _source_words(source))
    console().print(table)


def budgets(chosen: SetOption = None, as_json: JsonOption = False) -> None:
    """Shows every wait: who waits for what, how long, and what happens when the time is over.

    In capitals those that are built in; the others are settings. Says on stderr which are not over before another
    that they should be.

    Example: fictl config budgets --json
    """
    from contracts.budgets import BUDGETS, SETTING_WAITS, disorders

    resolved = given_settings(chosen)
    rows = [
        {
            "name": name,
            "seconds": float(getattr(resolved.settings, name)),
            "source": resolved.sources[name].layer,
            **wait._asdict(),
        }
        for name, wait in SETTING_WAITS.items()
    ]
    for name, budget in BUDGETS.items():
        meaning = {"kind": budget.kind, "waits": budget.waits, "then": budget.then}
        rows.append({"name": name, "seconds": budget.s, "source": "constant", **meaning})
    found = disorders(resolved.settings)
    if as_json:
        wrong = [
            {
                "shorter": disorder.order.shorter,
                "longer": disorder.order.longer,
                "text": str(disorder),
            }
            for disorder in found
        ]
        print_json({"budgets": rows, "disorders": wrong})
        return
    table = make_table("wait", "seconds", "from", "kind", "who waits for what", "then")
    for row in rows:
        seconds = f"{row['seconds']:g}"
        words = (str(row[key]) for key in ("source", "kind", "waits", "then"))
        table.add_row(str(row["name"]), seconds, *words)
    console().print(table)
    for disorder in found:
        say(str(disorder))


def check(
    connect: Annotated[
        bool, typer.Option("--connect", help="Try the servers, streams, store and signing key too.")
    ] = False,
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    nats: NatsOption = None,
    shards: Annotated[
        Path | None, typer.Option(help="Store directory that persist would write. Default: DIR/shards.")
    ] = None,
    chosen: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Checks the settings, one line each: ok, or what to do. Starts nothing and changes nothing.

    Of certificates and credentials it says when they expire, with --connect also of the servers'.
    With --connect also: the servers answer; the streams are there and agree with the settings, for which those of a run
    in DIR stand in place of the defaults, as for `fictl cluster plan`; this user can write the store's directory, it
    has disk_floor_bytes free and is not mounted with `discard` (advice only); the signing key can be read. The exit
    code is that of the first failure: 2 a wrong setting, 3 no servers or streams, 1 anything else.

    Example: fictl config check --connect --nats nats://10.0.0.1:4222 --shards /var/lib/fi/shards
    """
    checks = _settings_checks(chosen)
    if not any(done.exit_code for done in checks):
        checks += _paper_checks(given_settings(chosen).settings)
    if connect and any(done.exit_code for done in checks):
        names = ("servers", "streams", "store", "signing key")
        checks += [Check(name=name, result="not checked", detail="mend the settings first") for name in names]
    elif connect:
        checks += _cluster_checks(directory, nats, chosen)
        settings = _settings(directory, nats, chosen)
        checks += [_store_check(directory, nats, shards, settings), _try("signing key", lambda: _look_at_key(settings))]
    code = next((done.exit_code for done in checks if done.exit_code), 0)
    if as_json:
        print_json({"ok": code == 0, "checks": checks})
    else:
        for done in checks:
            typer.echo(f"{done.result:<12} {done.name}: {done.detail}")
    if code:
        raise typer.Exit(code)


def _file_words(file: SettingsFile | None) -> str:
    if file is None:
        return f"none; it would be named by --config or {CONFIG_VARIABLE}, or be {DEFAULT_FILE} in {Path.cwd()}"
    return str(Path(file.name).absolute())


def _source_words(source: Source) -> str:
    return f"{source.layer} ({source.name})" if source.name else source.layer


def _try(name: str, look: Callable[[], str]) -> Check:
    """The check `name`: `look` gives what it found, or raises what is wrong."""
    try:
        return Check(name=name, result="ok", detail=look())
    except FiError as error:
        return _failed(name, error)


async def _try_async(name: str, look: Awaitable[str]) -> Check:
    """As `_try`."""
    try:
        return Check(name=name, result="ok", detail=await look)
    except FiError as error:
        return _failed(name, error)


def _failed(name: str, error: FiError) -> Check:
    return Check(name=name, result="failed", detail=str(error), exit_code=exit_code(error))


def _settings_checks(chosen: list[str] | None) -> list[Check]:
    def together() -> str:
        from stages.runtime.telemetry import otlp_endpoint

        resolved = given_settings(chosen)
        otlp_endpoint(resolved.settings, os.environ)
        layers = Counter(source.layer for source in resolved.sources.values())
        counts = ", ".join(f"{count} from {layer}" for layer, count in layers.items())
        return counts + _receipts_advice(resolved.settings)

    file = _try("settings file", lambda: _file_words(given_file()))
    if file.exit_code:
        return [file, Check(name="settings", result="not checked", detail="mend the settings file first")]
    return [file, _try("settings", together)]


def _paper_checks(settings: Settings) -> list[Check]:
    """One for each certificate or JWT of ours that expires."""
    from stages.runtime.access import access_of
    from stages.runtime.expiry import own_papers

    now_s, access = time.time(), access_of(settings)
    checks = []
    for name, paper in own_papers(access).items():
        file, words = getattr(settings, name), expiry(paper.ends_s, now_s)
        if paper.ends_s <= now_s:
            error = DefiniteError(
                f"{file} expired {words}: no connection can be made with it; put a renewed one in its place"
            )
            checks.append(_failed(name, error))
        else:
            advice = ". It is to be renewed now" if paper.due_s <= now_s else ""
            checks.append(Check(name=name, result="ok", detail=f"{file} expires {words}{advice}"))
    return checks


def _receipts_advice(settings: Settings) -> str:
    """What a stream of receipts that will be too small had better be: a full one stops commits."""
    bytes_max = settings.partitions * settings.receipts_kept * _RECEIPT_BYTES
    if 2 * bytes_max <= settings.receipts_bytes_max:
        return ""
    return (
        f". But receipts_kept of {settings.partitions} partitions can take {bytes_max} bytes, and seal records, kept "
        f"for ever, come beside them; receipts_bytes_max is {settings.receipts_bytes_max}, and commits stop when "
        "that is full: raise it to twice as much, or keep fewer"
    )


def _settings(directory: Path, nats: list[str] | None, chosen: list[str] | None) -> Settings:
    """As `find_settings`, also where nothing runs."""
    try:
        return find_settings(directory, nats, chosen)
    except NotRunningError:
        return given_settings(chosen).settings


def _cluster_checks(directory: Path, nats: list[str] | None, chosen: list[str] | None) -> list[Check]:
    async def look() -> list[Check]:
        servers, settings = find_servers(directory, nats, chosen), find_settings(directory, nats, chosen)
        async with connected(servers) as client:
            greeted = await _try_async("servers", _look_at_servers(client, servers))
            return [greeted, await _try_async("streams", _look_at_streams(client, settings))]

    try:
        with progress_bar("asking the servers"):
            return run_async(look())
    except FiError as error:
        return [_failed("servers", error), Check(name="streams", result="not checked", detail="no server to ask")]


async def _look_at_servers(client: GuardedClient, servers: Servers) -> str:
    from cluster.status import status
    from stages.runtime.tasks import side_by_side

    found = (await status(client, servers)).servers
    silent = [server.url for server in found if not server.reachable and not server.problem]
    if silent:
        raise ClusterUnavailableError(f"{', '.join(silent)} does not answer; start it, or correct the address")
    refusals = await side_by_side(*(_refusal(url, servers.access) for url in servers.urls))
    if any(refusals):
        raise ClusterUnavailableError("; ".join(filter(None, refusals)))
    ends = [
        f"{server.url} {expiry(server.certificate_ends_s, time.time())}"
        for server in found
        if server.certificate_ends_s
    ]
    expire = f"; their certificates expire: {'; '.join(ends)}" if ends else ""
    return f"{', '.join(server.url for server in found)} answer{expire}"


async def _refusal(url: str, access: Access) -> str:
    """Why the server at `url` itself takes no connection, or not all messages; empty when it does. Others hide that."""
    from contracts.frames import FRAME_BYTES_MAX
    from stages.runtime.connection import connect

    try:
        client = await connect((url,), "fi", access=access, wait_s=GREETING.s, discover=False)
    except ClusterUnavailableError as error:
        return str(error)
    await client.close()
    if client.max_payload < FRAME_BYTES_MAX:
        return f"max_payload of {hide_credentials(url)} is {client.max_payload}: not every frame passes; set it to 8MB"
    return ""


async def _look_at_streams(client: GuardedClient, settings: Settings) -> str:
    from cluster.apply import plan

    todo = await plan(client, settings, wait_s=TOPOLOGY_PLAN.s)
    if todo.refused or todo.lasting:
        raise TopologyError("; ".join((*todo.refused, *todo.lasting)))
    missing = [change.stream for change in todo.changes if change.action == "create"]
    if missing:
        raise NotReadyError(f"{', '.join(missing)} is missing; run `fictl cluster apply` with these settings")
    drifts = [drift for change in todo.changes for drift in change.drifts]
    if drifts:
        shown = [f"{d.stream} {d.field} is {d.found}, the settings say {d.wanted}" for d in drifts[:DRIFTS_SHOWN_MAX]]
        more = f" and {len(drifts) - len(shown)} more" if len(drifts) > len(shown) else ""
        raise TopologyError(
            f"{'; '.join(shown)}{more}; correct the settings, or change the streams with `fictl cluster apply`"
        )
    return "as the settings say"


def _store_check(directory: Path, nats: list[str] | None, shards: Path | None, settings: Settings) -> Check:
    if shards is None and nats:
        return Check(name="store", result="not checked", detail="give --shards DIR where persist runs")
    store = shards or directory / SHARDS
    return _try("store", lambda: _look_at_disk(store, settings.disk_floor_bytes))


def _look_at_disk(store: Path, floor_bytes: int) -> str:
    """Writes and syncs a nameless file where the store is, or would be made."""
    place = store.absolute()
    try:
        place = next(path for path in (place, *place.parents) if path.exists())
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        free_bytes = shutil.disk_usage(place).free
    except OSError as error:
        raise DefiniteError(
            f"{place} cannot be written by this user ({error.strerror}); give it access, or choose another directory"
        ) from error
    if free_bytes < floor_bytes:
        raise DefiniteError(
            f"{free_bytes} bytes are free at {place}, disk_floor_bytes is {floor_bytes}: make room, or lower it"
        )
    return (
        f"{place} can be written; {free_bytes} bytes are free, disk_floor_bytes is {floor_bytes}{_mount_advice(place)}"
    )


def _mount_advice(place: Path) -> str:
    """What `place` had better be mounted without; see ADR 0023."""
    from cluster.mounts import mount_of

    mount = mount_of(place)
    if mount is None or "discard" not in mount.options:
        return ""
    return (
        f". But its {mount.kind} is mounted with `discard`: a file deleted can hold up every write for 10 to 100 ms; "
        "mount it without, here and where the servers keep streams, and enable fstrim.timer instead"
    )


def _look_at_key(settings: Settings) -> str:
    if not settings.signing_key_file:
        return "signing_key_file is empty: receipts and seals are not signed"
    from stages.persist.keys import load_key

    load_key(Path(settings.signing_key_file))
    return f"{settings.signing_key_file} can be read"
