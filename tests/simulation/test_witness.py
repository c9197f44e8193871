"""One of three servers cannot read some of what it stored: what waits is read from two, and none of it is left out."""

from __future__ import annotations

import asyncio
import random

import pytest
from two_servers import SERVERS, STORED, damage, feed_of, store, taken
from virtual import Ground, in_virtual_time

from cluster.testing.sim.consumers import Consumer
from cluster.testing.waiting import until
from contracts.budgets import WITNESS_SILENT
from contracts.events import Event
from contracts.frames import Frame, encode_frame
from contracts.subjects import EVENTS, PERSIST, raw_filter
from stages.hash.core import HashCore
from stages.runtime.checkpoint import Cursor
from stages.runtime.lane import Lane
from stages.runtime.messages import StoredMessage
from stages.runtime.telemetry import OFF
from stages.runtime.witness import Witness


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("server", SERVERS)
def test_what_a_server_passes_over_is_read_from_another_in_its_place(
    server: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(OFF, "unreadable", lambda *place: told.append(place))

    async def job(ground: Ground) -> None:
        made = damage(ground, {server: {1, 2, 17, 39}}, seed)
        await store(ground, STORED)
        feed = feed_of(ground)
        messages = await taken(feed, STORED)
        assert [message.seq for message in messages] == list(range(1, STORED + 1))
        assert [message.data for message in messages] == [b"%d" % number for number in range(STORED)]
        assert set(told) <= {(EVENTS, server)}
        assert told or made[0].server != server
        assert len({consumer.server for consumer in made}) > 1
        assert feed.reader._buffered_bytes == 0
        await feed.reader.close()

    in_virtual_time(job, pull_batch=8)


@pytest.mark.parametrize("seed", range(6))
def test_the_last_messages_that_a_server_passes_over_are_read_from_another_too(seed: int) -> None:
    async def job(ground: Ground) -> None:
        damage(ground, {"n1": {STORED - 1, STORED}}, seed)
        await store(ground, STORED)
        feed = feed_of(ground)
        messages = await taken(feed, STORED)
        assert sorted({message.seq for message in messages}) == list(range(1, STORED + 1))
        await feed.reader.close()

    in_virtual_time(job, pull_batch=8)


def test_once_nothing_waits_one_server_is_read() -> None:
    async def job(ground: Ground) -> None:
        made = damage(ground, {})
        await store(ground, STORED)
        feed = feed_of(ground)
        await taken(feed, STORED)
        await until(lambda: feed.reader._witness is None, "the second reader ends")
        before = len(made)
        # The second needs no more of what is in a message than that it is there.
        assert {("_w" in consumer.name, consumer.config["headers_only"]) for consumer in made} == {
            (False, False),
            (True, True),
        }
        await store(ground, 3)
        assert len(await taken(feed, STORED + 3)) == 3
        assert len(made) == before
        await feed.reader.close()
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith(("read", "end witness"))]

    in_virtual_time(job)


def test_a_reader_with_nothing_before_it_has_no_witness() -> None:
    async def job(ground: Ground) -> None:
        made = damage(ground, {})
        feed = feed_of(ground)
        await until(lambda: made, "it reads")
        await store(ground, 3)
        assert len(await taken(feed, 3)) == 3
        assert len(made) == 1
        await feed.reader.close()

    in_virtual_time(job)


@pytest.mark.parametrize("blind", [False, True], ids=["one server", "the others give nothing"])
def test_without_a_second_server_the_first_is_believed(blind: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def job(ground: Ground) -> None:
        made: list[Consumer] = []

        def place(consumer: Consumer) -> None:
            consumer.server = "n2" if blind and made else "n1"
            consumer.unreadable = set(range(1, STORED + 1)) if blind and made else set()
            made.append(consumer)

        ground.broker.placed = place
        await store(ground, STORED)
        feed = feed_of(ground)
        assert [message.seq for message in await taken(feed, STORED)] == list(range(1, STORED + 1))
        assert "no second server gives what n1 gives" in caplog.text
        await feed.reader.close()

    in_virtual_time(job)


def test_a_reader_that_begins_again_in_the_middle_leaves_nothing_out() -> None:
    async def job(ground: Ground) -> None:
        damage(ground, {"n2": {5, 6, 30}})
        await store(ground, STORED)
        feed = feed_of(ground)
        messages: list[StoredMessage] = []
        async with asyncio.timeout(60):
            while not messages or messages[-1].seq < STORED:
                await feed.reader.wait()
                for message in feed.reader.take(3, 1 << 20):
                    if message.seq > feed.cursor.origin:
                        messages.append(message)
                        feed.cursor = Cursor(message.seq)
                if len(messages) % 4 == 0:
                    feed.reader.reopen("by hand")
                if len(messages) % 5 == 0:
                    ground.broker.lose_consumers(0.5, told=False)
        assert [message.seq for message in messages] == list(range(1, STORED + 1))
        assert ground.broker.streams[EVENTS].last_by_subject(raw_filter(0)) is not None
        await feed.reader.close()

    in_virtual_time(job, pull_batch=8)


def with_a_silent_second(ground: Ground) -> None:
    made: list[Consumer] = []

    def place(consumer: Consumer) -> None:
        consumer.server = "n2" if made else "n1"
        consumer.muted = bool(made)
        made.append(consumer)

    ground.broker.placed = place


def test_what_was_held_when_the_reader_began_again_is_not_released_to_it() -> None:
    async def job(ground: Ground) -> None:
        with_a_silent_second(ground)
        await store(ground, STORED)
        feed = feed_of(ground)
        await until(lambda: feed.reader.held, "something is held")
        witness = feed.reader._witness
        assert isinstance(witness, Witness)
        feed.reader._reset()
        feed.reader.unwitness()
        witness._give_up()
        assert (feed.reader.buffered, feed.reader.held) == (0, 0)
        await feed.reader.close()

    in_virtual_time(job)


def test_an_idle_look_waits_for_what_is_held() -> None:
    async def job(ground: Ground) -> None:
        with_a_silent_second(ground)
        await store(ground, STORED)
        feed = feed_of(ground)
        await until(lambda: feed.reader.held, "something is held")
        await feed.check()
        assert feed.reader._trouble is None
        await feed.reader.close()

    in_virtual_time(job)


def test_a_reader_of_whom_nobody_takes_anything_is_not_taken_for_one_whose_server_gives_nothing() -> None:
    async def job(ground: Ground) -> None:
        made = damage(ground, {}, seed=5)
        await store(ground, 10 * STORED)
        feed = feed_of(ground)
        await until(lambda: feed.reader.buffered >= 8, "it is full")
        assert feed.reader._witness is not None
        before = len(made)
        await asyncio.sleep(60)
        assert len(made) == before
        assert [m.seq for m in await taken(feed, 10 * STORED)] == list(range(1, 10 * STORED + 1))
        await feed.reader.close()

    in_virtual_time(job, pull_batch=8)


def test_closing_a_reader_that_is_cut_off_ends_its_witness() -> None:
    """A lane may be cut off for another process just when its own is told to end."""

    async def job(ground: Ground) -> None:
        damage(ground, {}, seed=5)
        await store(ground, 10 * STORED)
        feed = feed_of(ground)
        await until(lambda: feed.reader.buffered >= 8, "it is full")
        assert feed.reader._witness is not None
        closing = asyncio.create_task(feed.reader.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait((closing,))
        assert closing.cancelled()
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()}, "nothing of it is left")

    in_virtual_time(job, pull_batch=8)


@pytest.mark.parametrize("seed", range(4))
def test_a_server_that_hangs_all_the_while_does_not_hold_a_backlog_up_for_long(seed: int) -> None:
    async def job(ground: Ground) -> None:
        damage(ground, {}, seed)
        await store(ground, 450)
        ground.broker.hang("n2", 1000.0)
        feed = feed_of(ground)
        loop = asyncio.get_running_loop()
        begun_s, stood_s = loop.time(), 0.0
        while feed.cursor.origin < 450:
            before_s = loop.time()
            await feed.reader.wait()
            if loop.time() > before_s + 1:
                stood_s += loop.time() - before_s
            messages = [m for m in feed.reader.take(1, 1 << 20) if m.seq > feed.cursor.origin]
            feed.cursor = Cursor(messages[-1].seq) if messages else feed.cursor
            await asyncio.sleep(0.2)
        took_s = loop.time() - begun_s
        assert took_s > 90
        assert stood_s < 0.2 * took_s, (stood_s, took_s)
        await feed.reader.close()

    in_virtual_time(job, pull_batch=8)


@pytest.mark.parametrize("second", ["hangs", "has nothing more"])
def test_what_waits_is_not_believed_of_one_server_while_another_one_that_has_it_may_answer(
    second: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The first has not all of it, the second hangs or has less: the third one is asked."""

    async def job(ground: Ground) -> None:
        made: list[Consumer] = []
        good = asyncio.Event()
        rng = random.Random(1)

        def place(consumer: Consumer) -> None:
            is_second = "_w" in consumer.name
            if is_second and second == "has nothing more" and [m for m in made if m.server == "n2"]:
                good.set()
            other = "n3" if good.is_set() else "n2"
            consumer.server = other if is_second else rng.choice(("n1", other)) if made else "n1"
            consumer.muted = consumer.server == "n2" and second == "hangs"
            consumer.unreadable = {"n1": {17, 18}, "n2": set(range(17, STORED + 1))}.get(consumer.server, set())
            made.append(consumer)

        ground.broker.placed = place
        await store(ground, STORED)
        feed = feed_of(ground)
        if second == "hangs":
            await until(lambda: "n2 gives nothing" in feed.reader.refused, "it says what it waits for")
            await asyncio.sleep(20 * WITNESS_SILENT.s)
            assert not feed.reader.buffered
            good.set()
        messages = await taken(feed, STORED)
        assert sorted({message.seq for message in messages}) == list(range(1, STORED + 1))
        assert feed.reader.refused == ""
        await feed.reader.close()

    in_virtual_time(job)


@pytest.mark.parametrize("unreadable", [{1}, {4, 5}, {10}], ids=["the first", "in the middle", "the last"])
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_a_hop_has_no_witness_and_what_a_server_passes_over_there_is_a_hole(seed: int, unreadable: set[int]) -> None:
    """Read there three times running (seed 2), the hop is emptied, and made again by who is upstream: nobody here."""

    async def job(ground: Ground) -> None:
        made = damage(ground, {"n1": unreadable}, seed)
        for at in range(1, 11):
            event = Event(at, 0, b"%16d" % at, b"c" * 16, "s", "CORE_ERROR_OCCURRED", 1, True, b"{}", b"{}", 1)
            await ground.publish("fi.hash.0", encode_frame(Frame(0, at - 1, at, at, (), "w", 0, b"", (), (event,))))
        lane = Lane(ground.api, HashCore(), 0, "nonce", lambda _: None)
        running = asyncio.create_task(lane.run())
        await until(lambda: [event.origin for event in ground.events(PERSIST)][-1:] == [10], "all are passed on")
        lane.stop()
        await running
        assert [event.origin for event in ground.events(PERSIST)] == list(range(1, 11))
        assert len(made) > 1 or made[0].server != "n1"

    in_virtual_time(job)
