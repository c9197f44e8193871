"""What the tests of reading from two servers share: servers that pass over messages, and a reader of `FI_EVENTS`."""

from __future__ import annotations

import asyncio
import random

from virtual import Ground

from cluster.testing.sim.consumers import Consumer
from stages.runtime.base import InputFeed
from stages.runtime.checkpoint import Cursor
from stages.runtime.messages import StoredMessage

SERVERS = ("n1", "n2", "n3")
STORED = 40


def damage(ground: Ground, unreadable: dict[str, set[int]], seed: int = 1) -> list[Consumer]:
    """Consumers lie on servers by chance; gives all that are made."""
    rng, made = random.Random(seed), list[Consumer]()

    def place(consumer: Consumer) -> None:
        consumer.server = rng.choice(SERVERS)
        consumer.unreadable = unreadable.get(consumer.server, set())
        made.append(consumer)

    ground.broker.placed = place
    return made


async def store(ground: Ground, count: int) -> None:
    for number in range(count):
        await ground.publish("fi.events.clinic-1.c", b"%d" % number)


async def taken(feed: InputFeed, until_seq: int) -> list[StoredMessage]:
    messages: list[StoredMessage] = []
    async with asyncio.timeout(60):
        while not messages or messages[-1].seq < until_seq:
            await feed.reader.wait()
            messages += feed.reader.take(5, 1 << 20)
    return messages


def feed_of(ground: Ground, nonce: str = "n") -> InputFeed:
    feed = InputFeed(ground.api, "ingest", 0, nonce, Cursor(), Cursor())
    feed.reader.start()
    return feed
