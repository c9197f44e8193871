"""Frames near the size of what servers take, though each stage adds to every event in them."""

from __future__ import annotations

import asyncio
import json
from uuid import UUID

import pytest
from nats.aio.client import Client
from pipeline import until

from cluster.apply import apply
from contracts.frames import decode_frame_head
from contracts.settings import MIB, Settings
from contracts.subjects import PERSIST, input_filter
from stages.hash.core import HashCore
from stages.ingest.core import IngestCore
from stages.runtime.api import Api
from stages.runtime.base import InputFeed
from stages.runtime.lane import Lane
from stages.runtime.tasks import end_tasks
from stages.segment.core import SegmentCore

pytestmark = pytest.mark.cluster

CONSULTATION = UUID(int=1, version=4)
SITE = "s" * 64
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
LINE = json.dumps(
    {
        "consultation_id": str(CONSULTATION),
        "event_type": "MESSAGE_DELETED",
        "payload": {},
        "metadata": {"user_id": "a", "session_id": "b"},
    },
    separators=(",", ":"),
).encode()


class TakesBoth(Lane):
    """Ingest, when two messages have come together before it begins."""

    async def _gather(self, feed: InputFeed) -> None:
        async def two() -> bool:
            return feed.reader.buffered == 2

        if not feed.cursor.origin:
            await until(two, "both messages are there", 60)


async def test_messages_that_fit_one_frame_of_ingest_but_none_of_hash_are_parted(client: Client) -> None:
    settings = Settings(partitions=1, frame_bytes_max=2 * MIB)
    await apply(client, settings)
    api = Api(client, settings)
    events = 8_900, 14_100
    for count in events:
        await client.jetstream(timeout=30).publish(
            f"fi.events.{SITE}.{CONSULTATION}", b"\n".join([LINE] * count), headers={"traceparent": TRACE}
        )
    lanes = [
        TakesBoth(api, IngestCore(), 0, "ingest", lambda _: None),
        Lane(api, SegmentCore(), 0, "segment", lambda _: None),
        Lane(api, HashCore(), 0, "hash", lambda _: None),
    ]
    tasks = [asyncio.create_task(lane.run()) for lane in lanes]

    async def hashed() -> bool:
        for task in tasks:
            if task.done():
                task.result()
        last = await api.last_message(PERSIST, input_filter("persist", 0))
        return last is not None and decode_frame_head(last.data).last == len(events)

    try:
        await until(hashed, "all events are hashed", 120)
    finally:
        await end_tasks(*tasks)
