"""A consumer is put on one server, by chance: what has become of that server must not hold up who reads."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from pipeline import Load, settings, workload

from cluster.testing.ficluster import FiCluster
from contracts.subjects import STAGES
from stages.runtime.base import InputFeed
from stages.runtime.checkpoint import Cursor

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

STORED = 20
NONCE = "misplaced"
NAME = f"{NONCE}-fi_raw_0_all-1"
"""What the reader calls its first consumer."""


async def make_first_consumer(cluster: FiCluster) -> str:
    """Asks for it as the reader does, and gives the server that was given it."""
    asked: list[bytes] = []
    feed = InputFeed(cluster.api, "ingest", 0, NONCE, Cursor(), Cursor())
    api_ask = cluster.api.ask

    async def noted(stream: str, subject: str, body: bytes, kind: type[Any]) -> Any:
        if "CONSUMER.CREATE" in subject:
            asked.append(body)
        return await api_ask(stream, subject, body, kind)

    cluster.api.ask = noted  # type: ignore[method-assign]
    feed.reader.start()
    async with asyncio.timeout(30):
        await feed.reader.wait()
    await feed.reader.close()
    cluster.api.ask = api_ask  # type: ignore[method-assign]
    assert json.loads(asked[0])["config"]["name"] == NAME
    return feed.reader.server


async def test_a_consumer_that_was_given_to_a_server_which_ended_is_asked_for_elsewhere(tmp_path: Path) -> None:
    quick = settings(partitions=1)
    async with FiCluster(tmp_path, backend="embedded", settings=quick, scale=dict.fromkeys(STAGES, 0)) as cluster:
        await Load(workload(seed=92, events=STORED)).publish(cluster.client, batch=1)
        given_to = await make_first_consumer(cluster)
        await cluster.kill(given_to)
        feed = InputFeed(cluster.api, "ingest", 0, NONCE, Cursor(), Cursor())
        feed.reader.start()
        try:
            async with asyncio.timeout(60):
                await feed.reader.wait()
            assert feed.reader.opened > 1
            assert feed.reader.server not in (given_to, "")
        finally:
            await feed.reader.close()
