"""The verdict names what is wrong, the most urgent first, with the cause and what to do."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from overviews import (
    PARTITIONS,
    histogram,
    holding,
    members,
    overview,
    partition,
    process,
    processes,
    stream,
    waiting,
    with_streams,
)

from cluster.backlog import StageLag
from cluster.members import MembersReport, Unheld
from cluster.overview import Letters, Overview
from cluster.problem import Problem
from cluster.scrape import Held, Metered, Unreadable
from cluster.status import ReplicaStatus, ServerStatus, clock_ahead_s
from cluster.summary import summarize
from cluster.verdict import judge
from contracts.events import parse_rfc3339
from contracts.subjects import STAGES, STREAMS, Stage
from contracts.telemetry import DURABLE_LATENCY, STAGE_LATENCY
from stages.runtime.health import Check

FOLLOWS = ReplicaStatus(name="n3", current=True, offline=False, lag=0)


def verdict(*looks: Overview) -> list[Problem]:
    return list(judge(summarize(looks)))


def changed(report: MembersReport, stage: Stage, **changes: Any) -> MembersReport:
    every = [msgspec.structs.replace(m, **changes) if m.stage == stage else m for m in report.members]
    return msgspec.structs.replace(report, members=tuple(every))


def only(*looks: Overview) -> Problem:
    (problem,) = verdict(*looks)
    return problem


def test_a_pipeline_that_is_well_has_no_problem() -> None:
    assert verdict(overview(), overview(1)) == []


def test_one_look_without_a_run_directory_is_enough_to_be_well() -> None:
    assert verdict(overview(processes=None, disk=None)) == []


def test_a_full_hop_says_since_when_who_waits_and_why() -> None:
    held = holding("segment", Held("FI_HASH", "5", 12.2), Held("FI_HASH", "3", 3.0))
    problem = only(overview(members=members(paused="hash"), processes=processes(segment=held)))
    assert problem.kind == "stream_full"
    assert problem.what.startswith(
        "hop FI_HASH is full for 12 s: segment waits in partitions 3, 5; hash is paused since "
    )
    assert problem.what.endswith(" by eve@ops1")
    assert problem.next == "`fictl resume hash`"


def test_hops_that_are_full_because_of_a_later_one_are_told_with_it() -> None:
    looks = overview(
        members=members(paused="persist"),
        processes=processes(
            hash=holding("hash", Held("FI_PERSIST", "1", 30.0)),
            segment=holding("segment", Held("FI_HASH", "1", 20.0)),
            ingest=holding("ingest", Held("FI_SEGMENT", "1", 10.0)),
        ),
        streams=with_streams(FI_EVENTS={"used": 1.0}),
        partitions=(
            partition(0),
            partition(1, {stage: waiting(9, 40) for stage in STAGES}),
            *map(partition, range(2, 8)),
        ),
    )
    problem = only(looks)
    assert problem.urgency == 1
    assert "hop FI_PERSIST is full for 30 s: hash waits in partition 1; so is FI_HASH: segment waits" in problem.what
    assert "so is FI_EVENTS; gateways are refused; persist is paused since" in problem.what


def test_lost_receipts_are_the_cause_of_what_persist_does_not_get_on_with() -> None:
    lost = with_streams(FI_RECEIPTS={"lost": "2026-11-23T00:05:00Z"})
    late = msgspec.structs.replace(partition(3, {"persist": waiting(9, 40)}), receipt=None, seal=None)
    problem = only(overview(streams=lost, partitions=(*map(partition, range(3)), late, *map(partition, range(4, 8)))))
    assert (problem.urgency, problem.kind) == (2, "receipts_lost")
    assert "persist waits in partition 3 to be told where to go on" in problem.what
    assert "`fictl partitions restore`" in problem.next
    assert verdict(overview(streams=lost)) == [], "all were restored"


def test_a_hop_in_the_middle_does_not_blame_a_stage_that_is_well() -> None:
    held = holding("ingest", Held("FI_SEGMENT", "0", 2.0))
    problem = only(overview(processes=processes(ingest=held)))
    assert problem.what == "hop FI_SEGMENT is full for 2.0 s: ingest waits in partition 0; segment does not keep up"
    assert "fictl scale segment=N" in problem.next


def test_any_hop_that_fills_up_is_blamed_on_the_stage_before_which_something_waits() -> None:
    """Only persist empties hops, so they fill up together when it waits, and each of them may be the first."""
    held = holding("ingest", Held("FI_SEGMENT", "0", 89.0))
    partitions = (partition(0, {"persist": waiting(57, 89)}), *map(partition, range(1, 8)))
    problem = only(
        overview(
            members=members(paused="persist"),
            processes=processes(ingest=held),
            streams=with_streams(FI_SEGMENT={"used": 0.97}, FI_HASH={"used": 0.975}, FI_PERSIST={"used": 0.985}),
            partitions=partitions,
        )
    )
    assert problem.what.startswith(
        "hop FI_PERSIST is full; so is FI_SEGMENT: ingest waits in partition 0; persist is paused since "
    )
    assert problem.next == "`fictl resume persist`"


def test_a_hold_of_a_moment_is_no_problem() -> None:
    assert verdict(overview(processes=processes(ingest=holding("ingest", Held("FI_SEGMENT", "0", 0.1))))) == []


def test_a_stream_that_is_full_is_seen_without_any_process() -> None:
    problem = only(overview(processes=None, streams=with_streams(FI_HASH={"used": 0.995})))
    assert problem.what.startswith("hop FI_HASH is full; hash does not keep up")


def test_a_paused_stage_says_who_paused_it_and_what_waits() -> None:
    lags = {"hash": waiting(70, 5.0)}
    problem = only(overview(members=members(paused="hash"), partitions=tuple(partition(n, lags) for n in range(8))))  # type: ignore[arg-type]
    assert problem.kind == "paused"
    assert problem.what.endswith("by eve@ops1; 560 messages wait, the oldest for 5.0 s")


def test_partitions_that_nobody_holds_are_named_with_the_reason() -> None:
    gone = (Unheld(stage="persist", partition=4, why="waits for store 1234 on node b: start persist there"),)
    problem = only(overview(members=members(unheld=gone)))
    assert (problem.urgency, problem.kind) == (2, "unheld")
    # Moving leaves ids behind: it is for a node that does not come back, not for one where persist was stopped.
    assert problem.next.startswith("`fictl scale persist=1` or `fictl run persist` there")
    assert problem.next.endswith("gone for good? Then `fictl partitions move`")
    assert problem.what == f"no member holds partition 4 of persist: {gone[0].why}"
    assert "fictl partitions move" in problem.next


def test_a_frozen_process_is_named_where_its_partitions_are_missing() -> None:
    gone = tuple(
        Unheld(stage="persist", partition=p, why="no process of persist announces itself") for p in range(PARTITIONS)
    )
    silent = process("persist-0", 103, ready=False, checks={}, why="does not answer within 2.4 s: frozen")
    problem = only(overview(members=members(unheld=gone), processes=processes(persist=silent)))
    assert problem.urgency == 1
    assert "no member holds partitions 0-7 of persist: persist-0 does not answer within 2.4 s" in problem.what
    assert problem.next.startswith("kill -CONT 103")


@pytest.mark.parametrize(("origin_before", "kind"), [(1000, "stuck"), (900, "behind")])
def test_work_that_waits_too_long_is_stuck_or_behind(origin_before: int, kind: str) -> None:
    before = overview(partitions=(partition(0, {"hash": waiting(5, 3, origin_before)}), *map(partition, range(1, 8))))
    now = overview(1, partitions=(partition(0, {"hash": waiting(7, 4)}), *map(partition, range(1, 8))))
    problem = only(before, now)
    assert problem.kind == kind
    assert "partition 0: 7 messages wait, the oldest for 4.0 s" in problem.what


def test_work_within_the_budget_is_no_problem() -> None:
    looks = [overview(t, partitions=tuple(partition(n, {"hash": waiting(5, 0.5)}) for n in range(8))) for t in (0, 1)]
    assert verdict(*looks) == []


def test_a_percentile_over_its_budget_is_told_with_the_budget() -> None:
    slow = Metered(histograms={DURABLE_LATENCY.name: histogram(DURABLE_LATENCY, s_5_0=100)})
    problem = only(
        overview(processes=processes(persist=process("persist-0", 103))),
        overview(1, processes=processes(persist=process("persist-0", 103, slow))),
    )
    assert problem.what == "durable p95 4.9 s over its 2.0 s budget over the last 1 s"


def test_what_was_slow_before_the_window_is_no_problem_now() -> None:
    slow = Metered(histograms={STAGE_LATENCY["hash"].name: histogram(STAGE_LATENCY["hash"], s_5_0=100)})
    looks = [overview(t, processes=processes(hash=process("hash-0", 102, slow))) for t in (0, 1)]
    assert verdict(*looks) == []


def test_servers_that_are_gone_are_counted_and_named() -> None:
    servers = tuple(ServerStatus(url=f"nats://n{n}:4222", reachable=n != 2, name=f"n{n}") for n in (1, 2, 3))
    problem = only(overview(servers=servers))
    assert problem.what == "2 servers answer of 3: not nats://n2:4222"


ONE_OF_THREE = tuple(ServerStatus(url=f"nats://n{n}:4222", reachable=n == 1, name=f"n{n}") for n in (1, 2, 3))
NOBODY = MembersReport(
    members=(),
    unheld=tuple(
        Unheld(stage=s, partition=p, why=f"no process of {s} announces itself")
        for s in STAGES
        for p in range(PARTITIONS)
    ),
    moving=(),
    paused={},
)
"""Announcements expire after three seconds; a leader notices ten seconds after it lost the others."""


def test_servers_that_are_no_majority_are_the_cause_while_streams_still_name_a_leader() -> None:
    first, *others = verdict(overview(servers=ONE_OF_THREE, members=NOBODY))
    assert (first.urgency, first.kind) == (1, "server_down")
    assert first.what == "1 servers answer of 3: not nats://n2:4222, nats://n3:4222, which is no majority"
    assert {problem.kind for problem in others} == {"unheld"}


def test_servers_that_are_no_majority_are_the_cause_when_only_some_streams_have_noticed() -> None:
    every = tuple(ReplicaStatus(name=f"n{n}", current=False, offline=False, lag=0) for n in (1, 2, 3))
    noticed = with_streams(FI_EVENTS={"leader": "", "replicas": every}, FI_HASH={"problem": "nats: timeout"})
    found = verdict(overview(servers=ONE_OF_THREE, members=NOBODY, streams=noticed))
    assert [(problem.urgency, problem.kind) for problem in found] == [
        (1, "no_leader"),
        (1, "server_down"),
        (2, "no_leader"),
        (5, "unheld"),
    ]


def test_announcements_that_expired_in_an_election_do_not_make_working_processes_missing() -> None:
    problem = only(overview(members=NOBODY))
    assert (problem.urgency, problem.kind) == (5, "unheld")
    assert problem.what.startswith(
        "ingest-0, segment-0, hash-0, persist-0 answer, but no process of their stage announces"
    )
    assert "look again in 5 s" in problem.next
    late = overview(members=NOBODY, partitions=(partition(0, {"hash": waiting(7, 4)}), *map(partition, range(1, 8))))
    assert [problem.kind for problem in verdict(late)] == ["behind", "unheld"]
    assert [problem.kind for problem in verdict(overview(members=NOBODY, processes=None))] == ["unheld"] * len(STAGES)
    some = msgspec.structs.replace(
        members(unheld=tuple(row for row in NOBODY.unheld if row.stage != "hash")),
        members=tuple(member for member in members().members if member.stage == "hash"),
    )
    problem = only(overview(members=some))
    assert problem.what.startswith("ingest-0, segment-0, persist-0 answer, but")


def test_partitions_that_stopped_are_told_once_and_with_the_reason() -> None:
    why = "partitions [0, 1] have stopped, and the log says why each: No space left on device"
    unready = process(
        "persist-0",
        103,
        Metered(lanes={"stopped": 2}),
        ready=False,
        why=f"lanes: {why}; circuits: disk open; disk: 0.00 GB free",
        checks={name: Check(False, why) for name in ("lanes", "circuits", "disk")},
    )
    problem = only(overview(processes=processes(persist=unready)))
    assert (problem.kind, why in problem.what) == ("stopped", True)


@pytest.mark.parametrize("answering", [0, 1])
def test_servers_that_only_we_cannot_reach_stop_nothing(answering: int) -> None:
    """Processes have announced themselves within seconds, so a majority is there."""
    servers = tuple(ServerStatus(url=f"nats://n{n}:4222", reachable=n <= answering, name=f"n{n}") for n in (1, 2, 3))
    problem = only(overview(servers=servers))
    assert (problem.urgency, problem.kind) == (5, "server_down")


def test_of_servers_that_are_not_all_known_no_majority_is_missed() -> None:
    replicas = tuple(ReplicaStatus(name=f"n{n}", current=True, offline=False, lag=0) for n in (2, 3))
    servers = tuple(ServerStatus(url=f"nats://n{n}:4222", reachable=n == 1, name=f"n{n}") for n in (1, 2))
    problem = only(overview(servers=servers, streams=with_streams(FI_EVENTS={"replicas": replicas})))
    assert (problem.urgency, problem.what) == (5, "1 servers answer of 2: not nats://n2:4222")


def test_a_replica_that_is_behind_is_told_when_its_server_was_not_asked() -> None:
    replicas = (ReplicaStatus(name="n9", current=False, offline=True, lag=4), FOLLOWS)
    problem = only(overview(streams=with_streams(FI_HASH={"replicas": replicas})))
    assert problem.text == "replica n9 is offline for FI_HASH -> start that server"


def test_a_server_that_answers_and_whose_replicas_are_behind_is_told_once() -> None:
    """As one is whose JetStream a full disk turned off."""
    behind = {
        name: {"replicas": (ReplicaStatus(name="n2", current=False, offline=False, lag=lag), FOLLOWS)}
        for name, lag in (("FI_EVENTS", 1456), ("FI_HASH", 1373), ("FI_DLQ", 1))
    }
    problem = only(overview(streams=with_streams(**behind)))
    assert problem.what == "replica n2 is behind for FI_EVENTS, FI_HASH, FI_DLQ"
    assert "a full disk turns its JetStream off" in problem.next


def test_a_stream_that_fewer_servers_keep_than_others_is_told() -> None:
    problem = only(overview(streams=with_streams(FI_RECEIPTS={"replicas": (), "copies_set": 1})))
    assert problem.what == "FI_RECEIPTS: 1 of 3 copies are there"
    assert "`fictl cluster plan`" in problem.next
    # So it is once a server was taken out of the cluster, and nothing stands in its place.
    problem = only(overview(streams=tuple(stream(name, replicas=(FOLLOWS,)) for name in STREAMS)))
    assert problem.what == "all streams: 2 of 3 copies are there"


@pytest.mark.parametrize(("ahead_s", "told"), [(3600.0, "60 min ahead of"), (-1800.0, "30 min behind")])
def test_a_server_whose_clock_is_another_is_told_once_and_before_what_seems_late(ahead_s: float, told: str) -> None:
    streams = tuple(stream(name, clock_ahead_s=ahead_s) for name in STREAMS)
    problem = only(overview(streams=streams))
    assert problem.what == f"the clock of n1 is {told} this machine's: ages and latencies err by that"
    assert problem.urgency == 2


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("2026-11-23T19:00:00.5Z", 0.0),
        ("2026-11-23T19:00:02Z", 1.0),
        ("2026-11-23T18:59:57Z", -3.0),
        ("yesterday", 0.0),
        (None, 0.0),
    ],
)
def test_how_far_a_clock_is_before_ours_counts_from_the_question_to_the_answer(told: object, expected: float) -> None:
    asked_ns = parse_rfc3339("2026-11-23T19:00:00Z")
    assert clock_ahead_s(told, asked_ns, asked_ns + 10**9) == expected


def test_streams_of_a_single_server_are_no_problem() -> None:
    assert not verdict(overview(streams=tuple(stream(name, leader="", replicas=(), copies_set=1) for name in STREAMS)))


def test_without_a_quorum_every_stream_that_is_silent_is_named_once() -> None:
    streams = tuple(stream(name, problem="nats: timeout") for name in STREAMS)
    unready = process(
        "hash-0", 102, ready=False, why="streams: no answer", checks={"streams": Check(False, "no answer")}
    )
    found = verdict(
        overview(
            streams=streams,
            facts=None,
            partitions=(),
            members=None,
            letters=None,
            unread=("FI_EVENTS: nats: timeout",),
            processes=processes(hash=unready),
        )
    )
    assert [problem.kind for problem in found] == ["no_leader"]
    assert found[0].what == "all streams: nats: timeout (3 of 3 servers answer): nothing is accepted"
    assert "one without room, on its disk or within its limits, needs room and a restart" in found[0].next
    assert "`kill -9` the server whose disk hangs" in found[0].next


def test_no_server_at_all_is_the_first_problem() -> None:
    servers = tuple(ServerStatus(url=f"nats://n{n}:4222", reachable=False) for n in (1, 2, 3))
    nothing: dict[str, Any] = {"streams": (), "facts": None, "partitions": (), "members": None, "letters": None}
    problem = verdict(overview(servers=servers, connected=False, streams_s=0.0, **nothing))[0]
    assert (problem.urgency, problem.kind) == (1, "no_server")


def test_dead_letters_are_a_problem_only_while_they_grow() -> None:
    problem = only(overview(letters=Letters(by_stage={"ingest": 200}, recent=120)))
    assert problem.what == "dead letters grew by 120 in the last minute (now 200)"
    assert verdict(overview(letters=Letters(by_stage={"ingest": 200}, recent=0))) == []


def test_an_open_breaker_a_low_disk_and_stopped_partitions_are_told() -> None:
    worse = overview()
    assert worse.disk is not None
    found = verdict(
        msgspec.structs.replace(
            worse,
            disk=msgspec.structs.replace(worse.disk, free_bytes=10),
            members=changed(members(), "ingest", holding=True),
            processes=processes(persist=process("persist-0", 103, Metered(lanes={"stopped": 2}))),
        )
    )
    assert [problem.kind for problem in found] == ["disk_low", "stopped", "breaker_open"]
    assert "disk below floor: 10 B free at /var/lib/fi/shards" in found[0].what


def test_a_server_that_cannot_read_what_it_stored_is_told_with_what_to_do() -> None:
    often, seldom = (Metered(unreadable=(Unreadable("FI_EVENTS", "n2", count),)) for count in (1200, 34))
    seen = processes(ingest=process("ingest-0", 100, often), hash=process("ingest-1", 104, seldom))
    (found,) = verdict(overview(processes=seen))
    assert (found.urgency, found.kind) == (5, "server_damaged")
    assert found.what == "a file of FI_EVENTS is damaged on n2: 1,234 times it could not read what it stored"
    assert "stop n2, delete its jetstream directory" in found.next


def test_processes_that_judge_by_different_policies_are_told() -> None:
    found = members()
    second = [msgspec.structs.replace(m, name="segment-1", policy=2) for m in found.members if m.stage == "segment"]
    both = msgspec.structs.replace(found, members=(*found.members, *second))
    assert only(overview(members=both)).what == "processes of segment judge by different policies: 1, 2"


def test_what_could_not_be_read_is_a_problem() -> None:
    lags = dict.fromkeys(STAGES, StageLag())
    unread = overview(partitions=(partition(0, lags), *map(partition, range(1, 8))), unread=("partition 0: late",))
    assert only(unread).what == "not read: partition 0: late"


def test_the_most_urgent_comes_first() -> None:
    servers = tuple(ServerStatus(url=f"nats://n{n}:4222", reachable=n != 2, name=f"n{n}") for n in (1, 2, 3))
    found = verdict(
        overview(
            servers=servers,
            streams=with_streams(FI_RECEIPTS={"used": 0.9}),
            letters=Letters(by_stage={"ingest": 1}, recent=1),
            members=members(paused="hash"),
            processes=processes(ingest=holding("ingest", Held("FI_SEGMENT", "0", 9.0))),
        )
    )
    assert [problem.kind for problem in found] == ["stream_full", "paused", "dead_letters", "near_full", "server_down"]
