"""The JetStream chains: four processes, durable acked consumers, R3 file streams; one event at a time, or tuned.

Classic: one event is fetched, worked on, published with its id (the PubAck awaited) and acked, before the next one.
Tuned: a large fetch; everything in it is published without waiting in between; acks follow the last PubAck; the HDF5
file stays open and is flushed once a fetch. Both on nats-py as it comes, with uvloop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import nats
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy, StorageType, StreamConfig

from benchmarks.baselines.arrivals import Reporter
from benchmarks.baselines.work import Work, hashed, ingest, sample, segment
from benchmarks.storage.classic import DESIGNS, ClassicFile
from contracts.subjects import STAGES, Stage

STREAMS: dict[Stage, str] = {stage: f"BASE_{stage.upper()}" for stage in STAGES}
"""The stream that each stage reads."""
PREFIX = "base"
DURABLE = "base"
PENDING_MAX = 8192
TUNED_FETCH = 512
IDLE_S = 5.0
_WORK: dict[Stage, Work] = {"segment": segment, "hash": hashed}


class Line(NamedTuple):
    """Where a stage of a chain stands.

    Attributes:
        urls: of the servers.
        stage: which.
        directory: where persist puts its file.
        port: where persist reports (`benchmarks.baselines.arrivals`).
    """

    urls: Sequence[str]
    stage: Stage
    directory: Path
    port: int

    @property
    def subjects(self) -> str:
        """What the stage reads."""
        return f"{PREFIX}.{self.stage}.>"


def first_subject(site: str, consultation: str) -> str:
    """Where a gateway publishes."""
    return f"{PREFIX}.ingest.{site}.{consultation}"


def next_subject(stage: Stage) -> str:
    """Where the stage publishes what it made of an event."""
    return f"{PREFIX}.{STAGES[STAGES.index(stage) + 1]}.events"


async def make_streams(jetstream: JetStreamContext, replicas: int) -> None:
    """A file stream for each stage to read, and a durable consumer of it with explicit acks."""
    for stage, name in STREAMS.items():
        await jetstream.add_stream(
            StreamConfig(
                name=name,
                subjects=[f"{PREFIX}.{stage}.>"],
                num_replicas=replicas,
                storage=StorageType.FILE,
                discard=DiscardPolicy.NEW,
            )
        )


async def make_consumers(jetstream: JetStreamContext) -> None:
    """A durable pull consumer with explicit acks for each stage."""
    for name in STREAMS.values():
        await jetstream.add_consumer(
            name,
            ConsumerConfig(durable_name=DURABLE, ack_policy=AckPolicy.EXPLICIT, max_ack_pending=PENDING_MAX),
        )


async def delete_streams(jetstream: JetStreamContext) -> None:
    """Undoes `make_streams`."""
    for name in STREAMS.values():
        await jetstream.delete_stream(name)


def worked(stage: Stage, message: Msg) -> bytes:
    """What `stage` makes of a message."""
    now_ns = time.time_ns()
    if stage != "ingest":
        return _WORK[stage](message.data, now_ns)
    _, _, site, consultation = message.subject.split(".")
    return ingest(message.data, site, consultation, message.metadata.sequence.stream, now_ns)


def id_of(message: Msg) -> dict[str, str]:
    """The header that keeps the event's id, and lets a stream drop a repeated publish."""
    assert message.headers is not None
    return {"Nats-Msg-Id": message.headers["Nats-Msg-Id"]}


async def run_stage(line: Line, *, tuned: bool, ready: Callable[[], None]) -> None:
    """Runs one stage of a chain until the process is ended."""
    client = await nats.connect(list(line.urls), max_reconnect_attempts=-1)
    jetstream = client.jetstream(timeout=IDLE_S, publish_async_max_pending=PENDING_MAX)
    subscription = await jetstream.pull_subscribe_bind(DURABLE, STREAMS[line.stage])
    if line.stage == "persist":
        reporter = await Reporter.connect(line.port)
        file = ClassicFile(line.directory / "classic.h5", DESIGNS[1 if tuned else 0])
        handle = _store_all(file, reporter) if tuned else _store_one(file, reporter)
    else:
        handle = _hand_on_all(jetstream, line.stage) if tuned else _hand_on_one(jetstream, line.stage)
    ready()
    while True:
        try:
            messages = await subscription.fetch(TUNED_FETCH if tuned else 1, timeout=IDLE_S)
        except nats.errors.TimeoutError:
            continue
        await handle(messages)


Handle = Callable[[list[Msg]], Awaitable[None]]


def _hand_on_one(jetstream: JetStreamContext, stage: Stage) -> Handle:
    async def handle(messages: list[Msg]) -> None:
        for message in messages:
            await jetstream.publish(next_subject(stage), worked(stage, message), headers=id_of(message))
            await message.ack()

    return handle


def _hand_on_all(jetstream: JetStreamContext, stage: Stage) -> Handle:
    async def handle(messages: list[Msg]) -> None:
        subject = next_subject(stage)
        answers = [
            await jetstream.publish_async(subject, worked(stage, message), headers=id_of(message))
            for message in messages
        ]
        # A refused publish never answers (nats.py issue 985): better to end than to wait for ever.
        async with asyncio.timeout(IDLE_S):
            await asyncio.gather(*answers)
        for message in messages:
            await message.ack()

    return handle


def _store_one(file: ClassicFile, reporter: Reporter) -> Handle:
    async def handle(messages: list[Msg]) -> None:
        for message in messages:
            row = sample(message.data)
            file.append(row, sync=False)
            reporter.stored([row.event_id])
            await message.ack()

    return handle


def _store_all(file: ClassicFile, reporter: Reporter) -> Handle:
    async def handle(messages: list[Msg]) -> None:
        rows = [sample(message.data) for message in messages]
        file.append_all(rows)
        reporter.stored(row.event_id for row in rows)
        for message in messages:
            await message.ack()

    return handle
