"""The three Grafana dashboards, as data: latency, throughput and capacity, infrastructure.

Streams are seen alike by every process that works with them, so their gauges are taken once (``max``); what a process
counts for itself is summed.
"""

from __future__ import annotations

from typing import Any, Final

from cluster.capacity import DAY_S, EVENTS_PER_SESSION
from cluster.deploy.panels import Panel, dashboard
from cluster.deploy.promql import (
    UP,
    grown,
    heat,
    highest,
    increase,
    lowest,
    mean,
    quantile,
    rate,
    series,
    total,
)
from contracts.subjects import STAGES
from contracts.telemetry import (
    ACCEPTED_LATENCY,
    BACKPRESSURE_AGE,
    BACKPRESSURE_TIME,
    BACKUP_AGE,
    BREAKER_OPEN,
    BREAKER_TRIPS,
    BUFFER_SIZE,
    CIRCUIT_STATE,
    CIRCUIT_TRIPS,
    COMMIT_DURATION,
    COMMIT_EVENTS,
    CONSUMED_MESSAGES,
    CONSUMER_LAG,
    CPU_TIME,
    DURABLE_BUDGET_MS_P95,
    DURABLE_LATENCY,
    EVENTS_APPENDED,
    EVENTS_DUPLICATE,
    EVENTS_FAILED,
    FRAME_BYTES,
    FRAME_EVENTS,
    LANE_RESTARTS,
    LANES,
    LOOP_LAG,
    MEMORY_USAGE,
    MESSAGES_UNREADABLE,
    OPERATION_DURATION,
    ORIGIN_REACHED,
    PAPER_DUE,
    PERSIST_ERRORS,
    POLICY_HITS,
    POLICY_MISSES,
    POLICY_VERSION,
    PROCESS_DURATION,
    QUEUE_BYTES,
    QUEUE_LENGTH,
    QUEUE_LIMIT,
    QUEUE_PENDING,
    READERS_OPENED,
    RECONNECTS,
    SEAL_BYTES,
    SEAL_DURATION,
    SENT_MESSAGES,
    SPANS_DROPPED,
    STAGE_BUDGET_MS_P95,
    STAGE_LATENCY,
    STORAGE_FREE,
    STORAGE_SIZE,
    Instrument,
)

_PLACE: Final = 'stage=~"$stage",partition=~"$partition"'
_PARTITION: Final = 'partition=~"$partition"'
_STAGE: Final = 'stage=~"$stage"'
_TEMPLATE: Final = "messaging_destination_template"
_ACKNOWLEDGED: Final = 'error_type=""'


def _percentiles(what: Instrument, title: str, limit: float | None = None, width: int = 12) -> Panel:
    queries = tuple((quantile(share, what), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99))
    return Panel(title=title, queries=queries, description=what.meaning, unit="s", limit=limit, width=width)


_DURABLE_BUDGET_S: Final = DURABLE_BUDGET_MS_P95 / 1000

_LATENCY: Final = {
    "End to end": (
        Panel(
            title="Durable, p95 now",
            queries=((quantile(0.95, DURABLE_LATENCY, window="5m"), ""),),
            description=DURABLE_LATENCY.meaning,
            unit="s",
            kind="stat",
            width=6,
            limit=_DURABLE_BUDGET_S,
        ),
        Panel(
            title="Durable, p95 of 24 hours",
            queries=((quantile(0.95, DURABLE_LATENCY, window="15m"), "p95"),),
            unit="s",
            width=18,
            limit=_DURABLE_BUDGET_S,
            span="24h",
        ),
        _percentiles(DURABLE_LATENCY, "Durable", _DURABLE_BUDGET_S),
        _percentiles(ACCEPTED_LATENCY, "Accepted, as gateways that export metrics see it"),
        Panel(
            title="Durable, how many events took how long",
            queries=((heat(DURABLE_LATENCY), "{{le}}"),),
            unit="s",
            kind="heatmap",
            width=24,
        ),
    ),
    "Stages, with their budgets": tuple(
        _percentiles(STAGE_LATENCY[stage], stage, STAGE_BUDGET_MS_P95[stage] / 1000) for stage in STAGES
    ),
    "Where the time goes": (
        Panel(
            title="Working on one frame, p95",
            queries=((quantile(0.95, PROCESS_DURATION, _TEMPLATE), f"{{{{{_TEMPLATE}}}}}"),),
            description=PROCESS_DURATION.meaning,
            unit="s",
        ),
        Panel(
            title="One try of a publish, p95",
            queries=((quantile(0.95, OPERATION_DURATION, _TEMPLATE), f"{{{{{_TEMPLATE}}}}}"),),
            description=OPERATION_DURATION.meaning,
            unit="s",
        ),
        _percentiles(COMMIT_DURATION, "Group commit on disk", width=8),
    ),
}

_LENGTHS: Final = highest(QUEUE_BYTES, "stream")
_LIMITS: Final = f"({highest(QUEUE_LIMIT, 'stream')} > 0)"
_FREE_SHARE: Final = f"{lowest(STORAGE_FREE, 'instance')} / {highest(STORAGE_SIZE, 'instance')}"
_FIRST, _LAST = (highest(ORIGIN_REACHED, "partition", where=f'{_PARTITION},stage="{s}"') for s in ("ingest", "persist"))

_THROUGHPUT: Final = {
    "Events": (
        Panel(
            title="Events committed, a second",
            queries=((rate(EVENTS_APPENDED), ""),),
            description=EVENTS_APPENDED.meaning,
            kind="stat",
            width=6,
        ),
        Panel(
            title="Sessions a day at this rate",
            queries=((f"{rate(EVENTS_APPENDED, window='15m')} * {DAY_S} / {EVENTS_PER_SESSION}", ""),),
            description=f"Mean rate of 15 minutes, kept up all day, {EVENTS_PER_SESSION} events a session.",
            kind="stat",
            width=6,
        ),
        Panel(
            title="Events committed by partition, a second",
            queries=((rate(EVENTS_APPENDED, "partition", where=_PARTITION), "{{partition}}"),),
            width=12,
        ),
        Panel(
            title="Duplicates by partition, a second",
            queries=((rate(EVENTS_DUPLICATE, "partition", where=_PARTITION), "{{partition}}"),),
            description=EVENTS_DUPLICATE.meaning,
        ),
        Panel(
            title="Dead letters in 15 minutes",
            queries=((grown(EVENTS_FAILED, "stage", "error_type", window="15m"), "{{stage}} {{error_type}}"),),
            description=EVENTS_FAILED.meaning,
        ),
        Panel(
            title="Events a frame, mean",
            queries=((mean(FRAME_EVENTS, "stage", where=_STAGE), "{{stage}}"),),
            description="One at low load; grows with load, up to FI_FRAME_EVENTS_MAX.",
        ),
    ),
    "What waits": (
        Panel(
            title="Lag by stage and partition, messages",
            queries=((total(CONSUMER_LAG, "stage", "partition", where=_PLACE), "{{stage}} {{partition}}"),),
            description=CONSUMER_LAG.meaning,
            width=12,
        ),
        Panel(
            title="Origins between ingest and persist",
            queries=((f"{_FIRST} - {_LAST}", "{{partition}}"),),
            description=ORIGIN_REACHED.meaning,
            width=12,
        ),
        Panel(
            title="Messages not worked on yet, by stream",
            queries=(
                (total(QUEUE_PENDING, "stream"), "{{stream}}"),
                (total(BUFFER_SIZE, "stream"), "{{stream}}, of these read already"),
            ),
            description=QUEUE_PENDING.meaning,
        ),
        Panel(
            title="Streams, share of their limit",
            queries=((f"{_LENGTHS} / {_LIMITS}", "{{stream}}"),),
            unit="percentunit",
            limit=0.8,
        ),
        Panel(
            title="Messages in streams",
            queries=((highest(QUEUE_LENGTH, "stream"), "{{stream}}"),),
            description=QUEUE_LENGTH.meaning,
        ),
    ),
    "Back-pressure": (
        Panel(
            title="Held since",
            queries=((highest(BACKPRESSURE_AGE, "stream", "partition", where=_PARTITION), "{{stream}} {{partition}}"),),
            description=BACKPRESSURE_AGE.meaning,
            unit="s",
            limit=60,
        ),
        Panel(
            title="Time held, seconds a second",
            queries=((rate(BACKPRESSURE_TIME, "stream"), "{{stream}}"),),
            description=BACKPRESSURE_TIME.meaning,
            unit="s",
        ),
        Panel(
            title="Tries to publish that were acknowledged, share",
            queries=(
                (
                    f"{rate(SENT_MESSAGES, _TEMPLATE, where=_ACKNOWLEDGED)} / {rate(SENT_MESSAGES, _TEMPLATE)}",
                    f"{{{{{_TEMPLATE}}}}}",
                ),
            ),
            description="A full stream's refusals and a fence's count as not acknowledged.",
            unit="percentunit",
        ),
        Panel(
            title="Tries to publish that were not acknowledged, a second",
            queries=(
                (
                    rate(SENT_MESSAGES, _TEMPLATE, "error_type", where='error_type!=""'),
                    f"{{{{{_TEMPLATE}}}}} {{{{error_type}}}}",
                ),
            ),
            description=SENT_MESSAGES.meaning,
        ),
    ),
    "Room": (
        Panel(
            title="Free where the shards lie",
            queries=((lowest(STORAGE_FREE, "instance"), "{{instance}}"),),
            unit="bytes",
        ),
        Panel(
            title="Disk of the shards, share used",
            queries=((f"1 - {_FREE_SHARE}", "{{instance}}"),),
            unit="percentunit",
            limit=0.9,
        ),
        Panel(
            title="Time until the disk is full",
            queries=(
                (
                    f"{series(STORAGE_FREE)} / clamp_min(-deriv({series(STORAGE_FREE)}[1h]), 1)",
                    "{{instance}}",
                ),
            ),
            description="At the last hour's rate; far up when nothing fills it.",
            unit="s",
        ),
        Panel(
            title="Since the last backup",
            queries=((lowest(BACKUP_AGE, "instance"), "{{instance}}"),),
            description=BACKUP_AGE.meaning,
            unit="s",
        ),
        Panel(
            title="Sealed, bytes a second",
            queries=((rate(SEAL_BYTES, "instance", window="1h"), "{{instance}}"),),
            description=SEAL_BYTES.meaning,
            unit="Bps",
        ),
    ),
    "Sizes": (
        Panel(
            title="Size of a frame, mean",
            queries=((mean(FRAME_BYTES, "stage", where=_STAGE), "{{stage}}"),),
            unit="bytes",
        ),
        Panel(title="Events a group commit, mean", queries=((mean(COMMIT_EVENTS), "events"),)),
        Panel(
            title="Messages delivered, a second",
            queries=((rate(CONSUMED_MESSAGES, _TEMPLATE), f"{{{{{_TEMPLATE}}}}}"),),
            description=CONSUMED_MESSAGES.meaning,
        ),
    ),
}

_INFRASTRUCTURE: Final = {
    "Processes": (
        Panel(title="Answer", queries=((f"sum({UP})", "up"),), kind="stat", width=4),
        Panel(
            title="Do not answer", queries=((f"count({UP} == 0) or vector(0)", "down"),), kind="stat", width=4, limit=1
        ),
        Panel(
            title="Lanes by state",
            queries=((total(LANES, "stage", "state", where=_STAGE), "{{stage}} {{state}}"),),
            description=LANES.meaning,
        ),
        Panel(
            title="Dead-letter breaker open",
            queries=(
                (highest(BREAKER_OPEN, "stage", "instance", where=_STAGE), "{{stage}} {{instance}}"),
                (grown(BREAKER_TRIPS, "stage", window="15m"), "{{stage}}, trips in 15 minutes"),
            ),
            description=BREAKER_OPEN.meaning,
        ),
        Panel(
            title="Policy in force",
            queries=((highest(POLICY_VERSION, "instance"), "{{instance}}"),),
            description=f"{POLICY_VERSION.meaning}; two for longer than seconds: a process cannot read the newer one",
        ),
        Panel(
            title="Policy, frames judged a second and versions read in 15 minutes",
            queries=(
                (rate(POLICY_HITS), "judged by what is in memory"),
                (increase(POLICY_MISSES, window="15m"), "versions read"),
            ),
            description=POLICY_HITS.meaning,
        ),
        Panel(
            title="CPU, cores",
            queries=((rate(CPU_TIME, "instance"), "{{instance}}"),),
        ),
        Panel(
            title="Resident memory",
            queries=((highest(MEMORY_USAGE, "instance"), "{{instance}}"),),
            unit="bytes",
        ),
        Panel(
            title="Event loop, how late: p99",
            queries=((quantile(0.99, LOOP_LAG, "instance"), "{{instance}}"),),
            description=LOOP_LAG.meaning,
            unit="s",
            limit=0.25,
        ),
    ),
    "Connections and lanes": (
        Panel(
            title="Reconnects in 15 minutes",
            queries=((increase(RECONNECTS, "instance", window="15m"), "{{instance}}"),),
            description=RECONNECTS.meaning,
        ),
        Panel(
            title="Until a certificate is to be renewed",
            queries=((lowest(PAPER_DUE, "paper", "instance"), "{{paper}} {{instance}}"),),
            description=PAPER_DUE.meaning,
            unit="s",
        ),
        Panel(
            title="Circuits: 1 no answer, 0.5 may be tried",
            queries=(
                (highest(CIRCUIT_STATE, "target", "instance"), "{{target}} {{instance}}"),
                (grown(CIRCUIT_TRIPS, "target", window="15m"), "{{target}}, trips in 15 minutes"),
            ),
            description=CIRCUIT_STATE.meaning,
        ),
        Panel(
            title="Lanes that started again, in 15 minutes",
            queries=((grown(LANE_RESTARTS, "stage", "error_type", window="15m"), "{{stage}} {{error_type}}"),),
            description=LANE_RESTARTS.meaning,
        ),
        Panel(
            title="Consumers made, in 15 minutes",
            queries=((grown(READERS_OPENED, "stream", window="15m"), "{{stream}}"),),
            description=READERS_OPENED.meaning,
        ),
        Panel(
            title="Messages that a server cannot read",
            queries=((highest(MESSAGES_UNREADABLE, "server", "stream"), "{{server}} {{stream}}"),),
            description=MESSAGES_UNREADABLE.meaning,
        ),
    ),
    "Disk": (
        _percentiles(COMMIT_DURATION, "Group commit on disk", width=8),
        Panel(
            title="Sealing a shard, p95 of an hour",
            queries=((quantile(0.95, SEAL_DURATION, "instance", window="1h"), "{{instance}}"),),
            description=SEAL_DURATION.meaning,
            unit="s",
        ),
        Panel(
            title="Failed disk operations in 15 minutes",
            queries=((grown(PERSIST_ERRORS, "error_type", window="15m"), "{{error_type}}"),),
            description=PERSIST_ERRORS.meaning,
        ),
    ),
    "Telemetry": (
        Panel(
            title="Spans dropped, a second",
            queries=((rate(SPANS_DROPPED, "instance"), "{{instance}}"),),
            description=SPANS_DROPPED.meaning,
        ),
    ),
}


DASHBOARDS: Final[dict[str, dict[str, Any]]] = {
    "latency": dashboard("fi-latency", "fi: latency", _LATENCY),
    "throughput": dashboard("fi-throughput", "fi: throughput and capacity", _THROUGHPUT, "stage", "partition"),
    "infrastructure": dashboard("fi-infrastructure", "fi: infrastructure", _INFRASTRUCTURE, "stage"),
}
"""Grafana's JSON, by file name."""
