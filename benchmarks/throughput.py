"""Sustained throughput, end to end, beside the ceiling: nothing but publishing the same messages to one R3 stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from nats.errors import NoRespondersError
from nats.js.api import DiscardPolicy, StorageType, StreamConfig

from benchmarks.costs import costs, snapshot
from benchmarks.load import IN_FLIGHT, Message, Pipeline, closed_loop, make_messages
from stages.runtime.client import GuardedClient
from stages.runtime.writer import decode_pub_answer

MESSAGES = {1: 30_000, 16: 8_000}
"""Events a message → messages published in one turn: three seconds, so that the way of the last ones hardly counts."""
CEILING_STREAM = "BENCH_CEILING"
_SPREAD_S = 10
_AGAIN_S = 0.02


async def measure_throughput(
    pipeline: Pipeline, seed: int, *, ceiling_first: bool, counts: Mapping[int, int] = MESSAGES
) -> list[dict[str, Any]]:
    """Each size once, beside its ceiling: ``{"batch", "events_per_s", "ceiling_events_per_s", "costs"}``.

    Args:
        ceiling_first: whose turn it is to come first, so that what the machine does meanwhile falls on both alike.
        counts: events a message → messages.

    Raises:
        RuntimeError: events did not come out.
    """
    rows = []
    for batch, count in counts.items():
        messages = make_messages(seed + batch, count, batch)
        ceiling = await _ceiling(pipeline, messages) if ceiling_first else 0.0
        before = await snapshot(pipeline)
        async with pipeline.tracked() as tracker:
            await closed_loop(pipeline, tracker, messages)
        settled = tracker.totals().settled
        if settled != count * batch:
            raise RuntimeError(f"{settled} of {count * batch} events came out")
        shared = costs(before, await snapshot(pipeline), settled)
        if not ceiling_first:
            ceiling = await _ceiling(pipeline, messages)
        rows.append(
            {
                "batch": batch,
                "events_per_s": round(settled / tracker.span_s()),
                "ceiling_events_per_s": round(ceiling),
                "costs": shared,
            }
        )
    return rows


async def _ceiling(pipeline: Pipeline, messages: Sequence[Message]) -> float:
    """Events a second when one R3 file stream is all there is: same messages, same connection count and depth."""
    jetstream = pipeline.observer.jetstream(timeout=10)
    await jetstream.add_stream(
        StreamConfig(
            name=CEILING_STREAM,
            subjects=["bench.ceiling.*"],
            num_replicas=pipeline.supervisor.settings.replicas,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
        )
    )
    for gateway in pipeline.gateways:
        await _until_answered(gateway.client, "bench.ceiling.warm-up")
    queue = iter(messages)

    async def worker() -> None:
        for message in queue:
            client = pipeline.gateway(message).client
            reply = await client.request(
                f"bench.ceiling.{message.consultation}",
                message.data,
                timeout=10,
                headers={"Nats-Msg-Id": message.message_id},
            )
            answer = decode_pub_answer(reply.data)
            if answer.error is not None:
                raise RuntimeError(f"the ceiling stream refused: {answer.error}")

    start_s = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(IN_FLIGHT):
            tasks.create_task(worker())
    elapsed_s = time.perf_counter() - start_s
    await jetstream.delete_stream(CEILING_STREAM)
    return sum(message.events for message in messages) / elapsed_s


async def _until_answered(client: GuardedClient, subject: str) -> None:
    """A stream just made answers at its leader; that it does spreads to the other servers a moment later."""
    async with asyncio.timeout(_SPREAD_S):
        while True:
            try:
                await client.request(subject, timeout=_SPREAD_S)
                return
            except NoRespondersError:
                await asyncio.sleep(_AGAIN_S)
