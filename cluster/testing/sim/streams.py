"""A JetStream stream as a state machine: what it stores, refuses, forgets and answers. Pure; time is passed in.

Modelled from nats-server 2.15: sequences never come again while the stream lives; `Nats-Msg-Id` is looked at before
the fence, remembers purged messages too, and spans subjects; what is proposed and not yet applied counts as "in
process". Sizes are near the servers', not theirs to the byte.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from nats.js.api import StorageType, StreamConfig, SubjectTransform

from contracts.telemetry import (
    HEADER_EXPECTED_LAST_SUBJECT_SEQ,
    HEADER_EXPECTED_STREAM,
    HEADER_MSG_ID,
    HEADER_TTL,
)

NS: Final = 1_000_000_000
_OVERHEAD_BYTES: Final = 30
_FUNCTION: Final = re.compile(r"\{\{(partition|wildcard)\(([0-9, ]+)\)\}\}")
_FNV_OFFSET, _FNV_PRIME = 2166136261, 16777619


class Refusal(NamedTuple):
    """The error part of an answer."""

    code: int
    err_code: int
    description: str


NO_MESSAGE: Final = Refusal(404, 10037, "no message found")
NO_STREAM: Final = Refusal(404, 10059, "stream not found")


@dataclass(slots=True)
class Message:
    """One stored message. `expires_ns`: when its TTL ends, 0 for never."""

    subject: str
    seq: int
    time_ns: int
    data: bytes
    headers: dict[str, str]
    size_bytes: int
    expires_ns: int = 0


class Proposal(NamedTuple):
    """A publish that the leader has let through and the others have not confirmed yet."""

    subject: str
    data: bytes
    headers: dict[str, str]
    size_bytes: int


@lru_cache(maxsize=4096)
def matches(pattern: str, subject: str) -> bool:
    """True when `subject` is one of those that `pattern` stands for."""
    wanted, tokens = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted = wanted[:-1]
        if len(tokens) <= len(wanted):
            return False
        tokens = tokens[: len(wanted)]
    return len(wanted) == len(tokens) and all(want in ("*", token) for want, token in zip(wanted, tokens, strict=True))


@lru_cache(maxsize=4096)
def _transformed(source: str, destination: str, subject: str) -> str:
    if not matches(source, subject):
        return subject
    wild = [token for want, token in zip(source.split("."), subject.split("."), strict=True) if want == "*"]

    def fill(found: re.Match[str]) -> str:
        numbers = [int(number) for number in found[2].split(",")]
        if found[1] == "wildcard":
            return wild[numbers[0] - 1]
        value = _FNV_OFFSET
        for byte in "".join(wild[place - 1] for place in numbers[1:]).encode():
            value = ((value ^ byte) * _FNV_PRIME) & 0xFFFFFFFF
        return str(value % numbers[0])

    return _FUNCTION.sub(fill, destination)


class View:
    """Messages by sequence, and how they are found: of a stream, or of what a stale leader takes for it."""

    def __init__(self, messages: dict[int, Message], seqs: list[int], last_seq: int) -> None:
        self.messages = messages
        self.seqs = seqs
        self.last_seq = last_seq

    def copy(self) -> View:
        """The same messages, whatever becomes of the original."""
        return View(dict(self.messages), list(self.seqs), self.last_seq)

    def last_by_subject(self, pattern: str) -> Message | None:
        """The last message on a subject that `pattern` stands for."""
        for seq in reversed(self.seqs):
            if matches(pattern, self.messages[seq].subject):
                return self.messages[seq]
        return None

    def next_by_subject(self, pattern: str, seq: int) -> Message | None:
        """The first one with this sequence or a later one."""
        return next(self.following(pattern, seq), None)

    def following(self, pattern: str, seq: int) -> Iterator[Message]:
        """Those on `pattern` from this sequence on."""
        for place in range(bisect_left(self.seqs, seq), len(self.seqs)):
            message = self.messages[self.seqs[place]]
            if matches(pattern, message.subject):
                yield message

    def last_of_each(self, patterns: list[str]) -> list[Message]:
        """The last message of every subject that one of `patterns` stands for, in stream order."""
        found: dict[str, Message] = {}
        for seq in self.seqs:
            message = self.messages[seq]
            if any(matches(pattern, message.subject) for pattern in patterns):
                found[message.subject] = message
        return sorted(found.values(), key=lambda message: message.seq)


class Stream(View):
    """One stream.

    Attributes:
        config: as the topology has it.
        bytes: held now.
        bytes_max: at which it refuses; a fault may lower it.
    """

    def __init__(self, config: StreamConfig) -> None:
        super().__init__({}, [], 0)
        self.config = config
        self.name = str(config.name)
        self.bytes = 0
        self.bytes_max = config.max_bytes or -1
        self.subjects = tuple(config.subjects or ())
        self._transform: SubjectTransform | None = config.subject_transform
        self._last: dict[str, int] = {}
        self._ids: dict[str, tuple[int, int]] = {}
        self._ids_pending: set[str] = set()
        self._subjects_pending: dict[str, int] = {}
        self._window_ns = int((config.duplicate_window or 120) * NS)

    def backup(self) -> Stream:
        """The stream as it is now, for whoever puts it back later."""
        made = Stream(self.config)
        made.messages, made.seqs, made.last_seq = dict(self.messages), list(self.seqs), self.last_seq
        made.bytes, made._last, made._ids = self.bytes, dict(self._last), dict(self._ids)
        return made

    def count_from(self, first_seq: int) -> None:
        """Its first message gets this sequence."""
        self.last_seq = first_seq - 1

    @property
    def in_memory(self) -> bool:
        """It is empty after all servers restarted."""
        return self.config.storage == StorageType.MEMORY

    def stored_subject(self, subject: str) -> str:
        """What the subject transform makes of it."""
        if self._transform is None:
            return subject
        return _transformed(str(self._transform.src), str(self._transform.dest), subject)

    def propose(self, subject: str, data: bytes, headers: dict[str, str], now_ns: int) -> Proposal | Refusal | int:
        """What the leader says to a publish: a proposal, a refusal, or the sequence this message has already."""
        expected_stream = headers.get(HEADER_EXPECTED_STREAM)
        if expected_stream is not None and expected_stream != self.name:
            return Refusal(400, 10060, "expected stream does not match")
        message_id = headers.get(HEADER_MSG_ID)
        if message_id is not None:
            known = self._ids.get(message_id)
            if known is not None and now_ns - known[1] < self._window_ns:
                return known[0]
            if message_id in self._ids_pending:
                return Refusal(409, 10158, "duplicate message id is in process")
        subject = self.stored_subject(subject)
        expected = headers.get(HEADER_EXPECTED_LAST_SUBJECT_SEQ)
        if expected is not None:
            if self._subjects_pending.get(subject):
                return Refusal(400, 10164, "wrong last sequence")
            last = self._last.get(subject, 0)
            if int(expected) != last:
                return Refusal(400, 10071, f"wrong last sequence: {last}")
        size_max = self.config.max_msg_size or -1
        if 0 <= size_max < len(data):
            return Refusal(400, 10054, "message size exceeds maximum allowed")
        header_bytes = sum(len(key) + len(value) + 4 for key, value in headers.items()) + 12 if headers else 0
        size_bytes = len(subject) + header_bytes + len(data) + _OVERHEAD_BYTES
        if 0 <= self.bytes_max < self.bytes + size_bytes:
            return Refusal(503, 10077, "maximum bytes exceeded")
        if message_id is not None:
            self._ids_pending.add(message_id)
        self._subjects_pending[subject] = self._subjects_pending.get(subject, 0) + 1
        return Proposal(subject, data, headers, size_bytes)

    def settle(self, proposal: Proposal, now_ns: int, *, applied: bool) -> Message | None:
        """The proposal is applied, or lost with its leader."""
        message_id = proposal.headers.get(HEADER_MSG_ID)
        if message_id is not None:
            self._ids_pending.discard(message_id)
        self._subjects_pending[proposal.subject] -= 1
        if not applied:
            return None
        seq = self.last_seq + 1
        message = Message(proposal.subject, seq, now_ns, proposal.data, proposal.headers, proposal.size_bytes)
        if (ttl := proposal.headers.get(HEADER_TTL)) is not None:
            message.expires_ns = now_ns + int(ttl.removesuffix("s")) * NS
        self.messages[seq] = message
        self.seqs.append(seq)
        self.last_seq = seq
        self._last[proposal.subject] = seq
        self.bytes += proposal.size_bytes
        if message_id is not None:
            self._ids[message_id] = (seq, now_ns)
        kept = self.config.max_msgs_per_subject or -1
        if kept > 0:
            self.purge(proposal.subject, keep=kept)
        return message

    def remove(self, seq: int) -> bool:
        """Removes one message; False when it is not there."""
        if seq not in self.messages:
            return False
        self._drop([seq])
        return True

    def purge(self, pattern: str, *, below_seq: int | None = None, keep: int = 0) -> int:
        """Removes what is on `pattern` and below a sequence (None: all), but for the last `keep`; gives how many."""
        gone = [message.seq for message in self.following(pattern, 1) if below_seq is None or message.seq < below_seq]
        gone = gone[: len(gone) - keep] if keep else gone
        self._drop(gone)
        return len(gone)

    def expire(self, now_ns: int) -> None:
        """Removes what has outlived its TTL."""
        self._drop([m.seq for m in self.messages.values() if m.expires_ns and m.expires_ns <= now_ns])

    def _drop(self, seqs: list[int]) -> None:
        touched: dict[str, None] = {}
        for seq in seqs:
            message = self.messages.pop(seq)
            self.seqs.remove(seq)
            self.bytes -= message.size_bytes
            if self._last.get(message.subject) == seq:
                touched[message.subject] = None
        for subject in touched:
            last = self.last_by_subject(subject)
            if last is None:
                del self._last[subject]
            else:
                self._last[subject] = last.seq

    def forget_ids(self, *, of_purged: bool = False) -> None:
        """No message is known by its id any more; `of_purged`: only those that are still there are."""
        self._ids = {name: at for name, at in self._ids.items() if of_purged and at[0] in self.messages}

    def wipe(self) -> None:
        """All servers restarted and this one was in memory: nothing is left, and sequences begin at 1 again."""
        for held in (self.messages, self.seqs, self._last, self._ids, self._ids_pending, self._subjects_pending):
            held.clear()
        self.bytes = self.last_seq = 0
