"""The alerts, as data: when somebody is told, how urgently, and where the runbook is.

``page``: somebody gets up; events wait, or soon will, and it does not mend itself. ``ticket``: within the working day.
A process that is down is no page: others take its partitions over, and a partition that nobody works on is one. Queries
that compare with nothing (no traffic) give NaN or nothing and do not fire.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final, Literal

import msgspec

from cluster.deploy.promql import UP, grown, highest, increase, lowest, quantile, rate, series, total
from contracts.settings import Settings
from contracts.subjects import DLQ, EVENTS, RECEIPTS, STAGES
from contracts.telemetry import (
    BACKPRESSURE_AGE,
    BACKUP_AGE,
    BREAKER_OPEN,
    CIRCUIT_STATE,
    CONSUMER_LAG,
    DURABLE_BUDGET_MS_P95,
    DURABLE_LATENCY,
    EVENTS_APPENDED,
    EVENTS_DUPLICATE,
    EVENTS_FAILED,
    LANE_RESTARTS,
    LANES,
    LOOP_LAG,
    MEMORY_USAGE,
    MESSAGES_UNREADABLE,
    ORIGIN_REACHED,
    PAPER_DUE,
    QUEUE_BYTES,
    QUEUE_LIMIT,
    RECONNECTS,
    SEAL_DURATION,
    SENT_MESSAGES,
    SPANS_DROPPED,
    STAGE_BUDGET_MS_P95,
    STAGE_LATENCY,
    STORAGE_FREE,
    STORAGE_SIZE,
)

RUNBOOKS: Final = "runbooks.md"

Severity = Literal["page", "ticket"]

_DEFAULTS: Final = Settings()
_KEPT: Final = f'stream=~"{EVENTS}|{RECEIPTS}|{DLQ}"'
"""Streams whose limit stops gateways or persist. A full hop is back-pressure and does no harm by itself."""
_HOPS: Final = f'stream!~"{EVENTS}|{RECEIPTS}|{DLQ}"'
_UNANSWERED: Final = 'error_type!="",error_type!="stream_full",error_type!="fenced"'
"""Tries to publish that failed, without the refusals that are part of normal work."""
_LAG_MIN: Final = 1000


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """One rule.

    Attributes:
        name: also the runbook's heading. Rules of one name differ in their labels.
        expr: fires for each series that it gives,
        held: once it has given it for so long: a PromQL duration.
        severity: who is told.
        summary, description: for people; ``{{ }}`` as in Prometheus' templates.
        labels: beside the severity.
    """

    name: str
    expr: str
    held: str
    severity: Severity
    summary: str
    description: str
    labels: dict[str, str] = {}


def _latency() -> Iterator[Alert]:
    budget_s = DURABLE_BUDGET_MS_P95 / 1000
    yield Alert(
        name="FiDurableLatencyHigh",
        expr=f"{quantile(0.95, DURABLE_LATENCY, window='5m')} > {budget_s:g}",
        held="5m",
        severity="page",
        summary=f"Events take longer than {budget_s:g} s to become durable",
        description=f"95th percentile over 5 minutes: {{{{ $value | humanizeDuration }}}}; budget {budget_s:g} s.",
    )
    for stage in STAGES:
        budget_s = STAGE_BUDGET_MS_P95[stage] / 1000
        yield Alert(
            name="FiStageLatencyHigh",
            expr=f"{quantile(0.95, STAGE_LATENCY[stage], window='5m')} > {budget_s:g}",
            held="10m",
            severity="ticket",
            summary=f"{stage} is over its budget",
            description=f"95th percentile over 5 minutes: {{{{ $value | humanizeDuration }}}}; budget {budget_s:g} s.",
            labels={"stage": stage},
        )


def _progress() -> Iterator[Alert]:
    lag = total(CONSUMER_LAG, "stage", "partition")
    reached = highest(ORIGIN_REACHED, "stage", "partition")
    before = f"max by (stage, partition) ({series(ORIGIN_REACHED)} offset 5m)"
    yield Alert(
        name="FiPartitionStalled",
        expr=f"({lag} > 0) and ({reached} == {before})",
        held="5m",
        severity="page",
        summary="{{ $labels.stage }} does not get on with partition {{ $labels.partition }}",
        description="{{ $value }} messages wait, and nothing was finished for 5 minutes.",
    )
    for stage in STAGES:
        there = highest(ORIGIN_REACHED, "partition")
        worked = highest(ORIGIN_REACHED, "partition", where=f'stage="{stage}"')
        yield Alert(
            name="FiPartitionUnattended",
            expr=f"{there} unless on (partition) {worked}",
            held="5m",
            severity="page",
            summary=f"No {stage} process works on partition {{{{ $labels.partition }}}}",
            description="Its events wait and are safe; nothing of it becomes durable until a process takes it.",
            labels={"stage": stage},
        )
    yield Alert(
        name="FiPartitionStopped",
        expr=f"{total(LANES, 'stage', 'instance', where=_state('stopped'))} > 0",
        held="1m",
        severity="page",
        summary="{{ $value }} partitions have stopped on {{ $labels.instance }}",
        description="Its disk refused a write or a sync, or a shard's file is damaged. What is committed is safe.",
    )
    yield Alert(
        name="FiPartitionOpening",
        expr=f"{total(LANES, 'stage', 'instance', where=_state('opening'))} > 0",
        held="5m",
        severity="page",
        summary="{{ $value }} partitions of {{ $labels.stage }} do not find their place on {{ $labels.instance }}",
        description="They read their own last output to know where to go on, and the streams do not answer.",
    )
    yield Alert(
        name="FiLagGrows",
        expr=f"({lag} > {_LAG_MIN}) and (deriv({lag}[15m:1m]) > 0)",
        held="15m",
        severity="ticket",
        summary="{{ $labels.stage }} falls behind on partition {{ $labels.partition }}",
        description="{{ $value }} messages wait, and they become more: more comes in than is worked on.",
    )
    yield Alert(
        name="FiNoEvents",
        expr=f"{increase(EVENTS_APPENDED, window='30m')} == 0",
        held="30m",
        severity="ticket",
        summary="No event was stored for half an hour",
        description="Either no gateway sends, or what they send is refused or held. Quiet nights may be normal here.",
    )


def _pressure() -> Iterator[Alert]:
    yield Alert(
        name="FiBackpressureHeld",
        expr=f"{highest(BACKPRESSURE_AGE, 'stream', 'partition')} > 60",
        held="1m",
        severity="page",
        summary="{{ $labels.stream }} has been full for partition {{ $labels.partition }} for over a minute",
        description="Publishing is held for {{ $value | humanizeDuration }}: the stage that reads it is slow or gone.",
    )
    share = f"{highest(QUEUE_BYTES, 'stream', where=_KEPT)} / ({highest(QUEUE_LIMIT, 'stream', where=_KEPT)} > 0)"
    yield Alert(
        name="FiStreamNearFull",
        expr=f"{share} > 0.8",
        held="5m",
        severity="page",
        summary="{{ $labels.stream }} is {{ $value | humanizePercentage }} full",
        description="Once full it refuses: gateways are told no, commits or dead letters wait. Nothing is dropped.",
    )
    share = f"{highest(QUEUE_BYTES, 'stream', where=_HOPS)} / ({highest(QUEUE_LIMIT, 'stream', where=_HOPS)} > 0)"
    yield Alert(
        name="FiHopNearFull",
        expr=f"{share} > 0.8",
        held="15m",
        severity="ticket",
        summary="The hop {{ $labels.stream }} is {{ $value | humanizePercentage }} full",
        description="The stage that reads it does not keep up; the one before it will soon be held.",
    )
    yield Alert(
        name="FiPublishesFail",
        expr=(
            f"{rate(SENT_MESSAGES, 'instance', where=_UNANSWERED, window='2m')}"
            f" / {rate(SENT_MESSAGES, 'instance', window='2m')} > 0.5"
        ),
        held="2m",
        severity="page",
        summary="{{ $labels.instance }} gets no acknowledgements",
        description="{{ $value | humanizePercentage }} of its tries failed: no quorum, no leader or no connection.",
    )

    yield Alert(
        name="FiCircuitOpen",
        # Silent lately: 0.5 alone waits for somebody who has something to try.
        expr=(
            f"({highest(CIRCUIT_STATE, 'target', 'instance')} > 0)"
            f" and (max by (target, instance) (max_over_time({series(CIRCUIT_STATE)}[1m])) == 1)"
        ),
        held="1m",
        severity="page",
        summary="{{ $labels.instance }} gets no answer from {{ $labels.target }}: its circuit is open",
        description="Its lanes keep what they have in hand, and one tries for all until there is an answer.",
    )


def _letters() -> Iterator[Alert]:
    yield Alert(
        name="FiDeadLetters",
        expr=f"{grown(EVENTS_FAILED, 'stage', 'error_type', window='15m')} > 0",
        held="0s",
        severity="ticket",
        summary="{{ $labels.stage }} refused events: {{ $labels.error_type }}",
        description="{{ $value | humanize }} in 15 minutes. They wait in FI_DLQ as they came.",
    )
    failed = rate(EVENTS_FAILED, window="10m")
    stored = f"{rate(EVENTS_APPENDED, window='10m')} + {rate(EVENTS_DUPLICATE, window='10m')}"
    yield Alert(
        name="FiDeadLettersMany",
        expr=f"{failed} / ({failed} + {stored}) > 0.05",
        held="10m",
        severity="page",
        summary="{{ $value | humanizePercentage }} of the events are refused",
        description="A gateway or a new build is wrong. They wait in FI_DLQ as they came.",
    )
    yield Alert(
        name="FiBreakerOpen",
        expr=f"{highest(BREAKER_OPEN, 'stage', 'instance')} > 0",
        held="1m",
        severity="page",
        summary="{{ $labels.stage }} on {{ $labels.instance }} holds: it would dead-letter nearly everything",
        description="Its partitions wait and nothing is lost. It tries again by itself with one message now and then.",
    )


def _disk() -> Iterator[Alert]:
    floor = _DEFAULTS.disk_floor_bytes
    yield Alert(
        name="FiDiskBelowFloor",
        expr=f"{lowest(STORAGE_FREE, 'instance')} < {floor}",
        held="1m",
        severity="page",
        summary="{{ $labels.instance }} has {{ $value | humanize1024 }}B left for shards",
        description="Persist is not ready below FI_DISK_FLOOR_BYTES; with a full disk its partitions stop.",
    )
    yield Alert(
        name="FiDiskNearFull",
        expr=f"{lowest(STORAGE_FREE, 'instance')} / {highest(STORAGE_SIZE, 'instance')} < 0.1",
        held="5m",
        severity="ticket",
        summary="The disk of {{ $labels.instance }}'s shards is over 90 % full",
        description="{{ $value | humanizePercentage }} of it is free.",
    )
    yield Alert(
        name="FiDiskFillsUp",
        expr=f"predict_linear({series(STORAGE_FREE)}[1h], 4 * 3600) < {floor}",
        held="30m",
        severity="page",
        summary="{{ $labels.instance }} will have no room for shards within 4 hours",
        description="At the last hour's rate {{ $value | humanize1024 }}B will be left then.",
    )
    yield Alert(
        name="FiSealSlow",
        expr=f"{quantile(0.95, SEAL_DURATION, 'instance', window='1h')} > 60",
        held="10m",
        severity="ticket",
        summary="Sealing a shard takes over a minute on {{ $labels.instance }}",
        description="95th percentile over an hour: {{ $value | humanizeDuration }}. Commits go on meanwhile.",
    )
    age_s = round(_DEFAULTS.shard_age_s_max)
    stored = increase(EVENTS_APPENDED, "instance", window=f"{age_s}s", offset=f"{2 * age_s}s")
    sealed = increase(SEAL_DURATION, "instance", window=f"{3 * age_s}s")
    yield Alert(
        name="FiSealMissing",
        expr=f"({stored} > 0) and ({sealed} == 0)",
        held="10m",
        severity="ticket",
        summary="{{ $labels.instance }} stored events and did not seal them",
        description="Their shard is older than FI_SHARD_AGE_S_MAX. FI_EVENTS keeps what is not sealed, and fills.",
    )
    yield Alert(
        name="FiBackupOld",
        expr=f"{lowest(BACKUP_AGE, 'instance')} > {age_s}",
        held="10m",
        severity="ticket",
        summary="The store of {{ $labels.instance }} was last copied {{ $value | humanizeDuration }} ago",
        description="What was sealed since, and found no room in FI_EVENTS, is on one disk alone.",
    )


def _servers() -> Iterator[Alert]:
    yield Alert(
        name="FiServerDamaged",
        expr=f"{highest(MESSAGES_UNREADABLE, 'server', 'stream')} > 0",
        held="0s",
        severity="ticket",
        summary="{{ $labels.server }} cannot read what it stored of {{ $labels.stream }}",
        description="{{ $value }} times. Its disk gave wrong bytes. Others have what it has: there is one copy less.",
    )
    yield Alert(
        name="FiPaperDue",
        expr=f"{lowest(PAPER_DUE, 'instance', 'paper')} < 0",
        held="10m",
        severity="ticket",
        summary="{{ $labels.paper }} of {{ $labels.instance }} expires soon, or has",
        description="In 14 days, or a fifth of its time, or less. Then no new connection can be made with it.",
    )


def _processes() -> Iterator[Alert]:
    yield Alert(
        name="FiNothingRuns",
        expr=f"absent({UP} == 1)",
        held="2m",
        severity="page",
        summary="No stage process answers",
        description="Or Prometheus cannot reach any of them. Gateways are acknowledged until FI_EVENTS is full.",
    )
    yield Alert(
        name="FiProcessDown",
        expr=f"{UP} == 0",
        held="10m",
        severity="ticket",
        summary="{{ $labels.instance }} does not answer",
        description="It is down, or its event loop is stuck. Other processes of its stage have taken its partitions.",
    )
    yield Alert(
        name="FiLoopLag",
        expr=f"{quantile(0.99, LOOP_LAG, 'instance', window='5m')} > 0.25",
        held="10m",
        severity="ticket",
        summary="The event loop of {{ $labels.instance }} is late",
        description="99th percentile over 5 minutes: {{ $value | humanizeDuration }}. It has too little CPU.",
    )
    yield Alert(
        name="FiReconnects",
        expr=f"{increase(RECONNECTS, 'instance', window='15m')} > 5",
        held="5m",
        severity="ticket",
        summary="{{ $labels.instance }} loses its connection again and again",
        description="{{ $value | humanize }} times in 15 minutes.",
    )
    yield Alert(
        name="FiLaneRestarts",
        expr=f"{grown(LANE_RESTARTS, 'stage', 'error_type', window='15m')} > 20",
        held="15m",
        severity="ticket",
        summary="Lanes of {{ $labels.stage }} start again and again: {{ $labels.error_type }}",
        description="{{ $value | humanize }} times in 15 minutes. Nothing is lost; it costs time.",
    )
    memory = series(MEMORY_USAGE)
    yield Alert(
        name="FiMemoryGrows",
        expr=(
            f"(min_over_time({memory}[1h]) > 1.5 * max_over_time({memory}[1h] offset 1d))"
            f" and (min_over_time({memory}[1h]) > {512 * 1024**2})"
        ),
        held="1h",
        severity="ticket",
        summary="{{ $labels.instance }} uses half as much memory again as a day ago",
        description="At least {{ $value | humanize1024 }}B for an hour.",
    )
    yield Alert(
        name="FiSpansDropped",
        expr=f"{increase(SPANS_DROPPED, 'instance', window='15m')} > 0",
        held="15m",
        severity="ticket",
        summary="{{ $labels.instance }} drops spans",
        description="{{ $value | humanize }} in 15 minutes: the collector does not take them. Events are safe.",
    )


def _state(state: str) -> str:
    return f'state="{state}"'


GROUPS: Final[dict[str, tuple[Alert, ...]]] = {
    "fi-latency": tuple(_latency()),
    "fi-progress": tuple(_progress()),
    "fi-back-pressure": tuple(_pressure()),
    "fi-dead-letters": tuple(_letters()),
    "fi-disk": tuple(_disk()),
    "fi-servers": tuple(_servers()),
    "fi-processes": tuple(_processes()),
}
"""Every alert, by group."""


def rules_yaml(runbooks_url: str) -> str:
    """The rule file. `runbooks_url`: where `RUNBOOKS` can be read; each alert links to its own section."""
    lines = ["# Made by `python -m cluster.deploy`; change cluster/deploy/alerts.py instead.", "groups:"]
    for group, alerts in GROUPS.items():
        lines += [f"  - name: {group}", "    rules:"]
        for alert in alerts:
            lines += [
                f"      - alert: {alert.name}",
                f"        expr: {_text(alert.expr)}",
                f"        for: {alert.held}",
            ]
            labels = {"severity": alert.severity, **alert.labels}
            lines += ["        labels:", *(f"          {name}: {value}" for name, value in labels.items())]
            notes = {"summary": alert.summary, "description": alert.description}
            notes["runbook_url"] = f"{runbooks_url}#{alert.name.lower()}"
            lines += ["        annotations:", *(f"          {name}: {_text(text)}" for name, text in notes.items())]
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    """A YAML double-quoted scalar: JSON's strings are such."""
    return json.dumps(text)
