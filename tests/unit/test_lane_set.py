"""The lanes of a process: one for each partition, cut off when they are late, and none ends unnoticed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from cluster.testing.sim.loop import VirtualLoop
from contracts.budgets import LET_GO
from contracts.errors import DefiniteError
from stages.runtime.lanes import LaneSet


class ALane:
    """Works until told to stop, and for `rest_s` after that; None: without end."""

    def __init__(self, rest_s: float | None, opened: Callable[[], None]) -> None:
        self.rest_s = rest_s
        self.open = opened
        self.handing_over: bool | None = None
        self.nudged = self.stops = 0
        self._stopped = asyncio.Event()
        self._failed = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait((stopped, self._failed), return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
            await asyncio.sleep(self.rest_s if self.rest_s is not None else 1e9)
        finally:
            stopped.cancel()

    def stop(self, *, handing_over: bool = False) -> None:
        self.handing_over = handing_over
        self.stops += 1
        self._stopped.set()

    def nudge(self) -> None:
        self.nudged += 1

    def fail(self, words: str) -> None:
        self._failed.set_exception(DefiniteError(words))


class Lanes:
    """A `LaneSet` and the lanes it made, in order. `changes`: how often it told of one."""

    def __init__(self, rest_s: float | None) -> None:
        self.made: list[ALane] = []
        self.changes = 0
        self._rest_s = rest_s
        self.set = LaneSet(self._make, self._changed)

    def _make(self, partition: int, opened: Callable[[int], None]) -> ALane:
        self.made.append(ALane(self._rest_s, lambda: opened(partition)))
        return self.made[-1]

    def _changed(self) -> None:
        self.changes += 1


def in_virtual_time(job: Callable[[Lanes], Awaitable[None]], rest_s: float | None = 0.1) -> None:
    async def all_of_it() -> None:
        lanes = Lanes(rest_s)
        try:
            await job(lanes)
        finally:
            await lanes.set.close()
        assert lanes.set.held == ()

    with contextlib.closing(VirtualLoop(lambda: 0.0)) as loop:
        loop.run_until_complete(all_of_it())


def test_a_partition_has_one_lane_at_a_time_and_the_next_once_that_has_ended() -> None:
    async def job(lanes: Lanes) -> None:
        for _ in range(2):
            lanes.set.start(3)
            assert lanes.changes == 1
        lanes.set.let_go(3)
        lanes.set.start(3)
        assert (len(lanes.made), lanes.set.held, lanes.made[0].handing_over) == (1, (3,), True)
        before = lanes.changes
        await asyncio.sleep(0.2)
        assert (lanes.set.held, lanes.changes) == ((), before + 1)
        lanes.set.start(3)
        assert (len(lanes.made), lanes.set.held) == (2, (3,))
        lanes.set.let_go(3)
        await asyncio.sleep(0.2)
        assert lanes.set.held == ()

    in_virtual_time(job)


def test_a_lane_is_opening_until_it_has_found_its_place_and_so_is_the_one_after_it() -> None:
    async def job(lanes: Lanes) -> None:
        for partition in (1, 0):
            lanes.set.start(partition)
        assert lanes.set.opening == (0, 1)
        before = lanes.changes
        for _ in range(2):
            lanes.made[0].open()
        assert (lanes.set.opening, lanes.changes) == ((0,), before + 1), "told once, though it looks for it again"
        lanes.set.let_go(1)
        await asyncio.sleep(0.2)
        lanes.set.start(1)
        assert lanes.set.opening == (0, 1)

    in_virtual_time(job)


def test_a_lane_that_does_not_let_go_is_cut_off_and_that_is_no_failure() -> None:
    async def job(lanes: Lanes) -> None:
        failing = asyncio.create_task(lanes.set.failed())
        lanes.set.start(0)
        await asyncio.sleep(0)
        for _ in range(2):
            lanes.set.let_go(0)
        await asyncio.sleep(LET_GO.s - 0.01)
        assert (lanes.set.held, lanes.made[0].stops) == ((0,), 1)
        before = lanes.changes
        await asyncio.sleep(0.02)
        assert (lanes.set.held, lanes.changes) == ((), before + 1)
        assert not failing.done()
        failing.cancel()

    in_virtual_time(job, rest_s=None)


def test_the_first_lane_that_cannot_go_on_is_told_at_once_and_again_when_the_others_have_drained() -> None:
    async def job(lanes: Lanes) -> None:
        for partition in range(3):
            lanes.set.start(partition)
        failing = asyncio.create_task(lanes.set.failed())
        await asyncio.sleep(0.1)
        assert not failing.done()
        for lane, words in zip(lanes.made, ("first", "second"), strict=False):
            lane.fail(words)
            await asyncio.sleep(0.1)
        assert lanes.set.held == (2,)
        with pytest.raises(DefiniteError, match="first"):
            failing.result()
        with pytest.raises(DefiniteError, match="first"):
            await lanes.set.drain(5.0, handing_over=False)
        assert (lanes.set.held, lanes.made[2].handing_over) == ((), False)

    in_virtual_time(job)


def test_a_drain_ends_in_its_time_whatever_the_lanes_do() -> None:
    async def job(lanes: Lanes) -> None:
        loop = asyncio.get_running_loop()
        for partition in range(2):
            lanes.set.start(partition)
        await asyncio.sleep(0)
        lanes.set.nudge()
        assert [lane.nudged for lane in lanes.made] == [1, 1]
        lanes.made[0].rest_s = 1.0
        await lanes.set.drain(5.0, handing_over=True)
        assert loop.time() == 5.0
        assert lanes.set.held == (1,)
        assert [lane.handing_over for lane in lanes.made] == [True, True]

    in_virtual_time(job, rest_s=None)
