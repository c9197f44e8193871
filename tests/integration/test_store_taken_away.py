"""A store whose files are taken from under its persister: by another one, a mount, or a rename."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from lanes import going
from pipeline import Load, running, settings, until, workload

from contracts.telemetry import EVENT_PERSIST_FAILED
from stages.persist.actor import PersistLane
from stages.persist.core import Group
from stages.persist.disk import LOCAL
from stages.persist.names import lock_name
from stages.persist.partition import PartitionFiles
from stages.persist.storedir import open_store
from stages.runtime.facts import read_cluster

pytestmark = pytest.mark.cluster


class Halt:
    """Persist's files, which can be made to halt before a commit: as a process does that is frozen there."""

    def __init__(self) -> None:
        self.due = threading.Event()
        self.halted = threading.Event()
        self.over = threading.Event()
        self.disk = LOCAL._replace(open=self._open)

    def _open(self, *arguments: Any) -> PartitionFiles:
        files = PartitionFiles.open(*arguments)
        fits = files.fits

        def halting(group: Group) -> bool:
            if self.due.is_set():
                self.halted.set()
                assert self.over.wait(120)
            return fits(group)

        files.fits = halting  # type: ignore[method-assign]
        return files


async def test_who_lost_its_lock_file_writes_nothing_over_what_its_successor_committed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    halt = Halt()
    first, second = Load(workload(seed=31, events=50)), Load(workload(seed=32, events=50))
    third = Load(workload(seed=33, events=50))
    async with running(tmp_path, settings(partitions=1), {"persist": 0}) as pipeline:
        store = open_store(pipeline.shards, (await read_cluster(pipeline.client)).cluster_id, now_ns=1)
        before = PersistLane(pipeline.api, store, 0, "before", lambda _: None, disk=halt.disk)
        after = PersistLane(pipeline.api, store, 0, "after", lambda _: None)
        async with going(before):
            try:
                await first.publish(pipeline.client)
                await pipeline.settled()
                halt.due.set()
                await second.publish(pipeline.client)
                assert await asyncio.to_thread(halt.halted.wait, 60)
                (pipeline.shards / lock_name(0)).unlink()
                async with going(after):
                    await third.publish(pipeline.client)
                    await pipeline.settled()
                    halt.over.set()

                    async def told() -> bool:
                        return any("stands by" in record.getMessage() for record in caplog.records)

                    await until(told, "who lost the partition stands by")
            finally:
                halt.over.set()
            await pipeline.assert_whole(first, second, third)
    assert any(record.message == EVENT_PERSIST_FAILED for record in caplog.records)


async def test_a_store_that_is_not_there_any_more_is_not_written_elsewhere_and_goes_on_when_it_is_back(
    tmp_path: Path,
) -> None:
    """As when its disk is unmounted under a running process: the path leads to an empty directory."""
    async with running(tmp_path, settings(partitions=1)) as pipeline:

        def log_text() -> str:
            return (pipeline.supervisor.directory / "logs" / "persist-0.log").read_text(errors="replace")

        first, second = Load(workload(seed=41, events=100)), Load(workload(seed=42, events=100))
        await first.publish(pipeline.client)
        await pipeline.settled()
        away = tmp_path / "away"
        pipeline.shards.rename(away)
        pipeline.shards.mkdir()
        await second.publish(pipeline.client)

        async def told() -> bool:
            return "still stopped" in log_text()

        await until(told, "the partition says that it stops, and that it waits for its store")
        assert "is not a store" in log_text()
        assert not list(pipeline.shards.iterdir())
        pipeline.shards.rmdir()
        away.rename(pipeline.shards)
        await pipeline.assert_whole(second, first)
