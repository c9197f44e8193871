"""A stage process before its lanes: what it takes from the cluster."""

from __future__ import annotations

from typing import Any

import pytest

from contracts.settings import Settings
from stages.runtime import process as module
from stages.runtime.access import Servers
from stages.runtime.api import Api
from stages.runtime.facts import ClusterFacts
from stages.runtime.process import Machine, StageProcess


class _ArrivedError(Exception):
    pass


class _Client:
    async def close(self) -> None:
        pass


class _Here(Machine):
    """A machine with a client that is connected to nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.connect = self._connect  # type: ignore[assignment]

    async def _connect(self, *_: object, **__: object) -> Any:
        return _Client()

    def on_terminate(self, stop: object) -> None:
        pass


class _Actor:
    def __init__(self) -> None:
        self.settings = Settings()

    async def arrive(self, api: Api, *_: object) -> str:
        self.settings = api.settings
        raise _ArrivedError


async def test_a_process_goes_by_the_partitions_that_the_cluster_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Persist shares out what may stay in the streams by their number, and may run with the defaults on any node."""

    async def read_cluster(_: object) -> ClusterFacts:
        return ClusterFacts(cluster_id="c", partitions=64, partition_by="site")

    monkeypatch.setattr(module, "read_cluster", read_cluster)
    actor: Any = _Actor()
    process = StageProcess(
        "persist",
        Servers(()),
        Settings(trim_s=3.0),
        actor,
        partitions=None,
        name="persist-a",
        on_ready=lambda: None,
        machine=_Here(),
    )
    with pytest.raises(_ArrivedError):
        await process.run()
    assert actor.settings == Settings(partitions=64, partition_by="site", trim_s=3.0)
