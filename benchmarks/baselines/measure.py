"""Measuring a baseline: sustained rate in a closed loop for a given time, and latency at a fixed rate from due time."""

from __future__ import annotations

import asyncio
import tempfile
import time
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

from benchmarks.baselines.designs import DESIGNS, Ground, MissingError, Rig
from benchmarks.load import IN_FLIGHT, Message
from benchmarks.report import Say
from cluster.track import percentiles_ms
from contracts.errors import FiError

RATES_PER_S = (200, 500)
WINDOW = 8 * IN_FLIGHT
"""Events under way at most in a closed loop: enough to keep every design busy, few enough to leave little behind."""
BEHIND_S = 1.0
"""A design falls behind when more than so much of the load is under way, or comes out so long after the last."""
WARM_UP_EVENTS = 100
RAMP_S = 1.0
"""What comes out so soon after the start of a closed loop is not counted: four hops have to fill first."""
SETTLE_S = 20.0


async def visit(
    name: str, ground: Ground, messages: Sequence[Message], *, rates: Sequence[int], seconds: float, say: Say
) -> dict[str, Any]:
    """Starts a design, measures latency at `rates` and then the sustained rate, each for `seconds`, and ends it.

    Args:
        messages: of one event each; not all of them need be used.

    Returns:
        ``{"design", "events_per_s", "events", "repeated", "latency"}``; ``{"design", "failed"}`` where it
        cannot run, or events did not come out.
    """
    say(f"baseline: {name}")
    source = iter(messages)
    with tempfile.TemporaryDirectory(dir=ground.directory) as own:
        try:
            async with DESIGNS[name].open(ground._replace(directory=Path(own))) as rig:
                await _all(rig, islice(source, WARM_UP_EVENTS))
                latency = []
                for rate in rates:
                    latency.append(await _at_rate(rig, list(islice(source, int(rate * seconds))), rate))
                    if latency[-1]["falls_behind"]:
                        break
                rate_per_s, events = await _sustained(rig, source, seconds)
                return {
                    "design": name,
                    "events_per_s": round(rate_per_s, 1),
                    "events": events,
                    "repeated": rig.arrivals.repeated,
                    "latency": latency,
                }
        except (MissingError, FiError, RuntimeError, ExceptionGroup) as error:
            # One alternative that fails must not take everything else that was measured with it.
            return {"design": name, "failed": f"{type(error).__name__}: {error}"}


async def _all(rig: Rig, messages: Iterator[Message]) -> None:
    """Sends some messages and waits until they came out."""
    expected = len(rig.arrivals.seen_ns)
    for message in messages:
        await rig.send(message)
        expected += 1
    if not await rig.arrivals.reach(expected, SETTLE_S):
        raise RuntimeError(f"{expected - len(rig.arrivals.seen_ns)} of {expected} events did not come out")


async def _at_rate(rig: Rig, messages: Sequence[Message], rate_per_s: int) -> dict[str, Any]:
    """Offers messages at fixed times; latencies count from these."""
    accepted = array("q")
    due: dict[bytes, int] = {}
    before = len(rig.arrivals.seen_ns)
    start_ns = time.time_ns() + 50_000_000
    behind = False

    async def one(message: Message, due_ns: int) -> None:
        await rig.send(message)
        accepted.append(time.time_ns() - due_ns)

    async with asyncio.TaskGroup() as tasks:
        for number, message in enumerate(messages):
            due_ns = start_ns + int(number * 1e9 / rate_per_s)
            wait_s = (due_ns - time.time_ns()) / 1e9
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            behind = len(due) - (len(rig.arrivals.seen_ns) - before) > rate_per_s * BEHIND_S
            if behind:
                break
            due[UUID(message.message_id).bytes] = due_ns
            tasks.create_task(one(message, due_ns))
    behind = behind or not await rig.arrivals.reach(before + len(due), BEHIND_S)
    if not await rig.arrivals.reach(before + len(due), SETTLE_S):
        raise RuntimeError(f"{before + len(due) - len(rig.arrivals.seen_ns)} events did not come out")
    durable = [rig.arrivals.seen_ns[event_id] - due_ns for event_id, due_ns in due.items()]
    return {
        "rate_per_s": rate_per_s,
        "falls_behind": behind,
        "accepted_ms": None if behind else percentiles_ms(accepted),
        "durable_ms": None if behind else percentiles_ms(durable),
    }


async def _sustained(rig: Rig, messages: Iterator[Message], seconds: float) -> tuple[float, int]:
    """(events a second, events) that came out while messages were sent as fast as they were accepted."""
    before = len(rig.arrivals.seen_ns)
    sent = before
    start_ns = time.time_ns()
    end_ns = start_ns + int((RAMP_S + seconds) * 1e9)
    turn = asyncio.Lock()

    async def worker() -> None:
        nonlocal sent
        while time.time_ns() < end_ns:
            async with turn:
                left_s = (end_ns - time.time_ns()) / 1e9
                if sent - len(rig.arrivals.seen_ns) >= WINDOW and not await rig.arrivals.reach(
                    sent - WINDOW + 1, max(left_s, 0.0)
                ):
                    return
                message = next(messages, None)
                if message is None:
                    return
                sent += 1
            await rig.send(message)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(IN_FLIGHT):
            tasks.create_task(worker())
    await rig.arrivals.reach(sent, max((end_ns - time.time_ns()) / 1e9, 0.0))
    stamps = list(islice(rig.arrivals.seen_ns.values(), before, None))
    return steady_rate(stamps, start_ns, start_ns + int(RAMP_S * 1e9), end_ns)


def steady_rate(stamps_ns: Sequence[int], start_ns: int, steady_ns: int, end_ns: int) -> tuple[float, int]:
    """(events a second, events) of what came out once the design was under way.

    Counted is from `steady_ns` to the end, or to the last event if that came out before; and from the start on, where
    everything came out before `steady_ns`.

    Args:
        stamps_ns: when each event came out, in order.
        start_ns: the first was sent.
        steady_ns: by now all parts of the design have work.
        end_ns: nothing was sent any more.

    Raises:
        RuntimeError: nothing came out in time.
    """
    in_time = [stamp for stamp in stamps_ns if stamp <= end_ns]
    from_ns = start_ns if in_time and in_time[-1] <= steady_ns else steady_ns
    counted = sum(stamp > from_ns for stamp in in_time)
    if not counted:
        raise RuntimeError("no event came out")
    until_ns = end_ns if len(in_time) < len(stamps_ns) else in_time[-1]
    return counted * 1e9 / (until_ns - from_ns), counted
