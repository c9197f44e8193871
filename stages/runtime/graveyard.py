"""Where refused events go: `FI_DLQ`, each once, acknowledged before the frame that covers it.

The subject's last message is the checkpoint here too: letters after it are not there yet. The fence refuses a second
process that dead-letters the same events at the same time. So the last message of a subject is never deleted: who
removes that letter first puts a message after it that says so (`cluster.dlq`).

Of letters before it the order alone proves nothing: what is judged again after hop streams were lost, or its process
died, may be judged by another policy or another build, and refused where it passed. Such a letter is looked for, and
buried unless it is found. So one that was removed in just that time comes again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final
from uuid import UUID

from contracts.budgets import LETTER_ORIGINAL
from contracts.errors import FencedError
from contracts.events import Event, gateway_line, split_body
from contracts.letters import FirstSeen, parse_first_seen, read_letter
from contracts.subjects import DLQ, EVENTS, Stage, dlq_subject, raw_subject
from contracts.telemetry import (
    DEAD_DETAIL,
    DEAD_FIELD,
    DEAD_INDEX,
    DEAD_LINES,
    DEAD_ORIGIN,
    DEAD_POLICY,
    DEAD_REASON,
    DEAD_STAGE,
    DEAD_SUBJECT,
    HEADER_EXPECTED_LAST_SUBJECT_SEQ,
    HEADER_FIRST_SEEN,
    HEADER_TRACEPARENT,
    parse_traceparent,
)
from stages.runtime.api import Api
from stages.runtime.messages import StoredMessage
from stages.runtime.work import DeadLetter
from stages.runtime.writer import FencedWriter

log = logging.getLogger(__name__)

_NOTHING: Final = (0, -1)


class Graveyard:
    """Writes the dead letters of one stage and partition."""

    def __init__(self, api: Api, stage: Stage, partition: int, nonce: str) -> None:
        self._api = api
        self._stage: Stage = stage
        self._partition = partition
        self._subject = dlq_subject(stage, partition)
        self._nonce = nonce
        self._openings = 0
        self._writer: FencedWriter | None = None
        self._buried = _NOTHING
        self._found: dict[tuple[int, int], int] = {}
        """The letters that were there when it was looked, of how many events each; `_found_from` to `_found_to`."""
        self._found_from = 0
        self._found_to = _NOTHING
        self._origin = 0
        self._original: StoredMessage | None = None
        self._lines: list[bytes] = []

    async def bury(self, letters: list[DeadLetter]) -> None:
        """Stores every letter that is not there yet, in order. Returns when all are acknowledged.

        Raises:
            TopologyError: the stream is missing.
        """
        for letter in letters:
            while True:
                writer = self._writer or await self._open()
                try:
                    if await self._is_buried(letter, writer.expected_seq):
                        break
                    headers, data = await self._compose(letter)
                    await writer.publish(data, f"{letter.origin}/{letter.index}", headers)
                except FencedError as error:
                    log.info("dead letters: %s", error)
                    self._writer = None
                    continue
                self._buried = max(self._buried, (letter.origin, letter.index))
                if (letter.origin, letter.index) <= self._found_to:
                    self._found[letter.origin, letter.index] = letter.lines
                self._api.telemetry.dead_letter(self._stage, letter.error.reason)
                log.warning("dead letter: %s", letter.error, extra={"origin": letter.origin, "stage": self._stage})
                break

    async def _is_buried(self, letter: DeadLetter, last_seq: int) -> bool:
        """`last_seq`: of the subject's last letter. Raises as `_find_from`."""
        key = (letter.origin, letter.index)
        if key > self._buried:
            return False
        if letter.origin < self._found_from or key > self._found_to:
            self._found = await self._find_from(letter.origin, last_seq)
            self._found_from, self._found_to = letter.origin, self._buried
        # Judged by other rules, more events may share it now.
        return self._found.get(key, 0) >= letter.lines

    async def _find_from(self, origin: int, last_seq: int) -> dict[tuple[int, int], int]:
        """What is buried of the events from `origin` on: where each letter begins, and of how many events it is.

        Letters lie in the order of their events, but for those that were judged again: one that lies too early is not
        found, and buried twice at worst.

        Raises:
            FencedError: what is read ends before `last_seq`.
        """
        low, high = 1, last_seq + 1
        while low < high:
            middle = (low + high) // 2
            message = await self._letter_from(middle, last_seq)
            if place_of(message)[0] >= origin:
                high = middle
            else:
                low = message.seq + 1
        found: dict[tuple[int, int], int] = {}
        while low <= last_seq:
            message = await self._letter_from(low, last_seq)
            place = place_of(message)
            found[place] = max(found.get(place, 0), lines_of(message))
            low = message.seq + 1
        return found

    async def _letter_from(self, seq: int, last_seq: int) -> StoredMessage:
        """The first letter from `seq` on, which is at most `last_seq`.

        The fence holds only what is last. So a read that does not get there is stale (a leader frozen and thawed), or
        somebody purged the letters: in either case it is for the fence to begin again.
        """
        message = await self._api.first_message(DLQ, self._subject, from_seq=seq)
        if message is None:
            await self._api.pause()
            raise FencedError(self._subject, last_seq)
        return message

    async def _open(self) -> FencedWriter:
        last = await self._api.last_message(DLQ, self._subject)
        self._openings += 1
        writer = FencedWriter(self._api, DLQ, self._subject, f"{self._nonce}_{self._openings}")
        self._buried = self._found_to = _NOTHING
        if last is not None:
            writer.expected_seq = last.seq
            self._buried = place_of(last)
        self._writer = writer
        return writer

    async def _compose(self, letter: DeadLetter) -> tuple[dict[str, str], bytes]:
        """Headers and original bytes; where these are nowhere any more, the events as ingest handed them on."""
        original = letter.original or await self._fetch(letter)
        error = letter.error
        headers = {
            DEAD_STAGE: self._stage,
            DEAD_ORIGIN: str(letter.origin),
            DEAD_INDEX: str(letter.index),
            DEAD_LINES: str(letter.lines),
            DEAD_REASON: error.reason,
            DEAD_FIELD: _one_line(error.field),
            DEAD_DETAIL: _one_line(error.detail),
        }
        if letter.policy:
            headers[DEAD_POLICY] = str(letter.policy)
        data = letter.data
        if original is not None:
            headers[DEAD_SUBJECT] = original.subject
            before = parse_first_seen(original.headers.get(HEADER_FIRST_SEEN, ""))
            first = before or FirstSeen(letter.origin, original.time_ns, 0)
            headers[HEADER_FIRST_SEEN] = str(first.at(letter.index))
            # A gateway's header may be as long as all of a message's may be; with ours the letter's would be longer.
            if parse_traceparent(trace := original.headers.get(HEADER_TRACEPARENT, "")) is not None:
                headers[HEADER_TRACEPARENT] = trace
            if data is None:
                lines = self._lines[letter.index : letter.index + letter.lines]
                data = b"\n".join(lines) if lines else original.data
        elif letter.events:
            headers |= self._told_by(letter.events)
            data = b"\n".join(map(gateway_line, letter.events))
        return headers, data or b""

    def _told_by(self, events: Sequence[Event]) -> dict[str, str]:
        """What the message's own headers would have said, by events that came in it."""
        event = events[0]
        # Those without a time of their own have that of the message, or of the one that it is a replay of.
        first_ns = next((event.timestamp_ns for event in events if not event.stamped), event.accepted_ns)
        headers = {
            DEAD_SUBJECT: raw_subject(self._partition, event.site, str(UUID(bytes=event.consultation_id))),
            HEADER_FIRST_SEEN: str(FirstSeen(event.origin, first_ns, event.index)),
        }
        return headers | ({HEADER_TRACEPARENT: event.traceparent} if event.traceparent else {})

    async def _fetch(self, letter: DeadLetter) -> StoredMessage | None:
        """The message is still in `FI_EVENTS`: it is purged only after it is sealed.

        So a read that ends before it is stale (a leader frozen and thawed, or cut off), and is repeated. Somebody may
        have deleted the message by hand: a later one in its place shows that, and so does time. Or the stream was
        rolled back, or made again, and has another message there: that was stored at another time.
        Kept for the next letter: thousands may be of one large message.
        """
        origin = letter.origin
        if origin != self._origin:
            now_s = asyncio.get_running_loop().time
            until_s = now_s() + LETTER_ORIGINAL.s
            while (found := await self._api.first_message(EVENTS, ">", from_seq=origin)) is None and now_s() < until_s:
                await self._api.pause()
            stored_ns = {event.accepted_ns for event in letter.events}
            is_it = found is not None and found.seq == origin and stored_ns <= {found.time_ns}
            self._original = found if is_it else None
            if self._original is None:
                what = "what ingest handed on of it" if letter.events else "nothing of it"
                log.error("%s does not have message %d any more: its dead letters hold %s", EVENTS, origin, what)
            self._lines = [] if self._original is None else split_body(self._original.data)
            self._origin = origin
        return self._original


def place_of(message: StoredMessage) -> tuple[int, int]:
    """Which event a letter is of: origin and index; (0, -1), none, for what says neither.

    Anybody may publish there, and copy a letter from another cluster, whose origins are others. What no fence let in
    was put there by no stage, and says nothing.
    """
    if HEADER_EXPECTED_LAST_SUBJECT_SEQ not in message.headers:
        return _NOTHING
    letter = read_letter(message.subject, message.seq, message.time_ns, message.data, message.headers)
    return (letter.origin, letter.index) if letter.origin >= 0 else _NOTHING


def lines_of(message: StoredMessage) -> int:
    """Of how many events a letter is."""
    return read_letter(message.subject, message.seq, message.time_ns, message.data, message.headers).lines


def _one_line(text: str) -> str:
    """Header-safe: no control characters, no surrogates, never empty."""
    return "".join(char if char.isprintable() else " " for char in text).strip() or "-"
