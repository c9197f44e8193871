"""The policy: which rules segment holds events to. Versions of it, what may be set, and how two of them differ.

Each version is written once, under a key of its own in the bucket `FI_CONTROL`, so that what an event was judged by can
be looked up as long as the bucket is there. Version 1 is built in and has no key. Records name every rule, and what
this build does not know is refused: no process holds events to a policy that it understands in part.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from contracts.errors import SettingsError, WireFormatError
from contracts.events import PAYLOAD_BYTES_MAX
from contracts.policy import CRITICALITIES, EVENT_TYPES, Criticality
from contracts.wire import UNREADABLE

PAYLOAD_BYTES_MIN: Final = 1024
"""A smaller limit would refuse ordinary events."""
CLOSED_REMEMBERED_MAX: Final = 256
"""The memory travels with every frame, receipt and seal record, at 24 bytes a consultation."""
NOTE_CHARS_MAX: Final = 500
BUILT_IN: Final = 1
"""The version that is in force where none was ever set."""


class Rules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a policy says.

    Attributes:
        check_payload: enforce DOMAIN's payload rules.
        check_lifecycle: refuse an event that says it happened after its consultation was committed.
        closed_remembered: how many committed consultations each partition remembers for that.
        payload_bytes_max: largest payload accepted.
        refused_types: event types that are refused, sorted.
        criticality: event type → its criticality, where that is not the usual one.
    """

    check_payload: bool = True
    check_lifecycle: bool = True
    closed_remembered: Annotated[int, Meta(ge=0, le=CLOSED_REMEMBERED_MAX)] = 64
    payload_bytes_max: Annotated[int, Meta(ge=PAYLOAD_BYTES_MIN, le=PAYLOAD_BYTES_MAX)] = PAYLOAD_BYTES_MAX
    refused_types: tuple[str, ...] = ()
    criticality: dict[str, Criticality] = {}


class Policy(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag="policy.1", forbid_unknown_fields=True):
    """One version of the rules, as it stands in `FI_CONTROL` under ``policy.<version>``.

    Attributes:
        version: its number; stored with every event that it passed.
        rules: what it says.
        since_ns: when it was set.
        by: who set it, as ``user@node``.
        note: why.
        follows: the version that was in force before it; 0: none.
    """

    version: int
    rules: Rules
    since_ns: int
    by: str
    note: str
    follows: int


DEFAULT_POLICY: Final = Policy(version=BUILT_IN, rules=Rules(), since_ns=0, by="", note="built in", follows=0)

NAMES: Final = Rules.__struct_fields__
_encoder = msgspec.json.Encoder(order="deterministic")
_decoder = msgspec.json.Decoder(Policy)


def encode_policy(policy: Policy) -> bytes:
    """Wire bytes (JSON)."""
    return _encoder.encode(policy)


def decode_policy(data: bytes, version: int) -> Policy:
    """Inverse of `encode_policy`. `version`: the key's.

    Raises:
        WireFormatError: not a policy of a format this build reads, out of range, or of another version.
    """
    try:
        policy = _decoder.decode(data)
        check_rules(policy.rules)
    except (*UNREADABLE, SettingsError) as error:
        raise WireFormatError(f"policy.{version} cannot be read by this build: {error}") from error
    if policy.version != version:
        raise WireFormatError(f"policy.{version} holds version {policy.version}: it was written by hand")
    return policy


def check_rules(rules: Rules) -> None:
    """Holds what types and ranges alone do not.

    Raises:
        SettingsError: an event type that there is not, or nothing would be let through.
    """
    for field, types in (("refused_types", rules.refused_types), ("criticality", tuple(rules.criticality))):
        for name in types:
            if name not in EVENT_TYPES:
                raise SettingsError(f"{field}: {name!r} is no event type{_nearest(name.upper(), EVENT_TYPES)}")
    if list(rules.refused_types) != sorted(set(rules.refused_types)):
        raise SettingsError("refused_types must be sorted, each type once")
    if len(rules.refused_types) == len(EVENT_TYPES):
        raise SettingsError("refused_types refuses every event; to stop the stage use `fictl pause segment`")


def change_rules(rules: Rules, given: Mapping[str, Any]) -> Rules:
    """`rules` with what is `given`: rule → JSON value.

    Raises:
        SettingsError: names no rule, or a value of the wrong type or out of range. Names the rule.
    """
    values = msgspec.structs.asdict(rules)
    for name, value in given.items():
        if name not in NAMES:
            raise SettingsError(f"{name!r} is no rule of a policy{_nearest(name, NAMES)}; there are {', '.join(NAMES)}")
        try:
            values[name] = getattr(msgspec.convert({name: value}, Rules), name)
        except msgspec.ValidationError as error:
            raise SettingsError(f"{name} = {msgspec.json.encode(value).decode()}: {_reason(error)}") from None
    values["refused_types"] = tuple(sorted(set(values["refused_types"])))
    changed = Rules(**values)
    check_rules(changed)
    return changed


def parse_rules(words: list[str], rules: Rules) -> dict[str, Any]:
    """``NAME=VALUE`` words → rule → JSON value, for `change_rules`.

    ``refused_types=A,B`` lists types, ``criticality.TYPE=routine`` overrides one and leaves the others of `rules`,
    ``criticality.TYPE=`` takes that back. Everything else is JSON.

    Raises:
        SettingsError: not of that form.
    """
    given: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise SettingsError(f"{word!r}: write NAME=VALUE, e.g. check_payload=false")
        rule, dot, event_type = name.partition(".")
        if rule == "criticality" and dot:
            overrides = given.setdefault(rule, dict(rules.criticality))
            if not isinstance(overrides, dict):
                raise SettingsError(f"{rule} = {overrides!r}: a JSON object, e.g. {{}}, or leave it out")
            if text:
                if text not in CRITICALITIES:
                    raise SettingsError(f"{name} = {text}: use one of {', '.join(CRITICALITIES)}, or nothing")
                overrides[event_type] = text
            else:
                overrides.pop(event_type, None)
        elif name == "refused_types" and not text.startswith("["):
            given[name] = [part.strip() for part in text.split(",") if part.strip()]
        else:
            given[name] = _value(name, text)
    return given


def _value(name: str, text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (*UNREADABLE, UnicodeEncodeError):
        # It may be a rule's name that is wrong, which says more.
        if name not in NAMES:
            return text
        raise SettingsError(f"{name} = {text}: not a JSON value, e.g. true, 64 or {{}}") from None


class Difference(msgspec.Struct, frozen=True):
    """One rule that two policies do not share. `rule` may be ``criticality.<event type>``; None: the usual one."""

    rule: str
    before: Any
    after: Any


def diff_rules(before: Rules, after: Rules) -> list[Difference]:
    """What `after` changes, by rule; overridden criticalities and refused types one by one."""
    found = [
        Difference(name, getattr(before, name), getattr(after, name))
        for name in NAMES
        if name not in ("criticality", "refused_types") and getattr(before, name) != getattr(after, name)
    ]
    old, new = set(before.refused_types), set(after.refused_types)
    found += [Difference(f"refused_types.{name}", name in old, name in new) for name in sorted(old ^ new)]
    types = sorted(before.criticality.keys() | after.criticality.keys())
    pairs = ((name, before.criticality.get(name), after.criticality.get(name)) for name in types)
    return found + [Difference(f"criticality.{name}", old, new) for name, old, new in pairs if old != new]


def _nearest(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _reason(error: msgspec.ValidationError) -> str:
    return str(error).partition(" - at ")[0]
