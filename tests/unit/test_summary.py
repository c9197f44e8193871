"""Rates, percentiles and counts from looks, and what `/metrics` becomes."""

from __future__ import annotations

import msgspec
import pytest
from overviews import (
    PARTITIONS,
    histogram,
    overview,
    partition,
    process,
    receipt,
    waiting,
    with_streams,
)

from cluster.backlog import StageLag
from cluster.scrape import Metered, grown, parse_metrics, percentiles
from cluster.summary import summarize
from cluster.words import duration, ranges, size
from contracts.receipts import SealRecord, StoreEnd
from contracts.telemetry import DURABLE_LATENCY, STAGE_LATENCY
from stages.runtime.exposition import prometheus_text
from stages.runtime.meters import Meters


def seal(shard: int, tree_size: int) -> SealRecord:
    numbers = {"first_origin": 1, "last_origin": 9, "events": 5, "sealed_ns": 1, "bytes": 9}
    names = {"store": "store", "file": "f", "sha256": "", "root": ""}
    return SealRecord(partition=0, shard=shard, tree_size=tree_size, **numbers, **names)  # type: ignore[arg-type]


def test_rates_are_what_came_between_two_looks() -> None:
    before = overview()
    now = overview(
        4,
        streams=with_streams(FI_EVENTS={"last_seq": 50}),
        partitions=tuple(partition(n, persisted=110) for n in range(PARTITIONS)),
    )
    summary = summarize((before, now))
    assert summary.accepted_per_s == pytest.approx(10.0)
    assert summary.persisted_per_s == pytest.approx(20.0)
    assert summary.window_s == pytest.approx(4.0)


def test_rates_are_over_the_last_two_seconds_where_there_are_looks_enough() -> None:
    looks = [overview(t, streams=with_streams(FI_EVENTS={"last_seq": 10 + t * t})) for t in range(8)]
    assert summarize(looks).accepted_per_s == pytest.approx((49 - 25) / 2)


def test_a_stream_that_began_again_has_no_rate() -> None:
    looks = (overview(streams=with_streams(FI_HASH={"last_seq": 900})), overview(1))
    rates = {one.status.name: one.in_per_s for one in summarize(looks).streams}
    assert (rates["FI_HASH"], rates["FI_EVENTS"]) == (None, 0.0)


def test_a_total_over_partitions_is_not_known_when_one_of_them_is_not() -> None:
    missing = overview(partitions=tuple(map(partition, range(PARTITIONS - 1))))
    summary = summarize((missing, missing))
    assert (summary.totals, summary.waiting, summary.persisted_per_s) == (None, None, None)
    lags = {"hash": StageLag(origin=None)}
    unread = overview(partitions=tuple(partition(n, lags if n == 3 else None) for n in range(8)))  # type: ignore[arg-type]
    found = {stage.stage: stage.waiting for stage in summarize((unread,)).stages}
    assert found == {"ingest": 0, "segment": 0, "hash": None, "persist": 0}


def test_shards_are_counted_from_receipts_and_seal_records() -> None:
    sealing = msgspec.structs.replace(
        partition(0),
        receipt=receipt(0, persisted=50, ends={"store": StoreEnd(shard=4, commits=1)}),
        seal=seal(shard=2, tree_size=30),
    )
    drained = msgspec.structs.replace(
        partition(1),
        receipt=receipt(1, persisted=50, ends={"store": StoreEnd(shard=4, commits=1)}),
        seal=seal(shard=4, tree_size=50),
    )
    never = msgspec.structs.replace(partition(2), receipt=None)
    found = summarize((overview(partitions=(sealing, drained, never, *map(partition, range(3, 8)))),)).partitions
    assert [(one.sealed_shards, one.live_shards, one.sealed_events) for one in found[:3]] == [
        (2, 2, 30),
        (4, 1, 50),
        (0, 0, 0),
    ]


def test_the_oldest_of_a_stage_is_the_oldest_of_its_partitions() -> None:
    ages = [waiting(2, 1.0), waiting(3, 7.0)]
    look = overview(partitions=tuple(partition(n, {"hash": ages[n]} if n < 2 else None) for n in range(8)))
    (stage,) = [one for one in summarize((look,)).stages if one.stage == "hash"]
    assert (stage.waiting, stage.oldest_s) == (5, pytest.approx(7.0))


def test_what_waited_when_it_was_read_is_no_older_because_a_frozen_process_was_asked_for_longer() -> None:
    look = overview(at_s=2.4, partitions=tuple(partition(n, {"hash": waiting(2, 0.1)}) for n in range(8)))
    (stage,) = [one for one in summarize((look,)).stages if one.stage == "hash"]
    assert stage.oldest_s == pytest.approx(0.1)


def test_percentiles_are_of_all_processes_and_a_new_process_counts_from_its_begin() -> None:
    name = STAGE_LATENCY["hash"].name

    def metered(**at: int) -> Metered:
        return Metered(histograms={name: histogram(STAGE_LATENCY["hash"], **at)})

    before = overview(processes=(process("hash-0", 102, metered(s_0_005=10)),))
    now = overview(
        1,
        processes=(
            process("hash-0", 102, metered(s_0_005=50)),
            process("hash-1", 777, metered(s_0_005=10, s_0_5=50)),
        ),
    )
    (latency,) = [stage.latency for stage in summarize((before, now)).stages if stage.stage == "hash"]
    assert latency is not None
    assert latency.count == 100
    assert latency.p50_s == pytest.approx(0.005)
    assert latency.p95_s == pytest.approx(0.25 + 0.25 * 0.9)


def test_a_histogram_that_shrank_belongs_to_a_new_process() -> None:
    assert grown((5, 5), (6, 5)) == (1, 0)
    assert grown((5, 5), (9, 0)) == (9, 0)
    assert grown(None, (1, 2)) == (1, 2)


def test_percentiles_of_nothing_are_not_known_and_above_all_bounds_are_the_highest() -> None:
    assert percentiles((1.0, 2.0), (0, 0, 0)) is None
    found = percentiles((1.0, 2.0), (0, 0, 10))
    assert found is not None
    assert (found.p50_s, found.p99_s) == (2.0, 2.0)


def test_what_a_process_shows_at_its_metrics_path_is_read_back() -> None:
    meters = Meters()
    durable = meters.histogram(DURABLE_LATENCY, {})
    for value_s in (0.0005, 0.02, 0.02, 1000.0):
        durable.record(value_s)
    meters.writer("FI_HASH", "fi.hash.3").holding(0.0)
    meters.writer("FI_HASH", "fi.hash.4")
    meters.storage_free_bytes = 123
    metered = parse_metrics(prometheus_text(meters.collect(), {}).decode())
    counts = metered.histograms[DURABLE_LATENCY.name]
    assert (counts[0], counts[DURABLE_LATENCY.buckets.index(0.025)], counts[-1], sum(counts)) == (1, 2, 1, 4)
    assert [(held.stream, held.partition) for held in metered.held] == [("FI_HASH", "3")]
    assert metered.memory_bytes is not None
    assert (metered.storage_free_bytes, metered.lanes) == (123, {})
    with pytest.raises(ValueError, match="not a metric"):
        parse_metrics("<html>")


def test_numbers_in_words() -> None:
    assert [duration(s) for s in (0.0004, 0.0041, 0.041, 3.14, 12.3, 300, 9000)] == [
        *("0.40 ms", "4.1 ms", "41 ms", "3.1 s", "12 s", "5 min", "2 h"),
    ]
    assert [size(n) for n in (0, 512, 1300, 250_000_000, 5_000_000_000_000)] == [
        *("0 B", "512 B", "1.3 kB", "250 MB", "5.0 TB"),
    ]
    assert (ranges([0, 1, 2, 5, 7, 8]), ranges([])) == ("0-2, 5, 7-8", "-")
