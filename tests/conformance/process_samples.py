"""Samples of what processes tell each other and leave in files: kept like those of streams and shards.

`WRITTEN` is read and written byte for byte. `READ` is only read: a state file holds all settings, and those grow.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from cluster.config import parse_file
from cluster.control import RestartAnswer, RestartRequest, ScaleAnswer, ScaleRequest
from cluster.state import STATE_FILE, ProcessState, State
from contracts.errors import WireFormatError
from contracts.letters import Letter, read_letter
from contracts.lifecycle import ClosedConsultations
from contracts.membership import Member, Pause, decode_member, decode_pause, encode_member
from contracts.settings import Settings, load_settings
from contracts.wire import UNREADABLE
from stages.persist.header import HEADER_BYTES, Area, LiveHeader, SealedHeader, decode_header, encode_header
from stages.persist.rows import CommitRow, decode_rows, encode_row
from stages.persist.storedir import STORE_FILE, Store, read_store
from stages.runtime.headers import parse_headers
from stages.runtime.health import Check, Report
from stages.runtime.watch import HealthFile

T = TypeVar("T")


class ProcessSample(NamedTuple):
    """One encoded value, as `test_golden.Sample`."""

    file: str
    value: Any
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


def reading(kind: Any) -> Callable[[bytes], Any]:
    """Decodes JSON of a kind, as its readers do in place."""

    def decode(data: bytes) -> Any:
        try:
            return msgspec.json.decode(data, type=kind)
        except UNREADABLE as error:
            raise WireFormatError(str(error)) from error

    return decode


MEMBER = Member(
    stage="persist",
    node="server-a",
    name="persist-0",
    nonce="w-1f2e3d",
    pid=4711,
    started_ns=1_767_323_046_000_000_000,
    partitions=(0, 5),
    opening=(5,),
    store="st-9",
    pinned=(0, 5),
    draining=True,
    paused=True,
)
SEGMENT_MEMBER = msgspec.structs.replace(MEMBER, stage="segment", name="segment-0", store="", policy=7, holding=True)
LIVE_HEADER = LiveHeader(
    partition=5,
    shard=3,
    store="st-9",
    cluster="c-77",
    created_ns=1_767_323_046_000_000_000,
    frames=Area(16_384, 1_048_576),
    index=Area(12_288, 720),
    watermark=Area(8_704, 8),
    file_bytes=1_064_960,
    structure_crc32=4_294_967_295,
    begins=True,
    tree_size_before=3,
    frontier_before=bytes(range(64)),
)
SEALED_HEADER = SealedHeader(
    partition=5,
    shard=3,
    store="st-9",
    cluster="c-77",
    first_origin=4_294_967_291,
    last_origin=4_294_967_300,
    commits=2,
    events=2,
    record_bytes=700,
    timestamp_ns_min=-1_000_000_001,
    timestamp_ns_max=1_767_323_045_678_901_234,
    sealed_ns=1_767_323_046_000_000_007,
    tree_size_before=1,
    frontier_before=bytes(range(32)),
    tree_size=3,
    frontier=bytes(range(64)),
    root="ab" * 32,
    areas={"by_event_id/ids": Area(9_000, 32), "merkle/before": Area(0, 0)},
    file_bytes=20_000,
    body_sha256="cd" * 32,
)
TAKEN_OVER_HEADER = msgspec.structs.replace(SEALED_HEADER, begins=True)
ROW = CommitRow(1, 700, 4_294_967_295, 4_294_967_290, 4_294_967_300, 2, 1, 3, 1_767_323_046_000_000_006)
CHECKS = {"servers": Check(ok=True, why="connected"), "disk": Check(ok=False, why="¿lleno?")}


def _block(data: bytes) -> LiveHeader | SealedHeader:
    if len(data) != HEADER_BYTES:
        raise WireFormatError("not a header's length")
    return decode_header(data, Path("p005-00000003.h5"))


def _row(data: bytes) -> CommitRow:
    rows = decode_rows(data) if len(data) == len(encode_row(ROW)) else []
    if len(rows) != 1:
        raise WireFormatError("not a row")
    return rows[0]


HEALTH = HealthFile(name="hash-0", stage="hash", pid=4711, host="127.0.0.1", port=8080)

WRITTEN = [
    ProcessSample("member.1.json", MEMBER, encode_member, decode_member),
    ProcessSample("member.1.segment.json", SEGMENT_MEMBER, encode_member, decode_member),
    ProcessSample("scale-request.1.json", ScaleRequest({"hash": 3}), msgspec.json.encode, reading(ScaleRequest)),
    ProcessSample(
        "scale-answer.json",
        ScaleAnswer({"hash": 1}, {"hash": 3}, "no", usage=True),
        msgspec.json.encode,
        reading(ScaleAnswer),
    ),
    ProcessSample(
        "restart-request.1.json", RestartRequest(("hash", "persist")), msgspec.json.encode, reading(RestartRequest)
    ),
    ProcessSample(
        "restart-answer.json", RestartAnswer({"hash": 2}, "no", usage=True), msgspec.json.encode, reading(RestartAnswer)
    ),
    ProcessSample("health.1.json", HEALTH, msgspec.json.encode, reading(HealthFile)),
    ProcessSample(
        "health.1.started.json",
        msgspec.structs.replace(HEALTH, started=12_345),
        msgspec.json.encode,
        reading(HealthFile),
    ),
    ProcessSample(
        "health-report.json",
        Report(ok=False, process="hash-0", stage="hash", checks=CHECKS),
        msgspec.json.encode,
        reading(Report),
    ),
    ProcessSample("live-header.1.bin", LIVE_HEADER, encode_header, _block),
    ProcessSample("sealed-header.1.bin", SEALED_HEADER, encode_header, _block),
    ProcessSample("sealed-header.1.begins.bin", TAKEN_OVER_HEADER, encode_header, _block),
    ProcessSample("commit-row.1.bin", ROW, encode_row, _row),
]
"""As `test_golden.SAMPLES`."""

LETTER = Letter(
    seq=7,
    time_ns=1_767_323_046_000_000_008,
    subject="fi.dlq.segment.5",
    stage="segment",
    partition=5,
    origin=4_294_967_292,
    index=2,
    lines=1,
    policy=7,
    reason="lifecycle.closed",
    field="event_type",
    detail="happened after",
    site="clinica-1",
    consultation="0a1b2c3d-4e5f-4a6b-8c7d-9e0f1a2b3c4d",
    first_seen="4294967292/1767323046000000001/2",
    traceparent="00-" + "ab" * 16 + "-" + "cd" * 8 + "-01",
    handled=False,
    data=b'{"event_type":"MESSAGE_RECEIVED"}',
)
LETTER_HEADERS = (
    b"NATS/1.0\r\nFi-Dead-Stage: segment\r\nFi-Dead-Origin: 4294967292\r\nFi-Dead-Index: 2\r\nFi-Dead-Policy: 7\r\n"
    b"Fi-Dead-Reason: lifecycle.closed\r\nFi-Dead-Field: event_type\r\nFi-Dead-Detail: happened after\r\n"
    b"Fi-Dead-Subject: fi.raw.5.clinica-1.0a1b2c3d-4e5f-4a6b-8c7d-9e0f1a2b3c4d\r\n"
    b"Fi-First-Seen: 4294967292/1767323046000000001/2\r\n"
    b"traceparent: 00-" + b"ab" * 16 + b"-" + b"cd" * 8 + b"-01\r\n\r\n"
)
LETTER_OF_THREE = msgspec.structs.replace(LETTER, lines=3)
LETTER_OF_THREE_HEADERS = LETTER_HEADERS.replace(b"Index: 2", b"Index: 2\r\nFi-Dead-Lines: 3")
STATE = State(
    status="ready",
    supervisor_pid=4711,
    supervisor_started=12_345,
    urls=("nats://127.0.0.1:4222",),
    processes=(ProcessState(name="n1", kind="server", pid=4712), ProcessState(name="hash-0", kind="hash", pid=None)),
    settings=Settings(partitions=4, hop_storage="file", probe_s=1.5),
    control="/run/fi/control.sock",
)
SETTINGS_TEXT = b'partitions = 4\nhop_storage = "file"\nprobe_s = 1.5\nseal_on_drain = true\n'
STORE_TEXT = b'{"format":1,"store_id":"9f","cluster_id":"c-77","created":"2026-01-02T03:04:06.000Z"}\n'
CLOSED = b"".join(bytes([n]) * 16 + (1_767_323_046_000_000_000 + n).to_bytes(8, "big", signed=True) for n in (1, 2))


def _letter(data: bytes) -> Letter:
    headers, _, body = data.partition(b"\r\n\r\n")
    return read_letter(LETTER.subject, LETTER.seq, LETTER.time_ns, body, parse_headers(headers))


def _store(data: bytes) -> Store:
    with tempfile.TemporaryDirectory() as place:
        Path(place, STORE_FILE).write_bytes(data)
        store = read_store(Path(place))
        return Store(Path(), store.store_id, store.cluster_id)


def _settings(data: bytes) -> Settings:
    return load_settings({}, file=parse_file(data, "fi.toml"))


def _closed(data: bytes) -> list[int | None]:
    closed = ClosedConsultations(data, 64)
    return [closed.committed_ns(bytes([n]) * 16) for n in (1, 2, 3)]


READ = [
    ProcessSample("pause.1.json", Pause(since_ns=9, by="ana@server-a"), msgspec.json.encode, decode_pause),
    ProcessSample("letter.bin", LETTER, lambda letter: LETTER_HEADERS + letter.data, _letter),
    ProcessSample("letter.lines.bin", LETTER_OF_THREE, lambda letter: LETTER_OF_THREE_HEADERS + letter.data, _letter),
    ProcessSample(STATE_FILE.replace(".json", ".1.json"), STATE, msgspec.json.encode, reading(State)),
    ProcessSample("settings.toml", _settings(SETTINGS_TEXT), lambda _: SETTINGS_TEXT, _settings),
    ProcessSample("store.1.json", Store(Path(), "9f", "c-77"), lambda _: STORE_TEXT, _store),
    ProcessSample(
        "closed-consultations.bin",
        [1_767_323_046_000_000_001, 1_767_323_046_000_000_002, None],
        lambda _: CLOSED,
        _closed,
    ),
]
"""Read and no more: `encode` made the file once."""
