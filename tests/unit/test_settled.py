"""How much of what is sealed `FI_EVENTS` still keeps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.settings import Settings
from stages.persist.room import EventsRoom
from stages.persist.trim import Trimmer


class Sealed:
    """The files of a partition with three sealed shards, which end at origins 10, 20 and 30."""

    def __init__(self, *, empty: bool) -> None:
        self.sealed: dict[int, Path] = {}
        self._empty = empty

    def is_empty(self) -> bool:
        return self._empty

    def settled_origin(self, kept: int, copied: int | None) -> int:
        return 10 * min(3 - kept, 3 if copied is None else copied)


def trimmer_of(*, short: bool = False, spare: bool = True) -> Trimmer:
    api: Any = SimpleNamespace(settings=Settings(sealed_kept=1))
    room = EventsRoom(api)
    room.short, room.spare = short, spare
    return Trimmer(api, 0, room, lambda: None)


@pytest.mark.parametrize(
    ("short", "empty", "origin"), [(False, False, 20), (False, True, 20), (True, False, 20), (True, True, 30)]
)
def test_the_newest_sealed_shard_stays_until_nothing_else_is_left_that_could_make_room(
    short: bool, empty: bool, origin: int
) -> None:
    """Damaged, it is made again from there. All of a full stream may be in it, though."""
    trimmer = trimmer_of(short=short, spare=not short)
    files: Any = Sealed(empty=empty)
    trimmer.settle(files, None)
    assert trimmer.unclaimed == origin


def test_what_no_backup_has_leaves_only_where_room_is_wanted_and_that_is_told_once_for_each_shard(
    caplog: pytest.LogCaptureFixture,
) -> None:
    files: Any = Sealed(empty=False)
    trimmer = trimmer_of()
    trimmer.settle(files, 1)
    assert (trimmer.unclaimed, caplog.text) == (10, "")
    trimmer = trimmer_of(spare=False)
    for _ in range(2):
        trimmer.settle(files, 1)
    assert trimmer.unclaimed == 20
    assert caplog.text.count("what no backup has leaves FI_EVENTS") == 1
    trimmer = trimmer_of(spare=False)
    trimmer.settle(files, 3)
    assert caplog.text.count("what no backup has leaves FI_EVENTS") == 1, "a backup has all that leaves"
