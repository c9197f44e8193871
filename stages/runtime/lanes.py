"""The lanes a process runs: started and let go one by one while the others work.

Always true: a partition has at most one lane here at any time, and the first lane that cannot go on ends the process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from contracts.budgets import LET_GO
from stages.runtime.tasks import end_tasks

log = logging.getLogger(__name__)


class RunnableLane(Protocol):
    """One partition of any stage."""

    async def run(self) -> None:
        """Works until `stop`; raises only what the process cannot go on with."""

    def stop(self, *, handing_over: bool = False) -> None:
        """Finish what is in hand and return from `run`; `handing_over` when another process goes on at once."""

    def nudge(self) -> None:
        """The connection came back: look again."""


class LaneSet:
    """Runs lanes.

    Args:
        make: builds the lane of a partition; it calls what it is given once it has found its place.
        changed: called after a lane was started, has found its place, or has ended.
    """

    def __init__(self, make: Callable[[int, Callable[[int], None]], RunnableLane], changed: Callable[[], None]) -> None:
        self._make = make
        self._changed = changed
        self._lanes: dict[int, RunnableLane] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._going: dict[int, asyncio.Task[None]] = {}
        self._opened: set[int] = set()
        self._failure: BaseException | None = None
        self._failed = asyncio.Event()

    @property
    def held(self) -> tuple[int, ...]:
        """Partitions whose lane runs, also while it finishes what it has in hand."""
        return tuple(sorted(self._tasks))

    @property
    def opening(self) -> tuple[int, ...]:
        """Partitions whose lane has not found its place yet."""
        return tuple(sorted(self._tasks.keys() - self._opened))

    def start(self, partition: int) -> None:
        """Runs the partition's lane. Does nothing while there is one."""
        if partition in self._tasks:
            return
        lane = self._make(partition, self._note_open)
        task = asyncio.create_task(lane.run(), name=f"lane {partition}")
        self._lanes[partition], self._tasks[partition] = lane, task
        task.add_done_callback(lambda _: self._note_end(partition, task))
        self._changed()

    def let_go(self, partition: int) -> None:
        """Ends the partition's lane for another process: it finishes its frame, or is cut off after `LET_GO`."""
        if partition in self._tasks and partition not in self._going:
            log.info("letting go", extra={"partition": partition})
            self._lanes[partition].stop(handing_over=True)
            going = asyncio.create_task(self._cut_off(partition, self._tasks[partition]), name=f"let go {partition}")
            self._going[partition] = going
            going.add_done_callback(lambda _: self._going.pop(partition))

    async def drain(self, limit_s: float, *, handing_over: bool) -> None:
        """Asks all lanes to end, and waits for `limit_s` at most. Raises what a lane could not go on with."""
        for lane in self._lanes.values():
            lane.stop(handing_over=handing_over)
        if tasks := set(self._tasks.values()):
            _, late = await asyncio.wait(tasks, timeout=limit_s)
            if late:
                log.error("%d lanes did not drain within %.0f s", len(late), limit_s)
        if self._failure is not None:
            raise self._failure

    async def close(self) -> None:
        """Cuts off every lane that still runs."""
        await end_tasks(*self._tasks.values(), *self._going.values())

    async def failed(self) -> None:
        """Raises what a lane could not go on with, as soon as there is such a lane."""
        await self._failed.wait()
        if self._failure is not None:
            raise self._failure

    def nudge(self) -> None:
        """The connection came back: every lane looks again."""
        for lane in self._lanes.values():
            lane.nudge()

    async def _cut_off(self, partition: int, task: asyncio.Task[None]) -> None:
        _, late = await asyncio.wait((task,), timeout=LET_GO.s)
        if late:
            log.warning("partition %d: cut off with a frame in hand; whoever takes it makes that again", partition)
            await end_tasks(task)

    def _note_open(self, partition: int) -> None:
        if partition not in self._opened:
            self._opened.add(partition)
            self._changed()

    def _note_end(self, partition: int, task: asyncio.Task[None]) -> None:
        del self._lanes[partition], self._tasks[partition]
        self._opened.discard(partition)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error
            self._failed.set()
        self._changed()
