"""Makes the cluster's streams what `cluster.topology` says, without ever losing data or counting origins anew.

Always true: applying twice changes nothing the second time; a refused change changes nothing at all; a `FI_EVENTS` that
has to be made again goes on counting above every origin that has been committed, framed or refused; and a `FI_RECEIPTS`
that has to be made again is marked, so that nobody takes a partition for a new one (`stages.persist.lost`).
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Final, Literal, TypeVar

import msgspec
from nats.errors import ConnectionClosedError, NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext
from nats.js.api import StreamConfig, StreamInfo
from nats.js.errors import APIError, ServiceUnavailableError

from cluster.topology import Drift, data_held, diff, lasting, merge, refusals, streams, told_lasting
from contracts import subjects
from contracts.budgets import HOP_DEDUP, TOPOLOGY_APPLY, TOPOLOGY_PAUSE_MAX, TOPOLOGY_PAUSE_MIN, TOPOLOGY_REQUEST
from contracts.errors import ClusterUnavailableError, TopologyError
from contracts.events import format_rfc3339
from contracts.frames import decode_frame_head
from contracts.receipts import decode_receipt
from contracts.settings import Settings
from stages.persist.remains import Remains
from stages.runtime.answers import NO_PEERS, DeniedError, unavailable
from stages.runtime.api import NO_STREAM, Api
from stages.runtime.client import GuardedClient
from stages.runtime.facts import META_CLUSTER_ID, META_PARTITIONS, META_RECEIPTS_LOST
from stages.runtime.graveyard import place_of
from stages.runtime.messages import StoredMessage
from stages.runtime.tasks import side_by_side

T = TypeVar("T")

_NAME_TAKEN: Final = 10058
_NO_ROOM: Final = frozenset({10002, 10023, 10028, 10047})
_STEPS: Final = {
    "number of streams": f"raise the account's `max_streams`: {len(subjects.STREAMS)} are ours",
    "max stream bytes": "raise the account's `disk_max_stream_bytes` (files) or `mem_max_stream_bytes`, or lower the "
    "stream's limit (FI_…_BYTES_MAX)",
    "duplicates window": f"raise `duplicate_window` in the servers' `jetstream {{ limits {{…}} }}`: FI_EVENTS has "
    f"FI_DEDUP_WINDOW_S, all others {HOP_DEDUP.s:.0f} s",
}
"""What to do about a limit of the account or the servers, by words of the refusal."""
_ORIGIN_MAX: Final = 2**53


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One stream to create or update.

    Attributes:
        stream: its name.
        action: what is to be done.
        drifts: for an update, what differs.
        first_seq: for a new `FI_EVENTS`, where its sequences begin.
        lost: for a new `FI_RECEIPTS`, when it was missed, RFC 3339; empty in a new cluster.
    """

    stream: str
    action: Literal["create", "update"]
    drifts: tuple[Drift, ...] = ()
    first_seq: int = 1
    lost: str = ""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What `apply` would do now.

    Attributes:
        cluster_id: the cluster's id, or the one it would be given.
        changes: `FI_EVENTS` last, if it is among them. Empty: the cluster is as it should be.
        refused: why nothing will be done, when it must not. Empty: the plan can be applied.
        lasting: what somebody set by hand, no server takes back and `apply` leaves, each with the way out.
    """

    cluster_id: str
    changes: tuple[Change, ...]
    refused: tuple[str, ...] = ()
    lasting: tuple[str, ...] = ()


async def plan(
    client: GuardedClient,
    settings: Settings,
    *,
    after: Remains | None = None,
    beside: str = "",
    wait_s: float = TOPOLOGY_APPLY.s,
) -> Plan:
    """What differs between the cluster and `settings`. Changes nothing.

    Args:
        client: connected.
        settings: the topology part of it counts.
        after: what the stores say of a cluster whose streams are gone, to go on with it.
        beside: the id of the cluster that a store here is of: no new one is begun beside it. Empty: there is none.
        wait_s: how long to try while the cluster elects leaders.

    Raises:
        ClusterUnavailableError: it had no leader for `wait_s`.
        WireFormatError: `FI_EVENTS` is gone and a receipt or frame of this cluster cannot be read.
    """
    return await _Applier(client, settings, wait_s, after, beside).plan()


async def apply(
    client: GuardedClient,
    settings: Settings,
    *,
    after: Remains | None = None,
    beside: str = "",
    wait_s: float = TOPOLOGY_APPLY.s,
) -> Plan:
    """Creates what is missing, updates what may be updated, and waits until every replica of every stream is current.

    Safe to repeat, and to run in two places at once.

    Args:
        client: connected.
        settings: the topology part of it counts.
        after, beside: as for `plan`.
        wait_s: how long to try while the cluster elects leaders or replicas catch up.

    Returns:
        What it did.

    Raises:
        TopologyError: a change must not or cannot be made (nothing was changed), or the servers lack the room.
        ClusterUnavailableError: no leader, or a replica that was not current, for `wait_s`.
        WireFormatError: as `plan`.
    """
    applier = _Applier(client, settings, wait_s, after, beside)
    done: list[Change] = []
    while True:
        todo = await applier.plan()
        if todo.refused:
            raise TopologyError("; ".join(todo.refused))
        if not todo.changes:
            await applier.settle()
            return msgspec.structs.replace(todo, changes=tuple(done))
        done += await applier.execute(todo)
        await applier.pause_between_rounds()


class _Applier:
    """One plan or apply: a connection, a deadline, and the retries both need."""

    def __init__(
        self, client: GuardedClient, settings: Settings, wait_s: float, after: Remains | None, beside: str
    ) -> None:
        self._settings = settings
        self._jetstream: JetStreamContext = client.jetstream(timeout=TOPOLOGY_REQUEST.s)
        self._api = Api(client, settings, give_up_s=wait_s)
        self._wait_s = wait_s
        self._deadline = time.monotonic() + wait_s
        self._after = after
        self._beside = beside
        self._new_id = uuid.uuid4().hex if after is None else after.cluster_id

    async def plan(self) -> Plan:
        found = await self._found()
        known_id = _known_id(found) or await self._receipts_id(found)
        cluster_id = known_id or self._new_id
        wanted = streams(self._settings, cluster_id)
        drifts = diff(wanted, {name: info.config for name, info in found.items()})
        lasts = lasting(drifts)
        drifts = [drift for drift in drifts if drift not in lasts]
        changes = []
        for config in wanted:
            name = str(config.name)
            own = tuple(drift for drift in drifts if drift.stream == name)
            if name not in found:
                first_seq = await self._origin_next(found) if name == subjects.EVENTS else 1
                is_lost = name == subjects.RECEIPTS and (self._after is not None or _has_counted(found))
                lost = format_rfc3339(time.time_ns()) if is_lost else ""
                changes.append(Change(stream=name, action="create", first_seq=first_seq, lost=lost))
            elif own:
                changes.append(Change(stream=name, action="update", drifts=own))
        refused = [*self._others(known_id), *await self._lost_origins(found), *refusals(drifts, data_held(found))]
        told = tuple(told_lasting(lasts))
        return Plan(cluster_id=cluster_id, changes=tuple(changes), refused=tuple(refused), lasting=told)

    async def execute(self, todo: Plan) -> list[Change]:
        """Makes the changes of a plan, all at once but for `FI_EVENTS`, which comes after them.

        Stops early, without an error, where somebody else was faster.

        Raises:
            TopologyError: the servers refuse one of them.
        """
        wanted = {str(config.name): config for config in streams(self._settings, todo.cluster_id)}

        async def make(change: Change) -> bool:
            config = wanted[change.stream]
            try:
                if change.action == "create":
                    await self._create(config, change)
                else:
                    await self._update(config)
            except APIError as error:
                if error.err_code in (_NAME_TAKEN, NO_STREAM):
                    return False
                raise _refusal(change.stream, error) from error
            return True

        done: list[Change] = []
        for last in (False, True):
            together = [change for change in todo.changes if (change.stream == subjects.EVENTS) is last]
            made = await side_by_side(*map(make, together))
            done += itertools.compress(together, made)
            if not all(made):
                break
        return done

    async def _create(self, config: StreamConfig, change: Change) -> None:
        if change.first_seq > 1:
            config = config.evolve(first_seq=change.first_seq)
        if change.lost:
            config = config.evolve(metadata={**(config.metadata or {}), META_RECEIPTS_LOST: change.lost})
        await self._retry(lambda: self._jetstream.add_stream(config))

    async def _update(self, config: StreamConfig) -> None:
        async def update() -> StreamInfo:
            found = await self._jetstream.stream_info(str(config.name))
            return await self._jetstream.update_stream(merge(found.config, config))

        await self._retry(update)

    async def pause_between_rounds(self) -> None:
        """Before planning again. A creation lost to another `apply` costs a round, and so does a name that is taken
        before the servers show its stream: time bounds the rounds, not their number. Raises `TopologyError` then."""
        if time.monotonic() > self._deadline:
            raise TopologyError(
                "the streams change while they are being changed: does another `fictl cluster apply` run?"
            )
        await self._pause()

    async def settle(self) -> None:
        """Waits until every stream has a leader and current replicas; in vain, it raises `ClusterUnavailableError`."""
        while True:
            behind = [name for name, info in (await self._found()).items() if not _current(info, self._settings)]
            if not behind:
                return
            if time.monotonic() > self._deadline:
                raise ClusterUnavailableError(
                    f"not every replica of {', '.join(behind)} is current after {self._wait_s:.0f} s; "
                    "is a server down? See `fictl cluster status`"
                )
            await self._pause()

    async def _found(self) -> dict[str, StreamInfo]:
        found = {}
        for name in subjects.STREAMS:
            info = await self._info(name)
            if info is not None:
                found[name] = info
        return found

    async def _info(self, name: str, subjects_filter: str | None = None) -> StreamInfo | None:
        try:
            return await self._retry(lambda: self._jetstream.stream_info(name, subjects_filter))
        except APIError as error:
            if error.err_code == NO_STREAM:
                return None
            raise _refusal(name, error) from error

    async def _receipts_id(self, found: dict[str, StreamInfo]) -> str | None:
        for message in await self._last_messages(found, subjects.RECEIPTS, "fi.receipts.*"):
            return decode_receipt(message.data).cluster
        return None

    async def _origin_next(self, found: dict[str, StreamInfo]) -> int:
        """The first sequence of a new `FI_EVENTS`: above all origins that the other streams speak of."""
        receipts = await self._last_messages(found, subjects.RECEIPTS, "fi.receipts.*")
        origins = [decode_receipt(message.data).origin for message in receipts]
        # A stage takes what comes before the last letter for buried. Anybody may publish there: no stream is that long.
        letters = [place_of(message)[0] for message in await self._last_messages(found, subjects.DLQ, "fi.dlq.*.*")]
        origins += [origin for origin in letters if origin <= _ORIGIN_MAX]
        for stage, hop in subjects.INPUT_STREAM.items():
            if hop in subjects.HOPS:
                frames = await self._last_messages(found, hop, f"fi.{stage}.*")
                origins += [decode_frame_head(message.data).last for message in frames]
        if self._after is not None:
            # No stream ever counted a message for each microsecond since 1970: it is above what other stores have too.
            origins += [self._after.origin, time.time_ns() // 1000]
        return max(origins, default=0) + 1

    def _others(self, known_id: str | None) -> list[str]:
        """What stands in the way of going on after stores, or beside one; `known_id`: the servers' cluster's."""
        if self._after is not None and known_id not in (None, self._after.cluster_id):
            return [
                f"the servers have streams, of cluster {known_id}, and the stores of {self._after.cluster_id}: only "
                "servers without any go on after stores"
            ]
        if self._after is not None:
            return self._after.refusals(self._settings)
        if self._beside and known_id is None:
            return [
                f"the servers have no streams, and the store here is of cluster {self._beside}: put the servers' own "
                "disks back; if they are lost, go on with --after-stores; for a new cluster choose another directory"
            ]
        return []

    async def _lost_origins(self, found: dict[str, StreamInfo]) -> list[str]:
        """Nothing says where a new `FI_EVENTS` must begin to count while receipts are lost, or purged, that would."""
        receipts = found.get(subjects.RECEIPTS)
        if subjects.EVENTS in found or receipts is None or self._after is not None:
            return []
        metadata, state = receipts.config.metadata or {}, receipts.state
        if META_RECEIPTS_LOST not in metadata and state.messages == state.last_seq:
            return []
        told = len(await self._last_messages(found, subjects.RECEIPTS, "fi.receipts.*"))
        if told == int(metadata.get(META_PARTITIONS, 0)):
            return []
        return [
            f"{subjects.EVENTS} is gone, and so are receipts that said how far it had counted: go on with what the "
            "stores hold, with `fictl cluster apply --after-stores DIR`"
        ]

    async def _last_messages(self, found: dict[str, StreamInfo], stream: str, pattern: str) -> list[StoredMessage]:
        """The last message of every subject that matches `pattern`."""
        info = await self._info(stream, pattern) if stream in found else None
        if info is None:
            return []
        messages = []
        for subject in sorted(info.state.subjects or {}):
            try:
                async with asyncio.timeout(self._wait_s):
                    message = await self._api.last_message(stream, subject)
            except TimeoutError:
                raise ClusterUnavailableError(f"{stream} has no leader; see `fictl cluster status`") from None
            if message is not None:
                messages.append(message)
        return messages

    async def _retry(self, call: Callable[[], Awaitable[T]]) -> T:
        """`call` until the cluster answers: elections show as time-outs, 503 and "no suitable peers"."""
        while True:
            try:
                return await call()
            except ConnectionClosedError as error:
                raise ClusterUnavailableError("the connection was closed") from error
            except (NatsTimeoutError, NoRespondersError, APIError) as error:
                if isinstance(error, APIError) and not _passing(error):
                    raise
                if isinstance(error, DeniedError):
                    raise unavailable("the streams", error) from error
                if time.monotonic() > self._deadline:
                    raise unavailable(f"the cluster could not do it within {self._wait_s:.0f} s", error) from error
            await self._pause()

    async def _pause(self) -> None:
        await asyncio.sleep(random.uniform(TOPOLOGY_PAUSE_MIN.s, TOPOLOGY_PAUSE_MAX.s))


def _passing(error: APIError) -> bool:
    if _lacks_room(error):
        return False
    # nats-py makes such an error, without a code, also of nobody being there to answer.
    return isinstance(error, ServiceUnavailableError) or error.err_code == NO_PEERS


def _lacks_room(error: APIError) -> bool:
    # With replicas the servers say so only in the text of "no suitable peers".
    return error.err_code in _NO_ROOM or (error.err_code == NO_PEERS and "insufficient" in (error.description or ""))


def _refusal(stream: str, error: APIError) -> TopologyError:
    text = error.description or ""
    hint = next((f"; {step}" for words, step in _STEPS.items() if words in text), "")
    if _lacks_room(error):
        hint = (
            "; the servers, or their account (`max_file`, `max_mem`), lack the disk or memory for the stream's limit: "
            "lower it (FI_…_BYTES_MAX) or make room"
        )
    return TopologyError(f"{stream}: the server refuses it: {text} ({error.err_code}){hint}")


def _known_id(found: dict[str, StreamInfo]) -> str | None:
    for name in (subjects.EVENTS, subjects.RECEIPTS):
        metadata = found[name].config.metadata if name in found else None
        if metadata and META_CLUSTER_ID in metadata:
            return metadata[META_CLUSTER_ID]
    return None


def _has_counted(found: dict[str, StreamInfo]) -> bool:
    """Something was accepted: `FI_RECEIPTS` is created before that can be, so when it is missing, it was lost."""
    return subjects.EVENTS in found and found[subjects.EVENTS].state.last_seq > 0


def _current(info: StreamInfo, settings: Settings) -> bool:
    if settings.replicas == 1:
        return True
    cluster = info.cluster
    if cluster is None or not cluster.leader:
        return False
    replicas = cluster.replicas or []
    return len(replicas) == settings.replicas - 1 and all(peer.current and not peer.offline for peer in replicas)
