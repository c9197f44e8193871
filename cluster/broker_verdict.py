"""The part of a verdict that is about the servers and their streams. Pure; see `cluster.verdict`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from cluster.problem import Problem
from cluster.status import FULL_SHARE, copies_set_most, with_fewer_copies
from cluster.summary import StreamSummary, Summary
from cluster.words import duration, expiry, partitions, size
from contracts.subjects import DLQ, EVENTS, HOPS, RECEIPTS

NEAR_FULL_SHARE: Final = 0.8
"""As in the alerts FiStreamNearFull and FiHopNearFull."""
CLOCK_APART_S_MAX: Final = 1.0


def connection_problems(summary: Summary) -> Iterator[Problem]:
    """Why there is no connection."""
    urls = ", ".join(server.url for server in summary.servers)
    if answering := [server.name for server in summary.servers if server.reachable or server.problem]:
        what = f"no connection, though {', '.join(answering)} answer{'s' if len(answering) == 1 else ''}"
        why, _, step = summary.no_connection.partition("; ")
        yield Problem(
            urgency=1,
            kind="disconnected",
            what=f"{what}: {why}" if why else what,
            next=step or "right password? Then see the servers' logs",
        )
    else:
        what = f"no server answers at {urls}: nothing is accepted"
        yield Problem(urgency=1, kind="no_server", what=what, next="start the servers, or give their --nats URLs")


def stream_problems(summary: Summary) -> Iterator[Problem]:
    """Streams that do not answer, that are not there or were lost, or that fill up."""
    silent_events = any(stream.status.name == EVENTS and is_silent(stream) for stream in summary.streams)
    if not summary.cluster and not silent_events:
        why = "; ".join(summary.unread) or "its facts cannot be read"
        yield Problem(urgency=1, kind="no_facts", what=why, next="`fictl cluster status`, or `fictl cluster apply`")
    # What is denied is told in other words for each stream, and with the same next step.
    silent: dict[str, list[StreamSummary]] = {}
    for stream in summary.streams:
        if is_silent(stream):
            silent.setdefault(stream.status.next or stream.status.problem, []).append(stream)
    for group in silent.values():
        names, first = [stream.status.name for stream in group], group[0].status
        answering = sum(server.reachable for server in summary.servers)
        hung = (
            "wait 10 s for an election; then the servers' logs: one without room, on its disk or within its limits, "
            "needs room and a restart; `kill -9` the server whose disk hangs (`iostat`)"
        )
        step = hung if answering == len(summary.servers) else "bring back a majority of the servers"
        why, step = first.problem or "has no leader", first.next or step
        told = "all streams" if len(names) == len(summary.streams) else ", ".join(names)
        effects = {EVENTS: "nothing is accepted", RECEIPTS: "nothing is committed"}
        effect = next((effects[name] for name in effects if name in names), "what needs it waits")
        what = f"{told}: {why} ({answering} of {len(summary.servers)} servers answer): {effect}"
        urgency = 2 if effects.keys().isdisjoint(names) else 1
        yield Problem(urgency=urgency, kind="no_leader", what=what, next=step)
    for since, lanes in lost_receipts(summary):
        where = f"persist waits in {partitions(lanes)} to be told where to go on"
        yield Problem(
            urgency=1 if len(lanes) == summary.partition_count else 2,
            kind="receipts_lost",
            what=f"{RECEIPTS} was lost and made again {since}: {where}",
            next="`fictl partitions restore` on each node with a store",
        )
    for stream in summary.streams:
        if stream.status.wrong:
            yield Problem(
                urgency=2,
                kind="stream_changed",
                what=f"{stream.status.name}, as somebody changed it, {stream.status.wrong}",
                next="`fictl cluster plan` shows it, `fictl cluster apply` mends it or says what does",
            )
    few: dict[int, list[str]] = {}
    for status in with_fewer_copies([stream.status for stream in summary.streams]):
        few.setdefault(status.copies, []).append(status.name)
    for copies, names in few.items():
        shall = copies_set_most([stream.status for stream in summary.streams])
        told = "all streams" if len(names) == len(summary.streams) else ", ".join(names)
        step = "a server was taken out? Start one in its place. Else `fictl cluster plan`, then `fictl cluster apply`"
        yield Problem(urgency=5, kind="few_copies", what=f"{told}: {copies} of {shall} copies are there", next=step)
    for stream in summary.streams:
        status = stream.status
        if status.name not in HOPS and NEAR_FULL_SHARE <= status.used < FULL_SHARE:
            yield Problem(
                urgency=5,
                kind="near_full",
                what=f"{status.name} is {status.used:.0%} full",
                next=make_room(status.name),
            )


def account_problems(summary: Summary) -> Iterator[Problem]:
    """The account that the streams are in has no room, or soon none: then none of them has, however empty it is."""
    for allowance in summary.allowances:
        if allowance.used < NEAR_FULL_SHARE:
            continue
        is_full, of_files = allowance.used >= FULL_SHARE, allowance.what.startswith("storage")
        what = f"the account's {allowance.what} is {'full' if is_full else f'{allowance.used:.0%} full'}: "
        what += f"{size(allowance.bytes)} of {size(allowance.bytes_max)}, over all of its streams"
        if is_full:
            what += "; gateways are refused" if of_files else "; hops in memory and announcements are refused"
        yield Problem(
            urgency=1 if is_full else 5,
            kind="account_full" if is_full else "near_full",
            what=what,
            next=f"raise the account's `{'max_file' if of_files else 'max_mem'}` in the servers' configuration and "
            "reload it, or empty what else is stored there",
        )


def lost_receipts(summary: Summary) -> Iterator[tuple[str, list[int]]]:
    """Since when receipts are lost, and the partitions that have none since; nothing while none are lost."""
    lanes = [one.partition for one in summary.partitions if one.is_known and not one.live_shards]
    for stream in summary.streams:
        if stream.status.lost and lanes:
            yield stream.status.lost, lanes


def _lacks_majority(summary: Summary) -> bool:
    """Too few servers answer, and no process could announce itself; streams may still name a leader for seconds."""
    alive = summary.members is not None and bool(summary.members.members)
    copies = max((bool(s.status.leader) + len(s.status.replicas) for s in summary.streams), default=1)
    too_few = 0 < sum(server.reachable for server in summary.servers) < copies // 2 + 1
    return not alive and len(summary.servers) >= copies and too_few


def is_silent(stream: StreamSummary) -> bool:
    """Nothing can be written to it now."""
    return bool(stream.status.problem) or (bool(stream.status.replicas) and not stream.status.leader)


def make_room(stream: str) -> str:
    """The next step where a stream is full."""
    if stream == DLQ:
        return "`fictl dlq ls`, then replay or drop"
    limits = {EVENTS: "events_bytes_max", RECEIPTS: "receipts_bytes_max"}
    return f"`fictl cluster apply --set {limits[stream]}=N` with more" if stream in limits else "look who fills it"


def clock_problems(summary: Summary) -> Iterator[Problem]:
    """Servers whose clock is not this machine's. Nothing is lost by it, and what stands here is wrong."""
    apart = {
        stream.status.leader or "the server": stream.status.clock_ahead_s
        for stream in summary.streams
        if abs(stream.status.clock_ahead_s) > CLOCK_APART_S_MAX
    }
    for name, ahead_s in apart.items():
        way = "ahead of" if ahead_s > 0 else "behind"
        what = f"the clock of {name} is {duration(abs(ahead_s))} {way} this machine's: ages and latencies err by that"
        yield Problem(
            urgency=2, kind="clock", what=what, next="set both by NTP; what is behind or late here may not be"
        )


def server_problems(summary: Summary) -> Iterator[Problem]:
    """Servers that do not answer, and replicas that are behind."""
    yield from _certificate_problems(summary)
    silent = [
        f"{server.url} ({server.problem})" if server.problem else server.url
        for server in summary.servers
        if not server.reachable
    ]
    if silent:
        answering = len(summary.servers) - len(silent)
        lost = _lacks_majority(summary)
        tail = ", which is no majority" if lost else ""
        what = f"{answering} servers answer of {len(summary.servers)}: not {', '.join(silent)}{tail}"
        refused = all(server.problem for server in summary.servers if not server.reachable)
        mend = "give it a certificate that its clients take" if refused else "start it"
        step = "bring back a majority of the servers" if lost else f"{mend}: one more may stop everything"
        yield Problem(urgency=1 if lost else 5, kind="server_down", what=what, next=step)
        return
    lagging: dict[tuple[str, bool], list[str]] = {}
    for stream in summary.streams:
        for replica in stream.status.replicas:
            if replica.offline or not replica.current:
                lagging.setdefault((replica.name, replica.offline), []).append(stream.status.name)
    for (name, offline), names in lagging.items():
        what = f"replica {name} is {'offline' if offline else 'behind'} for {', '.join(names)}"
        full = "wait if it catches up; else see its log: a full disk turns its JetStream off until it is restarted"
        yield Problem(urgency=5, kind="replica_lagging", what=what, next="start that server" if offline else full)


def _certificate_problems(summary: Summary) -> Iterator[Problem]:
    for server in summary.servers:
        if server.certificate_due and server.certificate_ends_s is not None:
            ends = expiry(server.certificate_ends_s, summary.at_ns / 1e9)
            what = f"the certificate of {server.name} expires {ends}"
            step = f"renew it, and `nats-server --signal reload` at {server.url}"
            yield Problem(urgency=5, kind="certificate_due", what=what, next=step)
