"""A partition that begins on a disk that does not answer yet."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

from virtual import Ground, in_virtual_time

from cluster.testing.sim.disk import MemoryDisk
from cluster.testing.sim.world import CLUSTER
from cluster.testing.waiting import until
from contracts.receipts import decode_receipt
from contracts.subjects import RECEIPTS, receipt_subject
from stages.persist.actor import PersistLane
from stages.persist.storedir import Store


def test_a_store_that_cannot_be_listed_stops_the_partition_that_begins_there_and_ends_no_process() -> None:
    async def job(ground: Ground) -> None:
        disk = MemoryDisk(Store(Path("/node0"), "0" * 32, CLUSTER), ground.rng)
        refusals = [errno.EIO, errno.EMFILE]

        def listed(directory: Path, partition: int) -> object:
            if refusals:
                error = refusals.pop()
                raise OSError(error, os.strerror(error), str(directory))
            return disk.as_disk().state(directory, partition)

        lane = PersistLane(ground.api, disk.store, 0, "n", lambda _: None, disk=disk.as_disk()._replace(state=listed))
        running = asyncio.create_task(lane.run())

        async def begun() -> bool:
            last = ground.broker.streams[RECEIPTS].last_by_subject(receipt_subject(0))
            return running.done() or (last is not None and decode_receipt(last.data).store == disk.store.store_id)

        await until(begun, "the partition has an owner")
        assert not refusals
        lane.stop()
        await running

    in_virtual_time(job)
