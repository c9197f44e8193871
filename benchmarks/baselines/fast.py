"""FastStream's NATS pipeline: the four stages as its subscribers, one message a call of the handler, or batched.

Publishing and acks are FastStream's: a handler publishes and awaits the PubAck, then its message is acked. One message
a call is ``PullSub(BATCH)``, whose handlers run side by side: faster than its default, a push consumer with one call at
a time, and it keeps no order. Batched is ``PullSub(batch=True)``, and everything in a batch is published side by side.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from faststream import FastStream
from faststream.nats import JStream, NatsBroker, NatsMessage, PullSub
from nats.aio.msg import Msg
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext

from benchmarks.baselines.arrivals import Reporter
from benchmarks.baselines.jetstream import DURABLE, STREAMS, Line, id_of, next_subject, worked
from benchmarks.baselines.work import sample
from benchmarks.storage.classic import DESIGNS, ClassicFile
from contracts.subjects import STAGES

BATCH = 256
BATCH_WAIT_S = 0.02
"""A batch that is not full waits so long for more: FastStream has no "take what is there"."""
IDLE_S = 5.0
PUBLISH_S = 5.0

Handle = Callable[[list[Msg]], Awaitable[None]]


async def run_stage(line: Line, *, batched: bool, ready: Callable[[], None]) -> None:
    """Runs one stage until the process is ended."""
    _name_timeouts()
    broker = NatsBroker(list(line.urls), logger=None, max_reconnect_attempts=-1)
    handle = await _store(line) if line.stage == "persist" else _hand_on(broker, line)
    subscribe: Any = broker.subscriber(
        line.subjects,
        durable=DURABLE,
        stream=JStream(STREAMS[line.stage], declare=False),
        decoder=_undecoded,
        pull_sub=PullSub(BATCH, BATCH_WAIT_S, batch=True) if batched else PullSub(BATCH, IDLE_S),
    )

    @subscribe  # type: ignore[untyped-decorator]
    async def take(message: NatsMessage) -> None:
        raw: Any = message.raw_message
        await handle(raw if batched else [raw])

    app = FastStream(broker, logger=None)
    app.after_startup(ready)
    await app.run()


def _name_timeouts() -> None:
    """Lets FastStream know a fetch that ran out of time.

    nats-py 2.16 ends one with asyncio's error, FastStream 0.7.8 expects nats-py's own: it would drop the batch in hand,
    which then comes again when the ack is overdue, 30 s later.
    """
    fetch = JetStreamContext.PullSubscription.fetch

    async def named(self: JetStreamContext.PullSubscription, *args: Any, **words: Any) -> list[Msg]:
        try:
            return await fetch(self, *args, **words)
        except TimeoutError as error:
            raise NatsTimeoutError from error

    JetStreamContext.PullSubscription.fetch = named  # type: ignore[method-assign]


async def _undecoded(message: Any) -> bytes:
    """The bodies are ours to decode; FastStream would try JSON first."""
    return b""


def _hand_on(broker: NatsBroker, line: Line) -> Handle:
    stage, subject = line.stage, next_subject(line.stage)
    stream = STREAMS[STAGES[STAGES.index(stage) + 1]]

    async def publish(message: Msg) -> None:
        await broker.publish(worked(stage, message), subject, stream=stream, headers=id_of(message), timeout=PUBLISH_S)

    async def handle(messages: list[Msg]) -> None:
        await asyncio.gather(*map(publish, messages))

    return handle


async def _store(line: Line) -> Handle:
    reporter = await Reporter.connect(line.port)
    file = ClassicFile(line.directory / "classic.h5", DESIGNS[0])

    async def handle(messages: list[Msg]) -> None:
        rows = [sample(message.data) for message in messages]
        file.append_all(rows)
        reporter.stored(row.event_id for row in rows)

    return handle
