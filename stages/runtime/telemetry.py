"""What a process tells of itself: the object that lanes, readers and writers are handed to record with.

Always true: when nothing listens (no OTLP endpoint and no health port) every call here does nothing; when something
does, a call touches memory only. Without an OTLP endpoint OpenTelemetry is not imported before `/metrics` is asked for,
and then no more of it than names the process. Export happens in a thread of its own (`stages.runtime.otlp`), so that a
slow or missing collector costs the pipeline nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from contracts.errors import SettingsError
from contracts.frames import Frame
from contracts.receipts import Receipt
from contracts.settings import Settings, hide_credentials
from contracts.subjects import Stage
from contracts.telemetry import Instrument
from stages.runtime.circuit import Circuit
from stages.runtime.instruments import Counter, Histogram
from stages.runtime.messages import StoredMessage

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
DISABLED_VARIABLE = "OTEL_SDK_DISABLED"


Readings = Iterable[tuple[Mapping[str, str], float]]
"""(attributes, value) of a gauge, or of a counter that somebody else keeps."""


class ReadingFrom(Protocol):
    """What a lane's probe looks at of its ordered reader."""

    pending: int
    """Messages the server had not delivered when it sent the last one."""
    refused: str
    """Why the stream refuses to be read; empty while it does not."""

    @property
    def buffered(self) -> int:
        """Messages received and not taken."""

    async def count_pending(self) -> None:
        """Brings `pending` up to date."""


class Cursor(Protocol):
    """What a lane's probe looks at of its place."""

    @property
    def origin(self) -> int:
        """Everything up to here is finished."""


class Feed(Protocol):
    """A lane's input."""

    @property
    def reader(self) -> ReadingFrom:
        """Where it reads."""

    @property
    def cursor(self) -> Cursor:
        """Its place."""


class Tripping(Protocol):
    """The dead-letter breaker of a process."""

    trips: int

    @property
    def is_open(self) -> bool:
        """Nearly everything would be dead-lettered, and is held instead."""


class StreamFacts(NamedTuple):
    """A stream as its leader described it: messages, bytes, and the bytes at which it refuses (0: never)."""

    messages: int
    size_bytes: int
    limit_bytes: int


class FrameTimes(NamedTuple):
    """When a frame was made, when the message of its first event was stored, and how many events it has."""

    made_ns: int
    accepted_ns: int
    events: int


class LaneProbe:
    """One lane, watched. These methods do nothing; `stages.runtime.meters` has those that do."""

    def opened(self, feed: Feed) -> None:
        """The lane has found its place and reads."""

    def standing_by(self) -> None:
        """The partition's shards are in another store: the lane waits."""

    def stopped(self, error: Exception) -> None:
        """The partition's disk or files failed: the lane waits until they are mended."""

    def disk_circuit(self, circuit: Circuit) -> None:
        """`circuit` is the lane's, before its disk (persist)."""

    def restarting(self, error: Exception) -> None:
        """The lane must find its place again."""

    def closed(self, error: BaseException | None) -> None:
        """A session ended, by `error` if one is on its way up."""

    def leaving(self) -> None:
        """The lane was told to stop."""

    def begin(self, messages: Sequence[StoredMessage]) -> None:
        """Work on `messages` begins."""

    def skipped(self) -> None:
        """The present work is over: nothing in its messages was new."""

    def worked(self) -> None:
        """The work is done; what is left is to publish it."""

    def headers(self) -> dict[str, str] | None:
        """What the frame of the present work carries beside its fence: its traces, if any event is sampled."""
        return None

    def framed(self, frame: Frame, size_bytes: int) -> None:
        """The frame of the present work is acknowledged."""

    def synced(self, begun_s: float, events: int) -> None:
        """A group commit of `events` is on disk; it began at `begun_s` (`time.perf_counter`). In any thread."""

    def committed(self, receipt: Receipt, frames: Sequence[FrameTimes], events: int, duplicates: int) -> None:
        """The receipt of the present work is accepted: what is new of `frames`, all that have events."""

    def sealed(self, begun_s: float, size_bytes: int) -> None:
        """A shard was sealed; that began at `begun_s`."""


class WriterProbe:
    """One subject that is written, watched."""

    def sent(self, begun_s: float, error: str) -> None:
        """One try to publish was answered, or given up; `error` is empty when it was acknowledged."""

    def holding(self, since_s: float) -> None:
        """The stream is full since `since_s` (`time.monotonic`)."""

    def released(self, held_s: float) -> None:
        """It has room again, after `held_s`."""


class ReaderProbe:
    """One subject that is read, watched."""

    def opened(self) -> None:
        """A consumer is being made."""

    def delivered(self) -> None:
        """A message came."""


class Telemetry:
    """Off: what it hands out records nothing."""

    def counter(self, what: Instrument, attributes: Mapping[str, str]) -> Counter:
        """The counter of these attributes; the same one each time.

        Raises:
            ValueError: attributes that the catalogue does not give it.
        """
        return Counter()

    def histogram(self, what: Instrument, attributes: Mapping[str, str]) -> Histogram:
        """The histogram of these attributes; the same one each time. Raises as `counter`."""
        return Histogram(what.buckets)

    def read_from(self, what: Instrument, read: Callable[[], Readings]) -> None:
        """Lets `read` give the values of `what`, in whichever thread collects."""

    def lane(self, stage: Stage, partition: int) -> LaneProbe:
        """For one lane, from its making."""
        return _LANE

    def writer(self, stream: str, subject: str) -> WriterProbe:
        """For whoever writes `subject`."""
        return _WRITER

    def reader(self, stream: str, filter_subject: str) -> ReaderProbe:
        """For whoever reads `filter_subject`."""
        return _READER

    def dead_letter(self, stage: Stage, reason: str) -> None:
        """An event was dead-lettered."""

    def unreadable(self, stream: str, server: str) -> None:
        """The server cannot read a message that it stored: a file of its stream is damaged."""

    def circuit(self, target: str, circuit: Circuit) -> None:
        """`circuit` is the one of this process before the stream `target`."""

    def breaker(self, stage: Stage, breaker: Tripping) -> None:
        """`breaker` is the one of this process; telling it again does nothing."""


_LANE, _WRITER, _READER = LaneProbe(), WriterProbe(), ReaderProbe()
OFF = Telemetry()


def otlp_endpoint(settings: Settings, env: Mapping[str, str]) -> str:
    """Where to send: ``otlp_endpoint``, else OpenTelemetry's own variable; empty for nowhere.

    Raises:
        SettingsError: not an HTTP URL.
    """
    if env.get(DISABLED_VARIABLE, "").lower() == "true":
        return ""
    given = "otlp_endpoint" if settings.otlp_endpoint else ENDPOINT_VARIABLE
    endpoint = settings.otlp_endpoint or env.get(ENDPOINT_VARIABLE, "")
    if endpoint and not _is_http_url(endpoint):
        shown = hide_credentials(endpoint)
        raise SettingsError(f"{given} = {shown!r}: give the collector's OTLP/HTTP URL, e.g. http://host:4318")
    return endpoint.rstrip("/")


def _is_http_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0 and " " not in text
    except ValueError:
        return False
