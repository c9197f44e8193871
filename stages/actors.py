"""The four kinds of actor, by stage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.subjects import Stage
from stages.hash.core import HashCore
from stages.ingest.actor import IngestCore
from stages.runtime.api import Api
from stages.runtime.breaker import Breaker
from stages.runtime.facts import ClusterFacts
from stages.runtime.lane import Lane
from stages.runtime.lanes import RunnableLane
from stages.runtime.process import Arrival, LaneMaker
from stages.runtime.work import StageCore
from stages.segment.core import SegmentCore

if TYPE_CHECKING:
    from contracts.statements import Signer
    from stages.persist.storedir import Store

_CORES: dict[Stage, Callable[[], StageCore]] = {"ingest": IngestCore, "segment": SegmentCore, "hash": HashCore}


def lane_maker(stage: Stage, shards: Path) -> LaneMaker:
    """How a process of `stage` makes its lanes.

    Args:
        stage: which.
        shards: directory of this node's store; used by persist only.
    """
    if stage == "persist":
        return _persist_maker(shards)
    core = _CORES[stage]
    breaker = cache(Breaker)

    def make(api: Api, facts: ClusterFacts, partition: int, nonce: str, on_open: Callable[[int], None]) -> RunnableLane:
        own = breaker(api.settings)
        api.telemetry.breaker(stage, own)
        return Lane(api, core(), partition, nonce, on_open, breaker=own)

    return make


def arrival(stage: Stage, shards: Path) -> Arrival:
    """What a process of `stage` does before it takes part: it gives the id of its store, empty for stages without one.

    Persist opens its store, and lets go of partitions that other stores took over meanwhile. Raises as
    `stages.persist.storedir.open_store` and `stages.persist.moved.let_go_of_moved`.
    """

    async def arrive(api: Api, facts: ClusterFacts, nonce: str) -> str:
        if stage != "persist":
            return ""
        from stages.persist.moved import let_go_of_moved

        store = await asyncio.to_thread(_open_store, shards, facts.cluster_id)
        signer = await asyncio.to_thread(_load_signer, api.settings.signing_key_file)
        await let_go_of_moved(api, store, facts.partitions, nonce, signer, time.time_ns)
        return store.store_id

    return arrive


@cache
def _open_store(shards: Path, cluster_id: str) -> Store:
    """Once for all lanes of the process: lanes are made on the event loop."""
    from stages.persist.storedir import open_store

    return open_store(shards, cluster_id, now_ns=time.time_ns())


@cache
def _load_signer(key_file: str) -> Signer | None:
    from stages.persist.keys import load_key

    return load_key(Path(key_file)) if key_file else None


def _persist_maker(shards: Path) -> LaneMaker:
    # h5py and numpy are loaded in persist processes only.
    from stages.persist.actor import PersistLane

    def make(api: Api, facts: ClusterFacts, partition: int, nonce: str, on_open: Callable[[int], None]) -> RunnableLane:
        store = _open_store(shards, facts.cluster_id)
        signer = _load_signer(api.settings.signing_key_file)
        return PersistLane(api, store, partition, nonce, on_open, signer=signer)

    return make
