"""The schedule of chaos is a function of its seed, and hits everything."""

from __future__ import annotations

from itertools import islice

from cluster.testing.chaos.faults import FAULTS
from cluster.testing.chaos.schedule import KINDS, PAIR_EVERY, schedule


def test_the_same_seed_gives_the_same_schedule_and_another_seed_another() -> None:
    first, again, other = (list(islice(schedule(seed), 50)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_every_kind_comes_once_before_any_comes_twice() -> None:
    faults = [fault for step in islice(schedule(3), 2 * len(KINDS)) for fault in step.faults]
    assert {fault.kind for fault in faults[: len(KINDS)]} == set(KINDS)


def test_every_third_step_is_a_pair_of_two_kinds_that_overlap() -> None:
    for step in islice(schedule(4), 300):
        assert len(step.faults) == (2 if step.number % PAIR_EVERY == 0 else 1)
        assert len({fault.kind for fault in step.faults}) == len(step.faults)
        assert all(fault.after_s <= step.faults[0].hold_s for fault in step.faults)


def test_targets_and_holds_are_those_of_the_kind() -> None:
    for step in islice(schedule(5), 300):
        for fault in step.faults:
            kind = KINDS[fault.kind]
            assert fault.target in kind.targets
            assert kind.hold_s[0] <= fault.hold_s <= kind.hold_s[1]


def test_every_kind_of_the_schedule_can_be_done() -> None:
    assert FAULTS.keys() == KINDS.keys()
