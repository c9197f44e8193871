"""One run out of one seed: a cluster comes up under load, things go wrong, all is healed, and everything is held.

What must hold in the end: the pipeline drains within `DRAIN_S_MAX` after healing and stops when told to; the checker
finds nothing lost, doubled, reordered, altered or made up; and for every partition the events accepted are those
persisted, dead-lettered and recognised as duplicates, to the last one, in the receipts as on the disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from cluster.testing.checker import check, event_id_of
from cluster.testing.sim.faults import FAULTS, make_schedule
from cluster.testing.sim.load import attempts
from cluster.testing.sim.loop import StuckError, VirtualLoop
from cluster.testing.sim.strikes import Fault
from cluster.testing.sim.world import World
from contracts.events import decode_event

DRAIN_S_MAX: Final = 90.0
"""Virtual seconds after healing until all that was accepted is committed. Sums of backoffs, not work."""
POLL_S: Final = 0.1
THREAD_S_MIN, THREAD_S_MAX = 0.0001, 0.002


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        seed: its seed.
        faults: what went wrong, by plan, `among` which kinds.
        verdict: the checker's words; empty when it did not come to that.
        problems: what must not be, in words; empty when all is well.
        virtual_s: how long the run took on its own clock, `drained_s` of them after healing.
        events: sent in all.
        fingerprint: of the trace; empty without one.
    """

    seed: int
    faults: list[Fault]
    among: Sequence[str] = ()
    verdict: str = ""
    problems: list[str] = field(default_factory=list)
    virtual_s: float = 0.0
    drained_s: float = 0.0
    events: int = 0
    fingerprint: str = ""

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


def simulate(seed: int, *, among: Sequence[str] = (), trace: list[str] | None = None) -> Outcome:
    """Runs `seed`; what it does depends on the seed and `among` alone.

    Args:
        seed: any integer.
        among: kinds of faults, each a key of `FAULTS`, to have all of; empty: any.
        trace: takes a line for everything that happens.
    """
    rng = random.Random(seed)
    loop = VirtualLoop(lambda: rng.uniform(THREAD_S_MIN, THREAD_S_MAX))
    unheard: list[str] = []
    loop.set_exception_handler(lambda _, context: unheard.append(_surprise(context)))
    outcome = Outcome(seed, [], among)
    with _quiet(loop, trace):
        try:
            loop.run_until_complete(_run(World(loop, rng, trace), outcome))
        except StuckError as error:
            outcome.problems.append(str(error))
        finally:
            outcome.problems += unheard
            outcome.virtual_s = loop.time()
            _end(loop)
            loop.close()
    if trace is not None:
        outcome.fingerprint = hashlib.sha256("\n".join(trace).encode()).hexdigest()
    return outcome


async def _run(world: World, outcome: Outcome) -> None:
    rng, loop = world.rng, world.loop
    fault_s = rng.uniform(2.0, 6.0)
    outcome.faults = make_schedule(rng, fault_s, rng.randint(1, 7), outcome.among)
    for process in world.processes:
        process.start()
    for fault in outcome.faults:
        world.broker.later(fault.at_s, _strike, world, fault)
    world.send(fault_s * rng.choice((0.2, 0.6, 1.0)))
    looking = [asyncio.create_task(world.people.look()), asyncio.create_task(world.people.back_up())]
    world.people.typing = looking
    await asyncio.sleep(fault_s + 0.5)
    world.heal()
    healed_s = loop.time()
    calm_s = loop.time()
    while (is_busy := world.is_busy) or loop.time() < calm_s + world.told_s:
        calm_s = loop.time() if is_busy else calm_s
        await asyncio.sleep(POLL_S)
        if loop.time() > healed_s + DRAIN_S_MAX:
            behind = world.behind()
            outcome.problems.append(
                f"not drained {DRAIN_S_MAX:.0f} s after healing: (committed, stored) by partition {behind}"
                + ("" if world.sending.done() else "; gateways still wait")
            )
            break
    outcome.drained_s = loop.time() - healed_s
    if not outcome.problems:
        try:
            await asyncio.gather(*(process.stop() for process in world.processes))
        except TimeoutError as error:
            outcome.problems.append(str(error))
    for task in (*looking, world.sending):
        task.cancel()
    await asyncio.wait((*looking, world.sending))
    ended = [task.exception() for task in looking if not task.cancelled()]
    outcome.problems += [repr(error) for error in ended if error is not None]
    for process in world.processes:
        process.abandon()
        if process.failure is not None:
            outcome.problems.insert(0, f"{process.name} ended with {process.failure!r}")
    judge(world, outcome)


def _strike(world: World, fault: Fault) -> None:
    world.broker.say(f"fault: {fault.kind}")
    FAULTS[fault.kind](world, fault)


def judge(world: World, outcome: Outcome) -> None:
    """Holds what is stored against what was sent, and adds what is wrong to the outcome."""
    stored = []
    for partition in range(world.settings.partitions):
        receipt = world.receipt(partition)
        if receipt is None:
            if world.accepted[partition] and not outcome.problems:
                outcome.problems.append(f"partition {partition} took events and has no receipt")
            continue
        records = world.disk_of(receipt).records(partition)
        stored += [decode_event(record) for record in records]
        letters = sum(message.subject.endswith(f".{partition}") for message in world.letters)
        books = (receipt.persisted, receipt.dead_lettered)
        if outcome.problems:
            continue
        if books != (len(records), letters):
            outcome.problems.append(
                f"partition {partition}: the receipt has {books[0]} persisted and {books[1]} dead-lettered, "
                f"there are {len(records)} and {letters}"
            )
        settled = receipt.persisted + receipt.dead_lettered + receipt.duplicates
        # Of what a stream took that was rolled back, nothing is read, and what is sent again counts twice.
        if settled > world.accepted[partition] or (settled < world.accepted[partition] and not world.rolled_back):
            outcome.problems.append(
                f"partition {partition}: {world.accepted[partition]} events were accepted, {settled} are settled "
                f"({receipt.persisted} persisted, {receipt.dead_lettered} dead, {receipt.duplicates} duplicates)"
            )
    sent = [event for site in world.sites for lines in site.consultations for line in lines for event in line]
    outcome.events = len(sent)
    dead = [event_id_of(message.data) for message in world.letters]
    if b"" in dead:
        outcome.problems.append("a dead letter does not hold the event that was refused")
    came = {event.line for event in sent}
    if not world.rolled_back and any(message.data not in came for message in world.letters):
        outcome.problems.append("a dead letter does not hold the event as it came")
    if world.rolled_back or world.is_taken_twice:
        # Servers that forgot a message's id take it again, and letters know no ids.
        dead = list(dict.fromkeys(dead))
    tried = attempts(world.sites, letters_count=not world.rolled_back)
    verdict = check(tried, stored, filter(None, dead))
    outcome.verdict = str(verdict)
    if not verdict.ok and not any("not drained" in problem for problem in outcome.problems):
        outcome.problems.insert(0, str(verdict))
    wrong = {event.event_id.bytes for event in sent if event.dies} ^ set(dead)
    if world.rolled_back:
        wrong &= set(dead)
    if wrong and not outcome.problems:
        outcome.problems.append(f"{len(wrong)} events are dead letters that should not be, or the other way round")


def _surprise(context: dict[str, Any]) -> str:
    error = context.get("exception")
    return f"{context.get('message')}: {error!r}"


def _end(loop: VirtualLoop) -> None:
    """Lets what was killed run out, so that no run leaves a task behind."""
    for _ in range(20):
        if not (left := asyncio.all_tasks(loop)):
            return
        for task in sorted(left, key=lambda task: task.get_name()):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(5.0))


@contextmanager
def _quiet(loop: VirtualLoop, trace: list[str] | None) -> Iterator[None]:
    """Log lines go to the trace, or nowhere."""
    root = logging.getLogger()
    before = root.manager.disable, root.level, root.handlers[:]
    if trace is None:
        logging.disable(logging.CRITICAL)
    else:
        root.handlers[:] = [_ToTrace(loop, trace)]
        root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.manager.disable, level, root.handlers[:] = before
        root.setLevel(level)


class _ToTrace(logging.Handler):
    def __init__(self, loop: VirtualLoop, trace: list[str]) -> None:
        super().__init__()
        self._loop = loop
        self._trace = trace

    def emit(self, record: logging.LogRecord) -> None:
        task = asyncio.current_task(self._loop) if self._loop.is_running() else None
        name = "" if task is None else task.get_name()
        # asyncio numbers the tasks without a name through the life of the interpreter.
        who = "" if name.startswith("Task-") else name
        self._trace.append(f"{self._loop.time():10.6f} log {who}: {record.getMessage()}")
