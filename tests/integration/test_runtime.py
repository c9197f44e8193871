"""The reader, the writer and the checkpoints against real streams, without stage processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from uuid import UUID

import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from cluster.apply import apply
from cluster.testing.waiting import until
from contracts.errors import CountsAnewError, DefiniteError, FencedError, TopologyError
from contracts.frames import FRAME_BYTES_MAX, Frame, decode_frame, decode_frame_head, encode_frame, held_bytes
from contracts.hashing import EMPTY_ROOT
from contracts.receipts import Receipt, encode_receipt
from contracts.settings import MIB, Settings
from contracts.subjects import PERSIST, RECEIPTS, SEGMENT, Stage
from contracts.telemetry import (
    HEADER_EXPECTED_LAST_SUBJECT_SEQ,
    HEADER_EXPECTED_STREAM,
    HEADER_MSG_ID,
    HEADER_TRACEPARENT,
)
from stages.ingest.core import IngestCore
from stages.runtime.api import Api
from stages.runtime.checkpoint import Checkpoint, Cursor, locate, read_checkpoint
from stages.runtime.lane import Lane
from stages.runtime.messages import StoredMessage
from stages.runtime.pace import Pace
from stages.runtime.reader import OrderedReader
from stages.runtime.writer import FencedWriter
from stages.segment.core import SegmentCore

pytestmark = pytest.mark.cluster

SUBJECT = "fi.segment.0"


async def ready(client: Client, **changes: int) -> Api:
    """An `Api` on a cluster that has all streams."""
    settings = Settings(**{"partitions": 2, **changes})
    await apply(client, settings)
    return Api(client, settings)


async def count(api: Api, stream: str = SEGMENT) -> int:
    info = await api.client.jetstream(timeout=30).stream_info(stream)
    return info.state.messages


def frame(prev: int, last: int, trail: tuple[int, ...] = (), closed: bytes = b"", partition: int = 0) -> bytes:
    return encode_frame(Frame(partition, prev, prev + 1, last, trail, "w", 0, closed, (), ()))


def receipt(origin: int, trail: tuple[int, ...]) -> bytes:
    return encode_receipt(
        Receipt(
            partition=0,
            cluster="c",
            writer="w",
            node="n",
            store="s",
            ends={},
            origin=origin,
            trail=trail,
            persisted=0,
            duplicates=0,
            dead_lettered=0,
            root=EMPTY_ROOT.hex(),
            closed=b"memory",
            committed_ns=0,
        )
    )


async def test_a_publish_whose_acknowledgement_was_lost_is_repeated_without_a_second_message(client: Client) -> None:
    api = await ready(client)
    writer = FencedWriter(api, SEGMENT, SUBJECT, "nonce")
    lost = {
        HEADER_MSG_ID: f"nonce:{SUBJECT}:0:5",
        HEADER_EXPECTED_LAST_SUBJECT_SEQ: "0",
        HEADER_EXPECTED_STREAM: SEGMENT,
    }
    await client.request(SUBJECT, b"frame", headers=lost, timeout=30)
    assert await writer.publish(b"frame", "5") == 1
    assert await count(api) == 1
    assert await writer.publish(b"next", "6") == 2
    assert await count(api) == 2


async def test_a_writer_that_missed_a_message_is_refused_and_told_where_the_subject_stands(client: Client) -> None:
    api = await ready(client)
    owner, zombie = (FencedWriter(api, SEGMENT, SUBJECT, nonce) for nonce in ("owner", "zombie"))
    await zombie.publish(b"1", "1")
    owner.expected_seq = 1
    await FencedWriter(api, SEGMENT, "fi.segment.1", "neighbour").publish(b"other lane", "1")
    await owner.publish(b"2", "2")
    with pytest.raises(FencedError) as refused:
        await zombie.publish(b"2'", "2")
    assert refused.value.last_seq == 3
    assert zombie.expected_seq == 1
    last = await api.last_message(SEGMENT, SUBJECT)
    assert last is not None
    assert last.data == b"2"
    await owner.publish(b"3", "3")


async def test_of_writers_at_the_same_place_at_once_exactly_one_is_accepted(client: Client) -> None:
    api = await ready(client)
    writers = [FencedWriter(api, SEGMENT, SUBJECT, f"w{number}") for number in range(8)]
    for round_ in range(1, 6):
        for writer in writers:
            writer.expected_seq = round_ - 1
        results = await asyncio.gather(*(w.publish(b"x", str(round_)) for w in writers), return_exceptions=True)
        assert [result for result in results if isinstance(result, int)] == [round_]
        assert sum(isinstance(result, FencedError) for result in results) == len(writers) - 1


async def test_a_frame_made_again_after_a_purge_is_stored_and_not_taken_for_the_old_one(client: Client) -> None:
    api = await ready(client)
    await FencedWriter(api, SEGMENT, SUBJECT, "nonce_1").publish(b"frame", "5")
    await api.purge(SEGMENT, SUBJECT)
    assert await FencedWriter(api, SEGMENT, SUBJECT, "nonce_2").publish(b"frame", "5") == 2
    assert await count(api) == 1


async def test_a_full_stream_holds_the_writer_and_lets_it_go_on_when_there_is_room(client: Client) -> None:
    api = await ready(client, hop_bytes_max=MIB)
    writer = FencedWriter(api, SEGMENT, SUBJECT, "nonce")
    body = b"x" * (300 * 1024)
    for number in range(3):
        await writer.publish(body, str(number))
    held = asyncio.create_task(writer.publish(body, "held"))
    await until(lambda: writer.full_since is not None, "the stream is full")
    assert not held.done()
    assert await count(api) == 3
    await api.purge(SEGMENT, SUBJECT, below_seq=3)
    assert await asyncio.wait_for(held, 30) == 4
    assert writer.full_since is None
    assert writer.held_s > 0


async def test_a_message_no_server_takes_is_a_definite_failure(client: Client) -> None:
    api = await ready(client)
    with pytest.raises(DefiniteError, match="max_payload"):
        await FencedWriter(api, SEGMENT, SUBJECT, "nonce").publish(b"x" * (client.max_payload + 1), "1")
    with pytest.raises(DefiniteError, match="refused for good"):
        await FencedWriter(api, "FI_HASH", SUBJECT, "nonce").publish(b"x", "1")


async def test_an_answer_that_is_not_the_streams_is_no_acceptance(client: Client) -> None:
    async def respond(message: Msg) -> None:
        await message.respond(b'{"ok":true}')

    await client.subscribe(SUBJECT, cb=respond)
    with pytest.raises(TopologyError, match=f"something else than {SEGMENT} answers"):
        await FencedWriter(Api(client, Settings()), SEGMENT, SUBJECT, "nonce").publish(b"x", "1")


class Following:
    """A reader whose position is that of the last message taken."""

    def __init__(self, api: Api, batch: int, weigh: Callable[[bytes], int]) -> None:
        self.taken: list[StoredMessage] = []
        self.reader = OrderedReader(
            api, SEGMENT, SUBJECT, batch=batch, locate=self._locate, nonce="reader", weigh=weigh
        )

    async def _locate(self) -> int:
        return self.taken[-1].seq + 1 if self.taken else 1

    async def take_until(self, messages: int) -> None:
        """Takes until so many are there."""
        async with asyncio.timeout(60):
            while len(self.taken) < messages:
                await self.reader.wait()
                self.taken += self.reader.take(7, MIB)


@asynccontextmanager
async def following(api: Api, batch: int = 64, weigh: Callable[[bytes], int] = len) -> AsyncIterator[Following]:
    follower = Following(api, batch, weigh)
    follower.reader.start()
    try:
        yield follower
    finally:
        await follower.reader.close()


async def fill(api: Api, first: int, last: int) -> None:
    """Stores the numbers from `first` up to `last`, with another lane's messages between them."""
    jetstream = api.client.jetstream(timeout=10)
    for number in range(first, last):
        await jetstream.publish(SUBJECT, str(number).encode())
        if number % 5 == 0:
            await jetstream.publish("fi.segment.1", b"other lane")


async def test_a_reader_sees_every_message_in_order_though_its_consumer_is_deleted_under_load(client: Client) -> None:
    api = await ready(client)
    async with following(api) as follower:
        filling = asyncio.create_task(fill(api, 0, 600))
        try:
            for goal in (100, 200, 300, 400):
                await follower.take_until(goal)
                names = await consumers(api)
                for name in names:
                    await client.request(f"$JS.API.CONSUMER.DELETE.{SEGMENT}.{name}", b"", timeout=30)
            await follower.take_until(600)
        finally:
            await filling
        assert [int(message.data) for message in follower.taken] == list(range(600))
        assert follower.reader.opened >= 4
        assert follower.reader.buffered == 0


async def consumers(api: Api) -> list[str]:
    answer = msgspec.json.decode(await api.request(SEGMENT, f"$JS.API.CONSUMER.NAMES.{SEGMENT}", b""))
    names: list[str] = answer["consumers"] or []
    return names


async def test_a_reader_goes_on_where_its_lane_stands_after_reopening(client: Client) -> None:
    api = await ready(client)
    await fill(api, 0, 200)
    async with following(api) as follower:
        for goal in range(20, 200, 20):
            await follower.take_until(goal)
            follower.reader.reopen("the test says so")
        await follower.take_until(200)
        assert [int(message.data) for message in follower.taken] == list(range(200))


async def test_what_would_make_too_large_a_frame_is_published_as_several(client: Client) -> None:
    api = await ready(client, partitions=1, frame_bytes_max=2 * MIB)
    consultation = str(UUID(int=1, version=4))
    head = f'{{"consultation_id":"{consultation}","event_type":"CONTEXT_UPDATED","payload":{{}},'
    line = f'{head}"metadata":{{"user_id":"u","session_id":"s"}}}}\n'.encode()
    body = line * ((2 * MIB - 1024) // len(line))
    trace = {HEADER_TRACEPARENT: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    for _ in range(6):
        await client.jetstream(timeout=30).publish(f"fi.events.{'s' * 64}.{consultation}", body, headers=trace)
    # Deflated, all that ingest made of them would fit into one frame of segment's.
    for core, stream, subject in ((IngestCore(), SEGMENT, SUBJECT), (SegmentCore(), "FI_HASH", "fi.hash.0")):
        lane = Lane(api, core, 0, "nonce", lambda _: None)
        running = asyncio.create_task(lane.run())

        async def reached(stream: str = stream, subject: str = subject, running: asyncio.Task[None] = running) -> bool:
            last = await api.last_message(stream, subject)
            return running.done() or (last is not None and decode_frame_head(last.data).last == 6)

        try:
            await until(reached, "the lane has seen all")
        finally:
            lane.stop()
            await running
        frames = [await api.message_at(stream, seq) for seq in range(1, await count(api, stream) + 1)]
        messages = [message for message in frames if message is not None]
        heads = [decode_frame_head(message.data) for message in messages]
        assert [head.prev for head in heads] == [0, *(head.last for head in heads[:-1])]
        assert sum(len(decode_frame(message.data).events) for message in messages) == 6 * body.count(b"\n")
        assert all(len(message.data) < held_bytes(message.data) <= FRAME_BYTES_MAX for message in messages)


async def test_frames_of_a_busy_lane_are_begun_when_its_pace_says_so(client: Client) -> None:
    gap_s, messages = 0.3, 300
    await apply(client, Settings(partitions=1))
    api = Api(client, Settings(partitions=1, frame_gap_s=gap_s))
    lane = Lane(api, IngestCore(), 0, "nonce", lambda _: None)
    running = asyncio.create_task(lane.run())
    consultation = str(UUID(int=1, version=4))
    event = (
        f'{{"consultation_id":"{consultation}","event_type":"CONTEXT_UPDATED","payload":{{}},'
        '"metadata":{"user_id":"u","session_id":"s"}}'
    ).encode()
    try:
        for _ in range(messages):
            await client.jetstream(timeout=30).publish(f"fi.events.site.{consultation}", event)

        async def reached() -> bool:
            last = await api.last_message(SEGMENT, SUBJECT)
            return running.done() or (last is not None and decode_frame_head(last.data).last == messages)

        await until(reached, "the lane has seen all")
    finally:
        lane.stop()
        await running
    stored = [await api.message_at(SEGMENT, seq) for seq in range(1, await count(api) + 1)]
    heads = [decode_frame_head(message.data) for message in stored if message is not None]
    pace = Pace()
    for head in heads:
        made_s = head.made_ns / 1e9
        # Whatever the machine's speed: no frame is begun while the lane should have waited for company.
        assert pace.wait_s(made_s, gap_s) < gap_s / 4
        pace.begin(made_s, head.last - head.prev)


async def test_take_gives_no_more_than_asked_and_never_nothing(client: Client) -> None:
    api = await ready(client)
    jetstream = client.jetstream(timeout=30)
    for size in (10, 10, 10, 5000, 10, 10):
        await jetstream.publish(SUBJECT, b"x" * size)
    async with following(api) as follower:
        reader = follower.reader
        await until(lambda: reader.buffered == 6, "six messages are there")
        assert [len(m.data) for m in reader.take(2, MIB)] == [10, 10]
        assert [len(m.data) for m in reader.take(9, 100)] == [10, 5000]
        assert [len(m.data) for m in reader.take(9, 1)] == [10]
        assert [len(m.data) for m in reader.take(9, MIB)] == [10]
        assert reader.take(9, MIB) == []


async def test_take_counts_what_messages_weigh(client: Client) -> None:
    api = await ready(client)
    await fill(api, 10, 15)
    async with following(api, weigh=lambda data: 1000 * len(data)) as follower:
        reader = follower.reader
        await until(lambda: reader.buffered == 5, "five messages are there")
        assert [int(message.data) for message in reader.take(9, 2001)] == [10, 11]
        assert [int(message.data) for message in reader.take(9, 2000)] == [12]
        assert [int(message.data) for message in reader.take(9, MIB)] == [13, 14]


async def test_what_is_put_back_comes_first(client: Client) -> None:
    api = await ready(client)
    await fill(api, 0, 6)
    async with following(api) as follower:
        reader = follower.reader
        await until(lambda: reader.buffered == 6, "six messages are there")
        reader.put_back(reader.take(4, MIB)[1:])
        assert [int(message.data) for message in reader.take(9, MIB)] == [1, 2, 3, 4, 5]


async def test_waiting_ends_when_woken_without_a_message(client: Client) -> None:
    api = await ready(client)
    async with following(api) as follower:
        follower.reader.wake()
        async with asyncio.timeout(10):
            await follower.reader.wait()
        assert follower.reader.buffered == 0


async def test_a_reader_closes_though_a_cancellation_gets_lost(client: Client) -> None:
    """As `asyncio.wait_for` of Python 3.11 loses one that comes together with an answer."""
    api = await ready(client)
    asked = asyncio.Event()

    async def locate_deaf() -> int:
        asked.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return 1

    reader = OrderedReader(api, SEGMENT, SUBJECT, batch=8, locate=locate_deaf, nonce="deaf")
    reader.start()
    await asked.wait()
    async with asyncio.timeout(10):
        await reader.close()


async def test_a_stage_goes_on_from_its_last_frame_or_from_the_receipt_when_that_is_further(client: Client) -> None:
    api = await ready(client)
    stage: Stage = "segment"
    assert await read_checkpoint(api, stage, 0) == Checkpoint(Cursor(), 0)

    jetstream = client.jetstream(timeout=30)
    await jetstream.publish("fi.receipts.0", receipt(40, (11, 12, 13)))
    assert await read_checkpoint(api, stage, 0) == Checkpoint(Cursor(40, 11, b"memory"), 0)
    assert await read_checkpoint(api, "ingest", 0) == Checkpoint(Cursor(40, 40, b"memory"), 0)
    assert await read_checkpoint(api, "hash", 0) == Checkpoint(Cursor(40, 12, b"memory"), 0)

    await jetstream.publish("fi.hash.0", frame(30, 35, (9,), b"old"))
    assert await read_checkpoint(api, stage, 0) == Checkpoint(Cursor(40, 11, b"memory"), 1)
    await jetstream.publish("fi.hash.0", frame(35, 50, (14,), b"new"))
    assert await read_checkpoint(api, stage, 0) == Checkpoint(Cursor(50, 14, b"new"), 2)
    await api.purge("FI_HASH", "fi.hash.0")
    assert await read_checkpoint(api, stage, 0) == Checkpoint(Cursor(40, 11, b"memory"), 0)
    assert await count(api, RECEIPTS) == 1


async def test_a_remembered_sequence_is_used_only_if_the_frame_there_is_the_one_remembered(client: Client) -> None:
    api = await ready(client)
    jetstream = client.jetstream(timeout=30)
    for prev, last in ((0, 10), (10, 20), (20, 30)):
        await jetstream.publish("fi.persist.0", frame(prev, last, (1, 1)))
    await jetstream.publish("fi.persist.1", frame(0, 20, (1, 1), partition=1))
    await jetstream.publish("fi.persist.0", b"no frame")
    assert await locate(api, "persist", 0, Cursor(20, 2)) == 3
    assert await locate(api, "persist", 0, Cursor(30, 3)) == 4
    assert await locate(api, "persist", 0, Cursor(25, 2)) == 1, "another frame is there now"
    assert await locate(api, "persist", 0, Cursor(20, 4)) == 1, "another lane's frame is there now"
    assert await locate(api, "persist", 0, Cursor(30, 5)) == 1, "no frame is there now"
    assert await locate(api, "persist", 0, Cursor(20, 9)) == 1, "beyond the end: a consumer there would wait for ever"
    assert await locate(api, "persist", 0, Cursor(20, 0)) == 1
    assert await locate(api, "ingest", 0, Cursor()) == 1
    with pytest.raises(CountsAnewError, match="it has not come so far"):
        await locate(api, "ingest", 0, Cursor(20, 7))
    await api.purge(PERSIST, "fi.persist.0", below_seq=3)
    assert await locate(api, "persist", 0, Cursor(20, 2)) == 1
