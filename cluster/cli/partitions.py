"""`fictl rebuild` and `fictl partitions ls|move|restore`: who has which partition, and taking one back."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

import msgspec
import typer

from cluster.cli.common import (
    DEFAULT_DIRECTORY,
    FAILED,
    DirectoryOption,
    JsonOption,
    NatsOption,
    check_directory,
    check_partitions,
    command_api,
    connected,
    console,
    find_servers,
    find_settings,
    finite,
    make_table,
    print_json,
    print_lines,
    progress_bar,
    run_async,
    say,
)
from contracts.budgets import COMMAND_CONNECT, REBUILD
from contracts.errors import ClusterUnavailableError, FiError, NotOursError, SettingsError
from stages.persist.names import SHARDS

if TYPE_CHECKING:
    from cluster.rewind import Rewind, Rewinder
    from contracts.receipts import Receipt
    from stages.persist.storedir import Store
    from stages.runtime.api import Api

PASSED_OVER: Final = "persist works on it, and its files were not looked at"

ShardsOption = Annotated[
    Path | None,
    typer.Option("--shards", help="The store's directory; needed with --nats. Default: that of the run in --dir."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
WaitOption = Annotated[
    float,
    typer.Option("--wait", min=0, callback=finite, metavar="S", help="Wait until it has caught up; 0: do not wait."),
]


class Unnamed(NamedTuple):
    """What a verb is for when no partition was named.

    Attributes:
        concerns: whether a partition of this last receipt, which the store may have shards of, is one of them.
        nothing: what there is not, when none is.
    """

    concerns: Callable[[Receipt | None, Store, int], bool]
    nothing: str


def _is_owned(last: Receipt | None, store: Store, partition: int) -> bool:
    return last is not None and last.store == store.store_id


def _lacks_receipts(last: Receipt | None, store: Store, partition: int) -> bool:
    from stages.persist.names import list_shards

    return last is None and partition in list_shards(store.directory)


UNNAMED_REBUILD: Final = Unnamed(_is_owned, "this store owns no partition")
UNNAMED_RESTORE: Final = Unnamed(_lacks_receipts, "no partition lacks receipts that this store has shards of")


def rebuild(
    partitions: Annotated[
        list[int] | None, typer.Argument(min=0, help="Which. Default: all that the store owns.", show_default=False)
    ] = None,
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    shards: ShardsOption = None,
    nats: NatsOption = None,
    dry_run: DryRunOption = False,
    wait: WaitOption = REBUILD.s,
    as_json: JsonOption = False,
) -> None:
    """Makes damaged or deleted shards again from the events that the cluster still holds.

    Reads every shard and holds it against the receipts and seal records. From the first damage on everything is made
    again from FI_EVENTS, by the running stages; the old files are moved aside, into the store's `superseded`. FI_EVENTS
    holds what is not sealed, the newest sealed shards (FI_SEALED_KEPT) and, while it is at most half full, those that
    `fictl backup` has not copied: what is older must come from a copy. One that was interrupted is to be run again.

    A partition that persist is working on is passed over, or refused when it was named; one whose damage persist has
    found is free. Exits 1 if something cannot be rebuilt, or if partitions were passed over and nothing was rebuilt.
    With --json a list: what went back, then the partitions that were `passed_over`, and those that `failed`.

    Example: fictl rebuild 3 --dir .fi --dry-run
    """

    _take_back(
        lambda rewinder, partition: rewinder.rebuild(partition, dry_run=dry_run),
        partitions,
        directory,
        shards,
        nats,
        dry_run,
        wait,
        as_json,
        unnamed=UNNAMED_REBUILD if partitions is None else None,
        store_is="there",
    )


def move(
    partitions: Annotated[list[int], typer.Argument(min=0, help="Which.", show_default=False)],
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    shards: ShardsOption = None,
    nats: NatsOption = None,
    dry_run: DryRunOption = False,
    wait: WaitOption = REBUILD.s,
    as_json: JsonOption = False,
) -> None:
    """Lets the store on this node take partitions over from one that is gone. Run it where the new store is.

    The new store goes on after the last sealed shard; what the old one had committed and not sealed is made again from
    FI_EVENTS, which still holds it. The old owner is fenced off at once: should it come back, it moves aside what it
    had not sealed, and does not write. If it can be stopped in order, stop it first: then everything is sealed. From an
    owner that goes on committing, a partition can be taken while `fictl pause persist` holds.

    Events in the old store's sealed shards stay there: the new store does not know their ids, so that a gateway which
    repeats one of those is not recognised. To keep a store whole, copy its directory to the new node and start persist
    on the copy: a store carries its identity with it, and nothing needs to be moved.

    Example: fictl partitions move 3 4 --shards /var/lib/fi/shards --nats nats://n2:4222
    """

    _take_back(
        lambda rewinder, partition: rewinder.move(partition, dry_run=dry_run),
        partitions,
        directory,
        shards,
        nats,
        dry_run,
        wait,
        as_json,
        unnamed=None,
        store_is="planned" if dry_run else "made",
    )


def restore(
    partitions: Annotated[
        list[int] | None, typer.Argument(min=0, help="Which. Default: all of which the store has shards.")
    ] = None,
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    shards: ShardsOption = None,
    nats: NatsOption = None,
    begin_anew: Annotated[
        bool, typer.Option("--begin-anew", help="Begin the named partitions, of which no store has a shard.")
    ] = False,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Go on without what neither FI_EVENTS nor the shards have.")
    ] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Writes where partitions go on, from the shards on this node, after the cluster lost FI_RECEIPTS.

    `fictl cluster apply` makes the lost stream again, empty. From then on persist waits: nothing is begun anew, and
    nothing is deleted. Run this once on each node that has a store; persist then goes on by itself. Every sealed shard
    counts, and of a live one what readers were shown; the rest is made again from FI_EVENTS. Reads and hashes every
    shard.

    Where several stores have shards of a partition, because it was moved, the one that had it last must be the one to
    restore it: a store that was followed by another is refused once FI_EVENTS no longer holds what came after it.

    Where FI_EVENTS was lost too, it is refused and says after which origin, and when, events may be gone. With
    --accept-loss the partition goes on with every whole commit that its shards hold; gateways must send again what they
    sent after that time, and what is stored is told by its event id. Bring shards from copies before, not after.

    A backup of FI_RECEIPTS is older than the stores, and persist refuses it: delete such a stream, and begin as above.

    Example: fictl partitions restore --shards /var/lib/fi/shards --nats nats://n1:4222 --dry-run
    """
    if begin_anew and not partitions:
        raise typer.BadParameter("name the partitions that no store has", param_hint="--begin-anew")

    _take_back(
        lambda rewinder, partition: rewinder.restore(
            partition, begin_anew=begin_anew, accept_loss=accept_loss, dry_run=dry_run
        ),
        partitions,
        directory,
        shards,
        nats,
        dry_run,
        0.0,
        as_json,
        unnamed=UNNAMED_RESTORE if partitions is None else None,
        store_is="there",
    )


def list_partitions(
    directory: DirectoryOption = DEFAULT_DIRECTORY, nats: NatsOption = None, as_json: JsonOption = False
) -> None:
    """Lists the partitions: which store on which node owns each, and how far it is committed and sealed.

    Example: fictl partitions ls --dir .fi
    """
    servers = find_servers(directory, nats)

    async def read() -> list[dict[str, Any]]:
        from stages.runtime.facts import read_cluster
        from stages.runtime.tasks import some_at_a_time

        async with connected(servers) as client:
            facts = await read_cluster(client, wait_s=COMMAND_CONNECT.s)
            api = command_api(client)
            return await some_at_a_time(partial(_row, api, partition) for partition in range(facts.partitions))

    with progress_bar("reading receipts"):
        found = run_async(read())
    if as_json:
        print_json(found)
        return
    table = make_table("partition", "store", "node", "committed origin", "events", "of them sealed")
    for row in found:
        names = ("partition", "store", "node", "origin", "events", "sealed_events")
        table.add_row(*("" if row.get(name) is None else str(row[name]) for name in names))
    console().print(table)


async def _row(api: Api, partition: int) -> dict[str, Any]:
    """What `fictl partitions ls --json` says of a partition."""
    from cluster.backlog import sealed_end
    from stages.runtime.checkpoint import last_receipt

    receipt, _ = await last_receipt(api, partition)
    if receipt is None:
        return {"partition": partition, "store": None, "node": None}
    seal = await sealed_end(api, receipt)
    return {
        "partition": partition,
        "store": receipt.store,
        "node": receipt.node,
        "origin": receipt.origin,
        "events": receipt.persisted,
        "sealed_events": 0 if seal is None else seal.tree_size,
        "committed_ns": receipt.committed_ns,
    }


class _Outcome:
    """What came of taking partitions back.

    Attributes:
        done: what went back.
        failed: by partition, why it could not be done.
        passed: partitions that were passed over, because persist works on them.
        looked_at: how many partitions it was about.
        late: why what went back has not caught up; None when it has, or nobody waited.
    """

    def __init__(self) -> None:
        self.done: list[Rewind] = []
        self.failed: dict[int, str] = {}
        self.passed: list[int] = []
        self.looked_at = 0
        self.late: ClusterUnavailableError | None = None

    async def take(self, partition: int, work: Callable[[int], Awaitable[Rewind | None]], *, named: bool) -> bool:
        """Does `work` for a partition; False when it is in vain to go on with others."""
        self.looked_at += 1
        try:
            rewind = await work(partition)
        except NotOursError as error:
            if named:
                self.failed[partition] = str(error)
            else:
                self.passed.append(partition)
        except FiError as error:
            self.failed[partition] = str(error)
            return not isinstance(error, ClusterUnavailableError)
        else:
            if rewind is not None:
                self.done.append(rewind)
        return True


async def _concerned(api: Api, store: Store, partitions: int, unnamed: Unnamed) -> list[int]:
    """Those of a cluster's partitions that a verb is for which was told none."""
    from stages.runtime.checkpoint import last_receipt
    from stages.runtime.tasks import some_at_a_time

    found = await some_at_a_time(partial(last_receipt, api, partition) for partition in range(partitions))
    return [partition for partition, (last, _) in enumerate(found) if unnamed.concerns(last, store, partition)]


def _take_back(
    work: Callable[[Rewinder, int], Awaitable[Rewind | None]],
    partitions: list[int] | None,
    directory: Path,
    shards: Path | None,
    nats: list[str] | None,
    dry_run: bool,
    wait_s: float,
    as_json: bool,
    *,
    unnamed: Unnamed | None,
    store_is: Literal["there", "planned", "made"],
) -> None:
    """Runs `work` for each partition, waits until all caught up, and shows what was done."""
    if shards is not None:
        check_directory("--shards", shards)
    elif nats:
        raise SettingsError("which store? Give --shards DIR, the directory of this node's own")
    servers, settings = find_servers(directory, nats), find_settings(directory, nats, None)

    async def run() -> _Outcome:
        from cluster.rewind import Rewinder, wait_caught_up
        from stages.persist.keys import load_key
        from stages.persist.storedir import existing_store, open_store, planned_store
        from stages.runtime.facts import read_cluster

        outcome = _Outcome()
        async with connected(servers) as client:
            facts = await read_cluster(client, wait_s=COMMAND_CONNECT.s)
            named = sorted(set(partitions or ()))
            check_partitions("partition", named, facts.partitions)
            api = command_api(client, settings)
            place = shards or directory / SHARDS
            if store_is == "made":
                store = open_store(place, facts.cluster_id, now_ns=time.time_ns())
            else:
                store = (planned_store if store_is == "planned" else existing_store)(place, facts.cluster_id)
            signer = load_key(Path(settings.signing_key_file)) if settings.signing_key_file else None
            rewinder = Rewinder(api, store, signer)
            for partition in named if unnamed is None else await _concerned(api, store, facts.partitions, unnamed):
                if not await outcome.take(partition, partial(work, rewinder), named=unnamed is None):
                    break
            if wait_s and outcome.done and not dry_run:
                try:
                    await wait_caught_up(api, outcome.done, wait_s=wait_s, on_progress=progress)
                except ClusterUnavailableError as error:
                    # What was done is shown first.
                    outcome.late = error
        return outcome

    with progress_bar("reading shards" if dry_run else "making events again") as progress:
        outcome = run_async(run())
    _report(outcome, unnamed, dry_run, as_json)


def _report(outcome: _Outcome, unnamed: Unnamed | None, dry_run: bool, as_json: bool) -> None:
    """Shows what was done; ends the verb where not all was."""
    if as_json:
        rows = [{**msgspec.to_builtins(rewind), "again": rewind.again} for rewind in outcome.done]
        rows += [{"partition": partition, "passed_over": PASSED_OVER} for partition in outcome.passed]
        rows += [{"partition": partition, "failed": why} for partition, why in outcome.failed.items()]
        print_json(rows)
    else:
        _show(outcome.done, dry_run)
        if unnamed is not None and not outcome.looked_at:
            print_lines(f"nothing to do: {unnamed.nothing}; `fictl partitions ls` shows which store owns which")
        elif not (outcome.done or outcome.failed or outcome.passed):
            print_lines("nothing to do: every file is as the records say")
    for partition in outcome.passed:
        say(f"fi: partition {partition} is passed over: {PASSED_OVER}")
    for reason in outcome.failed.values():
        say(f"fi: {reason}")
    if outcome.late is not None:
        raise outcome.late
    if outcome.failed or (outcome.passed and not outcome.done):
        raise typer.Exit(FAILED)


def _show(done: list[Rewind], dry_run: bool) -> None:
    verb = "would go" if dry_run else "went"
    for rewind in done:
        if rewind.why:
            print_lines(f"partition {rewind.partition}: {rewind.why}")
        else:
            print_lines(f"partition {rewind.partition}: from store {rewind.from_store} on {rewind.from_node}")
        if rewind.committed_origin == rewind.origin:
            print_lines(f"  goes on after origin {rewind.origin}, in shard {rewind.shard}: {rewind.events} events stay")
        else:
            print_lines(
                f"  {verb} back from origin {rewind.committed_origin} to {rewind.origin}: {rewind.events} events stay, "
                f"{rewind.again} are made again from the stream into shard {rewind.shard}"
            )
        for name in rewind.aside:
            print_lines(f"  moved aside: {name}" if not dry_run else f"  to be moved aside: {name}")
