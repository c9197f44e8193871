"""Letting what was accepted flow out: how far each stage has got, and what is still to be committed."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable

import msgspec

from contracts.frames import decode_frame_head
from contracts.subjects import EVENTS, INPUT_STREAM, STAGES, Stage, input_filter, raw_filter
from stages.runtime.api import Api
from stages.runtime.checkpoint import last_receipt, read_checkpoint

POLL_S = 0.1
_NS = 1_000_000_000


class DrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """What stands where after a drain.

    Attributes:
        committed: everything that was accepted is.
        waiting: messages in `FI_EVENTS` that no receipt covers yet. They are safe there.
        persisted, duplicates, dead_lettered: running totals of all partitions, in events.
        unfinished: stages that had not worked off their input when they were stopped.
    """

    committed: bool
    waiting: int
    persisted: int
    duplicates: int
    dead_lettered: int
    unfinished: tuple[Stage, ...]


async def drain(
    api: Api, partitions: int, stop: Callable[[Stage], Awaitable[None]], limit_s: float, on_stage: Callable[[int], None]
) -> DrainReport:
    """Stops stages in flow order, each when it has worked off what was there, or when the time is up.

    Args:
        api: a connection.
        partitions: P.
        stop: stops the processes of one stage, which finish what they have in hand.
        limit_s: for all the waiting together.
        on_stage: told how many stages are stopped.
    """
    deadline_s = time.monotonic() + limit_s
    unfinished = []
    for number, stage in enumerate(STAGES, 1):
        if not await _worked_off(api, stage, partitions, deadline_s):
            unfinished.append(stage)
        await stop(stage)
        on_stage(number)
    return await _report(api, partitions, tuple(unfinished))


async def _worked_off(api: Api, stage: Stage, partitions: int, deadline_s: float) -> bool:
    """True once the stage's output reaches what its input held at some moment after the call."""
    open_ = set(range(partitions))
    while open_:
        for partition in tuple(open_):
            reached = await _input_reaches(api, stage, partition)
            if await _output_reaches(api, stage, partition) >= reached:
                open_.discard(partition)
        if open_ and time.monotonic() > deadline_s:
            return False
        if open_:
            await asyncio.sleep(POLL_S)
    return True


async def _input_reaches(api: Api, stage: Stage, partition: int) -> int:
    last = await api.last_message(INPUT_STREAM[stage], input_filter(stage, partition))
    if last is None:
        return 0
    return last.seq if stage == "ingest" else decode_frame_head(last.data).last


async def _output_reaches(api: Api, stage: Stage, partition: int) -> int:
    if stage == "persist":
        receipt, _ = await last_receipt(api, partition)
        return 0 if receipt is None else receipt.origin
    return (await read_checkpoint(api, stage, partition)).cursor.origin


async def _report(api: Api, partitions: int, unfinished: tuple[Stage, ...]) -> DrainReport:
    waiting = persisted = duplicates = dead_lettered = 0
    for partition in range(partitions):
        receipt, _ = await last_receipt(api, partition)
        waiting += await _messages_from(api, partition, 1 if receipt is None else receipt.origin + 1)
        if receipt is not None:
            persisted += receipt.persisted
            duplicates += receipt.duplicates
            dead_lettered += receipt.dead_lettered
    return DrainReport(
        committed=waiting == 0,
        waiting=waiting,
        persisted=persisted,
        duplicates=duplicates,
        dead_lettered=dead_lettered,
        unfinished=unfinished,
    )


async def _messages_from(api: Api, partition: int, origin: int) -> int:
    """How many messages `FI_EVENTS` holds for the partition from `origin` on: a consumer that reads nothing counts."""
    name, pattern = f"count-{secrets.token_hex(6)}", raw_filter(partition)
    config = {
        "name": name,
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": origin,
        "ack_policy": "none",
        "filter_subject": pattern,
        "num_replicas": 1,
        "mem_storage": True,
        "inactive_threshold": _NS,
    }
    request = {"stream_name": EVENTS, "config": config, "action": "create"}
    data = await api.request(f"$JS.API.CONSUMER.CREATE.{EVENTS}.{name}.{pattern}", msgspec.json.encode(request))
    return msgspec.json.decode(data, type=_Counted).num_pending


class _Counted(msgspec.Struct):
    num_pending: int
