"""The policy: what may be set, how versions differ, and how segment judges by the one in force."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from contracts.errors import InvalidEventError, SettingsError, WireFormatError
from contracts.events import Event
from contracts.frames import Frame, encode_frame
from contracts.letters import LETTERS_APART
from contracts.lifecycle import ClosedConsultations
from contracts.policy import CRITICALITIES, EVENT_TYPES
from contracts.rules import (
    CLOSED_REMEMBERED_MAX,
    DEFAULT_POLICY,
    Difference,
    Policy,
    Rules,
    change_rules,
    decode_policy,
    diff_rules,
    encode_policy,
    parse_rules,
)
from contracts.settings import Settings
from contracts.subjects import policy_subject, policy_version
from stages.runtime.breaker import Breaker
from stages.runtime.messages import StoredMessage
from stages.runtime.work import DeadLetter, Step
from stages.segment.core import SegmentCore

HOUR_NS = 3_600_000_000_000


def policy(version: int, **rules: Any) -> Policy:
    return msgspec.structs.replace(DEFAULT_POLICY, version=version, rules=Rules(**rules))


def event(origin: int, kind: str, at_ns: int = HOUR_NS, payload: bytes = b"{}") -> Event:
    return Event(
        origin=origin,
        index=0,
        event_id=bytes([origin]) * 16,
        consultation_id=bytes(16),
        site="s",
        event_type=kind,
        timestamp_ns=at_ns,
        stamped=True,
        payload=payload,
        metadata=b"{}",
        accepted_ns=at_ns,
    )


def message(*events: Event, closed: bytes = b"") -> StoredMessage:
    first, last = events[0].origin, events[-1].origin
    frame = Frame(0, first - 1, first, last, (), "w", 0, closed, (), events)
    return StoredMessage("fi.segment.0", 1, 0, encode_frame(frame), {})


def judge(core: SegmentCore, *events: Event) -> Step:
    core.begin()
    step = core.step(message(*events), events[0].origin - 1, 7)
    assert step is not None
    return step


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"payload_bytes_max": 1024 * 1024 + 1}, "payload_bytes_max = 1048577"),
        ({"payload_bytes_max": 10}, "payload_bytes_max = 10"),
        ({"closed_remembered": -1}, "closed_remembered = -1"),
        ({"closed_remembered": CLOSED_REMEMBERED_MAX + 1}, "closed_remembered"),
        ({"check_payload": "no"}, 'check_payload = "no": Expected `bool`'),
        ({"chek_payload": True}, "'chek_payload' is no rule of a policy; did you mean check_payload?"),
        (
            {"refused_types": ["LLM_CAL_FAILED"]},
            "refused_types: 'LLM_CAL_FAILED' is no event type; did you mean LLM_CALL_FAILED?",
        ),
        ({"refused_types": list(EVENT_TYPES)}, "refuses every event"),
        ({"criticality": {"urgency_classified": "routine"}}, "did you mean URGENCY_CLASSIFIED?"),
        ({"criticality": {"URGENCY_CLASSIFIED": "mild"}}, "criticality"),
        ({"version": 3}, "'version' is no rule"),
    ],
)
def test_what_makes_no_policy_is_refused_naming_the_rule(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        change_rules(Rules(), given)
    assert words in str(refused.value)


@pytest.mark.parametrize("word", ["check_payload", "check_payload=no", "criticality.URGENCY_CLASSIFIED=mild"])
def test_a_word_that_is_no_assignment_is_refused(word: str) -> None:
    with pytest.raises(SettingsError):
        parse_rules([word], Rules())


@pytest.mark.parametrize("value", ["5", "[]", "null", '"critical"'])
def test_one_override_beside_a_value_that_is_no_object_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match="a JSON object"):
        parse_rules([f"criticality={value}", "criticality.MESSAGE_DELETED=critical"], Rules())


def test_words_change_what_they_name_and_leave_the_rest() -> None:
    before = Rules(closed_remembered=9, criticality={"LLM_CALL_FAILED": "critical", "CORE_ERROR_OCCURRED": "routine"})
    words = [
        "check_payload=false",
        "refused_types=MESSAGE_UPDATED, LLM_CALL_INITIATED,",
        "criticality.LLM_CALL_FAILED=",
        "criticality.MESSAGE_DELETED=critical",
    ]
    after = change_rules(before, parse_rules(words, before))
    assert after == Rules(
        check_payload=False,
        closed_remembered=9,
        refused_types=("LLM_CALL_INITIATED", "MESSAGE_UPDATED"),
        criticality={"CORE_ERROR_OCCURRED": "routine", "MESSAGE_DELETED": "critical"},
    )
    assert diff_rules(before, after) == [
        Difference("check_payload", True, False),
        Difference("refused_types.LLM_CALL_INITIATED", False, True),
        Difference("refused_types.MESSAGE_UPDATED", False, True),
        Difference("criticality.LLM_CALL_FAILED", "critical", None),
        Difference("criticality.MESSAGE_DELETED", None, "critical"),
    ]
    assert diff_rules(after, after) == []
    assert change_rules(after, parse_rules(["refused_types=", "criticality={}"], after)).refused_types == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b'"policy.1"', b'"policy.2"'),
        lambda data: data.replace(b'"check_payload"', b'"check_payloads"'),
        lambda data: data.replace(b'"version":4', b'"version":5'),
        lambda data: data.replace(b'"closed_remembered":64', b'"closed_remembered":9999'),
        lambda data: data.replace(b'"refused_types":[]', b'"refused_types":["NOTHING"]'),
        lambda data: data.replace(b'"rules"', b'"also":1,"rules"'),
        lambda data: b"",
    ],
)
def test_a_policy_that_is_not_understood_whole_is_not_read(change: Any) -> None:
    data = encode_policy(policy(4))
    assert decode_policy(data, 4) == policy(4)
    with pytest.raises(WireFormatError, match=r"policy\.4"):
        decode_policy(change(data), 4)


def test_a_key_names_its_version_and_other_keys_none() -> None:
    assert policy_version(policy_subject(12)) == 12
    prefix = policy_subject(12).removesuffix("12")
    assert [policy_version(prefix + key) for key in ("x", "012", "-1", "9" * 10, "²", "")] == [0] * 6


def test_the_policy_changes_between_frames_and_never_within_one() -> None:
    in_force = [policy(3)]
    core = SegmentCore(lambda: in_force[0])
    core.begin()
    in_force[0] = policy(4, refused_types=("MESSAGE_UPDATED",), criticality={"MESSAGE_DELETED": "critical"})
    for origin in (1, 2):
        step = core.step(
            message(event(origin, "MESSAGE_UPDATED"), event(origin + 10, "MESSAGE_DELETED")), origin - 1, 7
        )
        assert step is not None
        assert [(e.policy_version, CRITICALITIES[e.criticality]) for e in step.events] == [
            (3, "routine"),
            (3, "elevated"),
        ]
    step = judge(core, event(21, "MESSAGE_UPDATED"), event(22, "MESSAGE_DELETED"))
    assert [(e.policy_version, CRITICALITIES[e.criticality]) for e in step.events] == [(4, "critical")]
    (letter,) = step.letters
    assert (letter.origin, letter.policy, letter.error.reason) == (21, 4, "event_type.refused")
    assert "policy 4 refuses MESSAGE_UPDATED" in letter.error.detail


def test_a_smaller_payload_limit_refuses_what_is_larger() -> None:
    core = SegmentCore(lambda: policy(2, payload_bytes_max=1024))
    payload = msgspec.json.encode({"text": "x" * 1015})
    assert len(payload) == 1024 + 2
    step = judge(
        core,
        event(1, "MESSAGE_UPDATED", payload=payload),
        event(2, "MESSAGE_UPDATED", payload=payload[:8] + payload[10:]),
    )
    assert [e.origin for e in step.events] == [2]
    assert step.letters[0].error.reason == "payload.too_large"


def test_an_event_of_a_type_that_only_a_later_build_knows_waits_for_that_build() -> None:
    with pytest.raises(WireFormatError, match="'OF_A_LATER_BUILD' is not known to this build; run a later one"):
        judge(SegmentCore(), event(1, "OF_A_LATER_BUILD"))


@pytest.mark.parametrize("payload", [b"[]", b"{", b'{"\xff":1}'])
def test_a_payload_that_should_never_have_passed_ingest_is_refused_alone(payload: bytes) -> None:
    step = judge(SegmentCore(), event(1, "MESSAGE_RECEIVED", payload=payload), event(2, "CORE_STATE_CHANGED"))
    assert [letter.error.reason for letter in step.letters] == ["payload.malformed"]
    assert [one.origin for one in step.events] == [2]


def test_what_is_no_memory_of_commits_is_refused_as_something_that_cannot_be_read() -> None:
    with pytest.raises(WireFormatError, match="25 bytes are no rows of 24"):
        SegmentCore().open(bytes(25))


def test_thousands_of_refused_events_of_one_message_are_few_letters() -> None:
    core = SegmentCore(lambda: policy(2, refused_types=("MESSAGE_UPDATED",)))
    step = judge(core, *(msgspec.structs.replace(event(1, "MESSAGE_UPDATED"), index=index) for index in range(3000)))
    assert [letter.lines for letter in step.letters] == [1] * LETTERS_APART + [3000 - LETTERS_APART]
    assert sum(row.count for row in step.dead) == 3000


def test_commits_are_remembered_while_the_lifecycle_rule_is_off_so_that_it_holds_once_it_is_on() -> None:
    in_force = [policy(2, check_lifecycle=False, check_payload=False)]
    core = SegmentCore(lambda: in_force[0])
    late = event(2, "MESSAGE_UPDATED", at_ns=2 * HOUR_NS)
    step = judge(core, event(1, "CONSULTATION_COMMITTED"), late)
    assert (len(step.events), step.letters) == (2, [])
    in_force[0] = policy(3)
    step = judge(core, msgspec.structs.replace(late, origin=3))
    assert [letter.error.reason for letter in step.letters] == ["lifecycle.closed"]


COMMIT, RESET, LATE = "CONSULTATION_COMMITTED", "CONSULTATION_RESET", "MESSAGE_UPDATED"


@pytest.mark.parametrize(
    ("before", "at_hour", "passes"),
    [
        ([(COMMIT, 10)], 9, True),  # late or repeated: an outage at a gateway loses nothing
        ([(COMMIT, 10)], 10, True),
        ([(COMMIT, 10)], 11, False),
        ([(COMMIT, 10), (COMMIT, 8)], 9, True),  # a commit that comes again, as of earlier, moves nothing
        ([(COMMIT, 10), (RESET, 12)], 15, True),
        ([(COMMIT, 10), (RESET, 10)], 15, True),
        ([(COMMIT, 10), (RESET, 9)], 15, False),  # a reset from before the commit came late
        ([(RESET, 9), (COMMIT, 10)], 15, False),
        ([(COMMIT, 10), (RESET, 12), (COMMIT, 14)], 15, False),
        ([(COMMIT, 10), (RESET, 12), (COMMIT, 10)], 15, True),  # a file that is sent again
        ([(COMMIT, 10), (RESET, 12), (COMMIT, 10), (RESET, 12)], 15, True),
        ([(COMMIT, 10), (RESET, 12), (COMMIT, 11)], 15, True),  # a commit from before the reset came late
        ([(RESET, 12), (COMMIT, 10)], 15, True),  # also where that one is the first that is seen
        ([(RESET, 10), (COMMIT, 10)], 15, True),  # in whatever order the two came
        ([(RESET, 12), (RESET, 8), (COMMIT, 10)], 15, True),  # a reset that comes again, as of earlier, moves nothing
        ([(RESET, 12), (COMMIT, 14)], 15, False),
        ([(COMMIT, 10), (RESET, 12), (COMMIT, 14), (RESET, 12)], 15, False),
        ([(COMMIT, 10), (RESET, 12), (RESET, 16), (COMMIT, 14)], 17, True),
    ],
)
def test_what_happened_after_the_commit_is_refused_until_a_reset(
    before: list[tuple[str, int]], at_hour: int, passes: bool
) -> None:
    history = [event(number, kind, at_ns=hour * HOUR_NS) for number, (kind, hour) in enumerate(before, 1)]
    core = SegmentCore(lambda: policy(2, check_payload=False))
    step = judge(core, *history, event(9, LATE, at_ns=at_hour * HOUR_NS))
    assert [one.origin for one in step.events] == [*range(1, len(before) + 1), *([9] if passes else [])]
    assert [letter.error.reason for letter in step.letters] == ([] if passes else ["lifecycle.closed"])


def test_a_reset_takes_one_row_which_a_build_that_does_not_know_it_takes_for_no_consultation_of_ours() -> None:
    closed = ClosedConsultations(b"", 64)
    first = event(1, COMMIT, at_ns=10 * HOUR_NS)
    for one in (first, event(2, RESET, at_ns=12 * HOUR_NS)):
        closed.note(one)
    turned = bytes(byte ^ 0xFF for byte in first.consultation_id)
    assert closed.packed == turned + (12 * HOUR_NS).to_bytes(8, "big")
    again = ClosedConsultations(closed.packed, 64)
    again.note(first)
    assert again.packed == closed.packed
    again.note(event(3, COMMIT, at_ns=13 * HOUR_NS))
    assert again.packed == first.consultation_id + (13 * HOUR_NS).to_bytes(8, "big")


def test_an_event_that_does_not_say_when_it_happened_passes_after_the_commit() -> None:
    core = SegmentCore(lambda: policy(2, check_payload=False))
    late = msgspec.structs.replace(event(2, LATE, at_ns=11 * HOUR_NS), stamped=False)
    step = judge(core, event(1, COMMIT, at_ns=10 * HOUR_NS), late)
    assert ([one.origin for one in step.events], step.letters) == ([1, 2], [])


def test_a_policy_that_remembers_fewer_commits_forgets_the_oldest_at_once() -> None:
    closed = ClosedConsultations(b"", 64)
    for number in range(5):
        commit = msgspec.structs.replace(
            event(number + 1, "CONSULTATION_COMMITTED"), consultation_id=bytes([number]) * 16
        )
        closed.note(commit)
    in_force = [policy(2)]
    core = SegmentCore(lambda: in_force[0])
    core.open(closed.packed)
    assert judge(core, event(10, "CORE_STATE_CHANGED")).closed == closed.packed
    in_force[0] = policy(3, closed_remembered=2)
    assert judge(core, event(11, "CORE_STATE_CHANGED")).closed == closed.packed[3 * 24 :]


def test_a_core_that_is_opened_keeps_as_many_commits_as_the_policy_in_force_remembers() -> None:
    closed = ClosedConsultations(b"", CLOSED_REMEMBERED_MAX)
    for number in range(100):
        commit = event(number + 1, "CONSULTATION_COMMITTED")
        closed.note(msgspec.structs.replace(commit, consultation_id=bytes([number]) * 16))
    core = SegmentCore(lambda: policy(2, closed_remembered=90))
    core.open(closed.packed)
    assert judge(core, event(110, "CORE_STATE_CHANGED")).closed == closed.packed[10 * 24 :]


def test_a_breaker_told_to_try_again_lets_lanes_try_at_once_and_starts_its_pauses_anew() -> None:
    breaker = Breaker(Settings(dead_events_min=10, breaker_pause_s=5.0))
    letters = [DeadLetter(n, 0, InvalidEventError("r", "f", "d"), b"") for n in range(20)]
    assert not breaker.allows(0, letters, 100.0)
    for now_s in (105.0, 115.0):
        assert not breaker.allows(0, letters[:1], now_s)
    assert breaker.hold_s(115.0) == 20
    breaker.retry_now()
    assert breaker.is_open
    assert breaker.hold_s(116.0) == 0
    assert not breaker.allows(0, letters[:1], 116.0)
    assert breaker.hold_s(116.0) == 5
    breaker.retry_now()
    assert breaker.allows(1, [], 117.0)
    assert not breaker.is_open
    breaker.retry_now()
    assert not breaker.is_open
