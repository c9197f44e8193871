"""What a dead letter says, and which event it is of, however often that is replayed.

An event without an id or a time of its own gets both from where it came in. A replay brings it in again at another
place, so it carries the first one along (header ``Fi-First-Seen``): ingest then derives the same id and time as it
would have at first, and persist counts every further copy as a duplicate, however late it comes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from contracts.subjects import split_raw_subject
from contracts.telemetry import (
    DEAD_DETAIL,
    DEAD_FIELD,
    DEAD_HANDLED,
    DEAD_INDEX,
    DEAD_LINES,
    DEAD_ORIGIN,
    DEAD_POLICY,
    DEAD_REASON,
    DEAD_SUBJECT,
    HEADER_FIRST_SEEN,
    HEADER_TRACEPARENT,
)
from contracts.wire import INT64_MAX

LETTERS_APART: Final = 64
"""Refused events of a message that have a letter each; after that, those that follow one another share one.

Each letter is stored before anything behind the message goes on: thousands would hold that up."""

_TEXT: Final = re.compile(r"(\d{1,19})/(\d{1,19})/(\d{1,9})", re.ASCII)
_NUMBER: Final = re.compile(r"\d{1,19}", re.ASCII)


class FirstSeen(msgspec.Struct, frozen=True, gc=False):
    """Where an event first came in.

    Attributes:
        origin: sequence in `FI_EVENTS` of the message it came in.
        accepted_ns: when `FI_EVENTS` stored that message.
        index: its position within the message.
    """

    origin: int
    accepted_ns: int
    index: int

    def at(self, index: int) -> FirstSeen:
        """The event `index` places after this one."""
        return msgspec.structs.replace(self, index=self.index + index) if index else self

    def __str__(self) -> str:
        return f"{self.origin}/{self.accepted_ns}/{self.index}"


def parse_first_seen(text: str) -> FirstSeen | None:
    """Inverse of ``str(FirstSeen)``; None for anything else. Gateways can send any text."""
    match = _TEXT.fullmatch(text)
    if match is None:
        return None
    origin, accepted_ns, index = map(int, match.groups())
    return FirstSeen(origin, accepted_ns, index) if max(origin, accepted_ns) <= INT64_MAX else None


class Letter(msgspec.Struct, frozen=True, kw_only=True):
    """One message of `FI_DLQ`. Anybody may publish there: what is not given or not well-formed is empty, or -1.

    Attributes:
        seq: its sequence in `FI_DLQ`.
        time_ns: when it was stored.
        subject: what it was published to.
        stage, partition: which lane refused the event.
        origin, index: which event: the message in `FI_EVENTS`, and the place within it; of several that of the first.
        lines: how many events it is of.
        reason, field, detail: why, as in `InvalidEventError`.
        site, consultation: tokens of the subject that the gateway published to.
        policy: version of the policy that it was refused under.
        first_seen: where the event first came in.
        traceparent: the gateway's trace.
        handled: no letter, but what stands for the last one of its subject, which was removed.
        data: the event's bytes as they came.
    """

    seq: int
    time_ns: int
    subject: str
    stage: str
    partition: int
    origin: int
    index: int
    lines: int
    reason: str
    field: str
    detail: str
    site: str
    consultation: str
    policy: int
    first_seen: str
    traceparent: str
    handled: bool
    data: bytes


def read_letter(subject: str, seq: int, time_ns: int, data: bytes, headers: Mapping[str, str]) -> Letter:
    """A message of `FI_DLQ` → what it says. Never raises."""
    stage, _, partition = subject.removeprefix("fi.dlq.").partition(".")
    try:
        _, site, consultation = split_raw_subject(headers.get(DEAD_SUBJECT, ""))
    except ValueError:
        site = consultation = ""
    return Letter(
        seq=seq,
        time_ns=time_ns,
        subject=subject,
        stage=stage,
        partition=_number(partition),
        origin=_number(headers.get(DEAD_ORIGIN, "")),
        index=_number(headers.get(DEAD_INDEX, "")),
        lines=max(1, _number(headers.get(DEAD_LINES, ""))),
        reason=headers.get(DEAD_REASON, ""),
        field=headers.get(DEAD_FIELD, "").removeprefix("-"),
        detail=headers.get(DEAD_DETAIL, ""),
        site=site,
        consultation=consultation,
        policy=_number(headers.get(DEAD_POLICY, "")),
        first_seen=headers.get(HEADER_FIRST_SEEN, ""),
        traceparent=headers.get(HEADER_TRACEPARENT, ""),
        handled=DEAD_HANDLED in headers,
        data=data,
    )


def _number(text: str) -> int:
    return int(text) if _NUMBER.fullmatch(text) else -1
