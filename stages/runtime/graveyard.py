"""Where refused events go: `FI_DLQ`, each once, acknowledged before the frame that covers it.

The subject's last message is the checkpoint here too: letters at or before it are already buried. The fence
refuses a second process that dead-letters the same events at the same time. So the last message of a subject is never
deleted: who removes that letter first puts a message after it that says so (`cluster.dlq`).
"""

from __future__ import annotations

import logging
from typing import Final

from contracts.errors import FencedError
from contracts.events import split_body
from contracts.letters import FirstSeen, parse_first_seen
from contracts.subjects import DLQ, EVENTS, Stage, dlq_subject
from contracts.telemetry import (
    DEAD_DETAIL,
    DEAD_FIELD,
    DEAD_INDEX,
    DEAD_ORIGIN,
    DEAD_REASON,
    DEAD_STAGE,
    DEAD_SUBJECT,
    HEADER_FIRST_SEEN,
    HEADER_TRACEPARENT,
)
from stages.runtime.api import Api, StoredMessage
from stages.runtime.work import DeadLetter
from stages.runtime.writer import FencedWriter

log = logging.getLogger(__name__)

_NOTHING: Final = (0, -1)


class Graveyard:
    """Writes the dead letters of one stage and partition."""

    def __init__(self, api: Api, stage: Stage, partition: int, nonce: str) -> None:
        self._api = api
        self._stage: Stage = stage
        self._subject = dlq_subject(stage, partition)
        self._nonce = nonce
        self._openings = 0
        self._writer: FencedWriter | None = None
        self._buried = _NOTHING
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
                if (letter.origin, letter.index) <= self._buried:
                    break
                headers, data = await self._compose(letter)
                try:
                    await writer.publish(data, f"{letter.origin}/{letter.index}", headers)
                except FencedError as error:
                    log.info("dead letters: %s", error)
                    self._writer = None
                    continue
                self._buried = (letter.origin, letter.index)
                self._api.telemetry.dead_letter(self._stage, letter.error.reason)
                log.warning("dead letter: %s", letter.error, extra={"origin": letter.origin, "stage": self._stage})
                break

    async def _open(self) -> FencedWriter:
        last = await self._api.last_message(DLQ, self._subject)
        self._openings += 1
        writer = FencedWriter(self._api, DLQ, self._subject, f"{self._nonce}_{self._openings}")
        self._buried = _NOTHING
        if last is not None:
            writer.expected_seq = last.seq
            self._buried = (int(last.headers.get(DEAD_ORIGIN, 0)), int(last.headers.get(DEAD_INDEX, -1)))
        self._writer = writer
        return writer

    async def _compose(self, letter: DeadLetter) -> tuple[dict[str, str], bytes]:
        """Headers and original bytes."""
        await self._fetch(letter.origin)
        original = self._original
        error = letter.error
        headers = {
            DEAD_STAGE: self._stage,
            DEAD_ORIGIN: str(letter.origin),
            DEAD_INDEX: str(letter.index),
            DEAD_REASON: error.reason,
            DEAD_FIELD: _one_line(error.field),
            DEAD_DETAIL: _one_line(error.detail),
        }
        data = letter.data
        if original is not None:
            headers[DEAD_SUBJECT] = original.subject
            before = parse_first_seen(original.headers.get(HEADER_FIRST_SEEN, ""))
            first = before or FirstSeen(letter.origin, original.time_ns, 0)
            headers[HEADER_FIRST_SEEN] = str(first.at(letter.index))
            if trace := original.headers.get(HEADER_TRACEPARENT):
                headers[HEADER_TRACEPARENT] = _one_line(trace)
            if data is None:
                data = self._lines[letter.index] if letter.index < len(self._lines) else original.data
        return headers, data or b""

    async def _fetch(self, origin: int) -> None:
        """The message is still in `FI_EVENTS`: it is purged only after it is sealed.

        Kept for the next letter: thousands may be of one large message.
        """
        if origin != self._origin:
            self._original = await self._api.message_at(EVENTS, origin)
            self._lines = [] if self._original is None else split_body(self._original.data)
            self._origin = origin


def _one_line(text: str) -> str:
    """Header-safe: no control characters, no surrogates, never empty."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    return printable.encode(errors="replace").decode().strip() or "-"
