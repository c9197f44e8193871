"""A store of many sealed shards: duplicates are found in those whose ids are summarized, after a start as before it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline import Load, Totals, running, settings, until, workload

from stages.persist.ids import GROUP_SHARDS

pytestmark = pytest.mark.cluster

SHARDS = GROUP_SHARDS + 6
SUMMARIZED = '"ids summarized"'


async def test_duplicates_are_found_in_summarized_shards_before_and_after_a_start(tmp_path: Path) -> None:
    lines = workload(seed=51, events=2 * SHARDS)
    # Every commit but the first finds the live shard full.
    chosen = settings(partitions=1, dedup_window_s=0.1, shard_events_max=1)
    async with running(tmp_path, chosen) as pipeline:

        async def summaries() -> int:
            return pipeline.backend.logs()["persist-0"].count(SUMMARIZED)

        for first in range(0, len(lines), 2):
            await Load(lines[first : first + 2]).publish(pipeline.client)
            await pipeline.settled()
        await until(summaries, "a summary")
        again = Load(lines)
        # What is repeated within a tenth of a second the servers know themselves.
        known = (await again.publish(pipeline.client)).duplicates
        await pipeline.settled()
        assert await pipeline.totals() == Totals(len(lines), len(lines) - known, 0)

        made = await summaries()
        await pipeline.supervisor.stop_stage("persist")
        await pipeline.supervisor.start_stage("persist")

        async def summarized_again() -> bool:
            return await summaries() > made

        await until(summarized_again, "the summary after a start")
        known += (await Load(lines).publish(pipeline.client)).duplicates
        assert known < len(lines) // 10
        await pipeline.settled()
        assert await pipeline.totals() == Totals(len(lines), 2 * len(lines) - known, 0)
        # Nothing new is taken for a duplicate, and all of it is there once.
        more = Load(workload(seed=52, events=100))
        await more.publish(pipeline.client)
        await pipeline.settled()
        assert await pipeline.totals() == Totals(len(lines) + 100, 2 * len(lines) - known, 0)
        await pipeline.assert_whole(again)
