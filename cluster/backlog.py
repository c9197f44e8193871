"""How far each stage has got in a partition, and what waits before it, counted in accepted messages.

All four stages are measured with one measure: messages of `FI_EVENTS`, which keeps everything that is not sealed. A
stage's cursor is an origin, so what is in `FI_EVENTS` after it is not finished by that stage, and the difference to the
stage before it is what waits between the two, whether in a stream or in a process.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping

import msgspec

from contracts.errors import WireFormatError
from contracts.receipts import Receipt, SealRecord
from contracts.subjects import (
    EVENTS,
    OUTPUT_STREAM,
    RECEIPTS,
    STAGES,
    Stage,
    output_subject,
    raw_filter,
)
from stages.runtime.api import Api
from stages.runtime.checkpoint import checkpoint_from, last_receipt, last_seal

_NS = 1_000_000_000


class StageLag(msgspec.Struct, frozen=True, kw_only=True):
    """What waits before one stage in one partition.

    Attributes:
        origin: everything up to here is finished; None: not known.
        waiting: accepted messages that the stage before has finished and this one has not; None: not known.
        oldest_ns: when the first of them was accepted; None when none waits, or it is not known.
    """

    origin: int | None = None
    waiting: int | None = None
    oldest_ns: int | None = None


class PartitionLook(msgspec.Struct, frozen=True, kw_only=True):
    """One partition.

    Attributes:
        partition: which.
        receipt: its last one; None when nothing was ever committed.
        seal: the record of its last sealed shard; None before the first.
        lags: by stage.
        at_ns: when that was so, since the epoch.
        is_known: its receipts could be read.
        problem: why they could not, where another build wrote them; else empty.
    """

    partition: int
    receipt: Receipt | None = None
    seal: SealRecord | None = None
    lags: dict[Stage, StageLag]
    at_ns: int = 0
    is_known: bool = True
    problem: str = ""


async def look_at_partition(api: Api, partition: int, unreadable: Collection[str]) -> PartitionLook:
    """Reads one partition: six messages, and where something waits, two requests more for each stage.

    Downstream first: a cursor that is read later can only be further on, so nothing is counted below zero.

    Args:
        api: a connection. It repeats requests for ever: give this a time-out.
        partition: which.
        unreadable: streams not to be asked: what only they tell stays unknown.
    """
    if RECEIPTS in unreadable:
        # Every cursor may stand on the receipt.
        return _unknown(partition, "")
    try:
        receipt, _ = await last_receipt(api, partition)
        seal = await sealed_end(api, receipt)
        cursors: dict[Stage, int | None] = {"persist": 0 if receipt is None else receipt.origin}
        for stage in reversed(STAGES[:-1]):
            stream = OUTPUT_STREAM[stage]
            cursors[stage] = None
            if stream not in unreadable:
                last = await api.last_message(stream, output_subject(stage, partition))
                cursors[stage] = checkpoint_from(receipt, stage, last).cursor.origin
        lags = await _lags(api, partition, cursors, EVENTS not in unreadable)
        return PartitionLook(partition=partition, receipt=receipt, seal=seal, lags=lags)
    except WireFormatError as error:
        return _unknown(partition, str(error))


def _unknown(partition: int, problem: str) -> PartitionLook:
    return PartitionLook(
        partition=partition, lags={stage: StageLag() for stage in STAGES}, is_known=False, problem=problem
    )


async def sealed_end(api: Api, receipt: Receipt | None) -> SealRecord | None:
    """The record of the last sealed shard of a partition with this last receipt; None before the first.

    Those that were given up when it went back, or to another store, do not count; one that ends with everything there
    is does, though the receipt still names its shard as the live one. Raises as `last_seal`.
    """
    if receipt is None:
        return None
    live = receipt.end_of(receipt.store).shard
    record, _ = await last_seal(api, receipt.partition, told_before(live + 1, receipt))
    whole = (receipt.persisted, receipt.origin)
    if record is not None and record.shard == live and (record.tree_size, record.last_origin) != whole:
        record, _ = await last_seal(api, receipt.partition, told_before(live, receipt))
    return record


def told_before(shard: int, receipt: Receipt) -> Callable[[SealRecord], bool]:
    """For `last_seal`: of a shard below that number, by the owner that `receipt` names or from before its part."""
    first = receipt.end_of(receipt.store).first
    return lambda record: record.shard < shard and record.is_of(receipt.store, first)


async def _lags(api: Api, partition: int, cursors: dict[Stage, int | None], countable: bool) -> dict[Stage, StageLag]:
    last = await api.last_message(EVENTS, raw_filter(partition)) if countable else None
    reached = last.seq if last is not None else 0
    after: dict[int, int] = {}
    lags: dict[Stage, StageLag] = {}
    before: int | None = reached
    for stage in STAGES:
        cursor = cursors[stage]
        lags[stage] = StageLag(origin=cursor)
        if countable and cursor is not None and before is not None:
            for origin in (before, cursor):
                if origin not in after:
                    after[origin] = await count_from(api, partition, origin + 1) if origin < reached else 0
            waiting = max(0, after[cursor] - after[before])
            first = await api.first_message(EVENTS, raw_filter(partition), from_seq=cursor + 1) if waiting else None
            lags[stage] = StageLag(origin=cursor, waiting=waiting, oldest_ns=None if first is None else first.time_ns)
        before = cursor
    return lags


async def count_from(api: Api, partition: int, origin: int) -> int:
    """How many messages `FI_EVENTS` holds for the partition from `origin` on."""
    return await count_messages(
        api, EVENTS, raw_filter(partition), {"deliver_policy": "by_start_sequence", "opt_start_seq": origin}
    )


async def count_messages(api: Api, stream: str, pattern: str, start: Mapping[str, object]) -> int:
    """How many messages a stream holds on `pattern` from `start` on: a consumer that reads nothing counts.

    Args:
        start: the fields of a consumer's configuration that say where it begins.
    """
    name = f"count-{secrets.token_hex(6)}"
    config = {
        "name": name,
        **start,
        "ack_policy": "none",
        "filter_subject": pattern,
        "num_replicas": 1,
        "mem_storage": True,
        "inactive_threshold": _NS,
    }
    request = {"stream_name": stream, "config": config, "action": "create"}
    subject = f"$JS.API.CONSUMER.CREATE.{stream}.{name}.{pattern}"
    return (await api.ask(stream, subject, msgspec.json.encode(request), _Counted)).num_pending


class _Counted(msgspec.Struct):
    num_pending: int
