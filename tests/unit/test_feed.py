"""Lines are read whole and bounded, and become what a gateway may publish."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from cluster.feed import CHUNK_BYTES, Line, LineChecker, read_lines
from cluster.publish import REFUSED_KEPT_MAX, PublishReport
from cluster.workload import consultations
from contracts.errors import InvalidEventError
from contracts.events import BODY_BYTES_MAX
from stages.ingest.core import parse_message


async def read_all(path: Path, **options: Any) -> list[bytes]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [line async for line in read_lines(descriptor, **options)]
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    "lines",
    [
        [], [b""], [b"", b""], [b"a", b"b"], [b"a\r", b"", b"\xff\x00"], [b"x" * (CHUNK_BYTES - 1), b"y"],
        [b"x" * CHUNK_BYTES, b"y"], [b"x" * (3 * CHUNK_BYTES + 7), b"y"],
    ],
    ids=range(8),
)  # fmt: skip
@pytest.mark.parametrize("end", [b"\n", b""], ids=["ended", "open"])
async def test_lines_are_given_as_they_are(tmp_path: Path, lines: list[bytes], end: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\n".join(lines) + end)
    expected = (b"\n".join(lines) + end).split(b"\n")
    assert await read_all(path) == (expected if expected[-1] else expected[:-1])


async def test_an_endless_line_is_cut_and_the_next_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a\n" + b"x" * (5 * CHUNK_BYTES) + b"\nb\n")
    assert await read_all(path, line_bytes_max=100) == [b"a", b"x" * 100, b"b"]


async def test_what_cannot_be_read_to_its_end_is_no_shorter_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        await read_all(tmp_path)


async def test_lines_of_a_pipe_come_before_it_ends() -> None:
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"first\nsec")
        lines = read_lines(read_end)
        assert await anext(lines) == b"first"
        os.write(write_end, b"ond\n")
        assert await anext(lines) == b"second"
    finally:
        os.close(write_end)
        os.close(read_end)


@pytest.mark.parametrize("end", [b"\n", b""], ids=["ended", "open"])
async def test_a_line_longer_than_any_message_is_refused_for_its_length_though_it_is_cut(
    tmp_path: Path, end: bytes
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b'{"a":"' + bytes(BODY_BYTES_MAX + CHUNK_BYTES) + b'"}' + end)
    (line,) = await read_all(path)
    assert len(line) == BODY_BYTES_MAX + 1
    with pytest.raises(InvalidEventError) as refused:
        LineChecker().check(1, line)
    assert refused.value.reason == "message.too_large"


def an_event(**changes: Any) -> bytes:
    event = {**next(consultations(1, 1)), **changes}
    return json.dumps({key: value for key, value in event.items() if value != "absent"}).encode()


def test_a_line_with_an_id_is_published_byte_for_byte() -> None:
    raw = b"  " + an_event() + b" \r"
    line = LineChecker().check(7, raw)
    assert line is not None
    assert line.data == raw.strip()
    assert (line.number, line.site, line.event_id) == (7, json.loads(raw)["metadata"]["site_id"], line.event_id)
    assert LineChecker().check(1, b" \t\r") is None


def test_ids_in_capitals_name_the_same_subject_and_the_same_message() -> None:
    event = json.loads(an_event())
    ids = {name: event[name].upper() for name in ("event_id", "consultation_id")}
    line = LineChecker().check(1, an_event(**ids))
    assert line is not None
    assert (line.event_id, line.consultation) == (event["event_id"], event["consultation_id"])


@pytest.mark.parametrize("absent", ["absent", None])
def test_an_event_without_id_gets_the_same_one_each_time_and_equal_lines_get_different_ones(absent: Any) -> None:
    raw = an_event(event_id=absent)
    first, second = LineChecker(), LineChecker()
    lines = [first.check(1, raw), first.check(2, raw), second.check(9, raw)]
    ids = [line.event_id for line in lines if line]
    assert ids[0] == ids[2] != ids[1]
    for line in lines:
        assert line is not None
        parsed = parse_message(
            line.data,
            subject_site=line.site,
            subject_consultation=line.consultation,
            origin=1,
            accepted_ns=1,
            traceparent="",
            now_ns=1,
        )
        assert parsed.events[0].event_id == UUID(line.event_id).bytes
        payload = parsed.events[0].payload
        assert payload in raw


@pytest.mark.parametrize("event_id", [str(UUID(int=7)), "absent"], ids=["own id", "given id"])
def test_a_line_may_be_as_large_as_what_a_gateway_publishes_with_its_id_and_not_a_byte_more(event_id: str) -> None:
    def line(size_bytes: int) -> Line | None:
        note = "x" * (size_bytes - 1_000_000)
        metadata = {"user_id": "u", "session_id": "s", "site_id": "a", "note": note}
        return LineChecker().check(1, an_event(event_id=event_id, metadata=metadata, payload={"a": "y" * 900_000}))

    probe = line(1_100_000)
    assert probe is not None
    largest = 1_100_000 + BODY_BYTES_MAX - len(probe.data)
    taken = line(largest)
    assert taken is not None
    assert len(taken.data) == BODY_BYTES_MAX
    with pytest.raises(InvalidEventError, match=f"more than {BODY_BYTES_MAX} bytes") as refused:
        line(largest + 1)
    assert refused.value.reason == "message.too_large"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"consultation_id":"\xff"}', "json.utf8"),
        (b'{"consultation_id":"c","metadata":{"site_id":' + b"[" * 100_000, "metadata.depth"),
        (b'{"consultation_id":7}', "field.missing"),
        (b"[]", "json.not_object"),
        (b"\x00", "json.malformed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_line_of_which_not_even_the_subject_can_be_read_is_refused_as_any_other(raw: bytes, reason: str) -> None:
    checker = LineChecker("clinic-1")
    with pytest.raises(InvalidEventError) as refused:
        checker.check(1, raw)
    assert refused.value.reason == reason
    assert checker.check(2, an_event())


def test_a_site_is_taken_from_the_event_before_the_option() -> None:
    metadata = {"user_id": "u", "session_id": "s"}
    without = an_event(metadata=metadata)
    line = LineChecker("clinic-9").check(1, without)
    assert line is not None
    assert line.site == "clinic-9"
    own = LineChecker("clinic-9").check(1, an_event(metadata={**metadata, "site_id": "clinic-2"}))
    assert own is not None
    assert own.site == "clinic-2"
    with pytest.raises(InvalidEventError, match="--site"):
        LineChecker().check(1, without)
    with pytest.raises(InvalidEventError, match="must be a string"):
        LineChecker().check(1, an_event(metadata={**metadata, "site_id": 7}))


def test_a_report_keeps_so_many_refusals_and_counts_them_all() -> None:
    report = PublishReport()
    for number in range(REFUSED_KEPT_MAX + 5):
        report.refuse(number, InvalidEventError("json.malformed", "", "no"))
    assert (len(report.refused), report.refused_count) == (REFUSED_KEPT_MAX, REFUSED_KEPT_MAX + 5)


def test_percentiles_are_in_milliseconds() -> None:
    report = PublishReport()
    assert report.latency_ms() == {"p50": None, "p95": None, "p99": None}
    report.latencies_ns.extend(range(1_000_000, 101_000_000, 1_000_000))
    assert report.latency_ms() == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
