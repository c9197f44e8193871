"""What `fictl schema` prints is what ingest holds events to: what is given, what JSON Schema can say, and what not."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.feed import LineChecker
from contracts.errors import InvalidEventError
from contracts.events import gateway_schema

SCHEMA: dict[str, Any] = json.loads(json.dumps(gateway_schema()))
EVENT = SCHEMA["$defs"]["EventSchema"]["properties"]
METADATA = SCHEMA["$defs"]["MetadataSchema"]["properties"]
CONSULTATION = "aac18039-54dd-5c5d-a12f-d0aaa1882a18"


def line(payload: str = "{}", metadata: str = "", event_type: str = "LLM_CALL_FAILED", **fields: str) -> str:
    """An event's JSON text; `metadata` begins with a comma."""
    rest = "".join(f',"{name}":{value}' for name, value in fields.items() if name != "consultation_id")
    consultation = fields.get("consultation_id", json.dumps(CONSULTATION))
    return (
        f'{{"consultation_id":{consultation},"event_type":"{event_type}","payload":{payload},'
        f'"metadata":{{"user_id":"u","session_id":"s"{metadata}}}{rest}}}'
    )


def reason(text: str) -> str:
    """Why the line would be refused; empty if it would not."""
    try:
        LineChecker("clinic-1", payload_rules=True).check(1, text.encode())
    except InvalidEventError as error:
        return error.reason
    return ""


def string_rule(rule: dict[str, Any]) -> dict[str, Any]:
    return next(kind for kind in rule.get("anyOf", [rule]) if kind.get("type") == "string")


def fits(rule: dict[str, Any], text: str) -> bool:
    """As ECMA-262, which JSON Schema names, takes a pattern that has both anchors: no line break after the end."""
    return re.fullmatch(rule["pattern"].removeprefix("^").removesuffix("$"), text) is not None


NEARLY = st.one_of(
    st.uuids().map(str),
    st.uuids().map(lambda value: str(value).upper()),
    st.uuids().map(lambda value: f"{{{value}}}"),
    st.uuids().map(lambda value: value.hex),
    st.uuids().map(lambda value: value.urn),
    st.uuids().flatmap(lambda value: st.integers(0, 35).map(lambda at: str(value)[:at] + "-" + str(value)[at + 1 :])),
    st.uuids().map(lambda value: str(value).replace("1", "１")),
    st.text(max_size=70),
    st.text("aZ09_-. é\n", max_size=70),
)


@given(NEARLY)
def test_ids_and_sites_that_the_schema_takes_are_those_that_ingest_takes(text: str) -> None:
    quoted = json.dumps(text)
    for name in ("consultation_id", "event_id"):
        assert fits(string_rule(EVENT[name]), text) == (reason(line(**{name: quoted})) == ""), name
    assert fits(string_rule(METADATA["site_id"]), text) == (reason(line(metadata=f',"site_id":{quoted}')) == "")


TIMES = st.one_of(
    st.from_regex(r"\A[0-9]{4}-[01][0-9]-[0-3][0-9][Tt ][0-2][0-9]:[0-6][0-9]:[0-6][0-9](\.[0-9]{0,10})?Z\Z"),
    st.from_regex(r"\A2026-01-05T0[0-9]:[0-9]{2}:00[+-][0-2][0-9]:[0-6][0-9]\Z"),
    st.datetimes().map(lambda moment: f"{moment.isoformat()}Z"),
    st.datetimes().map(lambda moment: f"{moment.isoformat()}+05:30"),
    st.datetimes().map(lambda moment: moment.isoformat()),
    st.from_regex(string_rule(EVENT["timestamp"])["pattern"].replace("[0-9]", r"\d"), fullmatch=True),
)  # fmt: skip


@given(TIMES)
def test_of_times_that_the_schema_takes_ingest_refuses_those_that_do_not_exist_or_are_too_far_off(text: str) -> None:
    rule = string_rule(EVENT["timestamp"])
    why = reason(line(timestamp=json.dumps(text)))
    if not fits(rule, text):
        assert why == "timestamp.invalid"
    elif why:
        assert "a time that exists, no leap second, of the years 1678 to 2261" in rule["description"]
        year, month, day, hour, minute, second = map(int, re.findall(r"[0-9]+", text)[:6])
        wrong = month not in range(1, 13) or day not in range(1, 29) or hour > 23 or minute > 59 or second > 59
        if zone := re.search(r"[+-](..):(..)$", text):
            wrong |= int(zone[1]) > 23 or int(zone[2]) > 59
        assert wrong or not 1678 <= year <= 2261, text


DEEP = '{"a":' * 63 + "{}" + "}" * 63
LIMITS = [
    ("numbers", line('{"a":1e400}'), "payload.number", line('{"a":1e308}')),
    ("numbers", line(f'{{"a":{"9" * 4301}}}'), "payload.number", line(f'{{"a":{"9" * 4300}}}')),
    ("numbers", line(metadata=',"a":-1e400'), "metadata.number", line(metadata=',"a":-1e-400')),
    ("strings", line('{"a":"\\ud800"}'), "payload.utf8", line('{"a":"\\ud83d\\ude00"}')),
    ("strings", line(metadata=',"a":"\\udc00"'), "metadata.utf8", line(metadata=',"a":"\\u0000"')),
    ("strings", f"\ufeff{line()}", "json.malformed", line()),
    ("names", line(metadata=',"user_id":"v"'), "field.duplicate", line('{"a":1,"a":2}')),
    ("names", line(metadata=',"a":1,"\\u0061":2'), "field.duplicate", line(metadata=',"a":{"b":1,"b":2}')),
    ("names", line(event_id="null") [:-1] + ',"event_id":null}', "field.duplicate", line(event_id="null")),
    ("payload_depth_max", line(f'{{"b":{DEEP}}}'), "payload.depth", line(DEEP)),
    ("metadata_depth_max", line(metadata=f',"b":{DEEP}'), "metadata.depth", line(metadata=f',"b":{DEEP[5:-1]}')),
]  # fmt: skip


@pytest.mark.parametrize(("limit", "refused", "why", "taken"), LIMITS)
def test_what_json_schema_has_no_words_for_is_among_the_limits(limit: str, refused: str, why: str, taken: str) -> None:
    assert limit in SCHEMA["x-limits"]
    assert (reason(refused), reason(taken)) == (why, "")


@pytest.mark.parametrize("number", ["5.0", "5e0", "50e-1"])
def test_that_an_integer_is_to_be_written_as_one_is_said_where_it_is_asked_for(number: str) -> None:
    def event(iteration: str) -> str:
        payload = f'{{"iteration":{iteration},"completeness":1.0,"nom_compliance":2}}'
        return line(payload, event_type="EXTRACTION_COMPLETED")

    assert (reason(event(number)), reason(event("5"))) == ("payload.range", "")
    assert "5.0 and 5e0" in SCHEMA["x-limits"]["integers"]
    texts = re.findall(r'\{"type": "integer".*?\}', json.dumps(SCHEMA))
    assert len(texts) == 1
    assert all("5.0 is refused" in text for text in texts)
