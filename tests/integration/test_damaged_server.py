"""Bits of one server's files have changed: what it can no longer read is read from another one, in its place."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from pipeline import Load, flip, until, workload

from cluster.testing.ficluster import FiCluster
from contracts.subjects import EVENTS, STAGES
from stages.runtime.base import InputFeed
from stages.runtime.checkpoint import Cursor

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

STORED = 600
FLIPS = 12
READINGS = 10
"""A consumer lies on any of three servers: on the damaged one at least once, but for one run in sixty."""


def damage(store: Path) -> None:
    (block,) = store.glob(f"jetstream/*/streams/{EVENTS}/msgs/*.blk")
    for number in range(1, FLIPS + 1):
        flip(block, block.stat().st_size * number // (FLIPS + 1))


async def test_what_a_damaged_server_passes_over_is_read_from_another(tmp_path: Path) -> None:
    async with FiCluster(tmp_path, backend="embedded", scale=dict.fromkeys(STAGES, 0), partitions=1) as cluster:
        await Load(workload(seed=91, events=STORED)).publish(cluster.client, batch=1)
        jetstream = cluster.client.jetstream(timeout=10)

        async def followers() -> list[str]:
            """Of `FI_EVENTS`; none while one of them is behind."""
            found = (await jetstream.stream_info(EVENTS)).cluster
            replicas = (found.replicas or []) if found is not None and found.leader else []
            return [str(peer.name) for peer in replicas] if all(peer.current for peer in replicas) else []

        damaged = (await until(followers, "all have it"))[0]
        await cluster.stop(damaged)
        damage(tmp_path / "nats" / damaged)
        await cluster.start(damaged)
        await until(followers, "all have it again")
        for reading in range(READINGS):
            feed = InputFeed(cluster.api, "ingest", 0, f"reading-{reading}", Cursor(), Cursor())
            feed.reader.start()
            seqs: list[int] = []
            async with asyncio.timeout(30):
                while not seqs or seqs[-1] < STORED:
                    await feed.reader.wait()
                    taken = [message.seq for message in feed.reader.take(100, 1 << 20)]
                    seqs += [seq for seq in taken if seq > feed.cursor.origin]
                    feed.cursor = Cursor(seqs[-1])
            await feed.reader.close()
            assert seqs == list(range(1, STORED + 1))
