"""The probes of telemetry that is on: what a lane, a writer and a reader tell of themselves, as instruments."""

from __future__ import annotations

import errno
import time
from collections import Counter as Counts
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Final, Protocol

from contracts.errors import StoreFailedError
from contracts.frames import Frame, decode_frame_head
from contracts.receipts import Receipt
from contracts.subjects import INPUT_STREAM, Stage, input_filter
from contracts.telemetry import (
    BACKPRESSURE_TIME,
    COMMIT_DURATION,
    COMMIT_EVENTS,
    CONSUMED_MESSAGES,
    DURABLE_LATENCY,
    EVENTS_APPENDED,
    EVENTS_DUPLICATE,
    FRAME_BYTES,
    FRAME_EVENTS,
    LANE_RESTARTS,
    OPERATION_DURATION,
    PERSIST_ERRORS,
    PROCESS_DURATION,
    READERS_OPENED,
    SEAL_BYTES,
    SEAL_DURATION,
    SENT_MESSAGES,
    STAGE_LATENCY,
    Instrument,
    messaging_attributes,
)
from stages.runtime.circuit import Circuit
from stages.runtime.instruments import Counter, Histogram
from stages.runtime.messages import StoredMessage
from stages.runtime.telemetry import Feed, FrameTimes, LaneProbe, ReaderProbe, WriterProbe

if TYPE_CHECKING:
    from stages.runtime.tracing import FrameTrace, Tracer

_NS: Final = 1e-9
_MADE_FROM: Final[dict[Stage, str]] = {"ingest": "accepted_ns", "segment": "ingest_ns", "hash": "segment_ns"}
"""The time of an event at which a stage's latency begins."""


class Instruments(Protocol):
    """The instruments of the process, as `stages.runtime.meters` keeps them."""

    lanes: dict[tuple[Stage, int], LaneMeter]
    tracer: Tracer | None

    def counter(self, what: Instrument, attributes: Mapping[str, str]) -> Counter:
        """See `Telemetry.counter`."""

    def histogram(self, what: Instrument, attributes: Mapping[str, str]) -> Histogram:
        """See `Telemetry.histogram`."""


class LaneMeter(LaneProbe):
    """See `LaneProbe`.

    Attributes:
        stage, partition: which lane.
        stream: its input.
        place: both, as attributes.
        state: ``opening``, ``open``, ``standby`` or ``stopped``.
        is_leaving: it was told to stop.
        feed: its input while a session is on.
        disk: the circuit before its disk (persist).
        why: what stopped it, in words; empty while nothing does.
        busy_since_s: when the work in hand began, by `time.perf_counter`; None while there is none.
    """

    def __init__(self, meters: Instruments, stage: Stage, partition: int) -> None:
        self.stage: Stage = stage
        self.partition = partition
        self.stream = INPUT_STREAM[stage]
        self.place = {"stage": stage, "partition": str(partition)}
        self.state = "opening"
        self.is_leaving = False
        self.feed: Feed | None = None
        self.disk: Circuit | None = None
        self.why = ""
        self.busy_since_s: float | None = None
        self._meters = meters
        self._origin: int | None = None
        self._messages: Sequence[StoredMessage] = ()
        self._begun_s = 0.0
        self._trace: FrameTrace | None = None
        messaging = messaging_attributes("process", input_filter(stage, partition))
        self._process_duration = meters.histogram(PROCESS_DURATION, messaging)
        self._latency = meters.histogram(STAGE_LATENCY[stage], {})
        if stage == "persist":
            self._appended = meters.counter(EVENTS_APPENDED, {"partition": str(partition)})
            self._duplicates = meters.counter(EVENTS_DUPLICATE, {"partition": str(partition)})
            self._durable = meters.histogram(DURABLE_LATENCY, {})
            self._commit_duration = meters.histogram(COMMIT_DURATION, {})
            self._commit_events = meters.histogram(COMMIT_EVENTS, {})
            self._seal_duration = meters.histogram(SEAL_DURATION, {})
            self._seal_bytes = meters.counter(SEAL_BYTES, {})
            self._synced = (0.0, 0)
        else:
            self._frame_events = meters.histogram(FRAME_EVENTS, {"stage": stage})
            self._frame_bytes = meters.histogram(FRAME_BYTES, {"stage": stage})
            self._begun_ns: attrgetter[int] = attrgetter(_MADE_FROM[stage])

    def lag(self) -> int | None:
        """Messages not worked on yet, as far as this process was told; None while it does not read."""
        feed = self.feed
        return None if feed is None else feed.reader.pending + feed.reader.buffered + len(self._messages)

    def buffered(self) -> int | None:
        """Messages read and not worked on yet; None while it does not read."""
        feed = self.feed
        return None if feed is None else feed.reader.buffered

    def origin(self) -> int | None:
        """Everything up to here is finished; None before the lane first found its place."""
        feed = self.feed
        return self._origin if feed is None else feed.cursor.origin

    def opened(self, feed: Feed) -> None:
        """See `LaneProbe.opened`."""
        self.state, self.feed, self.why = "open", feed, ""

    def standing_by(self) -> None:
        """See `LaneProbe.standing_by`."""
        self.state = "standby"

    def stopped(self, error: Exception) -> None:
        """See `LaneProbe.stopped`."""
        self.state, self.why = "stopped", str(error)
        if isinstance(error, StoreFailedError):
            cause = error.__cause__
            number = cause.errno if isinstance(cause, OSError) else None
            kind = errno.errorcode.get(number or 0, "unknown")
        else:
            kind = type(error).__name__
        self._meters.counter(PERSIST_ERRORS, {"error_type": kind}).add()

    def disk_circuit(self, circuit: Circuit) -> None:
        """See `LaneProbe.disk_circuit`."""
        self.disk = circuit

    def restarting(self, error: Exception) -> None:
        """See `LaneProbe.restarting`."""
        attributes = {"stage": self.stage, "error_type": type(error).__name__}
        self._meters.counter(LANE_RESTARTS, attributes).add()

    def closed(self, error: BaseException | None) -> None:
        """See `LaneProbe.closed`."""
        self._end_trace(error)
        self._messages = ()
        if self.feed is not None:
            self._origin, self.feed = self.feed.cursor.origin, None
        self.state, self.busy_since_s = "opening", None
        if self.is_leaving or error is not None:
            self._forget()

    def leaving(self) -> None:
        """See `LaneProbe.leaving`."""
        self.is_leaving = True
        if self.feed is None:
            self._forget()

    def _forget(self) -> None:
        # Another lane of the same partition may have come meanwhile.
        if self._meters.lanes.get((self.stage, self.partition)) is self:
            del self._meters.lanes[self.stage, self.partition]

    def begin(self, messages: Sequence[StoredMessage]) -> None:
        """See `LaneProbe.begin`."""
        self._end_trace(None)
        self._messages = messages
        self._begun_s = self.busy_since_s = time.perf_counter()
        if self._meters.tracer is not None:
            self._trace = self._meters.tracer.begin(self.stage, self.partition, messages)

    def skipped(self) -> None:
        """See `LaneProbe.skipped`."""
        self.busy_since_s = None
        self._messages = ()
        self._trace = None

    def worked(self) -> None:
        """See `LaneProbe.worked`."""
        self.busy_since_s = None
        self._process_duration.record(time.perf_counter() - self._begun_s)

    def headers(self) -> dict[str, str] | None:
        """See `LaneProbe.headers`."""
        return None if self._trace is None else self._trace.headers()

    def framed(self, frame: Frame, size_bytes: int) -> None:
        """See `LaneProbe.framed`."""
        self._messages = ()
        self._frame_events.record(len(frame.events))
        self._frame_bytes.record(size_bytes)
        for begun_ns, events in Counts(map(self._begun_ns, frame.events)).items():
            self._latency.record(max(0.0, (frame.made_ns - begun_ns) * _NS), events)
        if self._trace is not None:
            self._trace.finished(frame.first, frame.last, len(frame.events))
            self._trace = None

    def synced(self, begun_s: float, events: int) -> None:
        """See `LaneProbe.synced`."""
        self._synced = (time.perf_counter() - begun_s, events)

    def committed(self, receipt: Receipt, frames: Sequence[FrameTimes], events: int, duplicates: int) -> None:
        """See `LaneProbe.committed`."""
        self._appended.add(events)
        self._duplicates.add(duplicates)
        duration_s, count = self._synced
        self._commit_duration.record(duration_s)
        self._commit_events.record(count)
        now_ns = time.time_ns()
        for frame in frames:
            self._latency.record(max(0.0, (receipt.committed_ns - frame.made_ns) * _NS), frame.events)
            self._durable.record(max(0.0, (now_ns - frame.accepted_ns) * _NS), frame.events)
        if self._trace is not None:
            first = decode_frame_head(self._messages[0].data).first
            self._trace.finished(first, receipt.origin, events, durable_ns=receipt.committed_ns)
            self._trace = None
        self._messages = ()

    def sealed(self, begun_s: float, size_bytes: int) -> None:
        """See `LaneProbe.sealed`."""
        self._seal_duration.record(time.perf_counter() - begun_s)
        self._seal_bytes.add(size_bytes)

    def _end_trace(self, error: BaseException | None) -> None:
        if self._trace is not None:
            self._trace.abandoned(error)
            self._trace = None


class WriterMeter(WriterProbe):
    """See `WriterProbe`. `full_since_s` is monotonic; None while the stream takes what comes."""

    def __init__(self, meters: Instruments, stream: str, subject: str) -> None:
        self.full_since_s: float | None = None
        partition = subject.rpartition(".")[2]
        self.place = {"stream": stream, "partition": partition if partition.isdecimal() else ""}
        self._meters = meters
        self._held = meters.counter(BACKPRESSURE_TIME, {"stream": stream})
        self._attributes = messaging_attributes("publish", subject)
        self._by_error: dict[str, tuple[Counter, Histogram]] = {}
        self._instruments("")

    def _instruments(self, error: str) -> tuple[Counter, Histogram]:
        """The two instruments for one outcome."""
        if error not in self._by_error:
            attributes = self._attributes | ({"error.type": error} if error else {})
            self._by_error[error] = (
                self._meters.counter(SENT_MESSAGES, attributes),
                self._meters.histogram(OPERATION_DURATION, attributes),
            )
        return self._by_error[error]

    def sent(self, begun_s: float, error: str) -> None:
        """See `WriterProbe.sent`."""
        count, duration = self._instruments(error)
        count.add()
        duration.record(time.perf_counter() - begun_s)

    def holding(self, since_s: float) -> None:
        """See `WriterProbe.holding`."""
        self.full_since_s = since_s

    def released(self, held_s: float) -> None:
        """See `WriterProbe.released`."""
        self.full_since_s = None
        self._held.add(held_s)


class ReaderMeter(ReaderProbe):
    """See `ReaderProbe`."""

    def __init__(self, meters: Instruments, stream: str, filter_subject: str) -> None:
        self._opened = meters.counter(READERS_OPENED, {"stream": stream})
        self._delivered = meters.counter(CONSUMED_MESSAGES, messaging_attributes("fetch", filter_subject))

    def opened(self) -> None:
        """See `ReaderProbe.opened`."""
        self._opened.add()

    def delivered(self) -> None:
        """See `ReaderProbe.delivered`."""
        self._delivered.value += 1
