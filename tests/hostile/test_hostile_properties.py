"""Nearly valid bytes, built by rule: what the definition takes ingest takes, with its hash; what it refuses is refused.

The definition is Python's own JSON, read strictly, and ``sha256(json.dumps(…, sort_keys=True, ensure_ascii=False))``.
"""

from __future__ import annotations

import json
import tracemalloc
from contextlib import nullcontext
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import FiError, InvalidEventError
from contracts.events import (
    MESSAGE_BYTES_MAX,
    NESTING_MAX,
    PAYLOAD_BYTES_MAX,
    PAYLOAD_DEPTH_MAX,
    Event,
    is_nested_beyond_reading,
)
from contracts.frames import decode_frame, decode_frame_head, decode_packed_frame
from contracts.membership import decode_member
from contracts.receipts import decode_receipt, decode_seal
from contracts.settings import Settings, load_settings
from stages.hash.core import payload_hash
from stages.ingest.core import Parsed, parse_message
from tests.hostile.fuzz.corpus import files_of
from tests.hostile.fuzz.readers import CONSULTATION, ORIGIN, SITE, STORED_NS, read_body, read_hop, strict_json
from tests.hostile.fuzz.targets import TARGETS, verdict

MEMORY_BYTES_MAX = 64 * 1024 * 1024
"""For one message of 2 MiB at most. Its values as Python objects take some ten times its bytes."""

settings.register_profile("hostile", derandomize=True, max_examples=80)
HOSTILE = settings.get_profile("hostile")


def parse(body: bytes) -> Parsed:
    return parse_message(
        body,
        subject_site=SITE,
        subject_consultation=CONSULTATION,
        origin=ORIGIN,
        accepted_ns=STORED_NS,
        traceparent="",
        now_ns=STORED_NS,
    )


def around(payload: bytes) -> bytes:
    head = b'{"consultation_id":"%s","event_type":"CONTEXT_UPDATED","payload":' % CONSULTATION.encode()
    return head + payload + b',"metadata":{"user_id":"u","session_id":"s"}}'


def only(body: bytes) -> Event | None:
    """The event that `body` is; None when it is refused. It is one thing or the other."""
    parsed = parse(body)
    assert len(parsed.events) + len(parsed.rejected) == 1
    return parsed.events[0] if parsed.events else None


SPECIAL_NUMBERS = [
    *("0", "-0", "1E5", "1e+5", "1e-5", "1e400", "-1e400", "1e-400", "9007199254740993", "18446744073709551616"),
    *("0.1", "5e-324", "1.7976931348623157e308", "1.7976931348623159e308", "NaN", "Infinity", "-Infinity", "01"),
    *("+1", ".5", "5.", "0x10", "1_000", "1e", "-", "9" * 4300, "9" * 4301, "0." + "3" * 800),
]
NUMBERS = st.one_of(
    st.sampled_from(SPECIAL_NUMBERS),
    st.integers(-(2**70), 2**70).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
)
CHARS = st.one_of(
    st.characters(),
    st.sampled_from(
        ["\\u0000", "\\ud800", "\\udc00", "\\ud83d\\ude00", '\\"', "\\\\", "\\/", "\\x", "\\", "\t", "\x7f", "\u2028"]
    ),
)
TEXTS = st.lists(CHARS, max_size=6).map(lambda chars: '"' + "".join(chars) + '"')
SPACES = st.sampled_from(["", "", " ", "\n", "\r\n", "\t", "\x0b", "\xa0", "\ufeff"])
VALUES = st.recursive(
    st.one_of(NUMBERS, TEXTS, st.sampled_from(["null", "true", "false", "undefined", "'x'", ""])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: "[" + ",".join(items) + "]"),
        st.lists(st.tuples(TEXTS, SPACES, inner), max_size=4).map(
            lambda rows: "{" + ",".join(f"{name}{space}:{value}" for name, space, value in rows) + "}"
        ),
    ),
    max_leaves=12,
)


def defined(payload: bytes) -> Any | None:
    """The payload by the definition; None when it refuses it."""
    try:
        value = strict_json(payload)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@given(value=VALUES, lone=st.sampled_from(["{}", '{{"a":{}}}', '{{"":{0},"b":{0}}}']))
@settings(HOSTILE, max_examples=250)
def test_ingest_takes_exactly_the_payloads_that_the_definition_takes(value: str, lone: str) -> None:
    payload = lone.format(value).encode(errors="surrogatepass")
    text = payload.strip(b" \t\r\n")
    value_defined = defined(payload)
    event = only(around(payload)) if b"\n" not in payload else (parse(around(payload)).events or [None])[0]
    # Twice the same name: the hash takes the last, but a hidden half of a surrogate pair is refused all the same.
    if value_defined is not None and b"\\ud" not in payload.lower() and text == payload:
        assert event is not None, payload
    if event is not None:
        assert value_defined is not None, payload
        assert event.payload == text
        canonical = json.dumps(value_defined, sort_keys=True, ensure_ascii=False).encode()
        assert payload_hash(event.payload) == sha256(canonical).digest()


@pytest.mark.parametrize("depth", [63, 64, 65, 66, 500, 5000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [('{"a":', "}"), ("[", "]"), ('[{"":', "}]")])
def test_the_depth_of_a_payload_is_bounded_exactly(depth: int, opening: str, closing: str) -> None:
    levels = depth if (len(opening) < 6 and opening[0] != "[") or opening == '{"a":' else depth - 1
    if opening == '[{"":':
        levels //= 2
    inner = opening * levels + "1" + closing * levels
    payload = inner if opening == '{"a":' else '{"a":' + inner + "}"
    real = payload.count("{") + payload.count("[")
    event = only(around(payload.encode()))
    assert (event is not None) == (real <= PAYLOAD_DEPTH_MAX)


@pytest.mark.parametrize("size", [PAYLOAD_BYTES_MAX - 1, PAYLOAD_BYTES_MAX, PAYLOAD_BYTES_MAX + 1])
def test_the_size_of_a_payload_is_bounded_exactly(size: int) -> None:
    payload = b'{"a":"' + b"x" * (size - 8) + b'"}'
    assert len(payload) == size
    assert (only(around(payload)) is not None) == (size <= PAYLOAD_BYTES_MAX)


GOOD = around(b'{"n":1}')
LINES = st.sampled_from(
    [GOOD, GOOD + b" ", b"\t" + GOOD, b"", b" ", b"{", b"1", b"\xff", b"\x00", b"\xef\xbb\xbf" + GOOD, GOOD[:-1]]
)


@given(lines=st.lists(LINES, min_size=2, max_size=8), ends=st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r"]))
@HOSTILE
def test_of_several_lines_each_is_an_event_or_a_letter_whatever_ends_them(lines: list[bytes], ends: bytes) -> None:
    body = ends.join(lines)
    parsed = parse(body)
    held = [line.strip(b" \t\r\n") for line in body.split(b"\n")]
    assert len(parsed.events) == held.count(GOOD)
    assert sorted([e.index for e in parsed.events] + [r.index for r in parsed.rejected]) == list(
        range(len(parsed.events) + len(parsed.rejected))
    )
    read_body(body)


@pytest.mark.parametrize("escapes", [0, 1, 2, 16 * 1024 - 8, 16 * 1024 - 7, 40_000, 40_001])
def test_brackets_in_strings_are_no_nesting_wherever_the_string_begins(escapes: int) -> None:
    text = b'["' + b'\\"' * escapes + b"[" * 600 + b'"'
    assert not is_nested_beyond_reading(text + b"]")
    assert not is_nested_beyond_reading(text + b"[" * (NESTING_MAX - 1))
    assert is_nested_beyond_reading(text + b"[" * NESTING_MAX)


@pytest.mark.parametrize("depth", [NESTING_MAX, NESTING_MAX + 1, 600, 5000])
def test_what_is_hashed_does_not_depend_on_how_deep_the_interpreter_goes(depth: int) -> None:
    payload = b'{"a":' * depth + b"1" + b"}" * depth
    with nullcontext() if depth <= NESTING_MAX else pytest.raises(InvalidEventError, match="nested deeper than 500"):
        payload_hash(payload)


def from_deep_within(frames: int, body: bytes) -> list[tuple[int, bytes]]:
    """The letters of `body`, ingest being called from so many calls deep."""
    if frames:
        return from_deep_within(frames - 1, body)
    parsed = parse(body)
    return [(event.index, b"") for event in parsed.events] + [(row.index, row.raw) for row in parsed.rejected]


@pytest.mark.parametrize("depth", [400, 499, 501, 600, 700, 750, 800, 850, 900, 920, 940, 960, 980, 1000, 3000])
def test_how_deep_the_caller_is_changes_nothing_in_how_a_message_is_taken_apart(depth: int) -> None:
    nested, close = b"[" * depth, b"]" * depth
    for body in (
        b'{"payload":' + nested + b"\xed\xa0\x80\ny" + nested,
        nested + b"\n" + GOOD + b"\n" + close,
        nested + b"\n" + GOOD + b"\n,",
        b'{"a":"\\"' + b"{" * depth + b'"}\n' + nested + close,
        GOOD + b"\n" + b'{"a":' * depth + b"1" + b"}" * depth + b"\n\xff",
    ):
        assert from_deep_within(0, body) == from_deep_within(330, body)


BOMBS = {
    "depth": b"[" * MESSAGE_BYTES_MAX,
    "depth of objects": b'{"a":' * (MESSAGE_BYTES_MAX // 5),
    "one long text": b'"' + b"x" * (MESSAGE_BYTES_MAX - 2) + b'"',
    "escapes": around(b'{"a":"' + b"\\u00e9" * (PAYLOAD_BYTES_MAX // 7) + b'"}'),
    "half pairs": around(b'{"a":"' + b"\\ud800" * (PAYLOAD_BYTES_MAX // 7) + b'"}'),
    "quotes": b'"' * MESSAGE_BYTES_MAX,
    "backslashes": b'{"' + b"\\" * (MESSAGE_BYTES_MAX - 2),
    "many names": around(b"{" + b",".join(b'"%d":0' % n for n in range(90_000)) + b"}"),
    "one name again and again": around(b"{" + b",".join([b'"a":0'] * 150_000) + b"}"),
    "many empty arrays": around(b'{"a":[' + b",".join([b"[]"] * 300_000) + b"]}"),
    "digits": around(b'{"a":' + b"9" * (PAYLOAD_BYTES_MAX - 10) + b"}"),
    "digits of a fraction": around(b'{"a":0.' + b"1" * (PAYLOAD_BYTES_MAX - 10) + b"}"),
    "NaN at the end": around(b'{"a":[' + b"0," * 400_000 + b"NaN]}"),
    "lines": b"\n".join([b"{}"] * 600_000),
    "blank lines": b"\n" * MESSAGE_BYTES_MAX,
    "nearly lines": b"[\n" * (MESSAGE_BYTES_MAX // 2),
    "unknown name": b'{"' + b"k" * (MESSAGE_BYTES_MAX - 10) + b'":1}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_no_message_takes_long_or_much_memory(name: str) -> None:
    tracemalloc.start()
    try:
        parsed = parse(BOMBS[name])
        assert parsed.events or parsed.rejected
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES_MAX + 40 * len(BOMBS[name])
    finally:
        tracemalloc.stop()


KEPT = [
    (target, path) for target in ("frame", "receipt", "seal", "member", "shard-header") for path in files_of(target)
]


@given(data=st.data(), kept=st.sampled_from(KEPT))
@settings(HOSTILE, max_examples=150)
def test_kept_bytes_that_are_changed_anywhere_are_read_or_refused_with_a_reason(data: st.DataObject, kept: Any) -> None:
    target, path = kept
    bytes_ = bytearray(path.read_bytes()[:4096])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(bytes_)))
        bytes_[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    assert verdict(TARGETS[target], bytes(bytes_))


@given(st.binary(max_size=200))
@settings(HOSTILE, max_examples=100)
def test_any_bytes_at_all_are_refused_by_every_decoder_with_a_reason(data: bytes) -> None:
    read_hop(data)
    for decode in (decode_frame, decode_packed_frame, decode_frame_head, decode_receipt, decode_seal, decode_member):
        with pytest.raises(FiError, match=r"\w"):
            decode(data)


@given(
    name=st.sampled_from(Settings.__struct_fields__),
    text=st.text(max_size=30) | st.sampled_from(["nan", "inf", "1e999", "\udcff", "9" * 5000]),
)
@settings(HOSTILE, max_examples=150)
def test_any_text_for_a_setting_is_taken_or_refused_by_name(name: str, text: str) -> None:
    found = setting(name, text)
    if isinstance(found, FiError):
        assert f"FI_{name.upper()}" in str(found) or "member_renew_s" in str(found)
        assert len(str(found)) < 1000
    else:
        assert found == found, "not a number"


def setting(name: str, text: str) -> Any:
    """The setting's value, or why there is none."""
    try:
        return getattr(load_settings({f"FI_{name.upper()}": text}), name)
    except FiError as error:
        return error
