"""`fictl prove|consistency|check-proof`: evidence for somebody who has neither the store nor the cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from cluster.cli.common import (
    DEFAULT_DIRECTORY,
    NatsOption,
    PublicKeyOption,
    find_servers,
    print_lines,
    progress_bar,
    run_async,
    say,
    trusted_keys,
)
from contracts.errors import ClusterUnavailableError, ProofError, SettingsError, ShardError
from stages.persist.files import read_small

if TYPE_CHECKING:
    from contracts.evidence import Evidence, TreeHead
    from contracts.receipts import Receipt, SealRecord

DirectoryOption = Annotated[
    Path, typer.Option("--dir", help="Shards and cluster of what `fictl up --dir DIR` started, running or not.")
]
StoreOption = Annotated[
    Path | None, typer.Option("--store", help="A shards directory instead of --dir; with --nats for its cluster.")
]
OutputOption = Annotated[Path | None, typer.Option(help="Write to this file. Default: stdout.")]


def prove(
    event_id: Annotated[str, typer.Argument(help="UUID of the event.", show_default=False)],
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    store: StoreOption = None,
    nats: NatsOption = None,
    output: OutputOption = None,
) -> None:
    """Writes a small JSON proof that an event is stored, unchanged, under a root that persist committed.

    The root is that of a receipt or seal record, signed if there is one: from the cluster when it can be reached, else
    from beside the sealed shards. `fictl check-proof` needs nothing else. The file holds the event itself.

    Example: fictl prove 0b9e2d52-8a3c-4a55-9d1e-5a0c7b1f3e11 --dir .fi --output proof.json
    """
    from stages.persist.prove import event_partition, prove_event

    try:
        wanted = UUID(event_id)
    except ValueError:
        raise SettingsError(f"{event_id!r} is not a UUID; `fictl events` shows the ids that are stored") from None
    _check(output)
    place = store or directory
    with progress_bar("looking for the event"):
        partition = event_partition(place, wanted)
    if partition is None:
        raise ShardError(f"no event {wanted} is stored in {place}; was it published to this cluster?")
    records = _records(place, store is None, nats, partition)
    with progress_bar("hashing the events"):
        evidence = prove_event(place, wanted, records)
    _write(evidence, output, [evidence.head])


def consistency(
    partition: Annotated[int, typer.Argument(min=0, help="Which.", show_default=False)],
    old_size: Annotated[int, typer.Option("--from", min=0, help="Events under the earlier root.", show_default=False)],
    new_size: Annotated[
        int | None, typer.Option("--to", min=0, help="Events under the later root. Default: all stored.")
    ] = None,
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    store: StoreOption = None,
    nats: NatsOption = None,
    output: OutputOption = None,
) -> None:
    """Writes a small JSON proof that between two receipts of a partition events were only added.

    `persisted` of a receipt is its number of events. Checked with `fictl check-proof`.

    Example: fictl consistency 3 --from 1000 --to 2500 --dir .fi --output proof.json
    """
    from stages.persist.prove import prove_consistency

    _check(output)
    place = store or directory
    records = _records(place, store is None, nats, partition)
    with progress_bar("hashing the events"):
        evidence = prove_consistency(place, partition, old_size, new_size, records)
    _write(evidence, output, [evidence.old, evidence.new])


def check_proof(
    file: Annotated[Path, typer.Argument(help="What `fictl prove` or `fictl consistency` wrote.", show_default=False)],
    public_key: PublicKeyOption = None,
) -> None:
    """Checks a proof with nothing but the file and the public key. Exits 0 if it holds, 4 if not, saying what is wrong.

    Says of which cluster the signed statement is: one key may sign for several.

    Without --public-key only the file's own claims are checked: whoever can write files could have made it.

    Example: fictl check-proof proof.json --public-key fi.pub
    """
    from contracts.evidence import InclusionProof, check_evidence, clusters_of, decode_evidence

    trusted = trusted_keys(public_key)
    try:
        evidence = decode_evidence(read_small(file))
        check_evidence(evidence, trusted)
    except ProofError as error:
        raise ProofError(f"{file}: {error}") from error
    if isinstance(evidence, InclusionProof):
        heads = [evidence.head]
        said = f"event {evidence.event_id} is number {evidence.index}"
    else:
        heads = [evidence.old, evidence.new]
        said = f"the first {evidence.old.tree_size} events, root {evidence.old.root}, are the beginning"
    where = "".join(f" of cluster {cluster}" for cluster in clusters_of(evidence))
    print_lines(
        f"{said} of the {heads[-1].tree_size} events of partition {evidence.partition}{where}, root {heads[-1].root}"
    )
    if not trusted:
        keys = sorted({head.signature.key for head in heads if head.signature is not None})
        by = f"by {', '.join(keys)}; give --public-key to hold that against a key you trust" if keys else "by nobody"
        say(f"fi: signed {by}")


def _records(place: Path, runs_here: bool, nats: list[str] | None, partition: int) -> list[Receipt | SealRecord]:
    """The receipts and seal records at hand; without the cluster, those beside the shards."""
    from cluster.audit import read_records
    from cluster.cli.common import NotReadyError
    from cluster.state import NotRunningError
    from stages.persist.prove import kept_seals

    kept = kept_seals(place, partition)
    if not runs_here and not nats:
        return [*kept]
    try:
        found = run_async(read_records(find_servers(place, nats), partition=partition))
    except (NotRunningError, NotReadyError, ClusterUnavailableError) as error:
        if nats:
            raise
        say(f"fi: without the cluster's receipts ({error})")
        return [*kept]
    # One beside a shard may be old, or anybody's: the cluster's own goes before it.
    recorded = {seal.shard for seal in found.seals[partition]}
    others = [record for record in kept if record.shard not in recorded]
    return [*others, *found.receipts[partition], *found.seals[partition]]


def _check(output: Path | None) -> None:
    from stages.persist.output import check_output

    if output is not None:
        check_output(output)


def _write(evidence: Evidence, output: Path | None, heads: list[TreeHead]) -> None:
    from contracts.evidence import encode_evidence
    from stages.persist.output import write_output

    for head in heads:
        if head.signature is None:
            who = "no receipt or seal record" if head.statement is None else "no signature"
            say(f"fi: {who} stands for root {head.root[:16]}… over {head.tree_size} events")
    data = encode_evidence(evidence) + b"\n"
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        write_output(output, data)
