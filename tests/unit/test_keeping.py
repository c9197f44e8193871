"""What somebody may have changed in a stream by hand that would lose events, or keep them for ever, is told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from overviews import overview, process, processes, with_streams

from cluster.summary import summarize
from cluster.topology import streams
from cluster.verdict import judge
from contracts.settings import Settings
from contracts.subjects import CONTROL, EVENTS, MEMBERS
from stages.runtime.health import Check
from stages.runtime.keeping import StreamRules, keeping_problem

OURS = {str(config.name): config.as_dict() for config in streams(Settings(), "cluster-1")}
ELSEWHERE = "stores messages where no partition looks for them"
QUEUES = sorted(OURS.keys() - {CONTROL, MEMBERS})


def problem(stream: str, **changes: Any) -> str:
    return keeping_problem(msgspec.convert(OURS[stream] | changes, StreamRules))


@pytest.mark.parametrize("stream", QUEUES)
def test_streams_as_we_make_them_are_well(stream: str) -> None:
    assert problem(stream) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"discard": "old"}, "drops messages to make room"),
        ({"retention": "workqueue"}, "drops messages that were read"),
        ({"retention": "interest"}, "drops messages that were read"),
        ({"max_age": 1}, "drops messages for their age"),
        ({"max_msgs_per_subject": 1}, "drops all but the last messages of a subject"),
        ({"allow_rollup_hdrs": True}, "lets a message drop all those before it"),
        ({"allow_msg_ttl": True}, "lets messages vanish that bear a TTL"),
        ({"sources": [{"name": "OTHER"}]}, "takes in what other streams hold"),
        ({"no_ack": True}, "acknowledges nothing"),
        ({"sealed": True}, "takes no message"),
        ({"max_msgs": 10}, "takes no more than 10 messages"),
        ({"max_msg_size": 1000}, "takes no message of over 1000 bytes"),
        ({"deny_purge": True}, "cannot be emptied of what is settled"),
        ({"subject_transform": None}, ELSEWHERE),
        ({"subject_transform": {"src": "fi.events.*.*", "dest": "x"}}, ELSEWHERE),
        ({"metadata": {}}, ELSEWHERE),
    ],
)
def test_each_change_that_loses_or_keeps_events_is_told_with_the_next_step(changes: dict[str, Any], words: str) -> None:
    assert problem(EVENTS, **changes) == f"{words}: somebody changed it; see `fictl cluster plan`"


def test_several_changes_are_told_together() -> None:
    told = problem(EVENTS, discard="old", max_age=1)
    assert told.startswith("drops messages to make room, drops messages for their age: ")


def test_a_stream_that_loses_messages_as_it_was_changed_is_told_once() -> None:
    wrong = with_streams(FI_EVENTS={"wrong": "lets messages vanish"})
    check = Check(ok=False, why="FI_EVENTS: lets messages vanish")
    look = process("ingest-0", 100)
    unready = msgspec.structs.replace(look.health, ready=False, checks={"streams": check})
    told = overview(streams=wrong, processes=processes(ingest=msgspec.structs.replace(look, health=unready)))
    (problem,) = judge(summarize([told]))
    assert (problem.urgency, problem.kind) == (2, "stream_changed")
    assert problem.what == "FI_EVENTS, as somebody changed it, lets messages vanish"
