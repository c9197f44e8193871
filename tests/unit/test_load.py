"""What a load that ends early, or is acknowledged by a stranger, tells the checker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from cluster.testing.load import LINES_AFTER, Load, workload


async def test_once_it_is_enough_a_few_lines_more_are_begun_and_only_those_begun_are_judged() -> None:
    load, enough = Load(workload(seed=1, events=500)), asyncio.Event()
    assert len(load.attempts) == 500
    begun = []
    async for line in load._until(enough):
        begun.append(line)
        if len(begun) == 50:
            enough.set()
    assert begun == load.lines[: 50 + LINES_AFTER]
    assert len(load.attempts) == len(begun)


async def test_all_that_was_ever_begun_is_judged() -> None:
    load, enough = Load(workload(seed=1, events=150)), asyncio.Event()
    assert [line async for line in load._until(enough)] == load.lines
    enough.set()
    assert len([line async for line in load._until(enough)]) == LINES_AFTER
    assert len(load.attempts) == 150


@pytest.mark.parametrize(
    "written", [str, str.encode, UUID, lambda _: UUID(int=1).bytes], ids=["text", "ascii", "UUID", "other"]
)
def test_what_is_acknowledged_must_be_an_event_of_the_load(written: Callable[[str], Any]) -> None:
    load = Load(workload(seed=1, events=3))
    event_id = json.loads(load.lines[0])["event_id"]
    with pytest.raises(ValueError, match="no event of this load; an id is UUID"):
        load.acknowledge([UUID(event_id).bytes, written(event_id)])
    assert load.acknowledged == {UUID(event_id).bytes}
