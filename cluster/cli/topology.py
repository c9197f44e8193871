"""`fictl cluster plan|apply|status`: streams as data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from cluster.cli.common import (
    DEFAULT_DIRECTORY,
    FAILED,
    NOT_READY,
    DirectoryOption,
    JsonOption,
    NatsOption,
    SetOption,
    check_directory,
    connected,
    console,
    find_servers,
    find_settings,
    make_table,
    print_json,
    progress_bar,
    run_async,
    say,
)
from cluster.words import expiry
from contracts.budgets import TOPOLOGY_PLAN
from stages.persist.names import SHARDS

if TYPE_CHECKING:
    from cluster.apply import Plan
    from cluster.status import ClusterStatus
    from stages.persist.remains import Remains


AfterOption = Annotated[
    list[Path] | None,
    typer.Option("--after-stores", metavar="DIR", help="Go on with the cluster of this store; repeatable."),
]


def plan(
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    nats: NatsOption = None,
    settings: SetOption = None,
    after_stores: AfterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Shows what `fictl cluster apply` would create or change, field by field. Changes nothing.

    Exits 1 when a change must not be made, such as another P under data, or when a stream has what somebody set by hand
    and no server takes back, such as allow_msg_ttl: then it says how the stream is made again.

    Example: fictl cluster plan --nats nats://10.0.0.1:4222 --set hop_bytes_max=536870912
    """
    servers, wanted = find_servers(directory, nats, settings), find_settings(directory, nats, settings)
    after, beside = _stores(directory, nats, after_stores)

    async def work() -> Plan:
        from cluster.apply import plan as make_plan

        async with connected(servers) as client:
            return await make_plan(client, wanted, after=after, beside=beside, wait_s=TOPOLOGY_PLAN.s)

    with progress_bar("looking"):
        found = run_async(work())
    if as_json:
        print_json(found)
    else:
        _show_changes("to do", found, "the streams are as they should be")
    for reason in found.refused:
        say(f"refused: {reason}")
    _tell_lasting(found)
    if found.refused:
        raise typer.Exit(FAILED)


def apply(
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    nats: NatsOption = None,
    settings: SetOption = None,
    after_stores: AfterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Creates missing streams and changes what may be changed; waits until every replica is current. Safe to repeat.

    With --nats the settings of this shell count, not those of the cluster's processes: `fictl cluster plan` shows what
    would change. A limit that was lowered is told. Exits 1, after everything else was done, when a stream has what no
    server takes back.

    --after-stores is for servers that lost all streams, or FI_EVENTS and receipts, while stores survive: what is made
    then goes on with the cluster of these stores, and counts above everything that any store of it has. Name all that
    this host reaches. Persist waits until `fictl partitions restore` was run on each node with a store.

    Example: fictl cluster apply --nats nats://10.0.0.1:4222 --nats nats://10.0.0.2:4222
    """
    servers, wanted = find_servers(directory, nats, settings), find_settings(directory, nats, settings)
    after, beside = _stores(directory, nats, after_stores)

    async def work() -> Plan:
        from cluster.apply import apply as apply_plan

        async with connected(servers) as client:
            return await apply_plan(client, wanted, after=after, beside=beside)

    with progress_bar("applying"):
        done = run_async(work())
    if as_json:
        print_json(done)
    else:
        _show_changes("done", done, "the streams were as they should be")
    for drift in (drift for change in done.changes for drift in change.drifts):
        if drift.field == "max_bytes" and not 0 <= drift.found <= drift.wanted:
            said = f"{drift.stream} was lowered from {drift.found} to {drift.wanted} bytes"
            say(f"{said}; if that was not meant, apply again with the settings that its processes have")
    if after is not None:
        say("next: `fictl partitions restore --shards DIR` on each node with a store; it says what is gone")
    _tell_lasting(done)


def status(
    directory: DirectoryOption = DEFAULT_DIRECTORY, nats: NatsOption = None, as_json: JsonOption = False
) -> None:
    """Shows servers and streams as they are now. Exits 3 unless all servers answer, all replicas are current, and the
    account has room.

    Example: fictl cluster status --dir .fi --json
    """
    servers = find_servers(directory, nats)

    async def work() -> ClusterStatus:
        from cluster.status import status as look

        async with connected(servers) as client:
            return await look(client, servers)

    with progress_bar("looking"):
        found = run_async(work())
    if as_json:
        print_json({"healthy": found.healthy, **msgspec.structs.asdict(found)})
    else:
        _show_status(found)
    if not found.healthy:
        raise typer.Exit(NOT_READY)


def _stores(directory: Path, nats: list[str] | None, after_stores: list[Path] | None) -> tuple[Remains | None, str]:
    """What the stores to go on after say, and the cluster of the store of the run in `directory`, if it has one."""
    from stages.persist.remains import read_remains
    from stages.persist.storedir import STORE_FILE, read_store

    for path in after_stores or ():
        check_directory("--after-stores", path)
    own = directory / SHARDS
    is_beside = not nats and not after_stores and (own / STORE_FILE).exists()
    return read_remains(after_stores) if after_stores else None, read_store(own).cluster_id if is_beside else ""


def _tell_lasting(found: Plan) -> None:
    for line in found.lasting:
        say(f"fi: {line}")
    if found.lasting:
        raise typer.Exit(FAILED)


def _show_changes(title: str, found: Plan, well: str) -> None:
    if not found.changes:
        console().print(f"nothing {'that can be done' if found.lasting else f'to do: {well}'}")
        return
    table = make_table("stream", "action", "field", "found", "wanted", title=title)
    for change in found.changes:
        if not change.drifts:
            table.add_row(change.stream, change.action, "", "", "")
        for drift in change.drifts:
            table.add_row(change.stream, change.action, drift.field, str(drift.found), str(drift.wanted))
    console().print(table)


def _show_status(found: ClusterStatus) -> None:
    screen = console()
    servers = make_table("server", "name", "answers", "certificate until")
    for server in found.servers:
        answers = "yes" if server.reachable else f"NO: {server.problem}" if server.problem else "NO"
        ends_s = server.certificate_ends_s
        until = "-" if ends_s is None else f"{'RENEW: ' if server.certificate_due else ''}{expiry(ends_s, time.time())}"
        servers.add_row(server.url, server.name, answers, until)
    streams = make_table("stream", "messages", "bytes", "full", "leader", "followers")
    for stream in found.streams:
        followers = ", ".join(
            f"{replica.name}{'' if replica.current else ' OFFLINE' if replica.offline else ' behind'}"
            for replica in stream.replicas
        )
        state = stream.problem or followers
        full = f"{stream.used:.0%}"
        streams.add_row(stream.name, str(stream.messages), str(stream.bytes), full, stream.leader, state)
    screen.print(servers)
    screen.print(streams)
    for allowance in found.allowances:
        screen.print(f"the account's {allowance.what}: {allowance.bytes} of {allowance.bytes_max} bytes")
    if found.facts is not None:
        facts = found.facts
        screen.print(f"cluster {facts.cluster_id}: {facts.partitions} partitions by {facts.partition_by}")
    if not found.healthy:
        step = next((stream.next for stream in found.streams if stream.next), "see above, or `fictl cluster apply`")
        say(f"not ready{f': {found.problem}' if found.problem else ''}; {step}")
