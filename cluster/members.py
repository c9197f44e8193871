"""Who works on what now, which partitions nobody works on and why; and pausing a stage."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import msgspec

from contracts.budgets import COMMAND_ANSWER, MEMBERS_POLL, PAUSE_PUT
from contracts.errors import AccessDeniedError, ClusterUnavailableError
from contracts.membership import Member, Pause, decode_pause, shares
from contracts.receipts import Receipt
from contracts.subjects import CONTROL, MEMBERS, STAGES, Stage, members_pattern, pause_subject
from contracts.telemetry import HEADER_KV_OPERATION, KV_DELETED
from stages.runtime.api import Api
from stages.runtime.facts import read_cluster
from stages.runtime.membership import read_receipts, readable
from stages.runtime.messages import StoredMessage
from stages.runtime.writer import replace_last

T = TypeVar("T")

_STORE_SHOWN = 8


class MemberStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One process.

    Attributes:
        stage, name, node, pid: which.
        partitions: the lanes it runs.
        opening: of these, the ones that have not found their place yet.
        state: ``works``, ``opening``, ``idle`` (nothing falls to it), ``paused`` or ``draining``.
        pinned: it was told its partitions.
        store: id of its store (persist), else empty.
        policy: version of the policy in force (segment); 0 for a stage that has none.
        holding: its dead-letter breaker is open.
        age_s: since it last renewed its announcement, by this machine's clock.
    """

    stage: Stage
    name: str
    node: str
    pid: int
    partitions: tuple[int, ...]
    opening: tuple[int, ...]
    state: str
    pinned: bool
    store: str
    policy: int
    holding: bool
    age_s: float


class Unheld(msgspec.Struct, frozen=True, kw_only=True):
    """A partition that no process of a stage works on, and why."""

    stage: Stage
    partition: int
    why: str


class MembersReport(msgspec.Struct, frozen=True, kw_only=True):
    """All stages.

    Attributes:
        members: stages in flow order.
        unheld: what nobody works on.
        moving: stages in which some partition is not where it will be, or has not found its place.
        paused: stage → who paused it, and when.
    """

    members: tuple[MemberStatus, ...]
    unheld: tuple[Unheld, ...]
    moving: tuple[Stage, ...]
    paused: dict[Stage, Pause]

    @property
    def complete(self) -> bool:
        """Every partition of every stage is worked on."""
        return not self.unheld

    @property
    def unheld_by_reason(self) -> dict[tuple[Stage, str], list[int]]:
        """(stage, why) → the partitions of `unheld`."""
        found: dict[tuple[Stage, str], list[int]] = {}
        for row in self.unheld:
            found.setdefault((row.stage, row.why), []).append(row.partition)
        return found


async def look(api: Api) -> MembersReport:
    """Looks once.

    Raises:
        TopologyError: the streams are not there.
        ClusterUnavailableError: the cluster does not answer.
    """
    facts = await read_cluster(api.client, wait_s=COMMAND_ANSWER.s)
    found, control = await read_buckets(api)
    return report(found, control, await read_receipts(api, facts.partitions), facts.partitions, time.time_ns())


Announcements = Mapping[Stage, dict[str, StoredMessage]]


async def read_buckets(api: Api) -> tuple[Announcements, dict[str, StoredMessage]]:
    """What stands in the buckets, with two requests: announcements by stage and key, and pauses by key.

    Raises:
        ClusterUnavailableError: the cluster does not answer.
    """
    found = await api.last_messages(MEMBERS, [members_pattern(stage) for stage in STAGES])
    control = await api.last_messages(CONTROL, [pause_subject(stage) for stage in STAGES])
    begins = {stage: members_pattern(stage).removesuffix("*.*") for stage in STAGES}
    by_stage = {
        stage: {key: message for key, message in found.items() if key.startswith(begin)}
        for stage, begin in begins.items()
    }
    return by_stage, control


def report(
    found: Announcements,
    control: Mapping[str, StoredMessage],
    receipts: Mapping[int, Receipt],
    partitions: int,
    now_ns: int,
) -> MembersReport:
    """What the buckets and the last receipts say.

    Args:
        found, control: from `read_buckets`.
        receipts: partition → its last receipt.
        partitions: P.
        now_ns: nanoseconds since the epoch.
    """
    members: list[MemberStatus] = []
    unheld: list[Unheld] = []
    moving: list[Stage] = []
    paused: dict[Stage, Pause] = {}
    for stage, messages in found.items():
        seen = readable(messages)
        owned = receipts if stage == "persist" else {}
        if (pause := control.get(pause_subject(stage))) is not None and pause.data:
            paused[stage] = decode_pause(pause.data)
        members += [_status(member, messages[key], now_ns) for key, member in sorted(seen.items())]
        assigned = shares(seen, partitions, {p: receipt.store for p, receipt in owned.items()})
        if _moves(seen, assigned, stage in paused):
            moving.append(stage)
        held = {partition for member in seen.values() for partition in member.partitions}
        unheld += [
            Unheld(stage=stage, partition=p, why=_why(stage, p, seen, assigned, owned, stage in paused))
            for p in range(partitions)
            if p not in held
        ]
    return MembersReport(members=tuple(members), unheld=tuple(unheld), moving=tuple(moving), paused=paused)


def _status(member: Member, message: StoredMessage, now_ns: int) -> MemberStatus:
    state = "opening" if member.opening else "works" if member.partitions else "idle"
    return MemberStatus(
        stage=member.stage,
        name=member.name,
        node=member.node,
        pid=member.pid,
        partitions=member.partitions,
        opening=member.opening,
        state="draining" if member.draining else "paused" if member.paused else state,
        pinned=member.pinned is not None,
        store=member.store,
        policy=member.policy,
        holding=member.holding,
        age_s=max(0.0, (now_ns - message.time_ns) / 1e9),
    )


def _moves(members: Mapping[str, Member], assigned: Mapping[int, str], paused: bool) -> bool:
    for key, member in members.items():
        due = set() if paused else {partition for partition, holder in assigned.items() if holder == key}
        if member.draining or member.opening or set(member.partitions) != due:
            return True
    return False


def _why(
    stage: Stage,
    partition: int,
    members: Mapping[str, Member],
    assigned: Mapping[int, str],
    receipts: Mapping[int, Receipt],
    paused: bool,
) -> str:
    if paused:
        return f"{stage} is paused; `fictl resume {stage}` goes on"
    if partition in assigned:
        member = members[assigned[partition]]
        return f"moves to {member.name} on {member.node}"
    if receipt := receipts.get(partition):
        others = [one.name for one in members.values() if one.node == receipt.node and one.store != receipt.store]
        mounted = f"; {others[0]} has another store there: is the disk mounted? Then restart it" if others else ""
        return f"waits for store {receipt.store[:_STORE_SHOWN]} on node {receipt.node}: start persist there{mounted}"
    return f"no process of {stage} takes it" if members else f"no process of {stage} announces itself"


async def look_until(api: Api, settled: Callable[[MembersReport], bool], limit_s: float) -> MembersReport:
    """Looks at the members as `keep_looking` does. Raises as `look`."""
    return await keep_looking(lambda: look(api), settled, limit_s)


async def keep_looking(look_once: Callable[[], Awaitable[T]], settled: Callable[[T], bool], limit_s: float) -> T:
    """Looks again and again until `settled`, for `limit_s` at most; gives what it saw last.

    A look that fails is none: a server that is asked may be frozen, or a leader just being elected.

    Raises:
        ClusterUnavailableError: nothing was seen at all, in that time and for `COMMAND_ANSWER`, or a server refuses.
    """
    begun_s = time.monotonic()
    seen: T | None = None
    while True:
        try:
            seen = await look_once()
        except ClusterUnavailableError as error:
            patience_s = 0.0 if isinstance(error, AccessDeniedError) else max(limit_s, COMMAND_ANSWER.s)
            if seen is None and time.monotonic() - begun_s > patience_s:
                raise
        else:
            if settled(seen):
                return seen
        if seen is not None and time.monotonic() - begun_s > limit_s:
            return seen
        await asyncio.sleep(MEMBERS_POLL.s)


async def pause(api: Api, stage: Stage, pause: Pause) -> None:
    """Tells all processes of a stage, on every node, to finish what they have in hand and to stop reading.

    Raises:
        TopologyError: the streams are not there.
        ClusterUnavailableError: not answered in time; it may be stored or not.
    """
    await _put(api, stage, msgspec.json.encode(pause), {})


async def resume(api: Api, stage: Stage) -> None:
    """Takes `pause` back. Raises as it does."""
    await _put(api, stage, b"", {HEADER_KV_OPERATION: KV_DELETED})


async def _put(api: Api, stage: Stage, data: bytes, headers: dict[str, str]) -> None:
    try:
        async with asyncio.timeout(PAUSE_PUT.s):
            nonce = f"pause-{secrets.token_hex(6)}"
            await replace_last(api, CONTROL, pause_subject(stage), lambda _: data, nonce, headers)
    except TimeoutError:
        raise ClusterUnavailableError(
            f"{CONTROL} did not answer within {PAUSE_PUT.s:g} s; whether {stage} is paused now, `fictl members` shows; "
            "see `fictl cluster status`"
        ) from None
