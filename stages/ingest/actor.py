"""Ingest as a stage: every stored gateway message becomes a step, whatever it holds."""

from __future__ import annotations

from contracts.frames import Dead
from contracts.subjects import Stage, split_raw_subject
from contracts.telemetry import HEADER_FIRST_SEEN, HEADER_TRACEPARENT
from stages.ingest.core import parse_message
from stages.runtime.messages import StoredMessage
from stages.runtime.work import DeadLetter, Step


class IngestCore:
    """See `StageCore`. Its input counts in origins, so there is nothing to join on to."""

    stage: Stage = "ingest"

    def __init__(self) -> None:
        self._closed = b""

    def open(self, closed: bytes) -> None:
        """Keeps segment's memory: frames made after the hops were lost hand it on from the receipt."""
        self._closed = closed

    def begin(self) -> None:
        """Nothing changes while the process runs."""

    def step(self, message: StoredMessage, origin: int, now_ns: int) -> Step | None:
        """Parses one gateway message. See `StageCore.step`."""
        if message.seq <= origin:
            return None
        _, site, consultation = split_raw_subject(message.subject)
        parsed = parse_message(
            message.data,
            subject_site=site,
            subject_consultation=consultation,
            origin=message.seq,
            accepted_ns=message.time_ns,
            traceparent=message.headers.get(HEADER_TRACEPARENT, ""),
            now_ns=now_ns,
            first_seen=message.headers.get(HEADER_FIRST_SEEN, ""),
        )
        dead = [Dead(message.seq, sum(row.lines for row in parsed.rejected))] if parsed.rejected else []
        letters = [
            DeadLetter(message.seq, row.index, row.error, row.raw, lines=row.lines, original=message)
            for row in parsed.rejected
        ]
        return Step(message.seq, message.seq, parsed.events, dead, letters, (), self._closed, message.time_ns)
