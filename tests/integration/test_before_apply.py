"""Servers on which no streams were made yet: every verb that needs them says so, and with which exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import run_fictl

from cluster.nodes import EmbeddedCluster
from cluster.workload import consultations

pytestmark = pytest.mark.cluster

VERBS = (
    "members", "pause hash", "resume hash", "flush", "status --json", "cluster status", "partitions ls",
    "partitions move 0 --shards STORE", "partitions restore --shards STORE", "rebuild --shards STORE",
    "policy show", "policy show 2", "policy set check_payload=false", "policy history",
    "dlq ls", "dlq show 1", "dlq replay 1 --yes", "dlq drop 1 --yes", "publish FILE", "run hash",
)  # fmt: skip


async def test_a_cluster_without_streams_is_not_ready_and_the_next_step_is_named(tmp_path: Path) -> None:
    file, store = tmp_path / "events.ndjson", tmp_path / "store"
    file.write_text("".join(f"{json.dumps(event)}\n" for event in consultations(1, 3)))
    places = {"FILE": file, "STORE": store}
    async with EmbeddedCluster(tmp_path / "servers", 1) as cluster:
        for verb in VERBS:
            words = [places.get(word, word) for word in verb.split()]
            code, out, err = await run_fictl(*words, "--nats", cluster.urls[0])
            assert (verb, code, "`fictl cluster apply`" in out + err) == (verb, 3, True), err
    assert not store.exists()
