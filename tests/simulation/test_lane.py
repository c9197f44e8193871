"""One lane, or one writer, on simulated servers: what it holds, gives back and begins anew is neither lost nor judged
by what was given up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from uuid import UUID

import msgspec
import pytest
from virtual import Ground, in_virtual_time

from cluster.testing.sim import network
from cluster.testing.waiting import until
from contracts.errors import InvalidEventError
from contracts.events import Event
from contracts.frames import Frame, encode_frame
from contracts.rules import DEFAULT_POLICY, Policy, Rules
from contracts.subjects import CONTROL, DLQ, EVENTS, FLUSH_SUBJECT, HASH, PERSIST, SEGMENT, dlq_subject, publish_subject
from contracts.telemetry import DEAD_INDEX, DEAD_ORIGIN
from stages.hash.core import HashCore
from stages.ingest import core
from stages.ingest.core import IngestCore
from stages.runtime.base import HOLES_BEFORE_PURGE
from stages.runtime.breaker import Breaker
from stages.runtime.graveyard import Graveyard
from stages.runtime.lane import Lane
from stages.runtime.messages import StoredMessage
from stages.runtime.work import DeadLetter, Step
from stages.runtime.writer import replace_last
from stages.segment.core import SegmentCore

CONSULTATION = UUID(int=7, version=4)
HOUR_NS = 3_600_000_000_000


@contextlib.asynccontextmanager
async def working(lane: Lane):  # type: ignore[no-untyped-def]
    running = asyncio.create_task(lane.run())
    try:
        yield
    finally:
        lane.stop()
        await running


def an_event(origin: int, kind: str, at_ns: int = HOUR_NS, payload: bytes = b"{}") -> Event:
    return Event(
        origin=origin,
        index=0,
        event_id=origin.to_bytes(16, "big"),
        consultation_id=CONSULTATION.bytes,
        site="clinic-1",
        event_type=kind,
        timestamp_ns=at_ns,
        stamped=True,
        payload=payload,
        metadata=b"{}",
        accepted_ns=at_ns,
    )


def a_frame(*events: Event) -> bytes:
    """What covers their origins, and those before it back to the first."""
    first, last = events[0].origin, events[-1].origin
    return encode_frame(Frame(0, first - 1, first, last, (), "w", 0, b"", (), events))


def a_body(text: str) -> bytes:
    """What a gateway publishes: one event."""
    return (
        f'{{"consultation_id":"{CONSULTATION}","event_type":"CONTEXT_UPDATED","payload":{{"text":"{text}"}},'
        '"metadata":{"user_id":"u","session_id":"s"}}'
    ).encode()


def a_policy(version: int, *refused: str) -> Policy:
    rules = Rules(check_payload=False, refused_types=refused)
    return msgspec.structs.replace(DEFAULT_POLICY, version=version, rules=rules)


def test_what_the_breaker_held_is_passed_on_whole_once_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ingest's input shows no holes: a message that a lane drops is lost."""

    async def job(ground: Ground) -> None:
        for _ in range(20):
            await ground.publish(publish_subject("clinic-1", str(CONSULTATION)), a_body(""))
        breaker = Breaker(ground.api.settings)
        lane = Lane(ground.api, IngestCore(), 0, "nonce", lambda _: None, breaker=breaker)
        with monkeypatch.context() as bad_build:
            bad_build.setattr(core, "EVENT_TYPES", {})
            async with working(lane):
                await until(lambda: breaker.is_open, "the breaker is open")
                buried = ground.buried()
                assert len(buried) < 10, "those of before it had seen enough"
                # Asked again, it holds on, and tries in vain once its pause is over.
                lane.end_hold()
                asked: list[str] = []
                ground.broker.trace = asked.append
                begun_s = asyncio.get_running_loop().time()
                await until(lambda: breaker.hold_s(begun_s) > 350, "it was tried", limit_s=350)
                assert (ground.events(SEGMENT), ground.buried()) == ([], buried)
                assert len(asked) < 1000, "it asks no more than a lane that waits for input"
                bad_build.undo()
                breaker.retry_now()
                lane.end_hold()
                await until(lambda: len(ground.events(SEGMENT)) + len(buried) >= 20, "all is passed on at once")
        origins = [origin for origin, _ in buried] + [event.origin for event in ground.events(SEGMENT)]
        assert (origins, ground.buried()) == (list(range(1, 21)), buried)

    in_virtual_time(job, dead_events_min=10, dead_share_max=0.5, breaker_pause_s=300.0)


def test_holes_that_were_passed_do_not_count_against_the_input(caplog: pytest.LogCaptureFixture) -> None:
    """At the third attempt it would be emptied."""

    async def job(ground: Ground) -> None:
        lane = Lane(ground.api, HashCore(), 0, "nonce", lambda _: None)
        async with working(lane):
            lane._holes = HOLES_BEFORE_PURGE - 1
            await ground.publish("fi.hash.0", a_frame(an_event(1, "CONTEXT_UPDATED")))
            await until(lambda: ground.events(PERSIST), "it is passed on")
            await ground.publish("fi.hash.0", a_frame(an_event(3, "CONTEXT_UPDATED")))
            await until(lambda: "(attempt 1)" in caplog.text, "it reads again")

    in_virtual_time(job)


def test_what_the_breaker_held_leaves_nothing_in_the_memory() -> None:
    """Judged again, what comes before a commit is not taken for something after it."""
    in_force = [a_policy(2, "LLM_CALL_FAILED")]

    async def job(ground: Ground) -> None:
        before = an_event(1, "MESSAGE_UPDATED", at_ns=3 * HOUR_NS)
        bad = [an_event(origin, "LLM_CALL_FAILED") for origin in range(2, 20)]
        await ground.publish("fi.segment.0", a_frame(before, *bad, an_event(20, "CONSULTATION_COMMITTED")))
        breaker = Breaker(ground.api.settings)
        lane = Lane(ground.api, SegmentCore(lambda: in_force[0]), 0, "nonce", lambda _: None, breaker=breaker)
        async with working(lane):
            await until(lambda: breaker.is_open, "the breaker is open")
            in_force[0] = a_policy(3)
            breaker.retry_now()
            lane.end_hold()
            await until(lambda: len(ground.events(HASH)) + len(ground.buried()) == 20, "all is judged again")
        assert ([event.origin for event in ground.events(HASH)], ground.buried()) == (list(range(1, 21)), [])

    in_virtual_time(job, dead_events_min=10, dead_share_max=0.5)


def test_what_was_too_much_for_one_frame_leaves_nothing_in_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, of a commit in the part that is put back."""
    judged: list[int] = []

    class Core(SegmentCore):
        """Notes what it judges."""

        def step(self, message: StoredMessage, origin: int, now_ns: int) -> Step | None:
            judged.append(message.seq)
            return super().step(message, origin, now_ns)

    async def job(ground: Ground) -> None:
        large = b'{"text":"%s"}' % (b"x" * 15_000)
        await ground.publish("fi.segment.0", a_frame(an_event(1, "CORE_STATE_CHANGED", HOUR_NS, large)))
        await ground.publish("fi.segment.0", a_frame(an_event(2, "MESSAGE_UPDATED", 3 * HOUR_NS, large)))
        await ground.publish("fi.segment.0", a_frame(an_event(3, "CONSULTATION_COMMITTED", HOUR_NS, large)))
        # Alone it is what it is, and goes on.
        await ground.publish("fi.segment.0", a_frame(an_event(4, "CORE_STATE_CHANGED", HOUR_NS, large + bytes(15_000))))

        def hold_up(_: int) -> None:
            """The first frame is on its way until the others have come in."""
            ground.broker.headless_until_s[HASH] = asyncio.get_running_loop().time() + 1

        lane = Lane(ground.api, Core(lambda: a_policy(2)), 0, "nonce", hold_up)
        async with working(lane):
            await until(lambda: len(ground.events(HASH)) + len(ground.buried()) == 4, "all is judged")
        assert judged.count(2) > 1, "nothing was parted: the test shows nothing"
        assert ([event.origin for event in ground.events(HASH)], ground.buried()) == ([1, 2, 3, 4], [])

    monkeypatch.setattr(network, "PAYLOAD_BYTES_MAX", 40_000)
    in_virtual_time(job, dead_share_max=1.0)


def test_what_was_too_much_for_one_frame_of_ingest_goes_into_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its input shows no holes: a message that is not put back is lost when another one waits behind it."""
    judged: list[int] = []

    class Core(IngestCore):
        """Notes what it judges."""

        def step(self, message: StoredMessage, origin: int, now_ns: int) -> Step | None:
            judged.append(message.seq)
            return super().step(message, origin, now_ns)

    async def job(ground: Ground) -> None:
        for _ in range(8):
            await ground.publish(publish_subject("clinic-1", str(CONSULTATION)), a_body("x" * 10_000))

        def hold_up(_: int) -> None:
            """The first frame is on its way until the others have come in."""
            ground.broker.headless_until_s[SEGMENT] = asyncio.get_running_loop().time() + 1

        async with working(Lane(ground.api, Core(), 0, "nonce", hold_up)):
            await until(
                lambda: judged and ground.events(SEGMENT)[-1:] and ground.events(SEGMENT)[-1].origin == 8, "all"
            )
        assert len(judged) > 8, "nothing was parted: the test shows nothing"
        assert [event.origin for event in ground.events(SEGMENT)] == list(range(1, 9))

    monkeypatch.setattr(network, "PAYLOAD_BYTES_MAX", 40_000)
    in_virtual_time(job, frame_events_max=4)


def refused(*origins: int) -> list[DeadLetter]:
    return [DeadLetter(origin, 0, InvalidEventError("reason", "field", "detail"), b"x") for origin in origins]


def test_letters_are_buried_once_in_whatever_order_they_are_judged_again() -> None:
    async def job(ground: Ground) -> None:
        for _ in range(9):
            await ground.publish(publish_subject("clinic-1", str(CONSULTATION)), b"x")
        graveyard = Graveyard(ground.api, "segment", 0, "nonce")
        for origins in ((2, 4), (3,), (3, 4), (5, 6), (5,), (1,), (1, 2, 3), (7, 8, 9), (7, 8, 9), (6, 9)):
            await graveyard.bury(refused(*origins))
        assert ground.buried() == [(origin, 0) for origin in (2, 4, 3, 5, 6, 1, 7, 8, 9)]

    in_virtual_time(job)


def test_of_two_that_replace_a_value_at_once_the_second_sees_what_the_first_made_of_it() -> None:
    async def job(ground: Ground) -> None:
        def adding(word: bytes) -> Callable[[StoredMessage | None], bytes]:
            return lambda last: (b"" if last is None else last.data) + word

        for word in (b"a", b"b"):
            await replace_last(ground.api, CONTROL, FLUSH_SUBJECT, adding(word), f"nonce-{word!r}")
        both = (b"c", b"d")
        await asyncio.gather(
            *(replace_last(ground.api, CONTROL, FLUSH_SUBJECT, adding(w), f"nonce-{w!r}") for w in both)
        )
        last = await ground.api.last_message(CONTROL, FLUSH_SUBJECT)
        assert last is not None
        assert last.data in (b"abcd", b"abdc")

    in_virtual_time(job)


def test_a_letter_that_somebody_copied_there_stands_for_no_event() -> None:
    """No fence let it in. Its origin is one of another cluster, and may be one of ours too."""

    async def job(ground: Ground) -> None:
        for _ in range(9):
            await ground.publish(publish_subject("clinic-1", str(CONSULTATION)), b"x")
        copied = {DEAD_ORIGIN: "7", DEAD_INDEX: "0"}
        graveyard = Graveyard(ground.api, "segment", 0, "nonce")
        await graveyard.bury(refused(2))
        await ground.api.client.request(dlq_subject("segment", 0), b"copied", timeout=5, headers=copied)
        await graveyard.bury(refused(7, 8))
        await Graveyard(ground.api, "segment", 0, "another").bury(refused(7, 8, 9))
        assert ground.buried() == [(2, 0), (7, 0), (7, 0), (8, 0), (9, 0)]

    in_virtual_time(job)


def test_a_letter_never_holds_another_event_than_its_own() -> None:
    """Not even where its own was deleted by hand."""

    async def job(ground: Ground) -> None:
        for body in (b"first", b"second\nthird", b"fourth"):
            await ground.publish(publish_subject("clinic-1", str(CONSULTATION)), body)
        await ground.api.delete(EVENTS, 1, erase=False)
        error = InvalidEventError("reason", "field", "detail")
        letters = [DeadLetter(origin, index, error, None) for origin, index in ((1, 0), (2, 1), (3, 0))]
        await Graveyard(ground.api, "segment", 0, "nonce").bury(letters)
        assert [message.data for message in ground.broker.streams[DLQ].messages.values()] == [b"", b"third", b"fourth"]

    in_virtual_time(job)


def test_what_is_awaited_before_a_session_holds_for_its_first_frame() -> None:
    """A process that takes a partition over judges by a policy that the one before it may have gone by."""
    in_force = [a_policy(2)]

    async def look_now() -> None:
        in_force[0] = a_policy(3)

    async def job(ground: Ground) -> None:
        await ground.publish("fi.segment.0", a_frame(an_event(1, "CORE_STATE_CHANGED")))
        core = SegmentCore(lambda: in_force[0])
        async with working(Lane(ground.api, core, 0, "nonce", lambda _: None, before_session=look_now)):
            await until(lambda: ground.events(HASH), "it is passed on")
        assert [event.policy_version for event in ground.events(HASH)] == [3]

    in_virtual_time(job)
