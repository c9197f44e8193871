"""A reader that stood still, or fell behind, is given what waited from two servers, and leaves none of it out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from two_servers import STORED, damage, feed_of, store, taken
from virtual import Ground, in_virtual_time

from cluster.testing.sim.consumers import Consumer
from cluster.testing.waiting import until
from contracts.budgets import WITNESS_LAG
from stages.runtime.checkpoint import Cursor
from stages.runtime.messages import StoredMessage
from stages.runtime.parser import Sink


def test_a_reader_that_has_lagged_reads_from_two_servers_again() -> None:
    async def job(ground: Ground) -> None:
        made = damage(ground, {})
        feed = feed_of(ground)
        await until(lambda: made, "it reads")
        await store(ground, STORED)
        await until(lambda: feed.reader.buffered >= 8, "it is full")
        # It stands still, as behind a full hop, and what its server has still to give can no longer be read there.
        await asyncio.sleep(2 * WITNESS_LAG.s)
        made[0].unreadable = {STORED - 1, STORED - 2}
        hit = made[0].server
        damage(ground, {hit: made[0].unreadable})
        messages: list[StoredMessage] = []
        async with asyncio.timeout(60):
            while not messages or messages[-1].seq < STORED:
                await feed.reader.wait()
                messages += [m for m in feed.reader.take(3, 1 << 20) if m.seq > feed.cursor.origin]
                feed.cursor = Cursor(messages[-1].seq)
        assert [message.seq for message in messages] == list(range(1, STORED + 1))
        await feed.reader.close()

    in_virtual_time(job, pull_batch=8)


def test_what_a_frozen_process_finds_waiting_is_given_without_a_gap_or_not_at_all() -> None:
    """The first message of it tells that the reader lags, and is read again; so must be what follows."""

    async def job(ground: Ground) -> None:
        damage(ground, {})
        client: Any = ground.api.client
        subscribe_sink, waiting, frozen = client.subscribe_sink, list[Callable[[], None]](), False

        async def held_up(subject: str, sink: Sink) -> object:
            def take(*message: bytes) -> None:
                waiting.append(partial(sink, *message))
                while waiting and not frozen:
                    waiting.pop(0)()

            return await subscribe_sink(subject, take)

        client.subscribe_sink = held_up
        feed = feed_of(ground)
        await store(ground, 3)
        feed.cursor = Cursor((await taken(feed, 3))[-1].seq)
        frozen = True
        await store(ground, 5)
        await until(lambda: len(waiting) == 5, "all of it waits in the socket")
        late, feed.reader._clock = feed.reader._clock, lambda: asyncio.get_running_loop().time() + 2 * WITNESS_LAG.s
        # In one piece: as it is read where the acknowledgement that the lane waits for came before it.
        frozen = False
        while waiting:
            waiting.pop(0)()
        found = [message.seq for message in feed.reader.take(9, 1 << 20)]
        assert found == [4, 5, 6, 7, 8][: len(found)]
        feed.cursor, feed.reader._clock = Cursor(max([3, *found])), late
        found += [message.seq for message in await taken(feed, 8) if message.seq > feed.cursor.origin]
        assert found == [4, 5, 6, 7, 8]
        await feed.reader.close()

    in_virtual_time(job)


@pytest.mark.parametrize("idle_s", [0.0, 2 * WITNESS_LAG.s], ids=["ever since", "after a rest"])
def test_a_reader_that_is_never_far_behind_keeps_to_one_server_however_long_something_waits(idle_s: float) -> None:
    async def job(ground: Ground) -> None:
        made = damage(ground, {})
        feed = feed_of(ground)
        await until(lambda: made, "it reads")
        await asyncio.sleep(idle_s)
        waiting = 0
        for _ in range(60):
            await store(ground, 10)
            # More than it holds: something is always left to deliver.
            for _ in range(2):
                await asyncio.sleep(0.1)
                waiting += feed.reader.pending > 0
                feed.reader.take(5, 1 << 20)
        assert waiting > 90
        assert len(made) == 1
        await feed.reader.close()

    in_virtual_time(job, pull_batch=8)


@pytest.mark.parametrize("server", ["n1", ""])
def test_where_no_other_server_has_the_stream_a_reader_that_lags_goes_on(server: str) -> None:
    async def job(ground: Ground) -> None:
        made: list[Consumer] = []

        def place(consumer: Consumer) -> None:
            consumer.server = server
            made.append(consumer)

        ground.broker.placed = place
        await store(ground, STORED)
        feed = feed_of(ground)
        await until(lambda: feed.reader.buffered >= 8, "it is full")
        # It stands still, as behind a full hop.
        await asyncio.sleep(2 * WITNESS_LAG.s)
        before = len(made)
        assert [message.seq for message in await taken(feed, STORED)] == list(range(1, STORED + 1))
        assert len(made) == before
        await feed.reader.close()

    in_virtual_time(job, pull_batch=8)
