"""Gateways that chaos kills: processes of their own, whose events all arrive once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.process import ProcessError
from cluster.testing.chaos.fleet import Book, EdgeGateway
from cluster.testing.chaos.ground import Ground
from cluster.testing.checker import check
from cluster.testing.ficluster import FiCluster
from cluster.testing.waiting import until
from stages.runtime.tasks import end_tasks

pytestmark = pytest.mark.cluster

KILLS = 5
PARTITIONS = 2


@asynccontextmanager
async def publishing(
    cluster: FiCluster, directory: Path, book: Book
) -> AsyncIterator[tuple[EdgeGateway, asyncio.Task[None]]]:
    by = cluster.settings.partition_by
    gateway = EdgeGateway("gateway-0", directory / "gateway-0.log", cluster.urls, 5, 300, PARTITIONS, by, book)
    task = asyncio.create_task(gateway.run())
    try:
        yield gateway, task
    finally:
        await end_tasks(task)


async def test_killed_again_and_again_it_loses_and_doubles_nothing(tmp_path: Path) -> None:
    async with FiCluster(tmp_path, backend="embedded", partitions=PARTITIONS) as cluster:
        book = Book()
        async with publishing(cluster, tmp_path, book) as (gateway, task):
            pids = set()
            for _ in range(KILLS):
                goal = len(book.acknowledged) + 100

                def goes_on(goal: int = goal) -> bool:
                    return len(book.acknowledged) >= goal or task.done()

                await until(goes_on, "the gateway publishes", 60)
                if task.done():
                    task.result()
                pids.add(gateway.pid)
                await gateway.kill()
                await gateway.repeat()
            gateway.finish()
            await asyncio.wait_for(task, 120)
        assert len(pids - {None}) == KILLS
        assert book.repeats > 0
        assert book.acknowledged == book.attempts.keys()
        await cluster.settled()
        ground = Ground(cluster, disk_is_small=False)
        verdict = check(book.judged(), await cluster.events(), letters := set(await ground.dead_ids()))
        assert verdict.ok, str(verdict)
        assert letters == book.bad
        assert await ground.problems(book.events_of) == []


async def test_one_that_ends_without_having_been_killed_is_an_error(tmp_path: Path) -> None:
    async with FiCluster(tmp_path, backend="embedded", nodes=1, partitions=PARTITIONS) as cluster:
        book = Book()
        async with publishing(cluster, tmp_path, book) as (gateway, task):
            await until(lambda: book.acknowledged or task.done(), "the gateway publishes", 60)
            pid = gateway.pid
            assert pid is not None
            os.kill(pid, signal.SIGTERM)
            with pytest.raises(ProcessError, match="gateway-0 was ended by SIGTERM"):
                await asyncio.wait_for(task, 60)
