"""The four kinds of actor, by stage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import msgspec

from contracts.membership import Member
from contracts.subjects import FLUSH_SUBJECT, POLICY_PATTERN, Stage
from stages.hash.core import HashCore
from stages.ingest.core import IngestCore
from stages.runtime.api import Api
from stages.runtime.breaker import Breaker
from stages.runtime.control import Control
from stages.runtime.facts import ClusterFacts
from stages.runtime.lane import Lane
from stages.runtime.lanes import RunnableLane
from stages.runtime.process import Actor
from stages.runtime.work import StageCore
from stages.segment.core import SegmentCore
from stages.segment.policies import Policies

if TYPE_CHECKING:
    from contracts.statements import Signer
    from stages.persist.disk import Turns
    from stages.persist.flush import Flushes
    from stages.persist.room import EventsRoom
    from stages.persist.storedir import Store


def actor(stage: Stage, shards: Path, clock_ns: Callable[[], int] = time.time_ns) -> Actor:
    """What a process of `stage` runs.

    Args:
        stage: which.
        shards: directory of this node's store; used by persist only.
        clock_ns: the wall clock.
    """
    if stage == "persist":
        return PersistActor(shards, clock_ns)
    if stage == "segment":
        return SegmentActor(clock_ns)
    return HopActor(IngestCore if stage == "ingest" else HashCore, clock_ns)


class HopActor:
    """Ingest and hash: nothing but lanes, which share a breaker.

    Args:
        make_core: for one lane.
        clock_ns: the wall clock.
    """

    def __init__(self, make_core: Callable[[], StageCore], clock_ns: Callable[[], int]) -> None:
        self._make_core = make_core
        self._clock_ns = clock_ns
        self._breaker: Breaker | None = None

    async def arrive(self, api: Api, facts: ClusterFacts, control: Control, nonce: str) -> str:
        """See `Actor.arrive`. Nothing is to be done."""
        return ""

    def make_lane(
        self, api: Api, facts: ClusterFacts, partition: int, nonce: str, on_open: Callable[[int], None]
    ) -> RunnableLane:
        """See `Actor.make_lane`."""
        core = self._make_core()
        return Lane(api, core, partition, nonce, on_open, self._clock_ns, self._shared_breaker(api, core.stage))

    def _shared_breaker(self, api: Api, stage: Stage) -> Breaker:
        if self._breaker is None:
            self._breaker = Breaker(api.settings)
            api.telemetry.breaker(stage, self._breaker)
        return self._breaker

    def describe(self, me: Member) -> Member:
        """See `Actor.describe`."""
        return msgspec.structs.replace(me, holding=self._breaker is not None and self._breaker.is_open)


class SegmentActor(HopActor):
    """Segment: its lanes judge by the policy in force, which is read before the first of them is made."""

    def __init__(self, clock_ns: Callable[[], int]) -> None:
        super().__init__(self._core, clock_ns)
        self._policies: Policies
        self._lanes: WeakValueDictionary[int, Lane] = WeakValueDictionary()

    def _core(self) -> StageCore:
        return SegmentCore(self._policies.for_frame)

    async def arrive(self, api: Api, facts: ClusterFacts, control: Control, nonce: str) -> str:
        """See `Actor.arrive`. Returns once the policy was read."""
        self._policies = Policies(api, self._try_again)
        await control.listen(POLICY_PATTERN, self._policies.take)
        return ""

    def make_lane(
        self, api: Api, facts: ClusterFacts, partition: int, nonce: str, on_open: Callable[[int], None]
    ) -> RunnableLane:
        """See `Actor.make_lane`."""
        breaker = self._shared_breaker(api, "segment")
        lane = Lane(api, self._core(), partition, nonce, on_open, self._clock_ns, breaker, self._policies.refresh)
        self._lanes[partition] = lane
        return lane

    def _try_again(self) -> None:
        """What the policy before refused, the one now in force may let through."""
        if self._breaker is not None:
            self._breaker.retry_now()
        for lane in list(self._lanes.values()):
            lane.end_hold()

    def describe(self, me: Member) -> Member:
        """See `Actor.describe`."""
        return msgspec.structs.replace(super().describe(me), policy=self._policies.version)


class PersistActor:
    """Persist: opens its store, and lets go of partitions that other stores took over meanwhile.

    h5py and numpy are loaded in persist processes only.
    """

    def __init__(self, shards: Path, clock_ns: Callable[[], int]) -> None:
        self._shards = shards
        self._clock_ns = clock_ns
        self._store: Store
        self._signer: Signer | None = None
        self._flushes: Flushes
        self._room: EventsRoom
        self._turns: Turns

    async def arrive(self, api: Api, facts: ClusterFacts, control: Control, nonce: str) -> str:
        """See `Actor.arrive`. Raises as `stages.persist.storedir.open_store`."""
        from stages.persist.disk import Turns
        from stages.persist.flush import Flushes
        from stages.persist.keys import load_key
        from stages.persist.lost import keep_places
        from stages.persist.moved import let_go_of_moved
        from stages.persist.room import EventsRoom
        from stages.persist.storedir import open_store

        def open_own() -> Store:
            return open_store(self._shards, facts.cluster_id, now_ns=self._clock_ns())

        self._store = await asyncio.to_thread(open_own)
        key_file = api.settings.signing_key_file
        self._signer = await asyncio.to_thread(load_key, Path(key_file)) if key_file else None
        self._flushes, self._turns = Flushes(facts.cluster_id), Turns()
        self._room = EventsRoom(api)
        await control.listen(FLUSH_SUBJECT, self._flushes.take)
        await keep_places(api, facts.partitions, facts.cluster_id, nonce)
        await let_go_of_moved(api, self._store, facts.partitions, nonce, self._signer, self._clock_ns)
        return self._store.store_id

    def make_lane(
        self, api: Api, facts: ClusterFacts, partition: int, nonce: str, on_open: Callable[[int], None]
    ) -> RunnableLane:
        """See `Actor.make_lane`."""
        from stages.persist.actor import PersistLane

        return PersistLane(
            api,
            self._store,
            partition,
            nonce,
            on_open,
            self._clock_ns,
            signer=self._signer,
            flushes=self._flushes,
            room=self._room,
            turns=self._turns,
        )

    def describe(self, me: Member) -> Member:
        """See `Actor.describe`. Nothing is added."""
        return me
