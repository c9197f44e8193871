"""The breaker: what opens it, what must not, and how it closes again."""

from __future__ import annotations

import random

import pytest

from contracts.errors import InvalidEventError
from contracts.settings import Settings
from stages.runtime.breaker import DOUBLINGS_MAX, Breaker
from stages.runtime.work import DeadLetter

PAUSE_S = 5.0


def made(**changes: float) -> Breaker:
    return Breaker(Settings(**{"dead_share_max": 0.5, "dead_events_min": 200, "breaker_pause_s": PAUSE_S, **changes}))


def letters(count: int, first: int = 1, reason: str = "event_type.unknown") -> list[DeadLetter]:
    """Letters of so many messages."""
    error = InvalidEventError(reason, "event_type", "no such event type: 'EATEN'")
    return [DeadLetter(origin, 0, error, None) for origin in range(first, first + count)]


def opened(breaker: Breaker) -> None:
    assert not breaker.allows(0, letters(200), 0.0)
    assert breaker.is_open


def test_nothing_but_refused_events_opens_it_before_any_of_the_frame_goes_out() -> None:
    breaker = made()
    assert all(breaker.allows(0, letters(1, first=n), 0.0) for n in range(199))
    assert not breaker.allows(0, letters(1, first=200), 0.0)
    assert breaker.hold_s(0.0) == PAUSE_S
    assert breaker.trips == 1


def test_a_long_good_past_delays_it_by_no_more_than_the_window() -> None:
    breaker = made()
    for _ in range(1000):
        assert breaker.allows(100, [], 0.0)
    allowed = 0
    while breaker.allows(0, letters(1, first=allowed), 0.0):
        allowed += 1
    assert 400 <= allowed <= 600


@pytest.mark.parametrize("seed", range(20))
def test_three_bad_events_in_ten_never_open_it(seed: int) -> None:
    rng, breaker = random.Random(seed), made()
    for number in range(20_000):
        bad = rng.random() < 0.3
        assert breaker.allows(not bad, letters(int(bad), first=number), 0.0)


def test_one_message_of_a_thousand_bad_events_does_not_open_it_but_ten_such_do() -> None:
    breaker = made()
    error = InvalidEventError("json.malformed", "", "not JSON")
    verdicts = [
        breaker.allows(0, [DeadLetter(origin, index, error, None) for index in range(1000)], 0.0)
        for origin in range(1, 11)
    ]
    assert verdicts == [True] * 9 + [False]


def test_frames_without_events_count_for_nothing() -> None:
    breaker = made()
    for _ in range(100_000):
        assert breaker.allows(0, [], 0.0)
    opened(breaker)
    assert breaker.allows(0, [], PAUSE_S), "an empty frame may go out in the trial"
    assert breaker.is_open, "and proves nothing"


def test_while_open_nothing_goes_out_until_the_pause_is_over() -> None:
    breaker = made()
    opened(breaker)
    assert not breaker.allows(500, [], PAUSE_S - 0.1), "a frame that was in hand when another lane opened it"
    assert breaker.is_open
    assert breaker.hold_s(PAUSE_S) == 0


def test_a_message_that_passes_closes_it_and_the_past_is_forgotten() -> None:
    breaker = made()
    opened(breaker)
    assert breaker.allows(1, [], PAUSE_S)
    assert not breaker.is_open
    assert breaker.allows(0, letters(199), PAUSE_S)
    assert not breaker.allows(0, letters(1, first=900), PAUSE_S)
    assert breaker.trips == 2
    assert breaker.hold_s(PAUSE_S) == PAUSE_S, "the pause begins anew"


def test_what_was_refused_before_it_closed_counts_no_more() -> None:
    breaker = made()
    opened(breaker)
    assert breaker.allows(1, [], PAUSE_S)
    assert breaker.allows(150, [], PAUSE_S)
    assert breaker.allows(0, letters(60, first=900), PAUSE_S)


def test_each_refused_trial_doubles_the_pause_up_to_a_limit_and_lanes_that_try_together_count_once() -> None:
    breaker = made()
    opened(breaker)
    now_s, pauses = 0.0, []
    for _ in range(DOUBLINGS_MAX + 2):
        now_s += breaker.hold_s(now_s)
        for lane in range(8):
            assert not breaker.allows(0, letters(1, first=lane), now_s)
        pauses.append(breaker.hold_s(now_s))
    limit = PAUSE_S * 2**DOUBLINGS_MAX
    assert pauses == [2 * PAUSE_S, 4 * PAUSE_S, 8 * PAUSE_S, limit, limit, limit]
    assert breaker.trips == 1


def test_a_share_of_one_never_opens_it() -> None:
    breaker = made(dead_share_max=1)
    for number in range(100):
        assert breaker.allows(0, letters(100, first=100 * number), 0.0)
    assert not breaker.is_open


def test_it_says_what_was_refused_most_with_an_example() -> None:
    breaker = made()
    assert breaker.allows(10, letters(50, reason="payload.value"), 0.0)
    last = letters(150, first=100)
    assert not breaker.allows(0, last, 0.0)
    text = breaker.explain(last)
    assert "200 of the last 210 events" in text
    assert "event_type.unknown 150, payload.value 50" in text
    assert "no such event type: 'EATEN'" in text
