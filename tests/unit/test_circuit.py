"""The circuit before a stream or a disk: by example, under any interleaving, and with tasks that wait at it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stages.runtime.circuit import Circuit, Gate
from stages.runtime.instruments import Counter
from stages.runtime.tasks import end_tasks

FAILURES_MAX = 3
PAUSE_S_MIN, PAUSE_S_MAX, TRY_S_MAX = 0.125, 1.0, 2.0
BOUND_S = max(PAUSE_S_MAX, TRY_S_MAX)


def make(trips: Counter | None = None, jitter: float = 0.5, **changed: float) -> Circuit:
    times = {"pause_s_min": PAUSE_S_MIN, "pause_s_max": PAUSE_S_MAX, "try_s_max": TRY_S_MAX} | changed
    return Circuit(failures_max=FAILURES_MAX, jitter=lambda: jitter, trips=trips or Counter(), **times)


def tripped(circuit: Circuit, now_s: float) -> None:
    for _ in range(FAILURES_MAX):
        assert circuit.ask(now_s) == 0
        circuit.failed(now_s, now_s)
    assert circuit.state(now_s) == "open"


def test_it_opens_after_failures_in_a_row_and_an_answer_between_them_begins_the_count_anew() -> None:
    trips = Counter()
    circuit = make(trips)
    for now_s in (1.0, 2.0, 3.0, 4.0):
        assert not circuit.failed(now_s, now_s)
        assert not circuit.failed(now_s + 0.1, now_s + 0.1)
        assert not circuit.answered(now_s + 0.2)
    assert circuit.state(5.0) == "closed"
    assert [circuit.failed(5.0, 5.0) for _ in range(FAILURES_MAX)] == [False, False, True]
    assert trips.value == 1
    assert 0 < circuit.ask(5.0) <= PAUSE_S_MIN


def test_the_pause_doubles_up_to_its_limit_and_begins_anew_after_an_answer() -> None:
    circuit = make(jitter=0.999)
    now_s, pauses_s = 0.0, []
    for _ in range(2):
        tripped(circuit, now_s)
        for _ in range(6):
            pauses_s.append(round(circuit.ask(now_s), 2))
            now_s += circuit.ask(now_s)
            assert circuit.state(now_s) == "half-open"
            assert circuit.ask(now_s) == 0
            circuit.failed(now_s, now_s)
        circuit.answered(now_s)
    assert pauses_s == [0.12, 0.25, 0.5, 1.0, 1.0, 1.0] * 2


def test_an_outage_may_last_for_days_and_its_pauses_are_jittered_by_half() -> None:
    circuit = make(jitter=0.0)
    tripped(circuit, 0.0)
    now_s = 0.0
    for _ in range(2000):
        now_s += circuit.ask(now_s)
        assert circuit.ask(now_s) == 0
        circuit.failed(now_s, now_s)
    assert circuit.ask(now_s) == pytest.approx(PAUSE_S_MAX / 2)


def test_one_is_let_through_at_a_time_and_a_lost_one_is_replaced_when_its_time_is_over() -> None:
    circuit = make()
    tripped(circuit, 0.0)
    assert circuit.ask(1.0) == 0
    assert circuit.state(1.0) == "half-open"
    assert circuit.ask(1.0) == TRY_S_MAX
    assert circuit.ask(1.0 + TRY_S_MAX / 2) == TRY_S_MAX / 2
    assert circuit.ask(1.0 + TRY_S_MAX) == 0


def test_it_is_silent_in_a_pause_and_while_one_tries_but_not_when_nobody_has_anything_to_try() -> None:
    circuit = make()
    assert not circuit.is_silent(0.0)
    tripped(circuit, 0.0)
    assert circuit.is_silent(0.0)
    assert not circuit.is_silent(1.0)
    assert circuit.ask(1.0) == 0
    assert circuit.is_silent(1.0 + TRY_S_MAX / 2)
    assert not circuit.is_silent(1.0 + TRY_S_MAX)
    circuit.answered(1.5)
    assert not circuit.is_silent(1.5)


def test_what_began_before_the_last_answer_or_the_last_try_says_nothing_new() -> None:
    circuit = make()
    circuit.answered(1.0)
    for _ in range(2 * FAILURES_MAX):
        circuit.failed(2.9, begun_s=0.9)
    assert circuit.state(2.9) == "closed"
    tripped(circuit, 3.0)
    circuit.failed(3.05, begun_s=2.95)
    assert circuit.ask(4.0) == 0
    circuit.failed(4.5, begun_s=3.0)
    assert circuit.ask(4.5) == TRY_S_MAX - 0.5, "the one let through at 4 is still at it"
    circuit.failed(5.0, begun_s=4.0)
    assert circuit.state(5.0) == "open"


def test_a_sign_lets_one_through_at_once_but_a_stream_of_signs_is_no_way_around_the_pause() -> None:
    circuit = make()
    assert not circuit.poke(0.0)
    tripped(circuit, 0.0)
    assert circuit.poke(0.01)
    assert circuit.ask(0.01) == 0
    circuit.failed(0.02, 0.01)
    granted = 0
    for millisecond in range(30, 1000):
        now_s = millisecond / 1000
        circuit.poke(now_s)
        if circuit.ask(now_s) == 0:
            granted += 1
            circuit.failed(now_s, now_s)
    assert granted <= 3


class Interleavings(RuleBasedStateMachine):
    """Any callers in any order: they ask, are answered, fail, are cut off; time goes on, signs come.

    Times are binary fractions, so that sums of them are exact.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.circuit = make(jitter=0.25)
        self.under_way: list[tuple[float, bool]] = []
        """(began at, was let through by an open circuit) of everybody who has not said how it went."""
        self.signs_s: list[float] = []

    @rule(seconds=st.sampled_from((0.0, 1 / 64, 1 / 8, 5 / 16, 1.0, 2.5)))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def somebody_asks(self) -> None:
        is_open = self.circuit.state(self.now_s) != "closed"
        hold_s = self.circuit.ask(self.now_s)
        assert 0 <= hold_s <= BOUND_S
        if not is_open:
            assert hold_s == 0
        if hold_s:
            return
        if is_open:
            # Nobody else is at it but who has had all of its time, or was there before a sign.
            since_s = max([self.now_s - TRY_S_MAX, *(s for s in self.signs_s if s <= self.now_s)])
            assert not [begun_s for begun_s, single in self.under_way if single and begun_s > since_s]
        self.under_way.append((self.now_s, is_open))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def somebody_fails(self, data: st.DataObject) -> None:
        begun_s, _ = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        before = self.circuit.state(self.now_s)
        self.circuit.failed(self.now_s, begun_s)
        assert before == "closed" or self.circuit.state(self.now_s) != "closed"

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def somebody_is_answered(self, data: st.DataObject) -> None:
        self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        self.circuit.answered(self.now_s)
        self.under_way = [(begun_s, False) for begun_s, _ in self.under_way]
        assert self.circuit.state(self.now_s) == "closed"

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def somebody_is_cut_off(self, data: st.DataObject) -> None:
        self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))

    @rule()
    def a_sign_comes(self) -> None:
        if self.circuit.poke(self.now_s):
            self.signs_s.append(self.now_s)

    @invariant()
    def the_state_is_one_of_three(self) -> None:
        assert self.circuit.state(self.now_s) in ("closed", "half-open", "open")

    def teardown(self) -> None:
        """Whatever happened: somebody is let through again within the bound, and an answer then closes it."""
        waited_s = 0.0
        while hold_s := self.circuit.ask(self.now_s):
            waited_s += hold_s
            self.now_s += hold_s
            assert waited_s <= BOUND_S
        self.circuit.answered(self.now_s)
        assert self.circuit.state(self.now_s) == "closed"
        assert self.circuit.ask(self.now_s) == 0


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=300, stateful_step_count=40)


async def test_tasks_at_an_open_gate_try_one_at_a_time_and_all_go_on_once_one_was_answered() -> None:
    said: list[str] = []
    gate = Gate(make(pause_s_max=0.05, try_s_max=60.0), said.append)
    well = asyncio.Event()
    at_once = tries = most_at_once = 0

    async def work() -> None:
        nonlocal tries, at_once, most_at_once
        while True:
            begun_s = await gate.turn()
            # What began before it opened is not held back.
            counts = bool(said)
            tries, at_once = tries + 1, at_once + counts
            most_at_once = max(most_at_once, at_once)
            await asyncio.sleep(0.001)
            at_once -= counts
            if well.is_set():
                gate.answered()
                return
            gate.failed(begun_s)

    tasks = [asyncio.create_task(work()) for _ in range(8)]
    await asyncio.sleep(0.5)
    before = tries
    assert most_at_once == 1
    assert before < 8 + FAILURES_MAX + 60
    well.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*tasks)
    assert ["open" in words for words in said] == [True, False]


async def test_a_task_cancelled_while_it_tries_or_waits_keeps_nobody_from_trying() -> None:
    gate = Gate(make(try_s_max=0.1), lambda _: None)
    for _ in range(FAILURES_MAX):
        gate.failed(await gate.turn())
    waiting = [asyncio.create_task(gate.turn()) for _ in range(4)]
    async with asyncio.timeout(5):
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        # Whoever was let through never says how it went; of the others one is cut off.
        lost = sum(task.done() for task in waiting)
        await end_tasks(next(task for task in waiting if not task.done()))
        assert lost == 1
        await gate.turn()


@pytest.mark.parametrize("answer", ["answered", "poke"])
async def test_who_waits_is_woken_by_an_answer_or_a_sign(answer: str) -> None:
    circuit = make(pause_s_min=600, pause_s_max=600)
    gate = Gate(circuit, lambda _: None)
    for _ in range(FAILURES_MAX):
        gate.failed(await gate.turn())
    waiting = asyncio.create_task(gate.turn())
    await asyncio.sleep(0)
    assert not waiting.done()
    getattr(gate, answer)()
    async with asyncio.timeout(5):
        await waiting


async def test_who_comes_after_those_who_were_woken_waits_and_does_not_ask_without_end() -> None:
    gate = Gate(make(pause_s_min=600, pause_s_max=600), lambda _: None)
    for _ in range(FAILURES_MAX):
        gate.failed(await gate.turn())
    gate.answered()
    for _ in range(FAILURES_MAX):
        gate.failed(await gate.turn())
    waiting = asyncio.create_task(gate.turn())
    await asyncio.sleep(0)
    assert not waiting.done()
    await end_tasks(waiting)
