"""Letting what was accepted flow out: how far each stage has got, and what is still to be committed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec

from cluster.backlog import count_from
from contracts.budgets import MEMBERS_POLL
from contracts.errors import ClusterUnavailableError
from contracts.frames import decode_frame_head
from contracts.subjects import INPUT_STREAM, STAGES, Stage, input_filter
from stages.runtime.api import Api
from stages.runtime.checkpoint import last_receipt, read_checkpoint


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
            try:
                reached = await _input_reaches(api, stage, partition)
                if await output_reaches(api, stage, partition) >= reached:
                    open_.discard(partition)
            except ClusterUnavailableError:
                # It is asked again until the time is up.
                break
        if open_ and time.monotonic() > deadline_s:
            return False
        if open_:
            await asyncio.sleep(MEMBERS_POLL.s)
    return True


async def _input_reaches(api: Api, stage: Stage, partition: int) -> int:
    last = await api.last_message(INPUT_STREAM[stage], input_filter(stage, partition))
    if last is None:
        return 0
    return last.seq if stage == "ingest" else decode_frame_head(last.data).last


async def output_reaches(api: Api, stage: Stage, partition: int) -> int:
    """The origin up to which a stage has finished a partition. Raises as `read_checkpoint`."""
    if stage == "persist":
        receipt, _ = await last_receipt(api, partition)
        return 0 if receipt is None else receipt.origin
    return (await read_checkpoint(api, stage, partition)).cursor.origin


async def _report(api: Api, partitions: int, unfinished: tuple[Stage, ...]) -> DrainReport:
    waiting = persisted = duplicates = dead_lettered = 0
    for partition in range(partitions):
        receipt, _ = await last_receipt(api, partition)
        waiting += await count_from(api, partition, 1 if receipt is None else receipt.origin + 1)
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
