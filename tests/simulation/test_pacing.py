"""How a lane's frames follow one another: ingest's gather company, those of later stages and full ones do not wait."""

from __future__ import annotations

import asyncio

import pytest
from test_lane import CONSULTATION, a_body, a_frame, a_policy, an_event, working
from virtual import Ground, in_virtual_time

from cluster.testing.waiting import until
from contracts.subjects import HASH, PERSIST, SEGMENT, publish_subject
from stages.hash.core import HashCore
from stages.ingest.core import IngestCore
from stages.runtime.breaker import Breaker
from stages.runtime.lane import Lane
from stages.segment.core import SegmentCore

SUBJECT = publish_subject("clinic-1", str(CONSULTATION))
GAP_S = 0.1


def frames(ground: Ground, stream: str) -> int:
    return len(ground.broker.streams[stream].messages)


def test_frames_of_ingest_gather_company_where_enough_comes_and_one_alone_goes_at_once() -> None:
    async def job(ground: Ground) -> None:
        loop = asyncio.get_running_loop()
        async with working(Lane(ground.api, IngestCore(), 0, "nonce", lambda _: None)):
            for _ in range(200):
                await ground.publish(SUBJECT, a_body(""))
                await asyncio.sleep(0.005)
            await until(lambda: len(ground.events(SEGMENT)) == 200, "all is passed on")
            assert 10 <= frames(ground, SEGMENT) < 40
            await asyncio.sleep(10)
            before_s = loop.time()
            await ground.publish(SUBJECT, a_body(""))
            await until(lambda: len(ground.events(SEGMENT)) == 201, "it is passed on")
            assert loop.time() - before_s < GAP_S

    in_virtual_time(job, frame_gap_s=GAP_S)


def test_frames_of_later_stages_follow_frames() -> None:
    async def job(ground: Ground) -> None:
        async with working(Lane(ground.api, HashCore(), 0, "nonce", lambda _: None)):
            for origin in range(1, 101):
                await ground.publish("fi.hash.0", a_frame(an_event(origin, "CONTEXT_UPDATED")))
                await asyncio.sleep(0.02)
            await until(lambda: len(ground.events(PERSIST)) == 100, "all is passed on")
        assert frames(ground, PERSIST) > 80

    in_virtual_time(job, frame_gap_s=GAP_S)


def test_what_fills_frames_waits_for_nothing_and_fills_them() -> None:
    async def job(ground: Ground) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(160):
            await ground.publish(SUBJECT, a_body(""))
        begun_s = loop.time()
        async with working(Lane(ground.api, IngestCore(), 0, "nonce", lambda _: None)):
            await until(lambda: len(ground.events(SEGMENT)) == 160, "all is passed on")
        assert frames(ground, SEGMENT) <= 160 / 4 + 2
        assert loop.time() - begun_s < 160 / 4 * 1.0 / 4

    in_virtual_time(job, frame_gap_s=1.0, frame_events_max=4)


@pytest.mark.parametrize("told", ["to stop", "of another owner"])
def test_a_lane_that_holds_hears_what_it_is_told(told: str) -> None:
    """Held for an hour it would be cut off at the end of its drain, or go on with what another has passed on."""

    async def job(ground: Ground) -> None:
        bad = [an_event(origin, "LLM_CALL_FAILED") for origin in range(1, 20)]
        await ground.publish("fi.segment.0", a_frame(*bad))
        breaker, in_force = Breaker(ground.api.settings), [a_policy(2, "LLM_CALL_FAILED")]
        lane = Lane(ground.api, SegmentCore(lambda: in_force[0]), 0, "nonce", lambda _: None, breaker=breaker)
        loop = asyncio.get_running_loop()
        async with working(lane):
            await until(lambda: breaker.is_open, "the breaker is open")
            if told == "of another owner":
                other = Lane(ground.api, SegmentCore(lambda: a_policy(3)), 0, "other", lambda _: None)
                async with working(other):
                    await until(lambda: len(ground.events(HASH)) == 19, "another passes all of it on")
                lane.end_hold()
                await until(lambda: lane._sessions > 1, "it starts again", ground.settings.probe_s / 2)
            begun_s = loop.time()
        assert loop.time() - begun_s < 5
        assert ground.buried() == []

    in_virtual_time(job, dead_events_min=10, dead_share_max=0.5, breaker_pause_s=3600.0)
