"""What a load that ends early tells the checker."""

from __future__ import annotations

import asyncio

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
