"""Names of metrics, log events and headers, in one place so that code, dashboards and alerts agree."""

from __future__ import annotations

from typing import Final

EVENT_QUEUED: Final = "EVENT_QUEUED"
EVENT_WORKER_STARTED: Final = "EVENT_WORKER_STARTED"
EVENT_PERSISTED: Final = "EVENT_PERSISTED"
EVENT_PERSIST_FAILED: Final = "EVENT_PERSIST_FAILED"

METRICS: Final[dict[str, tuple[str, str, str]]] = {
    "fi.ingest.latency": ("histogram", "s", "stored by FI_EVENTS to framed by ingest"),
    "fi.segment.latency": ("histogram", "s", "framed by ingest to framed by segment"),
    "fi.hash.latency": ("histogram", "s", "framed by segment to framed by hash"),
    "fi.persist.latency": ("histogram", "s", "framed by hash to durable on disk"),
    "fi.events.appended": ("counter", "{event}", "events committed to shards"),
    "fi.events.failed": ("counter", "{event}", "events dead-lettered, by error_type"),
    "fi.persist.errors": ("counter", "{error}", "failed disk operations, by error_type"),
    "fi.queue.length": ("gauge", "{message}", "messages in a stream"),
    "fi.queue.pending": ("gauge", "{message}", "messages a stage has not read yet, by stream"),
    "fi.buffer.size": ("gauge", "{message}", "messages read and not yet processed"),
}
"""name → (instrument, unit, meaning). From DOMAIN, "Metric names they ask for"."""

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

DEAD_REASON: Final = "Fi-Dead-Reason"
DEAD_FIELD: Final = "Fi-Dead-Field"
DEAD_DETAIL: Final = "Fi-Dead-Detail"
DEAD_STAGE: Final = "Fi-Dead-Stage"
DEAD_ORIGIN: Final = "Fi-Dead-Origin"
DEAD_INDEX: Final = "Fi-Dead-Index"
DEAD_SUBJECT: Final = "Fi-Dead-Subject"
DEAD_HANDLED: Final = "Fi-Dead-Handled"
"""On a message that is no letter but stands for the last one of its subject, which was removed."""
HEADER_FIRST_SEEN: Final = "Fi-First-Seen"
"""Where a replayed event first came in; see `contracts.letters`."""
