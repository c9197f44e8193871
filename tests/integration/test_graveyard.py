"""Removing dead letters while stages bury them and are killed, and the breaker of a lane, on real streams."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import UUID

import msgspec
import pytest
from lanes import going
from nats.aio.client import Client
from pipeline import until

from cluster.apply import apply
from cluster.dlq import DeadLetters, Selection, Span
from contracts.errors import InvalidEventError
from contracts.frames import decode_frame_head
from contracts.letters import Letter, read_letter
from contracts.settings import MIB, Settings
from contracts.subjects import DLQ, EVENTS, HOPS, SEGMENT
from contracts.telemetry import DEAD_INDEX, DEAD_ORIGIN
from stages.ingest import core
from stages.ingest.core import IngestCore
from stages.runtime.api import Api
from stages.runtime.graveyard import Graveyard
from stages.runtime.lane import Lane
from stages.runtime.messages import StoredMessage
from stages.runtime.work import DeadLetter

pytestmark = pytest.mark.cluster

GONE = 1000
"""The last origin of events that are not in the stream any more."""


def refused(origin: int, index: int = 0) -> DeadLetter:
    return DeadLetter(origin, index, InvalidEventError("json.malformed", "", "not JSON"), b"x")


async def ready(client: Client, **changes: Any) -> Api:
    chosen = Settings(**{"partitions": 1, "probe_s": 0.5, **changes})
    await apply(client, chosen)
    return Api(client, chosen)


async def without_originals(client: Client, **changes: Any) -> Api:
    """As `ready`; the messages that letters are made of here were in `FI_EVENTS` once, and are not any more."""
    api = await ready(client, **changes)
    jetstream = client.jetstream(timeout=30)
    await jetstream.purge_stream(EVENTS, seq=GONE + 1)
    assert (await jetstream.publish("fi.events.clinic-1.c", b"x")).seq > GONE
    return api


async def everything(dead: DeadLetters) -> list[Letter]:
    """All letters and marks, as the stream's leader has them."""
    found: list[Letter] = []
    span = await dead.span(Selection())
    seq = 1
    while (message := await dead._api.first_message(DLQ, "fi.dlq.*.*", from_seq=seq)) and message.seq <= span.last:
        seq = message.seq + 1
        found.append(read_letter(message.subject, message.seq, message.time_ns, message.data, message.headers))
    return found


async def buried(dead: DeadLetters) -> list[tuple[int, int]]:
    return [(letter.origin, letter.index) for letter in await everything(dead) if not letter.handled]


async def test_a_stage_killed_between_bury_and_publish_buries_again_only_what_nothing_stands_for(
    client: Client,
) -> None:
    api = await without_originals(client)
    dead = DeadLetters(api, "c")
    of_a_frame = [refused(5), refused(5, 1), refused(9)]
    killed = Graveyard(api, "ingest", 0, "first")
    await killed.bury(of_a_frame)
    assert await buried(dead) == [(5, 0), (5, 1), (9, 0)]
    await Graveyard(api, "ingest", 0, "second").bury(of_a_frame)
    assert await buried(dead) == [(5, 0), (5, 1), (9, 0)]
    assert await dead.remove(await everything(dead)) == 3
    assert await buried(dead) == []

    # Whether the first two were removed, or never there, cannot be told; the third has its mark.
    restarted = Graveyard(api, "ingest", 0, "third")
    await restarted.bury(of_a_frame)
    assert await buried(dead) == [(5, 0), (5, 1)]
    await restarted.bury([refused(9), refused(9, 1), refused(12)])
    assert await buried(dead) == [(5, 0), (5, 1), (9, 1), (12, 0)]


async def test_without_a_mark_it_would_bury_the_last_one_again(client: Client) -> None:
    """What the mark is for: the same with the newest letter simply deleted."""
    api = await without_originals(client)
    dead = DeadLetters(api, "c")
    await Graveyard(api, "ingest", 0, "first").bury([refused(5), refused(9)])
    await api.request(DLQ, f"$JS.API.STREAM.MSG.DELETE.{DLQ}", b'{"seq":2}')
    await Graveyard(api, "ingest", 0, "second").bury([refused(5), refused(9)])
    assert await buried(dead) == [(5, 0), (9, 0)]
    assert (await everything(dead))[-1].seq == 3


async def test_what_an_earlier_build_refuses_of_what_a_later_one_passed_gets_its_letter(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way back (ADR 32): all stages stop, the hops go, and the earlier build judges everything again."""
    api = await ready(client)

    async def ingest(name: str) -> None:
        async def framed() -> bool:
            last = await api.last_message(SEGMENT, "fi.segment.0")
            return last is not None and decode_frame_head(last.data).last >= 2

        async with going(Lane(api, IngestCore(), 0, name, lambda _: None)):
            await until(framed, "both are judged", 60)

    consultation = str(UUID(int=1, version=4))
    body = {"consultation_id": consultation, "event_type": "OF_A_LATER_BUILD", "payload": {}}
    metadata = {"metadata": {"user_id": "u", "session_id": "s"}}
    for data in (json.dumps(body | metadata).encode(), b"not JSON"):
        await client.jetstream(timeout=30).publish(f"fi.events.clinic-1.{consultation}", data)
    with monkeypatch.context() as later:
        kind = next(iter(core.EVENT_TYPES.values()))
        later.setattr(core, "EVENT_TYPES", {**core.EVENT_TYPES, "OF_A_LATER_BUILD": kind})
        await ingest("later")
    assert await buried(DeadLetters(api, "c")) == [(2, 0)]
    for hop in HOPS:
        await client.jetstream(timeout=30).delete_stream(hop)
    await apply(client, api.settings)
    await ingest("earlier")
    assert sorted(await buried(DeadLetters(api, "c"))) == [(1, 0), (2, 0)]


async def test_a_stage_that_goes_on_meets_the_mark_and_loses_and_doubles_nothing(client: Client) -> None:
    api = await without_originals(client)
    dead = DeadLetters(api, "c")
    living = Graveyard(api, "ingest", 0, "living")
    for origin in range(1, 6):
        await living.bury([refused(origin)])
        assert await dead.remove(await everything(dead)) == 1
        await living.bury([refused(origin)])
        assert await buried(dead) == []
    (mark,) = await everything(dead)
    assert (mark.origin, mark.index, mark.handled) == (5, 0, True)


@pytest.mark.parametrize("dropped", [False, True])
async def test_what_somebody_else_put_there_keeps_no_letter_from_being_buried(client: Client, dropped: bool) -> None:
    """A letter copied by hand from a cluster whose origins are further on, say."""
    api = await without_originals(client)
    dead = DeadLetters(api, "c")
    await Graveyard(api, "ingest", 0, "first").bury([refused(5)])
    copied = {DEAD_ORIGIN: "5000000", DEAD_INDEX: "0"}
    await client.jetstream(timeout=30).publish("fi.dlq.ingest.0", b"copied", headers=copied)
    if dropped:
        assert await dead.remove((await everything(dead))[1:]) == 1
    for name in ("second", "third"):
        await Graveyard(api, "ingest", 0, name).bury([refused(9), refused(12)])
    assert [place for place in await buried(dead) if place != (5_000_000, 0)] == [(5, 0), (9, 0), (12, 0)]


async def test_a_mark_goes_when_there_is_a_letter_after_it(client: Client) -> None:
    api = await without_originals(client)
    dead = DeadLetters(api, "c")
    graveyard = Graveyard(api, "ingest", 0, "first")
    await graveyard.bury([refused(1)])
    await dead.remove(await everything(dead))
    await graveyard.bury([refused(2)])
    assert await dead.remove([letter for letter in await everything(dead) if letter.handled]) == 0
    assert [(letter.origin, letter.handled) for letter in await everything(dead)] == [(2, False)]


async def test_letters_can_be_removed_from_a_full_stream_and_the_stage_it_holds_goes_on(client: Client) -> None:
    api = await without_originals(client, dlq_bytes_max=MIB)
    dead = DeadLetters(api, "c")
    large = [msgspec.structs.replace(refused(n), data=b"x" * 340_000) for n in range(1, 5)]
    burying = asyncio.create_task(Graveyard(api, "ingest", 0, "first").bury(large))

    async def full() -> bool:
        return len(await buried(dead)) == 3

    await until(full, "three letters fill it", 60)
    assert await dead.remove(await everything(dead)) == 3
    async with asyncio.timeout(60):
        await burying
    assert await buried(dead) == [(4, 0)]


async def test_removed_by_several_at_once_while_a_stage_buries_and_is_killed_no_letter_is_missed(
    client: Client,
) -> None:
    api = await without_originals(client)
    frames = [[refused(n, i) for i in range(3)] for n in range(1, 41)]
    seen: dict[int, tuple[int, int]] = {}

    async def remove_all(dead: DeadLetters) -> None:
        """Whatever is removed was read before, so that `seen` misses nothing."""
        letters = await everything(dead)
        seen.update({letter.seq: (letter.origin, letter.index) for letter in letters if not letter.handled})
        await dead.remove(letters)

    async def bury() -> None:
        for number, letters in enumerate(frames):
            # Each frame is buried twice, the second time by a process that knows nothing: killed before it published.
            await Graveyard(api, "ingest", 0, f"killed-{number}").bury(letters)
            await Graveyard(api, "ingest", 0, f"restarted-{number}").bury(letters)

    async def remove(burying: asyncio.Task[None]) -> None:
        dead = DeadLetters(api, "c")
        while not burying.done():
            await remove_all(dead)

    burying = asyncio.create_task(bury())
    async with asyncio.timeout(120):
        await asyncio.gather(burying, remove(burying), remove(burying))
    dead = DeadLetters(api, "c")
    await remove_all(dead)
    assert await buried(dead) == []
    assert set(seen.values()) == {(letter.origin, letter.index) for letters in frames for letter in letters}


async def test_letters_are_found_by_time_in_a_stream_with_gaps_and_page_by_page(client: Client) -> None:
    api = await without_originals(client)
    dead = DeadLetters(api, "c")
    graveyard = Graveyard(api, "ingest", 0, "first")
    await graveyard.bury([refused(n) for n in range(1, 701)])
    letters = await everything(dead)
    assert [letter.origin for letter in letters] == list(range(1, 701))
    await dead.remove(letters[100:300])
    middle, late = letters[350], letters[500]
    since = Selection(since_ns=middle.time_ns, until_ns=late.time_ns)
    assert await dead.span(since) == Span(middle.seq, late.seq)
    found = [letter.origin async for letter in dead.letters(since, await dead.span(since), lambda done, total: None)]
    assert found == list(range(351, 502)), "both ends belong to it"
    gone = Selection(until_ns=letters[200].time_ns)

    async def only_the_first_hundred() -> bool:
        span = await dead.span(gone)
        found = [letter.origin async for letter in dead.letters(gone, span, lambda done, total: None)]
        return found == list(range(1, 101))

    await until(only_the_first_hundred, "what was removed is no longer listed", 60)


async def test_reading_ends_though_what_was_still_to_come_is_removed_by_somebody_else(client: Client) -> None:
    api = await without_originals(client)
    dead = DeadLetters(api, "c")
    graveyard = Graveyard(api, "ingest", 0, "first")
    await graveyard.bury([refused(n) for n in range(1, 11)])
    letters = await everything(dead)
    span = await dead.span(Selection())
    await dead.remove(letters[3:])
    async with asyncio.timeout(60):
        pages = [page async for page in dead.pages(Selection(), Span(1, span.last + 5), lambda done, total: None)]
    assert [letter.origin for page in pages for letter in page if not letter.handled][:3] == [1, 2, 3]


async def test_a_lane_whose_input_is_all_bad_holds_loses_nothing_stops_when_told_and_resumes_when_allowed(
    client: Client,
) -> None:
    api = await ready(client, dead_events_min=50, breaker_pause_s=3600.0)
    jetstream = client.jetstream(timeout=30)
    subject = f"fi.events.clinic-1.{UUID(int=1, version=4)}"
    for number in range(120):
        await jetstream.publish(subject, b"not JSON %d" % number)
    lane = Lane(api, IngestCore(), 0, "nonce", lambda _: None)
    running_lane = asyncio.create_task(lane.run())

    async def holds() -> bool:
        return lane._breaker.is_open

    await until(holds, "the breaker opens", 60)
    letters = (await jetstream.stream_info(DLQ)).state.messages
    assert letters < 50
    last = await api.last_message(SEGMENT, "fi.segment.0")
    lane.nudge()
    lane.stop()
    async with asyncio.timeout(60):
        await running_lane
    assert (await jetstream.stream_info(DLQ)).state.messages == letters
    assert await api.last_message(SEGMENT, "fi.segment.0") == last

    allowed = Api(client, msgspec.structs.replace(api.settings, dead_share_max=1.0))
    lane = Lane(allowed, IngestCore(), 0, "other", lambda _: None)
    running_lane = asyncio.create_task(lane.run())

    async def all_dead() -> bool:
        return (await jetstream.stream_info(DLQ)).state.messages == 120

    try:
        await until(all_dead, "all of them are dead letters", 60)
    finally:
        lane.stop()
        await running_lane
    assert [letter.origin for letter in await everything(DeadLetters(api, "c"))] == list(range(1, 121))


async def test_a_letter_that_a_policy_decides_is_buried_though_later_ones_are_and_none_is_twice(client: Client) -> None:
    """Judged again by another policy, an event may be refused that passed before."""
    api = await without_originals(client)
    judged = [msgspec.structs.replace(refused(n), policy=2) for n in range(1, 61)]
    first, again = judged[20:60:2], judged[10:60]
    graveyard = Graveyard(api, "segment", 0, "first")
    await graveyard.bury(first)
    await Graveyard(api, "segment", 0, "second").bury(again)
    assert sorted(await buried(DeadLetters(api, "c"))) == [(n, 0) for n in range(11, 61)]
    # The first one goes on, fenced at its next letter, and then goes back further than it looked.
    await graveyard.bury([msgspec.structs.replace(refused(61), policy=3), *judged])
    await graveyard.bury(judged)
    assert sorted(await buried(DeadLetters(api, "c"))) == [(n, 0) for n in range(1, 62)]


@pytest.mark.parametrize("trace", ["x" * 65_400, "\N{LATIN SMALL LETTER Y WITH DIAERESIS}" * 22_000])
async def test_a_refused_message_with_the_longest_headers_gets_its_letter_and_nothing_waits_behind_it(
    client: Client, trace: str
) -> None:
    """A letter that repeated them would be larger than the servers take, and its partition would stand for good."""
    api = await ready(client)
    jetstream = client.jetstream(timeout=30)
    subject = f"fi.events.clinic-1.{UUID(int=1, version=4)}"
    await jetstream.publish(subject, b"\n".join([b"{}", b"[]"]), headers={"traceparent": trace})
    await jetstream.publish(subject, b"not JSON")
    lane = Lane(api, IngestCore(), 0, "nonce", lambda _: None)
    running_lane = asyncio.create_task(lane.run())

    async def framed() -> bool:
        last = await api.last_message(SEGMENT, "fi.segment.0")
        return last is not None and decode_frame_head(last.data).last == 2

    try:
        await until(framed, "both messages are taken", 60)
    finally:
        lane.stop()
        await running_lane
    letters = await everything(DeadLetters(api, "c"))
    assert [(letter.origin, letter.index, letter.traceparent) for letter in letters] == [
        (1, 0, ""),
        (1, 1, ""),
        (2, 0, ""),
    ]


async def test_a_message_of_thousands_of_refused_lines_is_few_letters_and_counts_them_all(client: Client) -> None:
    api = await ready(client)
    await client.jetstream(timeout=30).publish(f"fi.events.clinic-1.{UUID(int=1, version=4)}", b"{}\n" * 3000)
    lane = Lane(api, IngestCore(), 0, "nonce", lambda _: None)
    running_lane = asyncio.create_task(lane.run())

    async def framed() -> bool:
        return await api.last_message(SEGMENT, "fi.segment.0") is not None

    try:
        await until(framed, "the message is taken", 60)
    finally:
        lane.stop()
        await running_lane
    last = await api.last_message(SEGMENT, "fi.segment.0")
    assert last is not None
    assert [row.count for row in decode_frame_head(last.data).dead] == [3000]
    letters = await everything(DeadLetters(api, "c"))
    assert [letter.index for letter in letters] == list(range(65))
    assert letters[-1].data == b"\n".join([b"{}"] * 2936)


class Stale(Api):
    """A connection whose next reads of letters come from a leader that was frozen before the last ones were buried."""

    reads = 0
    seq = 0

    async def first_message(self, stream: str, subject: str, *, from_seq: int) -> StoredMessage | None:
        found = await super().first_message(stream, subject, from_seq=from_seq)
        if stream != DLQ or not self.reads or found is None or found.seq <= self.seq:
            return found
        self.reads -= 1
        return None


@pytest.mark.parametrize("seq", [0, 3, 5])
async def test_a_letter_that_a_stale_leader_does_not_know_is_not_buried_again(client: Client, seq: int) -> None:
    """The fence does not show it: what was last was read from the leader that is."""
    api = await without_originals(client)
    letters = [msgspec.structs.replace(refused(n), policy=2) for n in range(1, 7)]
    await Graveyard(api, "segment", 0, "first").bury(letters)
    stale = Stale(client, api.settings)
    stale.reads, stale.seq = 3, seq
    await Graveyard(stale, "segment", 0, "second").bury(letters)
    assert stale.reads == 0
    assert await buried(DeadLetters(api, "c")) == [(n, 0) for n in range(1, 7)]


async def test_burying_remembers_no_letter_that_it_need_not_look_for(client: Client) -> None:
    api = await without_originals(client)
    graveyard = Graveyard(api, "segment", 0, "first")
    await graveyard.bury([refused(n) for n in range(1, 21)])
    await graveyard.bury([msgspec.structs.replace(refused(n), policy=2) for n in range(15, 41)])
    assert len(graveyard._found) == 6
