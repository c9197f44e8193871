"""A backlog that builds while a stage is stopped drains whole. `make bench-backlog` measures larger ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline import Load, running, settings, workload

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

EVENTS = 10_000


async def test_ten_thousand_events_that_waited_for_persist_drain_once_and_in_order(tmp_path: Path) -> None:
    async with running(tmp_path, settings()) as pipeline:
        await pipeline.supervisor.stop_stage("persist")
        load = Load(workload(seed=81, events=EVENTS))
        await load.publish(pipeline.client)
        assert load.accepted == EVENTS
        assert (await pipeline.totals()).persisted == 0
        await pipeline.supervisor.start_stage("persist")
        totals = await pipeline.assert_whole(load)
        assert (totals.persisted, totals.duplicates) == (EVENTS, 0)
