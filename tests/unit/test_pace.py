"""A lane's frames are held apart only where that gathers company, and never when nothing came for a while."""

from __future__ import annotations

import pytest

from stages.runtime.pace import Pace

GAP_S = 0.008


def run(rate_per_s: float, seconds: float, gap_s: float = GAP_S) -> list[int]:
    """Messages in each frame of a lane whose frames cost no time, at a steady rate."""
    pace, frames = Pace(), list[int]()
    now_s, taken = 0.0, 0
    while now_s < seconds:
        waiting = int(now_s * rate_per_s) - taken
        if waiting <= 0:
            now_s = (taken + 1) / rate_per_s + 1e-9
            continue
        now_s += pace.wait_s(now_s, gap_s)
        waiting = int(now_s * rate_per_s) - taken
        pace.begin(now_s, waiting)
        taken += waiting
        frames.append(waiting)
    return frames


def test_what_comes_seldom_goes_at_once() -> None:
    assert set(run(200, 3)) == {1}


@pytest.mark.parametrize("rate", [500, 2000, 20_000])
def test_what_comes_often_goes_together(rate: float) -> None:
    frames = run(rate, 3)
    late = frames[len(frames) // 2 :]
    assert sum(late) / len(late) == pytest.approx(rate * GAP_S, rel=0.2)


def test_no_gap_holds_nothing() -> None:
    assert Pace().wait_s(1.0, GAP_S) == 0.0
    pace = Pace()
    pace.begin(1.0, 10_000)
    assert pace.wait_s(1.0, 0.0) == 0.0


def test_the_wait_ends_a_gap_after_the_last_frame_began() -> None:
    pace = Pace()
    pace.begin(1.0, 1_000)
    assert pace.wait_s(1.003, GAP_S) == pytest.approx(0.005)
    assert pace.wait_s(1.02, GAP_S) == 0.0


def test_a_burst_is_forgotten() -> None:
    pace = Pace()
    pace.begin(1.0, 100)
    rates = [pace.wait_s(1.0 + age_s, 10.0) > 0 for age_s in (0.0, 0.25, 5.0)]
    assert rates == [True, True, False]


def test_a_load_is_forgotten_within_a_third_of_a_second() -> None:
    pace, now_s = Pace(), 0.0
    while now_s < 1.0:
        pace.begin(now_s, 150)
        now_s += 0.010
    waits = []
    for _ in range(200):
        now_s += 0.005
        waits.append(pace.wait_s(now_s, GAP_S) > 0)
        pace.begin(now_s, 1)
    assert waits[1]
    assert not any(waits[60:])
