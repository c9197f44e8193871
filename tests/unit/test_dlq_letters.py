"""Which letters are chosen, what a replay is called, what is shown of them, and what the verbs refuse."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from uuid import UUID

import msgspec
import pytest
from commandline import Captured, fictl
from hypothesis import given
from hypothesis import strategies as st
from test_ingest_core import a_gateway_event, body_of

from cluster.cli.common import parse_when, print_lines
from cluster.cli.letters import advice, append, brief, first_bytes, line, page, whole
from cluster.dlq import Selection, check_body, obstacle, replay_id
from contracts.errors import SettingsError
from contracts.events import parse_rfc3339
from contracts.letters import Letter, read_letter
from contracts.telemetry import (
    DEAD_DETAIL,
    DEAD_FIELD,
    DEAD_HANDLED,
    DEAD_INDEX,
    DEAD_ORIGIN,
    DEAD_REASON,
    DEAD_STAGE,
    DEAD_SUBJECT,
    HEADER_FIRST_SEEN,
    HEADER_TRACEPARENT,
)

CONSULTATION = str(UUID(int=7, version=4))
MENDED = a_gateway_event(consultation_id=CONSULTATION)
NOW_NS = 1_767_600_000_000_000_000
HEADERS = {
    DEAD_STAGE: "segment",
    DEAD_ORIGIN: "40",
    DEAD_INDEX: "2",
    DEAD_REASON: "payload.value",
    DEAD_FIELD: "payload.message_role",
    DEAD_DETAIL: "must be user or assistant",
    DEAD_SUBJECT: f"fi.raw.3.clinic-1.{CONSULTATION}",
    HEADER_FIRST_SEEN: "40/1234/2",
    HEADER_TRACEPARENT: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
}


def letter(data: bytes = b'{"a":1}', **headers: str) -> Letter:
    return read_letter("fi.dlq.segment.3", 17, NOW_NS, data, HEADERS | headers)


def with_subject(subject: str) -> Letter:
    return read_letter("fi.dlq.ingest.0", 1, NOW_NS, b"x", HEADERS | {DEAD_SUBJECT: subject})


def test_a_letter_says_where_it_came_from_and_why() -> None:
    found = letter()
    assert (found.seq, found.stage, found.partition, found.origin, found.index) == (17, "segment", 3, 40, 2)
    assert (found.site, found.consultation, found.handled) == ("clinic-1", CONSULTATION, False)
    assert read_letter("fi.dlq.segment.3", 18, 0, b"", {DEAD_HANDLED: "17"}).handled


@given(st.text(), st.dictionaries(st.sampled_from([*HEADERS, DEAD_HANDLED]), st.text()), st.binary())
def test_whatever_lies_in_the_stream_can_be_read_and_shown_without_steering_the_terminal(
    subject: str, headers: dict[str, str], data: bytes
) -> None:
    found = read_letter(f"fi.dlq.{subject}", 1, NOW_NS, data, headers)
    lines = [line(found), *page(found)]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        print_lines(*lines)
    assert shown.getvalue().count("\n") == len(lines)
    assert shown.getvalue().replace("\n", "").isprintable()
    json.loads(msgspec.json.encode(whole(found)))
    json.loads(msgspec.json.encode(brief(found)))


@pytest.mark.parametrize(
    ("selection", "taken"),
    [
        (Selection(), True),
        (Selection(reason="payload.value"), True),
        (Selection(reason="payload"), True),
        (Selection(reason="payload.val"), False),
        (Selection(reason="pay"), False),
        (Selection(site="clinic-1"), True),
        (Selection(site="clinic"), False),
        (Selection(since_ns=NOW_NS, until_ns=NOW_NS), True),
        (Selection(since_ns=NOW_NS + 1), False),
        (Selection(until_ns=NOW_NS - 1), False),
    ],
)
def test_a_selection_takes_what_all_its_parts_take(selection: Selection, taken: bool) -> None:
    assert selection.takes(letter()) is taken
    assert not selection.takes(letter(**{DEAD_HANDLED: "16"})), "a mark is no letter"
    assert selection.subjects == "fi.dlq.*.*"
    assert selection.everything is (selection == Selection())


def test_stage_and_partition_select_by_subject() -> None:
    assert Selection(stage="hash").subjects == "fi.dlq.hash.*"
    assert Selection(partition=0).subjects == "fi.dlq.*.0"


def test_a_replay_is_called_the_same_for_the_same_letter_and_bytes_and_differently_for_any_other() -> None:
    first = replay_id("c", letter(), b"body")
    assert first == replay_id("c", letter(), b"body")
    others = {
        replay_id("d", letter(), b"body"),
        replay_id("c", letter(), b"mended"),
        replay_id("c", msgspec.structs.replace(letter(), seq=18), b"body"),
        replay_id("c", msgspec.structs.replace(letter(), time_ns=NOW_NS + 1), b"body"),
    }
    assert len(others | {first}) == 5
    with pytest.raises(ValueError):
        UUID(first)


@pytest.mark.parametrize(
    ("subject", "why"),
    [
        ("", "does not say"),
        ("fi.raw.x.clinic-1", "does not say"),
        (f"fi.raw.0.a%b.{CONSULTATION}", "a%b"),
        (f"fi.raw.0.{'s' * 65}.{CONSULTATION}", "1 to 64"),
        ("fi.raw.0.clinic-1.not-a-uuid", "not a UUID"),
        ("fi.raw.0.clinic-1.\x1b[31m", "of its subject"),
    ],
)
def test_a_letter_whose_subject_can_only_be_refused_again_is_not_replayed(subject: str, why: str) -> None:
    assert why in obstacle(with_subject(subject))
    assert "a replay cannot help" in advice(with_subject(subject))
    assert not obstacle(letter())


def test_a_body_holds_no_more_events_than_the_letter() -> None:
    check_body(letter(), json.dumps(MENDED, indent=2).encode())
    with pytest.raises(SettingsError, match="holds 2 events"):
        check_body(letter(), b'{"a":2}\n{"a":3}')
    check_body(letter(data=b"x\ny"), body_of(consultation_id=CONSULTATION) + b"\n\n" + json.dumps(MENDED).encode())


@pytest.mark.parametrize(
    ("data", "body", "says"),
    [
        (b"{}", b"", "--body: message: the message is empty"),
        (b"{}", b" \n\t\n", "--body: message: the message is empty"),
        (b"{}", json.dumps(MENDED | {"payload": 1}, indent=2).encode(), "--body: payload: must be a JSON object"),
        (b"{}", body_of(), "--body: consultation_id: .* is not the subject's"),
        (b"x\ny", b"\n" + json.dumps(MENDED).encode() + b"\n\n{}", "--body, line 4: consultation_id: required"),
        (b"x\ny", b"\nx\ny", "--body, line 2: message: "),
    ],
)
def test_a_body_that_ingest_would_refuse_is_not_sent_in_a_letters_place(data: bytes, body: bytes, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        check_body(letter(data=data), body)


def test_pretty_where_it_is_json_and_as_it_came_where_it_is_not() -> None:
    assert '  "a": 1' in page(letter())
    assert page(letter(data=b'{"a'))[-3:-1] == ['{"a', ""]
    assert "trace:        4bf92f3577b34da6a3ce929d0e0e4736" in page(letter())
    assert first_bytes(b"\x1b[31m\x9b\xc2\x9b" + b"x" * 999).startswith("·[31m\ufffd·xxx")
    assert whole(letter(data=b"\xff"))["body_base64"] == "/w=="


def test_a_file_that_takes_no_letters_is_named(tmp_path: Path) -> None:
    pipe = tmp_path / "dropped.ndjson"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(OSError, match="Invalid argument") as refused:
            append(pipe, [letter()], "")
    finally:
        os.close(reader)
    assert refused.value.filename == str(pipe)


def test_what_is_dropped_begins_on_a_line_of_its_own_after_one_that_was_cut_short(tmp_path: Path) -> None:
    dropped = tmp_path / "dropped.ndjson"
    for _ in range(2):
        append(dropped, [letter()], "")
    whole_lines = dropped.read_bytes()
    assert whole_lines == 2 * (msgspec.json.encode(whole(letter())) + b"\n")
    dropped.write_bytes(whole_lines[:-9])
    append(dropped, [letter()], "")
    assert [json.loads(text) for text in dropped.read_bytes().splitlines()[::2]] == [
        json.loads(whole_lines[:-1].split(b"\n")[0])
    ] * 2


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("3d", 259200)])
def test_a_time_may_be_so_long_ago(text: str, seconds: int) -> None:
    assert parse_when("--since", text, NOW_NS) == NOW_NS - seconds * 10**9


def test_a_time_is_rfc_3339_and_anything_else_is_refused_with_the_options_name() -> None:
    assert parse_when("--since", "2026-01-31T08:00:00Z", NOW_NS) == parse_rfc3339("2026-01-31T08:00:00Z")
    with pytest.raises(SettingsError, match="--until yesterday"):
        parse_when("--until", "yesterday", NOW_NS)


@pytest.mark.parametrize("verb", ["replay", "drop"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--yes"], "which letters"),
        (["--yes", "--all", "--site", "x"], "one of them"),
        (["--yes", "3", "--all"], "one of them"),
        (["--yes", "3", "--site", "x"], "one of them"),
        (["--all"], "--yes"),
        (["--yes", "--stage", "harvest"], "ingest"),
        (["--yes", "--since", "now"], "--since now"),
    ],
)
def test_what_changes_something_wants_to_be_told_what_exactly(
    verb: str, arguments: list[str], says: str, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert fictl("dlq", verb, *arguments, "--dir", tmp_path) == 2
    assert says in capsys.readouterr().err


def test_without_a_cluster_it_is_not_ready(capsys: Captured, tmp_path: Path) -> None:
    assert fictl("dlq", "ls", "--dir", tmp_path) == 3
    assert capsys.readouterr().out == ""
