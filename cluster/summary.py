"""What looks at a pipeline amount to: counts, rates, percentiles, and what is wrong. Pure.

Rates and percentiles come from two looks; counts are the last look's. What is None could not be read, or is not known
from one look alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from cluster.backlog import StageLag
from cluster.members import MembersReport
from cluster.overview import DiskLook, Letters, Overview, ProcessLook
from cluster.scrape import HISTOGRAMS, Percentiles, grown, percentiles
from cluster.status import Allowance, ServerStatus, StreamStatus
from contracts.subjects import EVENTS, STAGES, Stage
from contracts.telemetry import (
    DURABLE_BUDGET_MS_P95,
    DURABLE_LATENCY,
    LOOP_LAG,
    STAGE_BUDGET_MS_P95,
    STAGE_LATENCY,
)

RATE_S: Final = 2.0
LATENCY_S: Final = 10.0
"""Rates and percentiles are over so much of the past, where that many looks are there."""


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """What waits before one stage in one partition; as `cluster.backlog.StageLag`, with an age for a time.

    Attributes:
        origin: up to here it is finished.
        messages: accepted messages that wait.
        oldest_s: since the first of them was accepted.
        stuck: it waited at the look before too, and nothing was finished since.
    """

    origin: int | None
    messages: int | None
    oldest_s: float | None
    stuck: bool = False


class PartitionSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One partition: events and shards as its receipts and seal records say; all 0 unless `is_known`."""

    partition: int
    is_known: bool
    persisted: int
    duplicates: int
    dead_lettered: int
    live_shards: int
    sealed_shards: int
    sealed_events: int
    node: str
    waiting: dict[Stage, Waiting]


class StageSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One stage.

    Attributes:
        stage: which.
        waiting: accepted messages before it, over all partitions; None when one of them is not known.
        oldest_s: since the first of them was accepted.
        processes: on all nodes; None when the bucket cannot be read.
        held: partitions that somebody works on.
        paused: it is.
        latency: of the processes whose metrics are read; None without any, or when no event passed.
        budget_s: for its 95th percentile.
    """

    stage: Stage
    waiting: int | None
    oldest_s: float | None
    processes: int | None
    held: tuple[int, ...]
    paused: bool
    latency: Percentiles | None
    budget_s: float


class StreamSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One stream, and the messages that came in each second; None when that is not known."""

    status: StreamStatus
    in_per_s: float | None


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Over all partitions. None when one of them could not be read."""

    persisted: int
    duplicates: int
    dead_lettered: int
    live_shards: int
    sealed_shards: int
    sealed_events: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What `fictl status` shows, but for the verdict.

    Attributes:
        at_ns: when the last look ended, since the epoch.
        window_s: between the two looks that rates are from; None with one look.
        latency_window_s: the same for percentiles.
        accepted_per_s: messages that `FI_EVENTS` took each second.
        persisted_per_s: events whose receipts were accepted, each second.
        durable: latency from accepted to durable; `durable_budget_s` for its 95th percentile.
        loop_lag: how late the event loops ran, of the worst process.
        Others as in `Overview`.
    """

    at_ns: int
    window_s: float | None
    latency_window_s: float | None
    connected: bool
    no_connection: str
    servers: tuple[ServerStatus, ...]
    cluster: str
    partition_count: int | None
    accepted_per_s: float | None
    persisted_per_s: float | None
    stages: tuple[StageSummary, ...]
    durable: Percentiles | None
    durable_budget_s: float
    loop_lag: Percentiles | None
    streams: tuple[StreamSummary, ...]
    allowances: tuple[Allowance, ...]
    totals: Totals | None
    partitions: tuple[PartitionSummary, ...]
    letters: Letters | None
    members: MembersReport | None
    processes: tuple[ProcessLook, ...] | None
    disk: DiskLook | None
    unread: tuple[str, ...]

    @property
    def waiting(self) -> int | None:
        """Accepted messages that are not committed; None when that is not known of some partition."""
        return sum_known(stage.waiting for stage in self.stages)

    def behind_from(self, reader: Stage) -> Stage:
        """The stage because of which the input of `reader` is not emptied.

        Only persist empties hops: it is the first stage, from `reader` on, before which something waits. Nobody knows:
        `reader`.
        """
        waiting = {stage.stage: stage.waiting for stage in self.stages}
        return next((stage for stage in STAGES[STAGES.index(reader) :] if waiting.get(stage, 0) != 0), reader)


def sum_known(values: Iterable[int | None]) -> int | None:
    """The sum; None when one of `values` is."""
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def summarize(looks: Sequence[Overview]) -> Summary:
    """What `looks` amount to: at least one, the oldest first."""
    now = looks[-1]
    before = _earlier(looks, RATE_S, "streams_s")
    earlier = _earlier(looks, LATENCY_S, "metrics_s")
    facts = now.facts
    partitions = _partitions(before, now)
    found = {} if earlier is None else _latencies(earlier, now)
    return Summary(
        at_ns=now.at_ns,
        window_s=None if before is None else now.streams_s - before.streams_s,
        latency_window_s=None if earlier is None else now.metrics_s - earlier.metrics_s,
        connected=now.connected,
        no_connection=now.no_connection,
        servers=now.servers,
        cluster="" if facts is None else facts.cluster_id,
        partition_count=None if facts is None else facts.partitions,
        accepted_per_s=_in_per_s(before, now, EVENTS),
        persisted_per_s=_persisted_per_s(before, now),
        stages=tuple(_stage(now, stage, partitions, found) for stage in STAGES),
        durable=found.get(DURABLE_LATENCY.name),
        durable_budget_s=DURABLE_BUDGET_MS_P95 / 1000,
        loop_lag=found.get(LOOP_LAG.name),
        streams=tuple(
            StreamSummary(status=stream, in_per_s=_in_per_s(before, now, stream.name)) for stream in now.streams
        ),
        allowances=now.allowances,
        totals=_totals(now, partitions),
        partitions=partitions,
        letters=now.letters,
        members=now.members,
        processes=now.processes,
        disk=now.disk,
        unread=now.unread,
    )


def _earlier(looks: Sequence[Overview], window_s: float, clock: str) -> Overview | None:
    """The newest look that is `window_s` older than the last one, else the oldest; of those that read `clock`."""
    now_s = getattr(looks[-1], clock)
    usable = [look for look in looks[:-1] if getattr(look, clock) > 0] if now_s > 0 else []
    old = [look for look in usable if now_s - getattr(look, clock) >= window_s]
    return old[-1] if old else usable[0] if usable else None


def _in_per_s(before: Overview | None, now: Overview, name: str) -> float | None:
    if before is None:
        return None
    first, last = (
        next((stream for stream in look.streams if stream.name == name and not stream.problem), None)
        for look in (before, now)
    )
    window_s = now.streams_s - before.streams_s
    # A memory stream begins again when all servers have restarted.
    if first is None or last is None or last.last_seq < first.last_seq or window_s <= 0:
        return None
    return (last.last_seq - first.last_seq) / window_s


def _persisted_per_s(before: Overview | None, now: Overview) -> float | None:
    if before is None or not _is_whole(before) or not _is_whole(now):
        return None
    first, last = (
        sum(look.receipt.persisted for look in overview.partitions if look.receipt is not None)
        for overview in (before, now)
    )
    window_s = now.receipts_s - before.receipts_s
    return (last - first) / window_s if last >= first and window_s > 0 else None


def _is_whole(overview: Overview) -> bool:
    """Every partition was read."""
    return (
        overview.facts is not None
        and len(overview.partitions) == overview.facts.partitions
        and all(look.is_known for look in overview.partitions)
    )


def _latencies(before: Overview, now: Overview) -> dict[str, Percentiles | None]:
    """Name of the histogram → percentiles of what came since `before`, over all processes."""
    found: dict[str, Percentiles | None] = {}
    earlier = {
        (process.health.name, process.health.pid): process.metered.histograms
        for process in before.processes or ()
        if process.metered is not None
    }
    for what in HISTOGRAMS:
        sums = [0] * (len(what.buckets) + 1)
        for process in now.processes or ():
            if process.metered is not None and (counts := process.metered.histograms.get(what.name)) is not None:
                first = earlier.get((process.health.name, process.health.pid), {}).get(what.name)
                sums = [total + count for total, count in zip(sums, grown(first, counts), strict=True)]
        found[what.name] = percentiles(what.buckets, sums)
    return found


def _partitions(before: Overview | None, now: Overview) -> tuple[PartitionSummary, ...]:
    earlier = {} if before is None else {look.partition: look.lags for look in before.partitions}
    found = []
    for look in now.partitions:
        receipt, seal = look.receipt, look.seal
        sealed = 0 if seal is None else seal.shard
        end = None if receipt is None else receipt.ends.get(receipt.store)
        found.append(
            PartitionSummary(
                partition=look.partition,
                is_known=look.is_known,
                persisted=0 if receipt is None else receipt.persisted,
                duplicates=0 if receipt is None else receipt.duplicates,
                dead_lettered=0 if receipt is None else receipt.dead_lettered,
                # A live shard is there always; a full one stays live until its record is accepted.
                live_shards=0 if receipt is None else max(1, 0 if end is None else end.shard - sealed),
                sealed_shards=sealed,
                sealed_events=0 if seal is None else seal.tree_size,
                node="" if receipt is None else receipt.node,
                waiting={
                    stage: _waiting(lag, earlier.get(look.partition, {}).get(stage), look.at_ns)
                    for stage, lag in look.lags.items()
                },
            )
        )
    return tuple(found)


def _waiting(lag: StageLag, before: StageLag | None, now_ns: int) -> Waiting:
    return Waiting(
        origin=lag.origin,
        messages=lag.waiting,
        # Clocks of servers and of this machine may differ a little.
        oldest_s=None if lag.oldest_ns is None else max(0.0, (now_ns - lag.oldest_ns) / 1e9),
        stuck=before is not None and bool(before.waiting) and bool(lag.waiting) and before.origin == lag.origin,
    )


def _totals(now: Overview, partitions: Sequence[PartitionSummary]) -> Totals | None:
    if not _is_whole(now):
        return None
    return Totals(
        persisted=sum(one.persisted for one in partitions),
        duplicates=sum(one.duplicates for one in partitions),
        dead_lettered=sum(one.dead_lettered for one in partitions),
        live_shards=sum(one.live_shards for one in partitions),
        sealed_shards=sum(one.sealed_shards for one in partitions),
        sealed_events=sum(one.sealed_events for one in partitions),
    )


def _stage(
    now: Overview, stage: Stage, partitions: Sequence[PartitionSummary], found: dict[str, Percentiles | None]
) -> StageSummary:
    waiting = [one.waiting[stage] for one in partitions]
    whole = now.facts is not None and len(partitions) == now.facts.partitions
    ages = [one.oldest_s for one in waiting if one.oldest_s is not None]
    members = now.members
    ours = [] if members is None else [member for member in members.members if member.stage == stage]
    return StageSummary(
        stage=stage,
        waiting=sum_known(one.messages for one in waiting) if whole else None,
        oldest_s=max(ages, default=None),
        processes=None if members is None else len(ours),
        held=tuple(sorted({partition for member in ours for partition in member.partitions})),
        paused=members is not None and stage in members.paused,
        latency=found.get(STAGE_LATENCY[stage].name),
        budget_s=STAGE_BUDGET_MS_P95[stage] / 1000,
    )
