"""What a stage refuses of one message is few letters, and each says of how many events it is."""

from __future__ import annotations

import msgspec

from contracts.errors import InvalidEventError
from contracts.letters import LETTERS_APART
from contracts.settings import Settings
from stages.runtime.breaker import Breaker
from stages.runtime.work import DeadLetter, join_letters


def letters(origin: int, *indexes: int, reason: str = "payload.value") -> list[DeadLetter]:
    return [DeadLetter(origin, index, InvalidEventError(reason, "payload", f"{index}"), None, 7) for index in indexes]


def test_neighbours_share_a_letter_once_a_message_has_many() -> None:
    few = letters(1, *range(LETTERS_APART))
    assert join_letters(few) == few
    many = letters(2, *range(1000))
    assert join_letters(few + many) == [
        *few,
        *many[:LETTERS_APART],
        msgspec.structs.replace(many[LETTERS_APART], lines=1000 - LETTERS_APART),
    ]


def test_only_neighbours_with_one_reason_share_a_letter() -> None:
    rest = letters(1, 100, 101, 103) + letters(1, 104, 105, reason="lifecycle.closed") + letters(1, 106)
    joined = join_letters(letters(1, *range(LETTERS_APART)) + rest)[LETTERS_APART:]
    assert [(letter.index, letter.lines) for letter in joined] == [(100, 2), (103, 1), (104, 2), (106, 1)]


def test_the_breaker_counts_events_and_not_letters() -> None:
    breaker = Breaker(Settings(dead_share_max=0.5))
    breaker._open(0.0)
    late_s = 1e9
    shared = [msgspec.structs.replace(letters(1, 0)[0], lines=1000)]
    assert not breaker.allows(500, shared, late_s)
    assert breaker.allows(1500, shared, 2 * late_s)
