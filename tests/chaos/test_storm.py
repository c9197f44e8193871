"""Half a minute of `make chaos`: real processes, real faults, nothing lost, doubled, reordered or altered."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cluster.testing.chaos.__main__ import run
from cluster.testing.chaos.report import markdown, read_outcomes, summary, write_outcomes
from cluster.testing.chaos.run import Outcome, Played

FINE = Outcome(
    seed=1,
    minutes=1,
    steps=(
        Played(1, 0.5, ("kill a stage (hash-0)",), ("kill a stage",), 0.25),
        Played(2, 9.0, ("kill a stage (hash-1)", "server down (n1) for 2.0 s"), ("kill a stage", "server down"), 4.0),
        Played(3, 20.0, ("disk full (store) for 3.0 s",), ("disk full",), None, "needs root"),
    ),
    attempted=10,
    acknowledged=10,
    repeated=0,
    stored=9,
    dead_lettered=1,
    faults={"lost": 0, "duplicated": 0, "reordered": 0, "altered": 0, "unexpected": 0},
    recovered=0,
    unknown=0,
    problems=(),
    counter_examples=(),
    drained_s=0.5,
)


@pytest.mark.cluster
async def test_a_short_storm_convicts_nothing(tmp_path: Path) -> None:
    outcome = await run(tmp_path, minutes=0.5, seed=7, rate_per_s=100, gateways=3)
    assert outcome.ok, summary(outcome)
    assert outcome.acknowledged > 0
    assert any(step.whole_s is not None for step in outcome.steps)


def test_a_lost_event_or_any_other_problem_convicts() -> None:
    assert FINE.ok
    assert "nothing convicts" in summary(FINE)
    for wrong in (
        msgspec.structs.replace(FINE, faults=dict(FINE.faults) | {"lost": 1}),
        msgspec.structs.replace(FINE, problems=("accounting",)),
    ):
        assert not wrong.ok
        assert "CONVICTED" in summary(wrong)


def test_the_table_has_each_kind_with_its_longest_time_and_leaves_out_what_was_passed_over() -> None:
    table = markdown([FINE, FINE])
    assert "| kill a stage | 4 | 4.0 | 4.0 |" in table
    assert "| server down | 2 | 4.0 | 4.0 |" in table
    assert "disk full" not in table
    assert "| 1 | 1 | 3 | 10 | 0 | 0 | 0 | 0 |" in table


def test_outcomes_are_kept_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "chaos.json"
    assert read_outcomes(path) == []
    write_outcomes(path, [FINE])
    assert read_outcomes(path) == [FINE]
