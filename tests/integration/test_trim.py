"""What leaves the streams of a partition when its trimmer is told something, and what must not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from nats.aio.client import Client
from pipeline import until

from cluster.apply import apply
from contracts.frames import Frame, encode_frame
from contracts.receipts import Receipt, first_receipt
from contracts.settings import MIB, Settings
from contracts.subjects import EVENTS, RECEIPTS, SEGMENT
from stages.persist.room import EventsRoom
from stages.persist.trim import KEPT_SHARE, Trimmer
from stages.runtime.api import Api
from stages.runtime.tasks import end_tasks

pytestmark = pytest.mark.cluster

INPUT = "fi.segment.0"


async def ready(client: Client, **changes: int) -> Api:
    settings = Settings(**{"partitions": 2, "trim_s": 0.01, "probe_s": 0.2, "hop_bytes_max": MIB, **changes})
    await apply(client, settings)
    return Api(client, settings)


@asynccontextmanager
async def trimming(api: Api) -> AsyncIterator[Trimmer]:
    trimmer = Trimmer(api, 0, EventsRoom(api), lambda: None)
    task = asyncio.create_task(trimmer.run())
    try:
        yield trimmer
        assert not task.done()
    finally:
        await end_tasks(task)


async def send(client: Client, subject: str, data: bytes) -> int:
    return (await client.jetstream(timeout=10).publish(subject, data)).seq


def frame(prev: int, last: int, filling: int = 0, partition: int = 0) -> bytes:
    return encode_frame(Frame(partition, prev, prev + 1, last, (), "w", 0, bytes(filling), (), ()))


def committed(origin: int, seq: int) -> Receipt:
    """A receipt of a commit that went up to `origin`, and whose last frame lay at `seq` of `FI_SEGMENT`."""
    return msgspec.structs.replace(first_receipt(0, "c", "s", "w"), origin=origin, trail=(seq,))


async def kept(api: Api, stream: str, subject: str) -> list[int]:
    """The sequences of what a stream still has of a subject."""
    seqs: list[int] = []
    while (message := await api.first_message(stream, subject, from_seq=seqs[-1] + 1 if seqs else 1)) is not None:
        seqs.append(message.seq)
    return seqs


async def test_what_is_committed_leaves_the_hop_but_for_its_last_frame_and_no_other_lanes(client: Client) -> None:
    api = await ready(client)
    for data in (frame(0, 1), frame(1, 2), frame(2, 3)):
        await send(client, INPUT, data)
    await send(client, "fi.segment.1", frame(0, 2, partition=1))

    async def left() -> bool:
        return await kept(api, SEGMENT, INPUT) == [2, 3]

    async with trimming(api) as trimmer:
        trimmer.committed(committed(2, 2))
        await until(left, "frames before the one that is the checkpoint have left")
    assert await kept(api, SEGMENT, "fi.segment.1") == [4]


async def test_a_large_last_frame_leaves_too(client: Client) -> None:
    """Or those of quiet partitions could fill the stream for good."""
    api = await ready(client)
    await send(client, INPUT, frame(0, 1))
    await send(client, INPUT, frame(1, 2, filling=int(KEPT_SHARE * MIB / 2)))
    await send(client, INPUT, frame(2, 3))

    async def left() -> bool:
        return await kept(api, SEGMENT, INPUT) == [3]

    async with trimming(api) as trimmer:
        trimmer.committed(committed(2, 2))
        await until(left, "the large frame has left")


async def test_what_is_told_while_it_trims_is_trimmed_next(client: Client) -> None:
    api = await ready(client)
    for data in (frame(0, 1), frame(1, 2), frame(2, 3)):
        await send(client, INPUT, data)

    class Telling(Api):
        told = False

        async def purge(self, stream: str, subject: str, **limits: int | None) -> None:
            await super().purge(stream, subject, **limits)
            if stream == SEGMENT and not self.told:
                self.told = True
                trimmer.committed(committed(3, 3))

    async def left() -> bool:
        return await kept(api, SEGMENT, INPUT) == [3]

    async with trimming(Telling(client, api.settings)) as trimmer:
        trimmer.committed(committed(2, 2))
        await until(left, "what was told meanwhile has been trimmed")


async def test_what_may_not_be_trimmed_yet_is_as_soon_as_it_may_though_nothing_new_is_told(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """A full stream lets nothing in, so there will be no commit that would bring it up again."""
    api = await ready(client, partitions=1)
    subject = "fi.events.clinic-1.00000000-0000-4000-8000-000000000001"
    for _ in range(2):
        await send(client, subject, b"{}")

    def refused() -> bool:
        return "partition 0 is not trimmed now" in caplog.text

    async def left() -> bool:
        return await kept(api, EVENTS, "fi.raw.0.>") == [3, 4]

    async with trimming(api) as trimmer:
        trimmer.committed(committed(4, 9))
        trimmer.sealed(3)
        trimmer.claimed(3)
        await until(refused, "who answers has not come so far")
        for _ in range(2):
            await send(client, subject, b"{}")
        await until(left, "it has, and what is before the sealed origin has left")


@pytest.mark.parametrize("there", ["not-committed", "another-lanes", "no-frame", "nothing"])
async def test_a_remembered_sequence_proves_nothing_where_another_message_is(client: Client, there: str) -> None:
    """Streams in memory begin at 1 again: what lies there now is perhaps not committed, and nowhere else."""
    api = await ready(client)
    await send(client, INPUT, frame(8, 9))
    if there == "not-committed":
        await send(client, INPUT, frame(9, 11))
    elif there == "another-lanes":
        await send(client, "fi.segment.1", frame(0, 1, partition=1))
    elif there == "no-frame":
        await send(client, INPUT, b"no frame")
    before = await kept(api, SEGMENT, INPUT)
    receipts = [await send(client, "fi.receipts.0", b"x") for _ in range(2)]
    api = Api(client, msgspec.structs.replace(api.settings, receipts_kept=1))

    async def looked() -> bool:
        """Receipts are trimmed after the hops."""
        return await kept(api, RECEIPTS, "fi.receipts.0") == receipts[1:]

    async with trimming(api) as trimmer:
        trimmer.committed(committed(10, 2))
        await until(looked, "old receipts have left, all but the newest")
    assert await kept(api, SEGMENT, INPUT) == before


async def test_what_is_sealed_leaves_the_stream_only_once_a_claim_was_accepted(client: Client) -> None:
    """An owner that was fenced off while it sealed has none, and its successor may need what it would remove."""
    api = await ready(client, partitions=1, receipts_kept=1)
    subject = "fi.events.clinic-1.00000000-0000-4000-8000-000000000001"
    for _ in range(4):
        await send(client, subject, b"{}")
    looks: list[int] = []

    async def left() -> bool:
        return await kept(api, EVENTS, "fi.raw.0.>") == [3, 4]

    async with trimming(api) as trimmer:
        trimmer._look_again = lambda: looks.append(1)
        assert trimmer.sealed(3)
        assert looks == [1], "a claim is asked for"
        assert not trimmer.sealed(3), "that is nothing new"
        assert not trimmer.sealed(2)
        assert looks == [1]
        # Receipts are trimmed before the events of one round: the second round shows that the first has ended.
        for _ in range(2):
            newest = [await send(client, "fi.receipts.0", b"x") for _ in range(2)][1]

            async def looked(newest: int = newest) -> bool:
                return await kept(api, RECEIPTS, "fi.receipts.0") == [newest]

            trimmer.committed(committed(4, 9))
            await until(looked, "it has trimmed")
        assert await kept(api, EVENTS, "fi.raw.0.>") == [1, 2, 3, 4]
        assert trimmer.unclaimed == 3
        trimmer.claimed(3)
        assert trimmer.unclaimed == 0
        await until(left, "what is before the sealed origin has left")
