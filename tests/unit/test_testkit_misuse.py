"""What a tester tells the kit wrongly it says at once and by name, in place of waiting or judging by it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest

from cluster.testing.ficluster import FiCluster
from cluster.testing.load import Load, workload
from contracts.errors import SettingsError

LINES = workload(seed=5, events=3)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([*LINES, LINES[1]], f"line 4 of the load: event {json.loads(LINES[1])['event_id']} is there already"),
        ([LINES[0], b"nope"], "line 2 of the load: no event with its ids and payload"),
        ([b"{}"], "line 1 of the load: no event .*event_id"),
        ([json.dumps({**json.loads(LINES[0]), "event_id": "7"}).encode()], "line 1 of the load: no event .*UUID"),
    ],
    ids=str,
)
def test_a_load_of_what_cannot_be_told_apart_is_not_made(lines: list[bytes], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Load(lines)


async def test_what_a_load_can_never_reach_is_not_waited_for() -> None:
    load = Load(LINES)
    with pytest.raises(ValueError, match="4 events can never be acknowledged: the load has 3"):
        await load.reached(4)
    load.acknowledge(UUID(json.loads(line)["event_id"]).bytes for line in LINES)
    await load.reached(3)


@pytest.mark.parametrize(
    "given", [{"nodes": 0}, {"nodes": 2}, {"nodes": "3"}, {"disk_bytes": 0}, {"disk_bytes": -1}], ids=str
)
def test_a_cluster_that_cannot_be_is_not_described(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(SettingsError, match=f"FiCluster: {name} = "):
        FiCluster(backend="embedded", **given)


@pytest.mark.parametrize(
    "use",
    [
        lambda cluster: cluster.kill("n1"), lambda cluster: cluster.start("hash-0"),
        lambda cluster: cluster.freeze("n1"), lambda cluster: cluster.settled(), lambda cluster: cluster.totals(),
    ],
)  # fmt: skip
async def test_a_cluster_that_is_not_open_says_so(use: Callable[[FiCluster], Awaitable[Any]]) -> None:
    cluster = FiCluster(backend="embedded")
    with pytest.raises((RuntimeError, AttributeError), match="the cluster is not open: use `async with FiCluster"):
        await use(cluster)
    assert not hasattr(cluster, "client")


@pytest.mark.parametrize("latency_s", [-0.1, float("nan"), float("inf")])
async def test_a_time_that_is_none_is_refused(latency_s: float) -> None:
    with pytest.raises(ValueError, match="latency_s = "):
        await FiCluster(backend="embedded").slow("n1", latency_s)
