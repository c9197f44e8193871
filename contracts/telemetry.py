"""What can be observed: one catalogue of metrics, and the names of log events, headers and span attributes.

Code, dashboards, alerts and the README's table all take their names from here, so they agree. Names that begin with
``messaging.`` and ``process.`` are OpenTelemetry's semantic conventions (1.44, docs/messaging; ``nats`` is not in its
registry of systems, and is what others emit); the other names are DOMAIN's and ours. No attribute grows without bound:
none is a consultation, an event id or a size.
"""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec

EVENT_QUEUED: Final = "EVENT_QUEUED"
EVENT_WORKER_STARTED: Final = "EVENT_WORKER_STARTED"
EVENT_PERSISTED: Final = "EVENT_PERSISTED"
EVENT_PERSIST_FAILED: Final = "EVENT_PERSIST_FAILED"

STAGE_BUDGET_MS_P95: Final[dict[str, int]] = {"ingest": 50, "segment": 100, "hash": 150, "persist": 1700}
"""DOMAIN, "The four stages and their budgets": 95th percentile."""
DURABLE_BUDGET_MS_P95: Final = 2000

HEADER_MSG_ID: Final = "Nats-Msg-Id"
HEADER_EXPECTED_STREAM: Final = "Nats-Expected-Stream"
HEADER_EXPECTED_LAST_SUBJECT_SEQ: Final = "Nats-Expected-Last-Subject-Sequence"
HEADER_TTL: Final = "Nats-TTL"
HEADER_KV_OPERATION: Final = "KV-Operation"
KV_DELETED: Final = "DEL"
HEADER_TRACEPARENT: Final = "traceparent"
HEADER_TRACES: Final = "Fi-Traces"
"""On a frame: the span that made it, once for each sampled trace its events belong to, as trace contexts with commas
between them. Only on frames that carry a sampled event, and never more than `FRAME_TRACES_MAX`."""
FRAME_TRACES_MAX: Final = 32

DEAD_REASON: Final = "Fi-Dead-Reason"
DEAD_FIELD: Final = "Fi-Dead-Field"
DEAD_DETAIL: Final = "Fi-Dead-Detail"
DEAD_STAGE: Final = "Fi-Dead-Stage"
DEAD_ORIGIN: Final = "Fi-Dead-Origin"
DEAD_INDEX: Final = "Fi-Dead-Index"
DEAD_LINES: Final = "Fi-Dead-Lines"
DEAD_SUBJECT: Final = "Fi-Dead-Subject"
DEAD_POLICY: Final = "Fi-Dead-Policy"
"""Version of the policy that the event was refused under; not there where no policy had a part in it."""
DEAD_HANDLED: Final = "Fi-Dead-Handled"
"""On a message that is no letter but stands for the last one of its subject, which was removed."""
HEADER_FIRST_SEEN: Final = "Fi-First-Seen"
"""Where a replayed event first came in; see `contracts.letters`."""

_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)
_TRACEPARENT_CHARS_MAX: Final = 64
"""A message may hold ten thousand events, and each of them carries it."""

TARGET_DISK: Final = "disk"
"""What a circuit stands before that is no stream."""

Kind = Literal["counter", "gauge", "histogram"]


class TraceContext(msgspec.Struct, frozen=True):
    """A W3C trace context: where a span belongs."""

    trace_id: int
    span_id: int
    sampled: bool


def parse_traceparent(text: str) -> TraceContext | None:
    """The W3C `traceparent` in `text` (version 00 or a later one that begins alike), or None when it is none."""
    match = _TRACEPARENT.fullmatch(text) if 0 < len(text) <= _TRACEPARENT_CHARS_MAX else None
    if match is None:
        return None
    trace, span, flags = match.groups()
    return TraceContext(int(trace, 16), int(span, 16), bool(int(flags, 16) & 1))


def format_traceparent(context: TraceContext) -> str:
    """Inverse of `parse_traceparent`."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.sampled):02x}"


def messaging_attributes(operation: str, subject: str) -> dict[str, str]:
    """The attributes of every ``messaging.*`` metric and span; the partition in `subject` becomes a placeholder."""
    tokens = ["{partition}" if token.isdecimal() else token for token in subject.split(".")]
    return {
        "messaging.system": "nats",
        "messaging.operation.name": operation,
        "messaging.destination.template": ".".join(tokens),
    }


class Instrument(msgspec.Struct, frozen=True, kw_only=True):
    """One metric.

    Attributes:
        name: as OpenTelemetry has it.
        kind: a counter only grows; a gauge is read when it is asked for; a histogram counts values in buckets.
        unit: UCUM, e.g. ``s``, ``By``, ``{event}``.
        meaning: what one value says.
        attributes: every value has each of these.
        optional: may be missing.
        buckets: upper bounds, of a histogram.
    """

    name: str
    kind: Kind
    unit: str
    meaning: str
    attributes: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def prometheus_name(self) -> str:
        """The name in ``/metrics``, and in Prometheus after OTLP: unit spelled out, counters end in ``_total``.

        A histogram's series add ``_bucket``, ``_sum`` and ``_count``.
        """
        unit = _UNITS.get(self.unit, "")
        name = self.name.replace(".", "_") + (f"_{unit}" if unit else "")
        return f"{name}_total" if self.kind == "counter" else name


_UNITS: Final = {"s": "seconds", "By": "bytes"}

_LATENCY_S: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5),
    *(1.0, 1.7, 2.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)
"""Every budget of `STAGE_BUDGET_MS_P95` and `DURABLE_BUDGET_MS_P95` is a bound, so that an alert can be exact."""
_OPERATION_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""The conventions' advice, and two bounds below it."""
_DISK_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_COUNTS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0, 65536.0)
_SIZES_BYTES: Final = tuple(float(4**power) for power in range(4, 12))

_MESSAGING: Final = ("messaging.system", "messaging.operation.name", "messaging.destination.template")


def _counter(name: str, unit: str, meaning: str, *attributes: str, optional: tuple[str, ...] = ()) -> Instrument:
    return Instrument(name=name, kind="counter", unit=unit, meaning=meaning, attributes=attributes, optional=optional)


def _gauge(name: str, unit: str, meaning: str, *attributes: str) -> Instrument:
    return Instrument(name=name, kind="gauge", unit=unit, meaning=meaning, attributes=attributes)


def _histogram(
    name: str, unit: str, buckets: tuple[float, ...], meaning: str, *attributes: str, optional: tuple[str, ...] = ()
) -> Instrument:
    return Instrument(
        name=name,
        kind="histogram",
        unit=unit,
        meaning=meaning,
        attributes=attributes,
        optional=optional,
        buckets=buckets,
    )


def _stage_latency(stage: str, before: str, after: str) -> Instrument:
    budget_ms = STAGE_BUDGET_MS_P95[stage]
    meaning = f"{before} to {after}, of each event; budget {budget_ms} ms at the 95th percentile"
    return _histogram(f"fi.{stage}.latency", "s", _LATENCY_S, meaning)


STAGE_LATENCY: Final[dict[str, Instrument]] = {
    "ingest": _stage_latency("ingest", "stored by FI_EVENTS", "framed by ingest"),
    "segment": _stage_latency("segment", "framed by ingest", "framed by segment"),
    "hash": _stage_latency("hash", "framed by segment", "framed by hash"),
    "persist": _stage_latency("persist", "framed by hash", "durable on disk"),
}
ACCEPTED_LATENCY: Final = _histogram(
    "fi.accepted.latency", "s", _LATENCY_S, "a gateway's send to its acknowledgement by FI_EVENTS, retries included"
)
DURABLE_LATENCY: Final = _histogram(
    "fi.durable.latency",
    "s",
    _LATENCY_S,
    "stored by FI_EVENTS to receipt accepted, of each event (all of a frame count as its oldest); budget 2000 ms",
)
EVENTS_APPENDED: Final = _counter(
    "fi.events.appended", "{event}", "events committed to shards: their receipt is accepted", "partition"
)
EVENTS_DUPLICATE: Final = _counter(
    "fi.events.duplicates", "{event}", "events not stored again because their id is stored already", "partition"
)
EVENTS_FAILED: Final = _counter(
    "fi.events.failed", "{event}", "events this process dead-lettered, by reason", "stage", "error_type"
)
PERSIST_ERRORS: Final = _counter(
    "fi.persist.errors",
    "{error}",
    "disk operations or shard files that failed: each stops its partition or keeps it stopped",
    "error_type",
)
QUEUE_LENGTH: Final = _gauge(
    "fi.queue.length", "{message}", "messages in a stream, processed ones that are not purged yet among them", "stream"
)
QUEUE_BYTES: Final = _gauge("fi.queue.size", "By", "bytes in a stream", "stream")
QUEUE_LIMIT: Final = _gauge("fi.queue.limit", "By", "bytes at which the stream refuses; 0 for none", "stream")
QUEUE_PENDING: Final = _gauge(
    "fi.queue.pending", "{message}", "messages of a stream that this process has not worked on yet", "stream"
)
BUFFER_SIZE: Final = _gauge(
    "fi.buffer.size", "{message}", "messages this process has read and not worked on yet", "stream"
)
CONSUMER_LAG: Final = _gauge(
    "fi.consumer.lag",
    "{message}",
    "messages (frames, after ingest) of a partition that its stage has not worked on yet",
    "stage",
    "partition",
)
ORIGIN_REACHED: Final = _gauge(
    "fi.origin.reached",
    "{origin}",
    "origin up to which a stage has finished a partition; the lag between two stages is the difference",
    "stage",
    "partition",
)
LANES: Final = _gauge(
    "fi.lanes", "{lane}", "lanes of this process, by state: opening, open, standby or stopped", "stage", "state"
)
BREAKER_OPEN: Final = _gauge(
    "fi.breaker.open",
    "{process}",
    "1 while nearly everything would be dead-lettered and is held instead, else 0",
    "stage",
)
BREAKER_TRIPS: Final = _counter("fi.breaker.trips", "{trip}", "times the dead-letter breaker opened", "stage")
CIRCUIT_STATE: Final = _gauge(
    "fi.circuit.state",
    "{state}",
    "1 while the stream (or the disk) does not answer, 0.5 once somebody may try it again, 0 when it answers",
    "target",
)
CIRCUIT_TRIPS: Final = _counter(
    "fi.circuit.trips", "{trip}", "times the circuit before a stream or the disk opened", "target"
)
POLICY_HITS: Final = _counter(
    "fi.policy.cache.hits", "{frame}", "frames judged by the policy in memory: all there are, each counted once"
)
POLICY_MISSES: Final = _counter(
    "fi.policy.cache.misses", "{policy}", "versions of the policy that were read from the bucket, at start and later"
)
POLICY_VERSION: Final = _gauge("fi.policy.version", "{version}", "version of the policy that events are judged by")
LANE_RESTARTS: Final = _counter(
    "fi.lane.restarts",
    "{restart}",
    "lanes that had to find their place again: fenced, a hole in the input, or input that cannot be read",
    "stage",
    "error_type",
)
READERS_OPENED: Final = _counter(
    "fi.reader.opened",
    "{consumer}",
    "consumers made to read a stream; more than one for a lane means that it healed itself",
    "stream",
)
MESSAGES_UNREADABLE: Final = _counter(
    "fi.messages.unreadable",
    "{message}",
    "stored messages that a server could not read, each time: a file of the stream is damaged there",
    "stream",
    "server",
)
FRAME_EVENTS: Final = _histogram("fi.frame.events", "{event}", _COUNTS, "events in each frame published", "stage")
FRAME_BYTES: Final = _histogram("fi.frame.size", "By", _SIZES_BYTES, "size of each frame published", "stage")
COMMIT_EVENTS: Final = _histogram("fi.commit.events", "{event}", _COUNTS, "events in each group commit")
COMMIT_DURATION: Final = _histogram(
    "fi.commit.duration", "s", _DISK_S, "time of each group commit on disk: append and fdatasync"
)
SEAL_DURATION: Final = _histogram("fi.seal.duration", "s", _LATENCY_S, "time to write, verify and sync a sealed shard")
SEAL_BYTES: Final = _counter("fi.seal.size", "By", "bytes of the shards sealed")
STORAGE_FREE: Final = _gauge("fi.storage.free", "By", "free bytes where the shards lie")
STORAGE_SIZE: Final = _gauge("fi.storage.size", "By", "bytes of the file system that the shards lie on")
BACKUP_AGE: Final = _gauge(
    "fi.backup.age",
    "s",
    "since a `fictl backup` left nothing of the store uncopied to another disk; no value where there never was one",
)
PAPER_DUE: Final = _gauge(
    "fi.paper.due",
    "s",
    "until a certificate or JWT is to be renewed: 14 days before it expires, or with a fifth of its time left; below 0 "
    "it should have been. By the setting that names its file, or the server that shows it",
    "paper",
)
BACKPRESSURE_TIME: Final = _counter(
    "fi.backpressure.duration",
    "s",
    "time that publishes were held because the stream was full; grows when a hold ends",
    "stream",
)
BACKPRESSURE_AGE: Final = _gauge(
    "fi.backpressure.age",
    "s",
    "how long a partition's publish has been held because the stream is full; 0 when it is not",
    "stream",
    "partition",
)
RECONNECTS: Final = _counter("fi.reconnects", "{reconnect}", "connections to the cluster after the first")
LOOP_LAG: Final = _histogram("fi.loop.lag", "s", _OPERATION_S, "how late the event loop ran a timer")
SPANS_DROPPED: Final = _counter("fi.spans.dropped", "{span}", "spans not exported: the collector did not take them")
OPERATION_DURATION: Final = _histogram(
    "messaging.client.operation.duration",
    "s",
    _OPERATION_S,
    "one try of a publish, until it was answered",
    *_MESSAGING,
    optional=("error.type",),
)
SENT_MESSAGES: Final = _counter(
    "messaging.client.sent.messages",
    "{message}",
    "tries to publish; with error.type those that were not acknowledged, e.g. stream_full or fenced",
    *_MESSAGING,
    optional=("error.type",),
)
CONSUMED_MESSAGES: Final = _counter(
    "messaging.client.consumed.messages", "{message}", "messages delivered to this process", *_MESSAGING
)
PROCESS_DURATION: Final = _histogram(
    "messaging.process.duration",
    "s",
    _OPERATION_S,
    "working on what was read at once, without waiting for the publish",
    *_MESSAGING,
)
CPU_TIME: Final = _counter("process.cpu.time", "s", "CPU time of the process", "cpu.mode")
MEMORY_USAGE: Final = _gauge("process.memory.usage", "By", "resident memory of the process")

CATALOGUE: Final[dict[str, Instrument]] = {
    instrument.name: instrument
    for instrument in (
        *STAGE_LATENCY.values(),
        ACCEPTED_LATENCY,
        DURABLE_LATENCY,
        EVENTS_APPENDED,
        EVENTS_DUPLICATE,
        EVENTS_FAILED,
        PERSIST_ERRORS,
        QUEUE_LENGTH,
        QUEUE_BYTES,
        QUEUE_LIMIT,
        QUEUE_PENDING,
        BUFFER_SIZE,
        CONSUMER_LAG,
        ORIGIN_REACHED,
        LANES,
        BREAKER_OPEN,
        BREAKER_TRIPS,
        CIRCUIT_STATE,
        CIRCUIT_TRIPS,
        POLICY_HITS,
        POLICY_MISSES,
        POLICY_VERSION,
        LANE_RESTARTS,
        READERS_OPENED,
        MESSAGES_UNREADABLE,
        FRAME_EVENTS,
        FRAME_BYTES,
        COMMIT_EVENTS,
        COMMIT_DURATION,
        SEAL_DURATION,
        SEAL_BYTES,
        STORAGE_FREE,
        STORAGE_SIZE,
        BACKUP_AGE,
        PAPER_DUE,
        BACKPRESSURE_TIME,
        BACKPRESSURE_AGE,
        RECONNECTS,
        LOOP_LAG,
        SPANS_DROPPED,
        OPERATION_DURATION,
        SENT_MESSAGES,
        CONSUMED_MESSAGES,
        PROCESS_DURATION,
        CPU_TIME,
        MEMORY_USAGE,
    )
}
"""Every metric there is, by name. A test holds that each is recorded, and nothing else is."""
