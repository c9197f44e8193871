"""One run of chaos: load, faults by the schedule, healing, draining, judgement.

After each step the pipeline must become *whole*: in every partition a message that was accepted after the last healing
is committed. How long that takes is measured from that healing, for a fault without a hold from when it was done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from typing import Any, Final

import msgspec

from cluster.testing.chaos.faults import begin
from cluster.testing.chaos.fleet import Book, EdgeGateway
from cluster.testing.chaos.ground import Ground
from cluster.testing.chaos.schedule import KINDS, Planned, Step, schedule
from cluster.testing.checker import FAULTS, check
from contracts.errors import FiError
from stages.runtime.tasks import end_tasks, side_by_side

log = logging.getLogger(__name__)

WHOLE_S_MAX: Final = 120.0
"""A pipeline that is not whole after so long is stuck, which convicts it."""
DRAIN_S_MAX: Final = 300.0
POLL_S: Final = 0.05
INJECT_S_MAX: Final = 180.0


class Played(msgspec.Struct, frozen=True):
    """One step, as it went.

    Attributes:
        number: of the step.
        at_s: since the run began.
        faults: in words.
        kinds: of the faults.
        whole_s: from the last healing until the pipeline was whole; None for a step that was passed over.
        skipped: why it was passed over.
    """

    number: int
    at_s: float
    faults: tuple[str, ...]
    kinds: tuple[str, ...]
    whole_s: float | None
    skipped: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """A whole run.

    Attributes:
        seed, minutes: as asked for.
        steps: in order.
        attempted, acknowledged, repeated, stored, dead_lettered: events.
        faults: events found lost, duplicated, reordered, altered, unexpected.
        recovered, unknown: events whose outcome the gateway never learnt, stored and not.
        problems: whatever else convicts: accounting that does not close, a store that does not verify, no progress.
        counter_examples: the checker's words.
        drained_s: from the last healing until everything accepted was committed.
    """

    seed: int
    minutes: float
    steps: tuple[Played, ...]
    attempted: int
    acknowledged: int
    repeated: int
    stored: int
    dead_lettered: int
    faults: Mapping[str, int]
    recovered: int
    unknown: int
    problems: tuple[str, ...]
    counter_examples: tuple[str, ...]
    drained_s: float

    @property
    def ok(self) -> bool:
        """Nothing convicts the pipeline."""
        return not self.problems and not any(self.faults.values())


class StuckError(FiError):
    """The pipeline did not become whole, or did not drain, in time."""


class Chaos:
    """Runs one seed against a started ground.

    Args:
        ground: the pipeline and what hurts it.
        seed: of schedule and load.
        rate_per_s: events a second of all gateways together.
        gateways: how many.
        on_step: told of each step when it is over.
    """

    def __init__(
        self, ground: Ground, seed: int, *, rate_per_s: float, gateways: int, on_step: Callable[[Played], None]
    ) -> None:
        self._ground = ground
        self._seed = seed
        self._on_step = on_step
        self._book = Book()
        settings = ground.settings
        ground.gateways = {
            name: EdgeGateway(
                name,
                ground.cluster.directory / "logs" / f"{name}.log",
                ground.cluster.urls,
                1000 * seed + number,
                rate_per_s / gateways,
                settings.partitions,
                settings.partition_by,
                self._book,
            )
            for number, name in enumerate(f"gateway-{number}" for number in range(gateways))
        }
        self._began_s = 0.0
        self._steps: list[Played] = []

    async def run(self, minutes: float) -> Outcome:
        """Plays the schedule for `minutes`, heals, drains and judges.

        Raises:
            FiError: the ground itself failed: a process that cannot be started, a gateway that cannot publish.
        """
        self._began_s = time.monotonic()
        problems: list[str] = []
        gateways = [asyncio.create_task(gateway.run(), name=name) for name, gateway in self._ground.gateways.items()]
        try:
            await self._beside(gateways, self._whole(0.0))
            for step in schedule(self._seed):
                if time.monotonic() - self._began_s >= 60 * minutes:
                    break
                played = await self._beside(gateways, self._play(step))
                self._steps.append(played)
                self._on_step(played)
            healed_s = time.monotonic()
            for gateway in self._ground.gateways.values():
                gateway.finish()
            async with asyncio.timeout(DRAIN_S_MAX):
                await asyncio.gather(*gateways)
            await self._drained()
            drained_s = time.monotonic() - healed_s
        except StuckError as stuck:
            problems.append(str(stuck))
            drained_s = -1.0
        finally:
            await end_tasks(*gateways)
        return await self._judge(minutes, problems, drained_s)

    async def _beside(self, gateways: Iterable[asyncio.Task[None]], job: Any) -> Any:
        """`job`, unless a gateway fails first."""
        task = asyncio.create_task(job)
        try:
            await asyncio.wait((task, *gateways), return_when=asyncio.FIRST_COMPLETED)
            for gateway in gateways:
                if gateway.done():
                    gateway.result()
            return await task
        finally:
            await end_tasks(task)

    async def _play(self, step: Step) -> Played:
        await asyncio.sleep(step.quiet_s)
        at_s = time.monotonic() - self._began_s
        words, kinds = tuple(map(str, step.faults)), tuple(fault.kind for fault in step.faults)
        if not self._ground.disk_is_small and any(KINDS[kind].needs_small_disk for kind in kinds):
            why = "filling the disk needs a file system of its own, so root"
            return Played(step.number, round(at_s, 1), words, kinds, None, why)
        healed = await side_by_side(*map(self._fault, step.faults))
        healed_s = max(healed)
        whole_s = await self._whole(healed_s)
        return Played(step.number, round(at_s, 1), words, kinds, round(whole_s - healed_s, 2))

    async def _fault(self, planned: Planned) -> float:
        """Does one fault and heals it; gives the moment from which being whole counts."""
        await asyncio.sleep(planned.after_s)
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(INJECT_S_MAX):
                await stack.enter_async_context(begin(self._ground, planned))
            done_s = time.monotonic()
            if not planned.hold_s:
                return done_s
            await asyncio.sleep(planned.hold_s)
            return time.monotonic()

    async def _whole(self, since_s: float) -> float:
        """Waits until every partition has committed something accepted after `since_s`; gives the moment."""
        goals: dict[int, int] = {}
        partitions = self._ground.settings.partitions
        deadline_s = time.monotonic() + WHOLE_S_MAX
        reached: dict[int, int] = {}
        while time.monotonic() < deadline_s:
            for partition, (origin, accepted_s) in self._book.newest.items():
                if accepted_s > since_s:
                    goals.setdefault(partition, origin)
            if len(goals) == partitions:
                reached = await self._ground.reached(deadline_s - time.monotonic())
                if all(reached.get(partition, 0) >= goal for partition, goal in goals.items()):
                    return time.monotonic()
            await asyncio.sleep(POLL_S)
        raise StuckError(
            f"not whole {WHOLE_S_MAX:.0f} s after the last fault was healed: of the goals {goals} "
            f"(partition: origin) only {reached} is committed"
        )

    async def _drained(self) -> None:
        goals = {partition: origin for partition, (origin, _) in self._book.newest.items()}
        deadline_s = time.monotonic() + DRAIN_S_MAX
        reached: dict[int, int] = {}
        while time.monotonic() < deadline_s:
            reached = await self._ground.reached(deadline_s - time.monotonic())
            if all(reached.get(partition, 0) >= goal for partition, goal in goals.items()):
                # Readers see a commit a moment after its receipt. Where they never do, the judge says what is missing.
                with contextlib.suppress(AssertionError):
                    await self._ground.cluster.settled()
                return
            await asyncio.sleep(POLL_S)
        raise StuckError(f"not drained in {DRAIN_S_MAX:.0f} s: goals {goals}, committed {reached}")

    async def _judge(self, minutes: float, problems: list[str], drained_s: float) -> Outcome:
        book, ground = self._book, self._ground
        stored = await ground.cluster.events()
        letters = await ground.dead_ids()
        verdict = check(book.judged(), stored, set(letters))
        wrongly_dead = set(letters) - book.bad
        if wrongly_dead:
            problems.append(f"{len(wrongly_dead)} valid events are dead letters")
        if passed := verdict.stored - sum(event.event_id not in book.bad for event in stored):
            problems.append(f"{passed} bad events are stored")
        problems += await ground.problems(book.events_of)
        return Outcome(
            seed=self._seed,
            minutes=minutes,
            steps=tuple(self._steps),
            attempted=verdict.attempted,
            acknowledged=verdict.acknowledged,
            repeated=book.repeats,
            stored=verdict.stored,
            dead_lettered=len(letters),
            faults={kind: len(verdict.all(kind)) for kind in FAULTS},
            recovered=len(verdict.all("recovered")),
            unknown=len(verdict.all("unknown")),
            problems=tuple(problems),
            counter_examples=tuple(f.counter_example for f in verdict.consultations.values() if f.counter_example)[:10],
            drained_s=round(drained_s, 1),
        )
