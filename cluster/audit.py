"""Reads receipts and seal records out of the cluster, and holds a store against them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec

from contracts.budgets import COMMAND_ANSWER, COMMAND_CONNECT, SHARD_CHECK
from contracts.errors import ShardError
from contracts.receipts import Receipt, SealRecord, decode_receipt, decode_seal
from contracts.settings import Settings
from contracts.subjects import RECEIPTS, receipt_subject, seal_subject
from stages.persist.audit import Audited, Witnesses, audit_partition, in_force, repeated
from stages.persist.lost import receipts_lost
from stages.persist.store import EventStore, find_store
from stages.persist.storedir import Store, read_store
from stages.persist.verify import Problem, ShardContents, VerifyReport, verify_store
from stages.runtime.access import Servers
from stages.runtime.api import Api
from stages.runtime.connection import connect
from stages.runtime.facts import read_cluster
from stages.runtime.messages import StoredMessage
from stages.runtime.tasks import REQUESTS_AT_ONCE, side_by_side, some_at_a_time


class AuditReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `audit_store` found.

    Attributes:
        store: what `verify_store` found, and in its problems what the receipts and seal records contradict.
        receipts, seals: how many of this store the shards were held against.
        signed: how many of these are signed.
        elsewhere: partitions that other stores own now, each with its store and node: what those hold was not read.
        rewinds: the receipts with which a partition went back; what was committed after their origins was given up and
            made again.
        lost: when the cluster's receipts were lost and begun again, RFC 3339; empty if they never were.
        unshown: partitions with a commit that readers do not see yet, as `Audited` says.
    """

    store: VerifyReport
    receipts: int
    seals: int
    signed: int
    elsewhere: dict[int, str]
    rewinds: list[Receipt]
    lost: str
    unshown: dict[int, str]


@dataclass(frozen=True, slots=True)
class ClusterRecords:
    """Everything that the cluster retains of its commits and that is in force (`in_force`).

    Attributes:
        cluster_id: whose.
        receipts, seals: by partition, in stream order.
        rewinds: by partition, the receipts with which it went back.
        repeated: by partition, those of them that are older than what they follow.
        last_seqs: by partition, the stream sequence of the last receipt; 0 without any.
        lost: as in `AuditReport`.
    """

    cluster_id: str
    receipts: dict[int, list[Receipt]]
    seals: dict[int, list[SealRecord]]
    rewinds: dict[int, list[Receipt]]
    repeated: dict[int, list[Receipt]]
    last_seqs: dict[int, int]
    lost: str


async def read_records(
    servers: Servers, *, partition: int | None = None, after: ClusterRecords | None = None
) -> ClusterRecords:
    """Receipts and seal records of one partition, or of all.

    Args:
        servers: of the cluster.
        partition: which; None for all.
        after: read no receipts up to the last of these.

    Raises:
        ClusterUnavailableError: no server answers, or a stream does not.
        TopologyError: it is not a cluster of ours.
        WireFormatError: a record of a version this build does not know.
    """
    client = await connect(servers.urls, "fi-audit", access=servers.access, wait_s=COMMAND_CONNECT.s)
    try:
        facts = await read_cluster(client, wait_s=COMMAND_CONNECT.s)
        api = Api(client, Settings(), give_up_s=COMMAND_ANSWER.s)
        lanes = range(facts.partitions) if partition is None else [partition]
        starts = {lane: 1 + (after.last_seqs.get(lane, 0) if after is not None else 0) for lane in lanes}
        found = await some_at_a_time(partial(read_partition, api, lane, start) for lane, start in starts.items())
        lost = await receipts_lost(api)
    finally:
        await client.close()
    records = ClusterRecords(facts.cluster_id, {}, {}, {}, {}, {}, lost)
    for lane, (rows, last_seq) in zip(lanes, found, strict=True):
        records.receipts[lane], records.seals[lane], records.rewinds[lane] = in_force(rows)
        records.repeated[lane] = repeated(rows)
        records.last_seqs[lane] = last_seq
    return records


async def audit_store(
    path: Path,
    servers: Servers,
    *,
    trusted: Collection[str] = (),
    shard_timeout_s: float = SHARD_CHECK.s,
    on_progress: Callable[[int, int], None] | None = None,
) -> AuditReport:
    """Verifies the store at `path` and holds it against the cluster, also while the pipeline runs.

    Receipts are read before the shards and again after: the shards must reach the last of the former, and must not go
    beyond the last of the latter.

    Args:
        path: as for `verify_store`.
        servers: of the cluster.
        trusted: public keys (64 hex digits); see `audit_partition`.
        shard_timeout_s, on_progress: as for `verify_store`.

    Raises:
        ShardError: there is no store, or it belongs to another cluster.
        OSError: the store cannot be read.
    As `read_records` besides.
    """
    store = read_store(find_store(path))
    before = await read_records(servers)
    if before.cluster_id != store.cluster_id:
        raise ShardError(f"{path}: belongs to cluster {store.cluster_id}, but the servers are of {before.cluster_id}")
    shards: dict[int, list[ShardContents]] = {}
    report = await asyncio.to_thread(
        verify_store,
        path,
        shard_timeout_s=shard_timeout_s,
        on_progress=on_progress,
        on_shard=lambda contents: shards.setdefault(contents.shard.partition, []).append(contents),
    )
    shown = await asyncio.to_thread(_shown_origins, path) if report.ok else {}
    newer = await read_records(servers, after=before)
    lanes = {
        lane: audit_partition(
            lane,
            shards.get(lane, ()),
            Witnesses(
                before.receipts.get(lane, ()),
                newer.receipts.get(lane, ()),
                before.seals.get(lane, ()),
                [*before.rewinds.get(lane, ()), *newer.rewinds.get(lane, ())],
                before.repeated.get(lane, ()),
            ),
            store,
            shown_origin=shown.get(lane, 0),
            trusted=trusted,
        )
        for lane in sorted({*before.receipts, *shards})
    }
    return _report(store, report, lanes, before, newer)


def _report(
    store: Store, report: VerifyReport, lanes: dict[int, Audited], before: ClusterRecords, newer: ClusterRecords
) -> AuditReport:
    """What the shards themselves showed, and each partition held against the records read before and after them."""
    problems: list[Problem] = [*report.problems, *(problem for one in lanes.values() for problem in one.problems)]
    records = [
        record
        for part in (before.receipts, newer.receipts, before.seals)
        for lane in part.values()
        for record in lane
        if record.store == store.store_id
    ]
    owners = {lane: rows[-1] for part in (before, newer) for lane, rows in part.receipts.items() if rows}
    return AuditReport(
        store=replace(report, ok=not problems, problems=problems),
        receipts=sum(isinstance(record, Receipt) for record in records),
        seals=sum(isinstance(record, SealRecord) for record in records),
        signed=sum(isinstance(record.signature, msgspec.Struct) for record in records),
        elsewhere={
            lane: f"store {last.store} on {last.node}" for lane, last in owners.items() if last.store != store.store_id
        },
        rewinds=[record for lane in before.rewinds.values() for record in lane],
        lost=before.lost,
        unshown={lane: audited.unshown for lane, audited in lanes.items() if audited.unshown},
    )


async def read_partition(api: Api, partition: int, from_seq: int = 1) -> tuple[list[Receipt | SealRecord], int]:
    """A partition's receipts from a stream sequence on, and all its seal records, in stream order.

    Returns:
        the records, and the sequence of the last receipt, also of a `place_kept`, which is not among them
        (`from_seq` - 1 without any).
    """
    receipts = await _messages(api, receipt_subject(partition), from_seq)
    seals = await _messages(api, seal_subject(partition), 1)
    rows: list[tuple[int, Receipt | SealRecord]] = [
        *((message.seq, decode_receipt(message.data)) for message in receipts),
        *((message.seq, decode_seal(message.data)) for message in seals),
    ]
    last_seq = receipts[-1].seq if receipts else from_seq - 1
    return [record for _, record in sorted(rows, key=lambda row: row[0]) if record.store], last_seq


async def _messages(api: Api, subject: str, from_seq: int) -> list[StoredMessage]:
    """The messages on `subject` from a stream sequence up to what is now the last.

    Each names the place of the next one only: they are read from several places at once.
    """
    last = await api.last_message(RECEIPTS, subject)
    if last is None or last.seq < from_seq:
        return []
    first = await api.first_message(RECEIPTS, subject, from_seq=from_seq)
    if first is None:
        return []
    step = (last.seq - first.seq) // REQUESTS_AT_ONCE + 1
    starts = range(first.seq, last.seq + 1, step)
    ends = (min(start + step - 1, last.seq) for start in starts)
    parts = await side_by_side(*(_walk(api, subject, start, end) for start, end in zip(starts, ends, strict=True)))
    return [message for part in parts for message in part]


async def _walk(api: Api, subject: str, from_seq: int, to_seq: int) -> list[StoredMessage]:
    """The messages on `subject` between two stream sequences, both included, one after the other."""
    found: list[StoredMessage] = []
    while from_seq <= to_seq:
        message = await api.first_message(RECEIPTS, subject, from_seq=from_seq)
        if message is None or message.seq > to_seq:
            break
        found.append(message)
        from_seq = message.seq + 1
    return found


def _shown_origins(path: Path) -> dict[int, int]:
    """How far readers see in each partition."""
    with EventStore(path) as store:
        return {info.partition: info.last_origin for info in store.shards() if info.last_origin is not None}
