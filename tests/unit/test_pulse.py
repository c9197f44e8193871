"""When a server counts as lost, and what it has surely read."""

from __future__ import annotations

import asyncio

import pytest

from stages.runtime.pulse import NOTHING, Pulse

MB = 1_000_000
IN_VAIN_MAX = 2


class Link:
    """A connection whose pulse is felt."""

    def __init__(self) -> None:
        self.pulse = Pulse(IN_VAIN_MAX, 0)
        self.given = self.left = 0
        self._pings: list[asyncio.Future[bool]] = []

    def beat(self, *, heard: bool = False) -> bool:
        """One interval."""
        lives = self.pulse.beat(self.left, heard=heard)
        self._pings.append(self.pulse.ping(self.given))
        return lives

    def answer(self) -> None:
        """To the oldest ping."""
        self._pings.pop(0).set_result(True)


@pytest.fixture
async def link() -> Link:
    return Link()


async def test_the_third_ping_in_vain_is_not_sent(link: Link) -> None:
    assert [link.beat() for _ in range(3)] == [True, True, False]


async def test_whatever_is_read_is_a_sign_of_life(link: Link) -> None:
    assert all(link.beat(heard=True) for _ in range(9))
    assert [link.beat(), link.beat()] == [True, False]


async def test_while_what_stands_before_a_ping_leaves_the_server_is_not_lost(link: Link) -> None:
    link.given = 9 * MB
    for _ in range(9):
        assert link.beat()
        link.left += MB
    # The first ping has left. What leaves behind it, a frozen server's kernel takes too.
    link.given += 9 * MB
    link.left += MB
    assert link.beat()
    link.left += MB
    assert not link.beat()


async def test_one_pause_of_what_leaves_is_forgiven_each_time(link: Link) -> None:
    link.given = 9 * MB
    assert link.beat()
    for _ in range(4):
        link.left += MB
        assert link.beat()
        assert link.beat()


async def test_what_does_not_leave_is_no_sign_of_life(link: Link) -> None:
    link.given = 9 * MB
    assert [link.beat() for _ in range(3)] == [True, True, False]


async def test_what_an_answered_ping_stands_behind_has_been_read(link: Link) -> None:
    link.beat()
    link.given = link.left = MB
    link.beat(heard=True)
    link.given = 3 * MB
    link.answer()
    link.beat(heard=True)
    # It owes an answer to the ping behind the first megabyte: that a hop took it says nothing.
    assert link.pulse.reached == 0
    link.answer()
    link.left = 2 * MB
    link.answer()
    link.beat(heard=True)
    assert link.pulse.reached == 3 * MB


async def test_of_a_server_that_only_takes_what_leaves_is_known_what_it_read(link: Link) -> None:
    """Or what is still on its way to it would count as unanswered."""
    link.beat()
    link.given = 9 * MB
    link.answer()
    link.beat(heard=True)
    link.left = MB
    link.beat()
    assert link.pulse.reached == 0


async def test_where_no_answer_is_owed_what_has_left_was_read(link: Link) -> None:
    link.beat()
    link.answer()
    link.given, link.left = 3 * MB, 2 * MB
    link.beat(heard=True)
    assert link.pulse.reached == 2 * MB


async def test_of_a_server_without_signs_of_life_nothing_is_known(link: Link) -> None:
    link.given = link.left = MB
    link.beat(heard=True)
    link.beat()
    assert link.pulse.reached == NOTHING
