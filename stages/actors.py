"""The four kinds of actor, by stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.subjects import Stage
from stages.hash.core import HashCore
from stages.ingest.actor import IngestCore
from stages.runtime.api import Api
from stages.runtime.facts import ClusterFacts
from stages.runtime.lane import Lane
from stages.runtime.lanes import RunnableLane
from stages.runtime.process import LaneMaker
from stages.runtime.work import StageCore
from stages.segment.core import SegmentCore

if TYPE_CHECKING:
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

    def make(api: Api, facts: ClusterFacts, partition: int, nonce: str, on_open: Callable[[int], None]) -> RunnableLane:
        return Lane(api, core(), partition, nonce, on_open)

    return make


def store_finder(stage: Stage, shards: Path) -> Callable[[ClusterFacts], str]:
    """How a process of `stage` learns the id of its store; it is empty for stages that have none.

    What is returned works on the disk, and raises as `stages.persist.storedir.open_store`.
    """

    def find(facts: ClusterFacts) -> str:
        return _open_store(shards, facts.cluster_id).store_id if stage == "persist" else ""

    return find


@cache
def _open_store(shards: Path, cluster_id: str) -> Store:
    """Once for all lanes of the process: lanes are made on the event loop."""
    from stages.persist.storedir import open_store

    return open_store(shards, cluster_id, now_ns=time.time_ns())


def _persist_maker(shards: Path) -> LaneMaker:
    # h5py and numpy are loaded in persist processes only.
    from stages.persist.actor import PersistLane
    from stages.persist.keys import load_key

    load_once = cache(load_key)

    def make(api: Api, facts: ClusterFacts, partition: int, nonce: str, on_open: Callable[[int], None]) -> RunnableLane:
        store = _open_store(shards, facts.cluster_id)
        key_file = api.settings.signing_key_file
        signer = load_once(Path(key_file)) if key_file else None
        return PersistLane(api, store, partition, nonce, on_open, signer=signer)

    return make
