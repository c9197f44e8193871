"""What is wrong with a pipeline, in words, the most urgent first, each with what to do about it. Pure.

The order follows from what it does to events: first what stops all of them, then what stops some, what makes them late,
what was refused, and at last what stops nothing yet. A cause comes before what it leads to, and what a deeper cause
explains (a hop that is full because the one after it is) is told in the same sentence, not again.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Final

from cluster.broker_verdict import (
    NEAR_FULL_SHARE,
    account_problems,
    clock_problems,
    connection_problems,
    is_silent,
    lost_receipts,
    make_room,
    server_problems,
    stream_problems,
)
from cluster.overview import RECENT_S, ProcessLook
from cluster.problem import Problem
from cluster.scrape import Held, Percentiles
from cluster.status import FULL_SHARE
from cluster.summary import StageSummary, Summary, Waiting
from cluster.words import duration, partitions, size
from contracts.subjects import DLQ, EVENTS, HOPS, MEMBERS, READER, RECEIPTS, STAGES, WRITER, Stage

HELD_S_MIN: Final = 0.5
"""A publish held for less is not worth a word."""
LOOP_LAG_S_MAX: Final = 0.25


def judge(summary: Summary) -> tuple[Problem, ...]:
    """Everything that is not well; empty when all is."""
    if not summary.connected:
        found = [*connection_problems(summary), *_processes(summary, set()), *_disk(summary)]
        return tuple(sorted(found, key=lambda problem: problem.urgency))
    chains = _chains(summary)
    blamed = {stage for chain in chains if (stage := _behind_with(summary, chain[0])) is not None}
    waits: set[Stage] = {"persist"} if any(lost_receipts(summary)) else set()
    held_up = {writer for chain in chains for name in chain if (writer := WRITER.get(name)) is not None}
    found = [
        *stream_problems(summary),
        *account_problems(summary),
        *clock_problems(summary),
        *_disk(summary),
        *_breakers(summary),
        *_full(summary, chains, blamed),
        *server_problems(summary),
        *_unheld(summary, blamed),
        *_late(summary, blamed | held_up | waits),
        *_latencies(summary),
        *_letters(summary),
        *_damaged(summary),
        *_processes(summary, blamed),
        *_unread(summary),
    ]
    return tuple(sorted(found, key=lambda problem: problem.urgency))


def _held(summary: Summary) -> dict[str, list[Held]]:
    """Stream → publishes that it holds long enough to matter, longest first."""
    found: dict[str, list[Held]] = {}
    for process in summary.processes or ():
        for held in process.metered.held if process.metered is not None else ():
            found.setdefault(held.stream, []).append(held)
    ordered = {stream: sorted(held, key=lambda one: -one.age_s) for stream, held in found.items()}
    return {stream: held for stream, held in ordered.items() if held[0].age_s >= HELD_S_MIN}


def _chains(summary: Summary) -> list[list[str]]:
    """Full streams: each begins a list with those upstream that are full because of it; downstream ones first."""
    held = _held(summary)
    used = {stream.status.name: stream.status.used for stream in summary.streams}
    full = {name for name in used if used[name] >= FULL_SHARE} | set(held)
    chains: list[list[str]] = []
    for name in (DLQ, RECEIPTS, *reversed(HOPS), EVENTS):
        if name not in full:
            continue
        if chains and _follows(summary, name, chains[-1]):
            chains[-1].append(name)
        else:
            chains.append([name])
    return chains


def _full(summary: Summary, chains: Sequence[Sequence[str]], told: Collection[Stage]) -> Iterator[Problem]:
    held = _held(summary)
    for cause, *led_to in chains:
        yield _full_problem(summary, cause, led_to, held)
    full = {name for chain in chains for name in chain}
    for stream in summary.streams:
        name, used = stream.status.name, stream.status.used
        stage = _behind_with(summary, name)
        if name in HOPS and name not in full and used >= NEAR_FULL_SHARE and stage is not None and stage not in told:
            reason, step = _reason(summary, stage)
            what = f"hop {name} is {used:.0%} full: {reason or f'{stage} does not keep up'}"
            step = step or f"`fictl scale {stage}=N` with more processes"
            yield Problem(urgency=3, kind="near_full", what=what, next=step)


def _behind_with(summary: Summary, stream: str) -> Stage | None:
    """The stage that keeps `stream` from being emptied; None for a stream that no stage reads."""
    reader = READER.get(stream)
    return reader if reader is None or stream == EVENTS else summary.behind_from(reader)


def _follows(summary: Summary, upstream: str, chain: Sequence[str]) -> bool:
    """True when `upstream` is full because of what `chain` tells: its reader waits for that, or the same stage."""
    stage = _behind_with(summary, upstream)
    same = upstream in HOPS and stage == _behind_with(summary, chain[0])
    return stage is not None and (same or stage == WRITER.get(chain[-1]))


def _full_problem(summary: Summary, stream: str, led_to: Sequence[str], held: dict[str, list[Held]]) -> Problem:
    since = f" for {duration(held[stream][0].age_s)}" if stream in held else ""
    what = f"{'hop ' if stream in HOPS else ''}{stream} is full{since}"
    if stream in held:
        what += f": {_who_waits(stream, held)}"
    for other in led_to:
        what += f"; so is {other}" + (f": {_who_waits(other, held)}" if other in held else "")
    all_events = EVENTS in (stream, *led_to)
    if all_events:
        what += "; gateways are refused"
    stage = _behind_with(summary, stream)
    if stream == EVENTS and stage is not None and not _reason(summary, stage)[0]:
        why, step = "what is not sealed fills it", make_room(EVENTS)
    elif stage is None:
        why, step = "", make_room(stream)
    else:
        why, step = _reason(summary, stage)
        why = why or f"{stage} does not keep up"
        step = step or f"`fictl scale {stage}=N` with more processes; is its CPU or disk full?"
    what += f"; {why}" if why else ""
    return Problem(urgency=1 if all_events else 2, kind="stream_full", what=what, next=step)


def _who_waits(stream: str, held: dict[str, list[Held]]) -> str:
    numbers = sorted({int(one.partition) for one in held[stream] if one.partition.isdecimal()})
    writer = WRITER.get(stream)
    return f"{'publishing' if writer is None else writer} waits in {partitions(numbers)}"


def _reason(summary: Summary, stage: Stage) -> tuple[str, str]:
    """Why a stage takes nothing, and what to do; empty texts when it seems to work."""
    members = summary.members
    if members is None:
        return "", ""
    if (pause := members.paused.get(stage)) is not None:
        when = time.strftime("%H:%M", time.localtime(pause.since_ns / 1e9))
        return f"{stage} is paused since {when} by {pause.by}", f"`fictl resume {stage}`"
    if (silent := _silent(summary, stage)) is not None:
        return _why_silent(silent)
    if unheld := [row for row in members.unheld if row.stage == stage]:
        numbers = [row.partition for row in unheld]
        return f"nobody works on {partitions(numbers)} of {stage}: {unheld[0].why}", _start(stage, unheld[0].why)
    return "", ""


def _silent(summary: Summary, stage: Stage) -> ProcessLook | None:
    """A process of the stage on this machine that is down, or does not answer."""
    ours = (process for process in summary.processes or () if process.health.kind == stage)
    return next((process for process in ours if not process.health.ready and not process.health.checks), None)


def _why_silent(process: ProcessLook) -> tuple[str, str]:
    health = process.health
    if health.pid is None:
        return f"{health.name} {health.why}", "its log says why; `fictl up` starts it again by itself"
    return f"{health.name} {health.why}", f"kill -CONT {health.pid} if it was stopped, else kill -9 {health.pid}"


def _start(stage: Stage, why: str) -> str:
    if "start persist there" in why:
        return "`fictl scale persist=1` or `fictl run persist` there; gone for good? Then `fictl partitions move`"
    if why.startswith("moves to"):
        return "wait some seconds; `fictl members`"
    return f"`fictl scale {stage}=1`, or `fictl run {stage}` on any node"


def _unheld(summary: Summary, told: Collection[Stage]) -> Iterator[Problem]:
    members = summary.members
    if members is None:
        return
    unannounced = _unannounced(summary)
    if unannounced:
        names = ", ".join(name for stage in STAGES for name in unannounced.get(stage, ()))
        what = f"{names} answer, but no process of their stage announces itself: {MEMBERS} forgets all in an election"
        yield Problem(urgency=5, kind="unheld", what=what, next="look again in 5 s; if it stays, `fictl health`")
    lags = {stage.stage: stage for stage in summary.stages}
    for stage in members.paused:
        if stage not in told:
            reason, step = _reason(summary, stage)
            yield Problem(urgency=2, kind="paused", what=f"{reason}{_behind(lags[stage])}", next=step)
    for (stage, why), numbers in members.unheld_by_reason.items():
        if stage not in members.paused and stage not in told and stage not in unannounced:
            silent = _silent(summary, stage)
            reason, step = (why, _start(stage, why)) if silent is None else _why_silent(silent)
            what = f"no member holds {partitions(numbers)} of {stage}: {reason}{_behind(lags[stage])}"
            moves = why.startswith("moves to")
            everyone = len(numbers) == summary.partition_count
            yield Problem(urgency=5 if moves else 1 if everyone else 2, kind="unheld", what=what, next=step)


def _unannounced(summary: Summary) -> dict[Stage, list[str]]:
    """Stages that the bucket shows no process of, though processes of this machine answer: these, by stage.

    Announcements expire sooner than an election ends, and processes work on meanwhile.
    """
    members = summary.members
    if members is None:
        return {}
    shown = {*members.paused, *(member.stage for member in members.members)}
    ours = [process.health for process in summary.processes or () if process.health.checks]
    return {
        stage: names
        for stage in STAGES
        if stage not in shown and (names := [health.name for health in ours if health.kind == stage])
    }


def _behind(stage: StageSummary) -> str:
    if not stage.waiting:
        return ""
    oldest = "" if stage.oldest_s is None else f", the oldest for {duration(stage.oldest_s)}"
    return f"; {stage.waiting:,} messages wait{oldest}"


def _late(summary: Summary, told: Collection[Stage]) -> Iterator[Problem]:
    """Stages that are given work and do not finish it in time, though somebody holds the partitions."""
    members = summary.members
    unannounced = _unannounced(summary)
    unheld = () if members is None else members.unheld
    excused = {(row.stage, row.partition) for row in unheld if row.stage not in unannounced}
    for stage in summary.stages:
        if stage.stage in told:
            continue
        late: dict[int, Waiting] = {}
        for one in summary.partitions:
            waiting = one.waiting[stage.stage]
            age_s = waiting.oldest_s
            if age_s is not None and age_s > summary.durable_budget_s and (stage.stage, one.partition) not in excused:
                late[one.partition] = waiting
        if not late:
            continue
        messages = sum(waiting.messages or 0 for waiting in late.values())
        oldest_s = max(waiting.oldest_s or 0.0 for waiting in late.values())
        stuck = sorted(number for number, waiting in late.items() if waiting.stuck)
        reason, step = _reason(summary, stage.stage)
        tail = f"{messages:,} messages wait, the oldest for {duration(oldest_s)}"
        if stuck:
            what = f"{stage.stage} does not get on with {partitions(stuck)}: {tail}{f'; {reason}' if reason else ''}"
            step = step or "`fictl members` names its processes; their logs say why"
            yield Problem(urgency=2, kind="stuck", what=what, next=step)
        else:
            what = f"{stage.stage} is behind in {partitions(sorted(late))}: {tail}"
            step = f"watch whether it falls (`fictl top`); if not, `fictl scale {stage.stage}=N` with more"
            yield Problem(urgency=3, kind="behind", what=what, next=step)


def _latencies(summary: Summary) -> Iterator[Problem]:
    window = f"over the last {summary.latency_window_s or 0:.0f} s"
    rows: list[tuple[str, Percentiles | None, float]] = [("durable", summary.durable, summary.durable_budget_s)]
    rows += [(stage.stage, stage.latency, stage.budget_s) for stage in summary.stages]
    for name, latency, budget_s in rows:
        if latency is not None and latency.p95_s > budget_s:
            what = f"{name} p95 {duration(latency.p95_s)} over its {duration(budget_s)} budget {window}"
            step = (
                "the stage over its budget is the cause" if name == "durable" else f"`fictl scale {name}=N` with more"
            )
            if name == "persist":
                step = "is its disk slow? fi.commit.duration in `/metrics` tells"
            yield Problem(urgency=3, kind="over_budget", what=what, next=step)
    lag = summary.loop_lag
    if lag is not None and lag.p95_s > LOOP_LAG_S_MAX:
        what = f"event loops run {duration(lag.p95_s)} late (p95 {window})"
        yield Problem(urgency=5, kind="loop_lag", what=what, next="the CPUs are full: give the stages more")


def _breakers(summary: Summary) -> Iterator[Problem]:
    members = summary.members.members if summary.members is not None else ()
    for member in members:
        if member.holding:
            policy = " or set another policy," if member.stage == "segment" else ""
            yield Problem(
                urgency=2,
                kind="breaker_open",
                what=f"breaker open in {member.name}: it would dead-letter nearly everything, and holds",
                next=f"its log says why; roll the build back,{policy} or FI_DEAD_SHARE_MAX=1 if the events are bad",
            )
    policies = sorted({member.policy for member in members if member.stage == "segment" and member.policy})
    if len(policies) > 1:
        what = f"processes of segment judge by different policies: {', '.join(map(str, policies))}"
        yield Problem(urgency=5, kind="policies", what=what, next="wait some seconds; `fictl health` says who cannot")


def _disk(summary: Summary) -> Iterator[Problem]:
    disk = summary.disk
    if disk is not None and disk.free_bytes < disk.floor_bytes:
        what = f"disk below floor: {size(disk.free_bytes)} free at {disk.path}, floor {size(disk.floor_bytes)}"
        yield Problem(urgency=2, kind="disk_low", what=what, next="free space there; partitions stop when it is full")
    for process in summary.processes or ():
        if stopped := _stopped(process):
            lanes = process.health.checks.get("lanes")
            why = f"{stopped} partitions have stopped" if lanes is None or lanes.ok else lanes.why
            what = f"the disk or files of {process.health.name} failed: {why}"
            step = "mend the disk, or make room; a damaged file: `fictl verify`, then `fictl rebuild`"
            yield Problem(urgency=2, kind="stopped", what=what, next=step)


def _stopped(process: ProcessLook) -> int:
    """How many partitions have stopped in it."""
    return 0 if process.metered is None else process.metered.lanes.get("stopped", 0)


def _letters(summary: Summary) -> Iterator[Problem]:
    letters = summary.letters
    if letters is not None and letters.recent:
        total = sum(letters.by_stage.values())
        what = f"dead letters grew by {letters.recent:,} in the last {_recent()} (now {total:,})"
        yield Problem(urgency=4, kind="dead_letters", what=what, next="`fictl dlq ls --since 5m` shows why")


def _damaged(summary: Summary) -> Iterator[Problem]:
    """Servers that cannot read what they stored; others have it still."""
    found: dict[tuple[str, str], int] = {}
    for process in summary.processes or ():
        for one in process.metered.unreadable if process.metered is not None else ():
            found[one.server, one.stream] = found.get((one.server, one.stream), 0) + one.messages
    for (server, stream), messages in sorted(found.items()):
        yield Problem(
            urgency=5,
            kind="server_damaged",
            what=f"a file of {stream} is damaged on {server}: {messages:,} times it could not read what it stored",
            next=f"while all other servers are current: stop {server}, delete its jetstream directory, start it; once "
            "`fictl cluster status` shows it current, `fictl restart`",
        )


def _recent() -> str:
    return "minute" if RECENT_S == 60 else f"{RECENT_S} s"


def _processes(summary: Summary, told: Collection[Stage]) -> Iterator[Problem]:
    """Processes of this machine that are not ready, and for a reason of their own."""
    excused = set()
    if not summary.connected or any(is_silent(stream) for stream in summary.streams):
        excused |= {"connected", "streams", "lanes"}
    if any(stream.status.wrong for stream in summary.streams):
        excused.add("streams")
    if any(problem.kind == "disk_low" for problem in _disk(summary)):
        excused.add("disk")
    unheld = set() if summary.members is None else {row.stage for row in summary.members.unheld}
    for process in summary.processes or ():
        health = process.health
        failing = {name for name, check in health.checks.items() if not check.ok}
        named = health.kind in unheld.union(told) and not health.checks
        known = excused | {"lanes", "circuits", "disk"} if _stopped(process) else excused
        if health.ready or health.kind == "server" or named or (failing and failing <= known):
            continue
        yield Problem(
            urgency=3,
            kind="not_ready",
            what=f"{health.name} is not ready: {health.why}",
            next="its log says more; others take its partitions over where they can",
        )


def _unread(summary: Summary) -> Iterator[Problem]:
    for line in summary.unread if summary.cluster else ():
        yield Problem(urgency=5, kind="unread", what=f"not read: {line}", next="look again")
