"""How each kind of fault is done, and how it is healed.

A fault is an async context: done on the way in, healed on the way out, whatever happened between. Healing is safe to
repeat and does not fail on what another fault has broken meanwhile: two may hit the same process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import cycle
from typing import Final

from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from cluster.apply import apply
from cluster.testing.chaos.ground import Ground
from cluster.testing.chaos.schedule import LED, PROCESSES, SERVERS, Planned
from contracts.errors import FiError
from stages.runtime.tasks import end_tasks, side_by_side

log = logging.getLogger(__name__)

Fault = Callable[[Ground, str], AbstractAsyncContextManager[None]]
"""(ground, target) → the fault while the context lasts."""

ANSWER_S: Final = 2.0
REPEAT_S_MAX: Final = 120.0
STEP_DOWNS_S: Final = 0.2
CLOCK_SHIFTS_S: Final = {"ingest": -3600.0, "segment": 3600.0, "hash": -30.0, "persist": 7200.0}


def begin(ground: Ground, planned: Planned) -> AbstractAsyncContextManager[None]:
    """The planned fault. Raises `KeyError` for a kind that is not known."""
    return FAULTS[planned.kind](ground, planned.target)


@asynccontextmanager
async def _kill(ground: Ground, name: str) -> AsyncIterator[None]:
    await ground.cluster.kill(name)
    await ground.cluster.start(name)
    yield


@asynccontextmanager
async def _down(ground: Ground, name: str) -> AsyncIterator[None]:
    if name in SERVERS:
        await ground.cluster.kill(name)
    else:
        await ground.cluster.stop(name)
    try:
        yield
    finally:
        await ground.cluster.start(name)


@asynccontextmanager
async def _frozen(ground: Ground, name: str) -> AsyncIterator[None]:
    await ground.cluster.freeze(name)
    try:
        yield
    finally:
        await ground.cluster.thaw(name)


@asynccontextmanager
async def _frozen_leader(ground: Ground, stream: str) -> AsyncIterator[None]:
    async with _frozen(ground, await _leader(ground, stream)):
        yield


@asynccontextmanager
async def _cut_off(ground: Ground, name: str) -> AsyncIterator[None]:
    await ground.cluster.cut(name)
    try:
        yield
    finally:
        await ground.cluster.heal(name)


@asynccontextmanager
async def _cut_off_leader(ground: Ground, stream: str) -> AsyncIterator[None]:
    async with _cut_off(ground, await _leader(ground, stream)):
        yield


@asynccontextmanager
async def _without_routes(ground: Ground, name: str) -> AsyncIterator[None]:
    ground.part(name)
    try:
        yield
    finally:
        await ground.cluster.heal(name)


@asynccontextmanager
async def _slow(ground: Ground, latency: str) -> AsyncIterator[None]:
    for name in SERVERS:
        await ground.cluster.slow(name, float(latency.removesuffix(" ms")) / 1000)
    try:
        yield
    finally:
        for name in SERVERS:
            await ground.cluster.heal(name)


@asynccontextmanager
async def _shifted_clock(ground: Ground, name: str) -> AsyncIterator[None]:
    await ground.cluster.move_clock(name, CLOCK_SHIFTS_S[name.partition("-")[0]])
    try:
        yield
    finally:
        await ground.cluster.move_clock(name, 0)


@asynccontextmanager
async def _second_owner(ground: Ground, stage: str) -> AsyncIterator[None]:
    async with ground.second_owner(stage):
        yield


@asynccontextmanager
async def _kill_all(ground: Ground, _: str) -> AsyncIterator[None]:
    await side_by_side(*map(ground.cluster.kill, SERVERS))
    try:
        yield
    finally:
        await side_by_side(*map(ground.cluster.start, SERVERS))


@asynccontextmanager
async def _rolling(ground: Ground, _: str) -> AsyncIterator[None]:
    for name in SERVERS:
        await ground.cluster.stop(name)
        await ground.cluster.start(name)
    yield


@asynccontextmanager
async def _step_down(ground: Ground, stream: str) -> AsyncIterator[None]:
    await _ask(ground, f"$JS.API.STREAM.LEADER.STEPDOWN.{stream}")
    yield


@asynccontextmanager
async def _step_down_storm(ground: Ground, _: str) -> AsyncIterator[None]:
    async def storm() -> None:
        async with asyncio.TaskGroup() as asking:
            for stream in cycle(LED):
                asking.create_task(_ask(ground, f"$JS.API.STREAM.LEADER.STEPDOWN.{stream}"))
                await asyncio.sleep(STEP_DOWNS_S)

    storming = asyncio.create_task(storm())
    try:
        yield
    finally:
        await end_tasks(storming)


@asynccontextmanager
async def _purged(ground: Ground, stream: str) -> AsyncIterator[None]:
    await _ask(ground, f"$JS.API.STREAM.PURGE.{stream}")
    yield


@asynccontextmanager
async def _deleted(ground: Ground, stream: str) -> AsyncIterator[None]:
    await _ask(ground, f"$JS.API.STREAM.DELETE.{stream}")
    try:
        yield
    finally:
        await _repeat(lambda: apply(ground.cluster.client, ground.settings), f"{stream} made again")


@asynccontextmanager
async def _lost_receipts(ground: Ground, stream: str) -> AsyncIterator[None]:
    try:
        async with _deleted(ground, stream):
            yield
    finally:
        await _repeat(ground.restore_receipts, "receipts told by the store")


@asynccontextmanager
async def _no_consumers(ground: Ground, stream: str) -> AsyncIterator[None]:
    jetstream = ground.cluster.client.jetstream(timeout=ANSWER_S)
    with contextlib.suppress(NatsError, asyncio.TimeoutError):
        for info in await jetstream.consumers_info(stream):
            with contextlib.suppress(NotFoundError):
                await jetstream.delete_consumer(stream, info.name)
    yield


@asynccontextmanager
async def _disk_full(ground: Ground, _: str) -> AsyncIterator[None]:
    await ground.cluster.fill_disk()
    try:
        yield
    finally:
        await ground.cluster.free_disk()


@asynccontextmanager
async def _failing_fsync(ground: Ground, name: str) -> AsyncIterator[None]:
    await ground.cluster.fail_fsync(name, failing=True)
    try:
        yield
    finally:
        await ground.cluster.fail_fsync(name, failing=False)


@asynccontextmanager
async def _new_gateway(ground: Ground, name: str) -> AsyncIterator[None]:
    await ground.gateways[name].kill()
    yield


@asynccontextmanager
async def _repeating_gateway(ground: Ground, name: str) -> AsyncIterator[None]:
    await ground.gateways[name].repeat()
    yield


@asynccontextmanager
async def _backlog(ground: Ground, stream: str) -> AsyncIterator[None]:
    """Every process that reads the stream is down, so that the hop fills."""
    stage = stream.removeprefix("FI_").lower()
    names = [name for name in PROCESSES if name.startswith(stage)]
    await side_by_side(*map(ground.cluster.stop, names))
    try:
        yield
    finally:
        await side_by_side(*map(ground.cluster.start, names))


FAULTS: Final[dict[str, Fault]] = {
    "kill a stage": _kill,
    "restart a stage": _down,
    "freeze a stage": _frozen,
    "cut off a stage": _cut_off,
    "cut off a persister": _cut_off,
    "shift a stage's clock": _shifted_clock,
    "second owner": _second_owner,
    "kill a server": _kill,
    "server down": _down,
    "freeze a server": _frozen,
    "freeze a leader": _frozen_leader,
    "kill all servers": _kill_all,
    "rolling server restart": _rolling,
    "cut off a server": _cut_off,
    "cut off a leader": _cut_off_leader,
    "server without routes": _without_routes,
    "slow network": _slow,
    "leader step-down": _step_down,
    "step-down storm": _step_down_storm,
    "purge a hop": _purged,
    "delete a hop": _deleted,
    "delete consumers": _no_consumers,
    "delete the members": _deleted,
    "delete the receipts": _lost_receipts,
    "disk full": _disk_full,
    "failing fsync": _failing_fsync,
    "kill a gateway": _new_gateway,
    "gateway repeats": _repeating_gateway,
    "backlog": _backlog,
}


async def _leader(ground: Ground, stream: str) -> str:
    """Name of the server that leads `stream`; the first server while nobody does."""
    try:
        info = await ground.cluster.client.jetstream(timeout=ANSWER_S).stream_info(stream)
    except (TimeoutError, NatsError):
        return SERVERS[0]
    leader = info.cluster.leader if info.cluster is not None else None
    return leader or SERVERS[0]


async def _ask(ground: Ground, subject: str) -> None:
    """One request to the JetStream API; that nobody answers is part of the weather."""
    try:
        await ground.cluster.client.request(subject, b"", timeout=ANSWER_S)
    except (TimeoutError, NatsError) as error:
        log.info("%s: %r", subject, error)


async def _repeat(job: Callable[[], Awaitable[object]], what: str) -> None:
    """Until it succeeds. Raises `TimeoutError` after `REPEAT_S_MAX`."""
    async with asyncio.timeout(REPEAT_S_MAX):
        while True:
            try:
                await job()
                return
            except (TimeoutError, FiError, NatsError) as error:
                log.info("%s: to be repeated: %r", what, error)
                await asyncio.sleep(0.2)
