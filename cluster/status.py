"""What a cluster looks like now, as one JSON-encodable value. Reads only, and reports what it cannot read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import PeerInfo, StreamInfo
from nats.js.errors import APIError

from contracts import subjects
from contracts.budgets import FOLLOWER_HEARD, STATUS_ANSWER
from contracts.errors import TopologyError
from contracts.events import parse_rfc3339
from contracts.settings import hide_credentials
from contracts.wire import UNREADABLE
from stages.runtime.access import Access, Servers
from stages.runtime.answers import step_after, why_silent
from stages.runtime.api import NO_STREAM
from stages.runtime.client import GuardedClient
from stages.runtime.expiry import greet
from stages.runtime.facts import META_RECEIPTS_LOST, ClusterFacts, facts_from_metadata
from stages.runtime.keeping import StreamRules, wrong_with
from stages.runtime.tasks import side_by_side

FULL_SHARE: Final = 0.98
"""What is so full counts as full, even where no process says that it is refused."""
LAG_USUAL_MAX: Final = 100
"""Raft entries. While events flow some are always under way, and servers call a replica that lacks one not current:
at 300 to 5,000 events/s, on a slow machine, one to eight."""


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One server.

    Attributes:
        url: without credentials.
        reachable: it greets, and we can connect to it as far as TLS goes.
        name: its own; empty when it does not greet.
        problem: why it greets and cannot be connected to; else empty.
        certificate_ends_s: when the certificate that it shows expires, seconds since the epoch; None without TLS.
        certificate_due: it should have been renewed (`stages.runtime.expiry.Paper`).
    """

    url: str
    reachable: bool
    name: str = ""
    problem: str = ""
    certificate_ends_s: float | None = None
    certificate_due: bool = False


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One follower of a stream.

    Attributes:
        name: of its server.
        current: its leader hears of it, and it lacks no more than what is under way (`LAG_USUAL_MAX`).
        offline: the servers know that its server is gone.
        lag: Raft entries that it has not got.
    """

    name: str
    current: bool
    offline: bool
    lag: int


class StreamStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One stream.

    Attributes:
        name: its name.
        problem: why nothing is known about it, else empty; all numbers are 0 then.
        next: what to do about that, where more than silence was met; else empty.
        messages, bytes, first_seq, last_seq: what it holds.
        bytes_max: its limit; a stream that reaches it refuses.
        used: bytes / bytes_max, 0 to 1.
        leader: name of the server that leads it; empty when none does, or without replication.
        replicas: the followers; without a leader all replicas.
        copies_set: how many servers shall keep it.
        clock_ahead_s: how far its leader's clock is before this machine's; below 0: behind. By it all stored times go.
        lost: when it was made again after it was lost, RFC 3339; empty if it never was (`stages.persist.lost`).
        wrong: what somebody's change has it do with messages that it should not (`stages.runtime.keeping`), else empty.
    """

    name: str
    problem: str = ""
    next: str = ""
    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0
    bytes_max: int = 0
    used: float = 0.0
    leader: str = ""
    replicas: tuple[ReplicaStatus, ...] = ()
    copies_set: int = 0
    clock_ahead_s: float = 0.0
    lost: str = ""
    wrong: str = ""

    @property
    def copies(self) -> int:
        """How many servers keep it; 0 where that is not known, or without replication."""
        return bool(self.leader) + len(self.replicas)


class Allowance(msgspec.Struct, frozen=True, kw_only=True):
    """What all streams of the user's account may hold together; beyond it servers refuse, however empty a stream is.

    Attributes:
        what: ``storage`` (files) or ``memory``, and its tier, as ``storage R3``, where the account has tiers.
        bytes, bytes_max: held, as servers count (without tiers every copy), and the limit, above 0.
    """

    what: str
    bytes: int
    bytes_max: int

    @property
    def used(self) -> float:
        """0 to 1, or more where the limit was lowered."""
        return self.bytes / self.bytes_max


class ClusterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster. `facts` is None, and `problem` says why, while `FI_EVENTS` cannot be read or is not ours.

    `allowances`: see `look_at_account`.
    """

    servers: tuple[ServerStatus, ...]
    streams: tuple[StreamStatus, ...]
    facts: ClusterFacts | None
    problem: str = ""
    allowances: tuple[Allowance, ...] = ()

    @property
    def healthy(self) -> bool:
        """True when every server answers, every stream has a leader and all its copies, all of them current, and the
        account has room."""
        streams_well = all(
            not stream.problem and all(replica.current and not replica.offline for replica in stream.replicas)
            for stream in self.streams
        )
        streams_well = streams_well and not with_fewer_copies(self.streams)
        streams_well = streams_well and all(allowance.used < FULL_SHARE for allowance in self.allowances)
        return self.facts is not None and streams_well and all(server.reachable for server in self.servers)


def with_fewer_copies(streams: Sequence[StreamStatus]) -> list[StreamStatus]:
    """The streams that fewer servers keep than any shall have: somebody changed them, or took a server out."""
    return [stream for stream in streams if 0 < stream.copies < copies_set_most(streams)]


def copies_set_most(streams: Sequence[StreamStatus]) -> int:
    """How many servers shall keep a stream, of which the most shall; 0 where none is known."""
    return max((stream.copies_set for stream in streams), default=0)


async def status(client: GuardedClient, servers: Servers) -> ClusterStatus:
    """Looks at every server and stream once, for about two seconds at most.

    Args:
        client: connected.
        servers: to look at.
    """
    found, (streams, facts, problem), allowances = await asyncio.gather(
        look_at_servers(servers), look_at_streams(client), look_at_account(client)
    )
    return ClusterStatus(servers=found, streams=streams, facts=facts, problem=problem, allowances=allowances)


async def look_at_servers(servers: Servers) -> tuple[ServerStatus, ...]:
    """Looks at every server once, for about two seconds at most. Raises `SettingsError`: as `Access.read`."""
    return tuple(await side_by_side(*(_server(url, servers.access) for url in servers.urls)))


async def look_at_streams(client: GuardedClient) -> tuple[tuple[StreamStatus, ...], ClusterFacts | None, str]:
    """One request for each stream, for about two seconds at most: `ClusterStatus` without its servers."""
    jetstream = client.jetstream(timeout=STATUS_ANSWER.s)
    found = await side_by_side(*(_info(jetstream, name) for name in subjects.STREAMS))
    infos = dict(zip(subjects.STREAMS, found, strict=True))
    facts, problem = None, ""
    events = infos[subjects.EVENTS]
    if isinstance(events, _Told):
        try:
            facts = facts_from_metadata(events.info.config.metadata)
        except TopologyError as error:
            problem = str(error)
    else:
        problem = f"{subjects.EVENTS}: {why_silent(events)}"
    return tuple(_stream(name, info) for name, info in infos.items()), facts, problem


class _Limits(msgspec.Struct):
    max_memory: int = -1
    max_storage: int = -1


class _Tier(msgspec.Struct):
    memory: int = 0
    storage: int = 0
    limits: _Limits = msgspec.field(default_factory=_Limits)


class _Account(_Tier):
    tiers: dict[str, _Tier] = {}


async def look_at_account(client: GuardedClient) -> tuple[Allowance, ...]:
    """What the user's account may hold, where that is limited. Empty also where the servers do not say."""
    try:
        answer = await client.request("$JS.API.INFO", b"", timeout=STATUS_ANSWER.s)
        account = msgspec.json.decode(answer.data, type=_Account)
    except (NatsError, *UNREADABLE):
        return ()
    return allowances_of({"": account, **account.tiers})


def allowances_of(tiers: Mapping[str, _Tier]) -> tuple[Allowance, ...]:
    """By tier, "" without one."""
    rows = [
        (f"{what} {name}".rstrip(), held, limit)
        for name, tier in tiers.items()
        for what, held, limit in (
            ("storage", tier.storage, tier.limits.max_storage),
            ("memory", tier.memory, tier.limits.max_memory),
        )
    ]
    return tuple(Allowance(what=what, bytes=held, bytes_max=limit) for what, held, limit in rows if limit > 0)


class _Told(NamedTuple):
    """What a stream's leader told, how far its clock is before ours, in seconds, and what is wrong with the stream."""

    info: StreamInfo
    clock_ahead_s: float
    wrong: str


async def _info(jetstream: JetStreamContext, name: str) -> _Told | NatsError:
    asked_ns = time.time_ns()
    try:
        # nats-py's `stream_info` leaves out when the answer was made.
        answer = await jetstream._api_request(f"$JS.API.STREAM.INFO.{name}", timeout=STATUS_ANSWER.s)
    except NatsError as error:
        return error
    ahead_s = clock_ahead_s(answer.get("ts"), asked_ns, time.time_ns())
    is_bucket = name in subjects.BUCKETS
    wrong = "" if is_bucket else wrong_with(msgspec.convert(answer.get("config", {}), StreamRules))
    return _Told(StreamInfo.from_response(answer), ahead_s, wrong)


def clock_ahead_s(told: object, asked_ns: int, answered_ns: int) -> float:
    """How far the clock is before ours that showed `told`, a time in RFC 3339, at some moment between the other two.

    0 where it may show the same, or was not told.
    """
    try:
        told_ns = parse_rfc3339(told) if isinstance(told, str) else asked_ns
    except ValueError:
        return 0.0
    return (min(told_ns - asked_ns, 0) + max(told_ns - answered_ns, 0)) / 1e9


def _stream(name: str, told: _Told | NatsError) -> StreamStatus:
    if isinstance(told, NatsError):
        missing = isinstance(told, APIError) and told.err_code == NO_STREAM
        step = "`fictl cluster apply` makes what is missing" if missing else step_after(told)
        return StreamStatus(name=name, problem=why_silent(told), next=step)
    info = told.info
    limit = info.config.max_bytes or 0
    cluster = info.cluster
    return StreamStatus(
        name=name,
        messages=info.state.messages,
        bytes=info.state.bytes,
        first_seq=info.state.first_seq,
        last_seq=info.state.last_seq,
        bytes_max=limit,
        used=info.state.bytes / limit if limit > 0 else 0.0,
        leader=(cluster.leader or "") if cluster else "",
        replicas=tuple(
            ReplicaStatus(name=peer.name or "", current=keeps_up(peer), offline=bool(peer.offline), lag=peer.lag or 0)
            for peer in (cluster.replicas if cluster else None) or []
        ),
        copies_set=info.config.num_replicas or 0,
        clock_ahead_s=told.clock_ahead_s,
        lost=(info.config.metadata or {}).get(META_RECEIPTS_LOST, ""),
        wrong=told.wrong,
    )


def keeps_up(peer: PeerInfo) -> bool:
    """What `ReplicaStatus.current` says of a follower, by what a stream's leader tells of it."""
    heard = (peer.active or 0) < FOLLOWER_HEARD.s * 1e9
    return bool(peer.current) or (heard and 0 < (peer.lag or 0) <= LAG_USUAL_MAX)


async def _server(url: str, access: Access) -> ServerStatus:
    """It greets, and shows its certificate, before any login."""
    shown = hide_credentials(url)
    found = await greet(url, access)
    if found is None:
        return ServerStatus(url=shown, reachable=False)
    if found.problem or found.certificate is None:
        return ServerStatus(url=shown, reachable=not found.problem, name=found.name, problem=found.problem)
    is_due = found.certificate.due_s < time.time()
    ends_s = found.certificate.ends_s
    return ServerStatus(url=shown, reachable=True, name=found.name, certificate_ends_s=ends_s, certificate_due=is_due)
