"""The ceiling: nothing but publishing to one R3 file stream that has nothing behind it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from nats.errors import NoRespondersError
from nats.js.api import DiscardPolicy, StorageType, StreamConfig

from benchmarks.load import IN_FLIGHT, Message, Pipeline
from stages.runtime.client import GuardedClient
from stages.runtime.writer import read_pub_answer

STREAM = "BENCH_CEILING"
SUBJECTS = "bench.ceiling.*"
ANSWER_S = 10
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
            timeout=ANSWER_S,
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


async def _until_answered(client: GuardedClient, subject: str) -> None:
    """A stream just made answers at its leader; that it does spreads to the other servers a moment later."""
    async with asyncio.timeout(_SPREAD_S):
        while True:
            try:
                await client.request(subject, timeout=_SPREAD_S)
                return
            except NoRespondersError:
                await asyncio.sleep(_AGAIN_S)
