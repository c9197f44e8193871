"""One reader on simulated servers: what it holds is bounded, its end is told, and where it may begin is checked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from nats.aio.msg import Msg
from nats.errors import TimeoutError as NatsTimeoutError
from virtual import Ground, in_virtual_time

from cluster.testing.waiting import until
from contracts.errors import ClusterUnavailableError, CountsAnewError, TopologyError
from contracts.frames import decode_frame
from contracts.subjects import EVENTS, SEGMENT, publish_subject
from stages.ingest.core import IngestCore
from stages.runtime.api import ApiError, RequestRefusedError
from stages.runtime.checkpoint import Cursor, locate
from stages.runtime.lane import Lane
from stages.runtime.parser import Sink
from stages.runtime.reader import OrderedReader

SUBJECT = "fi.segment.0"
KIB = 1024


def reader_of(ground: Ground, batch: int = 256) -> OrderedReader:
    async def from_the_first() -> int:
        return 1

    reader = OrderedReader(ground.api, SEGMENT, SUBJECT, batch=batch, locate=from_the_first, nonce="n")
    reader.start()
    return reader


def test_what_waits_in_a_reader_is_bounded_however_often_some_of_it_is_put_back() -> None:
    async def job(ground: Ground) -> None:
        for number in range(200):
            await ground.publish(SUBJECT, b"%d " % number + bytes(10 * KIB))
        reader = reader_of(ground)
        limit = 2 * ground.settings.pull_bytes_max // (10 * KIB)
        await until(lambda: reader.buffered > 10, "it reads")
        for _ in range(301):
            reader.put_back(reader.take(8, 1000 * KIB))
            await asyncio.sleep(0.01)
            assert reader.buffered <= limit
        numbers: list[int] = []
        # Less than if it asked for more only when a heartbeat is due.
        async with asyncio.timeout(0.3):
            while len(numbers) < 200:
                await reader.wait()
                numbers += [int(message.data.partition(b" ")[0]) for message in reader.take(8, 1000 * KIB)]
        assert (numbers, reader.opened) == (list(range(200)), 1)
        await reader.close()

    in_virtual_time(job, pull_bytes_max=128 * KIB)


def test_what_is_taken_at_once_is_bounded_and_so_is_what_waits_until_then() -> None:
    async def job(ground: Ground) -> None:
        for number in range(50):
            await ground.publish(SUBJECT, b"%04d" % number)
        reader = reader_of(ground, batch=8)
        await asyncio.sleep(2)
        assert 8 <= reader.buffered <= 2 * 8
        assert [len(reader.take(*limits)) for limits in ((3, KIB), (3, 1), (8, 9), (2, 8))] == [3, 1, 3, 1]
        await reader.close()

    in_virtual_time(job)


def test_told_to_reopen_it_reads_again_at_once_what_was_not_taken() -> None:
    async def job(ground: Ground) -> None:
        for number in range(5):
            await ground.publish(SUBJECT, b"%d" % number)
        reader = reader_of(ground)
        await until(lambda: reader.buffered == 5, "it has read all")
        reader.reopen("somebody says so")
        await until(lambda: reader.opened == 2 and reader.buffered == 5, "it has read all again", 0.3)
        assert [message.data for message in reader.take(9, KIB)] == [b"%d" % number for number in range(5)]
        await reader.close()

    in_virtual_time(job)


def test_a_message_that_is_lost_on_its_way_is_missed_although_none_follows() -> None:
    async def job(ground: Ground) -> None:
        reader = reader_of(ground)
        await ground.publish(SUBJECT, b"1")
        await until(lambda: reader.buffered == 1, "it reads")
        (consumer,) = ground.broker.consumers.values()
        ground.broker.lost_deliveries = 1.0
        await ground.publish(SUBJECT, b"2")
        await until(lambda: consumer.delivered == 2, "it is lost on its way")
        ground.broker.lost_deliveries = 0.0
        await until(lambda: reader.buffered == 2, "a heartbeat tells of it")
        assert reader.opened == 2
        await reader.close()

    in_virtual_time(job)


def test_a_reader_that_wants_another_server_leaves_none_of_its_tries_there_and_wants_it_once() -> None:
    async def job(ground: Ground) -> None:
        servers = iter(["n1", "n1", "n2", "n1", "n3", "n1"])
        ground.broker.placed = lambda consumer: setattr(consumer, "server", next(servers))
        reader = reader_of(ground)
        await until(lambda: reader.server == "n1", "it reads")
        reader.reopen("by hand", on="n3")
        reader.reopen("and for another reason")
        await until(lambda: reader.server == "n3", "it reads there")
        assert [consumer.server for consumer in ground.broker.consumers.values()] == ["n1", "n3"]
        reader.reopen("by hand")
        await until(lambda: reader.server == "n1", "any will do")
        assert reader.opened == 6
        await reader.close()

    in_virtual_time(job)


def test_woken_up_it_waits_for_nothing_once() -> None:
    async def job(ground: Ground) -> None:
        reader = reader_of(ground)
        reader.wake()
        await reader.wait()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await reader.wait()
        await reader.close()

    in_virtual_time(job)


def test_why_it_cannot_read_is_known_as_long_as_that_is_so_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async def job(ground: Ground) -> None:
        api, ask = ground.api, ground.api.ask
        errors: list[Exception] = [
            CountsAnewError("it counts anew"),
            RequestRefusedError("consumer", ApiError(400, 10026, "no more consumers")),
        ]

        async def refuse(*arguments: Any, **options: Any) -> Any:
            if errors:
                raise errors[0]
            return await ask(*arguments, **options)

        api.ask = refuse  # type: ignore[method-assign]
        reader = reader_of(ground)
        for words in ("counts anew", "no more consumers"):
            await asyncio.sleep(5)
            assert words in reader.refused
            assert caplog.text.count(words) == 1
            del errors[0]
        await ground.publish(SUBJECT, b"x")
        async with asyncio.timeout(5):
            await reader.wait()
        assert (reader.refused, len(reader.take(1, 1))) == ("", 1)
        await reader.close()

    in_virtual_time(job)


def test_a_full_reader_asks_what_is_still_to_come_and_one_that_hears_of_it_does_not() -> None:
    async def job(ground: Ground) -> None:
        client: Any = ground.api.client
        answers: list[bytes | Exception] = [b'{"num_pending": 77}', b"no JSON", NatsTimeoutError()]
        request, asked = client.request, list[str]()

        async def answered(subject: str, *arguments: Any, **options: Any) -> Any:
            if ".CONSUMER.INFO." not in subject:
                return await request(subject, *arguments, **options)
            asked.append(subject)
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return Msg(_client=None, data=answer)  # type: ignore[arg-type]

        client.request = answered
        reader = reader_of(ground, batch=8)
        await asyncio.sleep(1)
        await reader.count_pending()
        assert asked == [], "whatever comes would tell"
        for _ in range(8):
            await ground.publish(SUBJECT, bytes(KIB))
        await until(lambda: reader.buffered == 8, "it has what it asked for")
        for _ in range(3):
            await reader.count_pending()
            assert reader.pending == 77
        assert len(asked) == 3
        reader.take(6, 9 * KIB)
        await asyncio.sleep(1)
        await reader.count_pending()
        for _ in range(8):
            await ground.publish(SUBJECT, bytes(KIB))
        await until(lambda: reader.buffered == 10, "it has what it asked for")
        reader.take(10, 11 * KIB)
        await reader.count_pending()
        assert len(asked) == 3
        await reader.close()

    in_virtual_time(job)


def test_a_consumer_that_is_gone_is_missed_and_one_that_nothing_was_asked_of_is_not() -> None:
    async def job(ground: Ground) -> None:
        for _ in range(8):
            await ground.publish(SUBJECT, b"x")
        reader = reader_of(ground, batch=8)
        await until(lambda: reader.buffered == 8, "it has what it asked for")
        await asyncio.sleep(10)
        reader.take(8, KIB)
        await asyncio.sleep(10)
        assert reader.opened == 1
        ground.broker.lose_consumers(1.0, told=False)
        settings = ground.settings
        await until(lambda: reader.opened == 2, "it reopens", settings.heartbeat_s * settings.heartbeats_missed_max + 1)
        await reader.close()

    in_virtual_time(job)


def test_deliveries_of_a_cluster_with_a_domain_are_read() -> None:
    """Their reply subjects have two tokens more in front, and one behind."""

    async def job(ground: Ground) -> None:
        client: Any = ground.api.client
        subscribe_sink = client.subscribe_sink

        async def with_domain(subject: str, sink: Sink) -> object:
            def take(subject: bytes, reply: bytes, block: bytes, payload: bytes) -> None:
                sink(
                    subject, reply.replace(b"$JS.ACK.", b"$JS.ACK.hub.AbCdEfGh.") + b".x7" * bool(reply), block, payload
                )

            return await subscribe_sink(subject, take)

        client.subscribe_sink = with_domain
        for number in range(20):
            await ground.publish(SUBJECT, b"%d" % number)
        reader = reader_of(ground, batch=8)
        numbers: list[int] = []
        while len(numbers) < 20:
            async with asyncio.timeout(5):
                await reader.wait()
            numbers += [int(message.data) for message in reader.take(3, KIB)]
        assert (numbers, reader.opened) == (list(range(20)), 1)
        await reader.close()

    in_virtual_time(job)


@pytest.mark.parametrize("ends", ["the stream", "the connection"])
def test_a_lane_whose_input_ends_for_good_ends_too(ends: str) -> None:
    async def job(ground: Ground) -> None:
        opened: list[int] = []
        lane = Lane(ground.api, IngestCore(), 0, "nonce", opened.append)
        running = asyncio.create_task(lane.run())
        await until(lambda: opened, "it has found its place")
        await asyncio.sleep(1)
        if ends == "the stream":
            del ground.broker.streams[EVENTS]
            lane.nudge()
        else:
            await ground.api.client.close()
        done, _ = await asyncio.wait((running,), timeout=60)
        assert done
        with pytest.raises((TopologyError, ClusterUnavailableError), match=r"is gone|does not exist|was closed"):
            running.result()

    in_virtual_time(job)


async def counting(ground: Ground) -> list[int]:
    """Three messages in `FI_EVENTS`, the second one of another partition; gives when each was stored."""
    stored = ground.broker.streams[EVENTS]
    for partition in (0, 1, 0):
        stored.config.subject_transform = None
        await ground.publish(publish_subject("clinic-1", "c"), b"x")
        stored.messages[stored.last_seq].subject = f"fi.raw.{partition}.clinic-1.c"
    return [0, *(message.time_ns for message in stored.messages.values())]


@pytest.mark.parametrize(
    ("origin", "stored", "purged", "words"),
    [
        (0, None, False, ""),
        (1, 1, False, ""),
        (3, None, False, ""),
        (3, 3, False, ""),
        (3, 3, True, ""),
        (1, 1, True, ""),
        (3, 1, False, "that message is one of"),
        (2, None, False, "that message is of another partition now"),
        (4, None, False, "it has not come so far"),
        (4, 3, True, "it has not come so far"),
    ],
)
def test_ingest_goes_on_only_where_the_stream_goes_on_counting(
    origin: int, stored: int | None, purged: bool, words: str
) -> None:
    async def job(ground: Ground) -> None:
        times = await counting(ground)
        cursor = Cursor(origin, origin, b"", 0 if stored is None else times[stored])
        if purged:
            await ground.api.purge(EVENTS, ">")
        if words:
            with pytest.raises(CountsAnewError, match=words):
                await locate(ground.api, "ingest", 0, cursor)
        else:
            assert await locate(ground.api, "ingest", 0, cursor) == origin + 1

    in_virtual_time(job, partitions=2)


def test_a_message_that_gets_a_settled_sequence_while_the_stream_is_looked_at_is_seen() -> None:
    """It is not there yet, and then the stream has come as far: as if the settled one were trimmed."""

    async def job(ground: Ground) -> None:
        await counting(ground)
        seq, ask = await ground.api.last_message(EVENTS, ">"), ground.api.ask
        assert seq is not None

        async def publish_first(stream: str, subject: str, *more: Any) -> Any:
            if ".STREAM.INFO." in subject:
                await ground.publish(publish_subject("clinic-1", "c"), b"x")
            return await ask(stream, subject, *more)

        ground.api.ask = publish_first  # type: ignore[method-assign]
        with pytest.raises(CountsAnewError, match="that message is "):
            await locate(ground.api, "ingest", 0, Cursor(seq.seq + 1, seq.seq + 1, b"", 1))

    in_virtual_time(job, partitions=2)


def test_a_refused_last_message_is_no_sign_of_a_stream_that_counts_anew() -> None:
    """When its frame's last event was stored says nothing of the message that the frame ends with."""

    async def job(ground: Ground) -> None:
        consultation = "0a1b2c3d-4e5f-4a6b-8c7d-9e0f1a2b3c4d"
        good = (
            f'{{"consultation_id":"{consultation}","event_type":"CONTEXT_UPDATED","payload":{{}},'
            '"metadata":{"user_id":"u","session_id":"s"}}'
        ).encode()
        subject = publish_subject("clinic-1", consultation)
        segment = ground.broker.streams[SEGMENT]

        def hold_up(_: int) -> None:
            """The first frame is on its way until all has come in."""
            ground.broker.headless_until_s[SEGMENT] = asyncio.get_running_loop().time() + 1

        async def pass_on(nonce: str) -> None:
            for body in [good] * 12 + [b"not JSON"]:
                await ground.publish(subject, body)
            reached = ground.broker.streams[EVENTS].last_seq
            lane = Lane(ground.api, IngestCore(), 0, nonce, hold_up)
            running = asyncio.create_task(lane.run())

            def all_is() -> bool:
                return bool(segment.seqs) and decode_frame(segment.messages[segment.last_seq].data).last == reached

            await until(all_is, "all is passed on")
            lane.stop()
            await running

        for nonce in ("first", "second"):
            await pass_on(nonce)
            events = decode_frame(segment.messages[segment.last_seq].data).events
            assert events, "nothing passed beside what was refused: the test shows nothing"
        # All of it was sealed, and nothing is left to look at.
        await ground.api.purge(EVENTS, ">")
        await pass_on("third")

    in_virtual_time(job)
