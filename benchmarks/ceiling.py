"""The ceiling: nothing but publishing to one R3 file stream that has nothing behind it, by our client or nats-py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import MappingProxyType
from typing import Any

import nats
from nats.errors import NoRespondersError
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, StorageType, StreamConfig

from benchmarks.load import IN_FLIGHT, Message, Pipeline
from stages.runtime.client import GuardedClient
from stages.runtime.writer import read_pub_answer

STREAM = "BENCH_CEILING"
SUBJECTS = "bench.ceiling.*"
_ANSWER_S = 10
_SPREAD_S = 10
_AGAIN_S = 0.02

Publish = Callable[[Message], Awaitable[None]]
"""Sends one message; returns once it is accepted."""


@asynccontextmanager
async def bare_stream(pipeline: Pipeline, **differences: Any) -> AsyncIterator[None]:
    """The stream, reachable by every gateway's server; deleted at the end.

    Args:
        differences: fields of its `StreamConfig` that are not as the ceiling has them.
    """
    jetstream = pipeline.observer.jetstream(timeout=10)
    config = StreamConfig(
        name=STREAM,
        subjects=[SUBJECTS],
        num_replicas=pipeline.supervisor.settings.replicas,
        storage=StorageType.FILE,
        discard=DiscardPolicy.NEW,
    )
    await jetstream.add_stream(config.evolve(**differences))
    try:
        for gateway in pipeline.gateways:
            await _until_answered(gateway.client, subject_of("warm-up"))
        yield
    finally:
        await jetstream.delete_stream(STREAM)


async def measure_ceiling(pipeline: Pipeline, messages: Sequence[Message]) -> float:
    """Events a second: same messages, same connection count and depth as ours."""
    async with bare_stream(pipeline):
        return await events_per_s(messages, by_request(pipeline))


def by_request(pipeline: Pipeline, *, ids: bool = True) -> Publish:
    """Publishes over the gateways' connections, with message ids or without."""

    async def publish(message: Message) -> None:
        subject = subject_of(message.consultation)
        reply = await pipeline.gateway(message).client.request(
            subject,
            message.data,
            timeout=_ANSWER_S,
            headers={"Nats-Msg-Id": message.message_id} if ids else None,
        )
        answer = read_pub_answer(reply.data, STREAM, subject)
        if answer.error is not None:
            raise RuntimeError(f"the ceiling stream refused: {answer.error}")

    return publish


def subject_of(consultation: str) -> str:
    """Where the stream listens for what belongs to a consultation."""
    return SUBJECTS.replace("*", consultation)


async def events_per_s(messages: Sequence[Message], publish: Publish) -> float:
    """The rate at which `publish` has messages accepted, `IN_FLIGHT` at once."""
    queue = iter(messages)

    async def worker() -> None:
        for message in queue:
            await publish(message)

    start_s = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(IN_FLIGHT):
            tasks.create_task(worker())
    return sum(message.events for message in messages) / (time.perf_counter() - start_s)


async def measure_library(way: str, pipeline: Pipeline, messages: Sequence[Message]) -> float:
    """Events a second with nats-py as it comes, over as many connections to the same servers as the gateways have.

    Args:
        way: one of `LIBRARY`.
    """
    async with bare_stream(pipeline), AsyncExitStack() as stack:
        contexts = []
        for gateway in pipeline.gateways:
            url = gateway.client.connected_url
            if url is None:
                raise RuntimeError("a gateway has lost its connection")
            client = await nats.connect(url.geturl())
            stack.push_async_callback(client.close)
            pending_max = IN_FLIGHT // len(pipeline.gateways)
            contexts.append(client.jetstream(timeout=_ANSWER_S, publish_async_max_pending=pending_max))
        return await LIBRARY[way](contexts, messages)


async def _awaited(contexts: Sequence[JetStreamContext], messages: Sequence[Message]) -> float:
    async def publish(message: Message) -> None:
        await _context(contexts, message).publish(
            subject_of(message.consultation), message.data, headers={"Nats-Msg-Id": message.message_id}
        )

    return await events_per_s(messages, publish)


async def _unawaited(contexts: Sequence[JetStreamContext], messages: Sequence[Message]) -> float:
    async def publish_all(context: JetStreamContext) -> None:
        for message in messages:
            if _context(contexts, message) is context:
                future = await context.publish_async(
                    subject_of(message.consultation),
                    message.data,
                    wait_stall=_ANSWER_S,
                    headers={"Nats-Msg-Id": message.message_id},
                )
                answers.append(future)

    answers: list[Awaitable[object]] = []
    start_s = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for context in contexts:
            tasks.create_task(publish_all(context))
    # A refused one never ends its future (nats-py #985).
    async with asyncio.timeout(_ANSWER_S):
        await asyncio.gather(*answers)
    return sum(message.events for message in messages) / (time.perf_counter() - start_s)


def _context(contexts: Sequence[JetStreamContext], message: Message) -> JetStreamContext:
    return contexts[hash(message.consultation) % len(contexts)]


LIBRARY = MappingProxyType({"publish": _awaited, "publish_async": _unawaited})
"""nats-py's ways to publish, `IN_FLIGHT` messages at once: its method → how fast it has all of them accepted."""


async def _until_answered(client: GuardedClient, subject: str) -> None:
    """A stream just made answers at its leader; that it does spreads to the other servers a moment later."""
    async with asyncio.timeout(_SPREAD_S):
        while True:
            try:
                await client.request(subject, timeout=_SPREAD_S)
                return
            except NoRespondersError:
                await asyncio.sleep(_AGAIN_S)
