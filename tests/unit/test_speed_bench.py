"""The speed benchmark's sums: headline, comparison, regression, costs, steady rates; and its report says them."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

from benchmarks.__main__ import write
from benchmarks.baselines import work
from benchmarks.baselines.designs import DESIGNS
from benchmarks.baselines.measure import steady_rate
from benchmarks.check import main as check
from benchmarks.costs import LOAD, SERVERS, Reading, Snapshot, StreamState, costs
from benchmarks.headline import compare, headline, ratios
from benchmarks.load import make_messages
from benchmarks.regression import judge_ratios
from benchmarks.report import round_trips
from benchmarks.speedreport import as_markdown
from cluster.cli.capacity import read_benchmark
from contracts.subjects import STAGES
from stages.hash.core import payload_hash

S = 10**9


def shared(cpu_s: float = 1.0) -> dict[str, Any]:
    kinds = (SERVERS, *STAGES, LOAD, "pipeline")
    return {
        "cpu_s": dict.fromkeys(kinds, cpu_s),
        "disk_bytes": 4_000_000,
        "messages": {"FI_EVENTS": 1000.0},
        "bytes": {},
        "raft_entries": 12.5,
        "received_bytes": 700_000,
        "resident_bytes": {"n1": 90_000_000},
    }


def latency_row(rate: int, p95: float, p99: float = 10.0) -> dict[str, Any]:
    times = {"p50": p95 / 2, "p95": p95, "p99": p99}
    return {"rate_per_s": rate, "accepted_ms": times, "durable_ms": times, "costs": shared()}


def throughput_row(batch: int, rate: int, ceiling: int) -> dict[str, Any]:
    row = {"batch": batch, "events_per_s": rate, "ceiling_events_per_s": ceiling, "costs": shared(0.1)}
    return row if batch > 1 else {**row, "library_events_per_s": {"publish": 10_000, "publish_async": 8000}}


def visited(design: str, rate: float, latency: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"design": design, "events_per_s": rate, "events": 9, "repeated": 0, "latency": latency or []}


LATENCY = [latency_row(200, p95, 2 * p95) for p95 in (5.0, 7.0, 60.0)] + [latency_row(500, 12.0)]
THROUGHPUT = [
    throughput_row(1, 6000, 10_000),
    throughput_row(1, 8000, 10_000),
    throughput_row(1, 9000, 10_000),
    throughput_row(16, 40_000, 160_000),
]
BEHIND = {"rate_per_s": 200, "falls_behind": True, "accepted_ms": None, "durable_ms": None}
KEEPS_UP = {**BEHIND, "falls_behind": False, "durable_ms": {"p50": 30.0, "p95": 45.0, "p99": 51.0}}
BASELINES = [
    visited("chain", 200.0, [BEHIND]),
    visited("tuned", 4000.0, [KEEPS_UP]),
    visited("tuned", 2000.0),
    visited("faststream", 500.0),
    visited("faststream-batched", 1000.0),
    {"design": "redis", "failed": "MissingError: no redis-server"},
]
DRAIN = [
    {
        "events": 100_000,
        "batch": 16,
        "gathered_per_s": 9e4,
        "drained_s": 1.25,
        "drained_per_s": 80_000.0,
        "checked": {"lost": 0, "duplicated": 0, "reordered": 0},
    }
]


def result() -> dict[str, Any]:
    return {
        "environment": {"taken": "2026-11-21T00:00:00Z", "cpus": 2, "commit": "abc"},
        "headline": headline(LATENCY, THROUGHPUT, DRAIN, BASELINES),
        "ratios": ratios(THROUGHPUT, BASELINES),
        "latency": LATENCY,
        "throughput": THROUGHPUT,
        "drain": DRAIN,
        "baselines": BASELINES,
        "idle": [{"per_second": {"cpu_s": {"pipeline": 0.03}, "disk_bytes": None, "raft_entries": 7.0}}],
        "took_s": 250.0,
    }


def test_the_headline_takes_medians_and_the_fastest_of_several_rivals() -> None:
    found = headline(LATENCY, THROUGHPUT, DRAIN, BASELINES)
    assert found == {
        "single_vs_ceiling": 0.8,
        "single_vs_nats_py_publish": 0.8,
        "single_vs_nats_py_publish_async": 1.0,
        "batched_vs_ceiling": 0.25,
        "batched_events_per_s": 40_000,
        "drain_events_per_s": 80_000.0,
        "durable_p95_ms": {"200": 7.0, "500": 12.0, "2000": None},
        "accepted_p95_ms": 7.0,
        "accepted_p95_ms_by_rate": {"200": 7.0, "500": 12.0, "2000": None},
        "p99_over_p95": {"200": 2.0, "500": 0.83, "2000": None},
        "vs_classic": 40.0,
        "vs_tuned": 2.7,
        "vs_redis": None,
        "vs_faststream": 8.0,
        "vs_one_process": None,
        "events_per_s_batch_1": 8000,
        "events_per_s_batch_16": 40_000,
    }


def test_a_headline_of_nothing_is_null_all_over() -> None:
    found = headline([], [], [], [])
    assert {value for value in found.values() if not isinstance(value, dict)} == {None}


def test_ratios_keep_one_value_for_each_repetition() -> None:
    found = ratios(THROUGHPUT, BASELINES)
    assert found["single_vs_ceiling"] == [0.6, 0.8, 0.9]
    assert found["single_vs_nats_py_publish_async"] == [0.75, 1.0, 1.125]
    assert found["vs_tuned"] == [2.0, 4.0]
    assert found["vs_redis"] == []


def test_a_comparison_goes_into_nested_figures_and_leaves_out_what_has_no_partner() -> None:
    rows = compare({"a": 2.0, "p": {"200": 4.0}, "gone": 1}, {"a": 3.0, "p": {"200": 4.0, "500": 9.0}, "none": None})
    assert [(row["figure"], row["old"], row["new"], row["ratio"]) for row in rows] == [
        ("a", 2.0, 3.0, 1.5),
        ("p.200", 4.0, 4.0, 1.0),
        ("p.500", None, 9.0, None),
        ("none", None, None, None),
    ]


@pytest.mark.parametrize(
    ("kept", "found", "verdict"),
    [
        ([0.80, 0.75, 0.85], [0.50, 0.40, 0.55], "worse"),
        ([0.80, 0.75, 0.85], [0.60, 0.58, 0.61], "ok"),  # less than 30 % below
        ([0.80, 0.45, 0.85], [0.50, 0.40, 0.55], "worse"),  # that a kept repetition was as low excuses nothing
        ([0.80, 0.45, 0.85], [0.50, 0.40, 0.60], "ok"),  # one repetition now was not so low, nor below every kept one
        ([0.80, 0.75, 0.85], [0.40, 0.45, 0.90], "ok"),  # one repetition now was as high
        ([0.80], [1.60], "ok"),
        ([], [0.8], "unknown"),
        ([0.8], [], "unknown"),
    ],
)
def test_a_ratio_is_worse_only_beyond_the_limit_and_the_spread(
    kept: list[float], found: list[float], verdict: str
) -> None:
    (row,) = judge_ratios({"single_vs_ceiling": kept}, {"single_vs_ceiling": found})
    assert row["verdict"] == verdict
    assert "single_vs_ceiling" in row["words"]


def test_the_words_of_a_regression_name_both_values_and_what_to_do() -> None:
    (row,) = judge_ratios({"vs_tuned": [4.0, 4.2]}, {"vs_tuned": [1.0, 1.1]})
    assert "vs_tuned is 1.05, kept was 4.1: 74% worse" in row["words"]
    assert "Run it again on a quiet machine" in row["words"]


def test_a_check_without_kept_ratios_measures_nothing_and_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as exited:
        check(kept=tmp_path / "latest.json")
    assert exited.value.exit_code == 3
    assert "run `make bench`" in capsys.readouterr().err


Ratios = dict[str, list[float]]
KEPT: Ratios = {"single_vs_ceiling": [0.8, 0.9], "vs_redis": [20.0], "vs_one_process": [9.0]}


@pytest.mark.parametrize(
    ("kept", "now", "code", "verdicts"),
    [
        (KEPT, {"single_vs_ceiling": [0.8, 0.7], "vs_redis": [19.0]}, 0, {"single_vs_ceiling": "ok", "vs_redis": "ok"}),
        # No redis-server this time: nobody knows whether it became worse.
        (KEPT, {"single_vs_ceiling": [0.8], "vs_redis": []}, 3, {"single_vs_ceiling": "ok", "vs_redis": "unknown"}),
        (KEPT, {"single_vs_ceiling": [0.3], "vs_redis": []}, 1, {"single_vs_ceiling": "worse", "vs_redis": "unknown"}),
        # Where there never was one, nothing is missed.
        ({"single_vs_ceiling": [0.8], "vs_redis": []}, {"vs_redis": []}, 0, {"vs_redis": "unknown"}),
        ({"single_vs_ceiling": [0.8]}, {"vs_redis": [19.0]}, 0, {"vs_redis": "unknown"}),
        # A check never visits the one process, whatever is kept of it.
        (KEPT, {"vs_redis": [3.0, 4.0], "vs_one_process": []}, 1, {"vs_redis": "worse"}),
        (KEPT, {"vs_redis": [20.0], "vs_one_process": []}, 0, {"vs_redis": "ok"}),
    ],
)
def test_a_check_fails_on_a_regression_or_a_kept_ratio_it_could_not_measure_and_can_be_read_by_machines(
    kept: Ratios,
    now: Ratios,
    code: int,
    verdicts: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def measured(*_: Any) -> dict[str, Any]:
        return {"environment": {"cpus": 2}, "ratios": now}

    monkeypatch.setattr("benchmarks.check.run", measured)
    path = tmp_path / "latest.json"
    path.write_bytes(msgspec.json.encode({"ratios": kept}))
    with pytest.raises(typer.Exit) if code else nullcontext() as exited:
        check(as_json=True, kept=path, directory=None)
    assert (exited.value.exit_code if exited else 0) == code
    rows = json.loads(capsys.readouterr().out)["verdicts"]
    assert {row["figure"]: row["verdict"] for row in rows} == verdicts


def taken(at: int, *, pid: int = 1, purged: bool = False) -> Snapshot:
    """The `at`-th moment: each process worked `at` s more, each stream got 500 more messages, and so on."""
    reading = Reading(pid, float(at), at * 10_000, 50_000_000, 0)
    return Snapshot(
        {SERVERS: {"n1": reading, "n2": reading}, "ingest": {"ingest-0": reading}, LOAD: {LOAD: reading}},
        {
            "FI_EVENTS": StreamState(1, 500 * at, 300_000 * at),
            "FI_HASH": StreamState(90 if purged else 1, 100 * at, 1000),
        },
        {"S-R3F-a": 40 * at, "S-R3F-b": 10 * at},
        1_000_000 * at,
        8_000_000 * at,
    )


def test_costs_are_shared_among_the_events_and_leave_the_load_generator_out_of_the_pipeline() -> None:
    found = costs(taken(1), taken(2, purged=True), 500)
    assert found["cpu_s"] == {SERVERS: 4.0, "ingest": 2.0, LOAD: 2.0, "pipeline": 6.0}
    assert found["written_bytes"] == {SERVERS: 40_000, "ingest": 20_000, LOAD: 20_000, "pipeline": 60_000}
    assert found["messages"] == {"FI_EVENTS": 1000.0, "FI_HASH": 200.0}
    assert found["bytes"] == {"FI_EVENTS": 600_000}  # of what was purged meanwhile nobody knows the size
    assert found["raft_entries"] == 100.0
    assert found["received_bytes"] == 2_000_000
    assert found["disk_bytes"] == 16_000_000
    assert found["resident_bytes"]["n1"] == 50_000_000


def test_a_group_and_a_stream_that_were_made_meanwhile_count_in_full() -> None:
    before = taken(1)
    found = costs(before._replace(streams={}, raft={}), taken(2), 1000)
    assert found["messages"]["FI_EVENTS"] == 1000.0
    assert found["raft_entries"] == 100.0


def test_costs_of_a_process_that_was_started_anew_are_refused() -> None:
    with pytest.raises(ValueError, match="started anew"):
        costs(taken(1), taken(2, pid=7), 500)


def test_what_the_disk_got_is_null_where_nobody_knows() -> None:
    assert costs(taken(1), taken(2)._replace(disk_bytes=None), 500)["disk_bytes"] is None


def test_costs_of_no_events_are_refused() -> None:
    with pytest.raises(ValueError, match="no events"):
        costs(taken(1), taken(2), 0)


@pytest.mark.parametrize(
    ("stamps_s", "rate"),
    [
        ([0.5, 1, 2, 3, 4, 5, 6], (1.0, 3)),  # two came before it was under way, two after the end
        ([0.5, 1, 1.5, 2, 2.5, 3], (2.0, 4)),  # all came out before the end
        ([0.1, 0.2, 0.3, 0.4, 0.5], (10.0, 5)),  # and even before it was under way
    ],
)
def test_a_steady_rate_counts_what_came_out_in_time(stamps_s: list[float], rate: tuple[float, int]) -> None:
    assert steady_rate([int(stamp * S) for stamp in stamps_s], 0, S, 4 * S) == rate


def test_a_design_that_gives_nothing_has_no_rate() -> None:
    with pytest.raises(RuntimeError, match="no event came out"):
        steady_rate([5 * S], 0, S, 4 * S)


def test_the_report_says_goals_losses_and_what_fell_behind() -> None:
    text = as_markdown({**result(), "before": {"environment": {}, "compared": []}})
    assert "| one event a message, of the ceiling | at least 0.75 | 0.8 | yes |" in text
    assert "| durable p95 at 2,000/s, ms | at most 30 |  | not measured |" in text
    assert "| … times the tuned chain | at least 3 | 2.7 | no |" in text
    assert "| falls behind | falls behind | no event; one may be stored twice" in text
    assert "| 2.7 | 30.0/45.0/51.0 |" in text
    assert "no redis-server" in text
    assert "| 100,000 | 16 | 90,000 | 1.25 | 80,000 | 0, 0, 0 |" in text
    assert "| written to the disk, KB | 4,000 | 4,000 | 4,000 | 4,000 |" in text
    assert "| CPU of all but the load generator, ms | 1,000 | 1,000 | 100 | 100 |" in text


def test_every_alternative_says_what_it_loses() -> None:
    assert all(design.killed and design.power for design in DESIGNS.values())


def test_a_kept_result_is_compared_with_the_one_before_and_read_by_capacity(tmp_path: Path) -> None:
    (tmp_path / "latest.json").write_bytes(
        msgspec.json.encode({"environment": {"taken": "yesterday"}, "headline": {"single_vs_ceiling": 0.4}})
    )
    text = write(result(), tmp_path)
    assert "Kept: yesterday." in text
    assert "| single_vs_ceiling | 0.4 | 0.8 | 2 |" in text
    assert (tmp_path / "latest.md").read_text() == text
    assert (tmp_path / "latest.png").read_bytes().startswith(b"\x89PNG")
    measured = read_benchmark(tmp_path / "latest.json", 16)
    assert (measured.events_per_s, measured.cpus) == (40_000, 2.0)


def test_a_baseline_does_the_stages_work_on_an_event() -> None:
    (message,) = make_messages(5, 1, 1)
    row = work.everything(message.data, message.site, message.consultation, 1, S)
    stored, sent = msgspec.json.decode(row.line), msgspec.json.decode(message.data)
    assert stored["payload"] == sent["payload"]
    assert stored["event_id"] == sent["event_id"] == message.message_id
    assert stored["audit_hash"] == payload_hash(msgspec.json.encode(sent["payload"])).hex()
    assert stored["policy_version"] >= 1
    assert stored["group"]


def test_round_trips_are_measured_and_the_process_keeps_its_cores() -> None:
    cores = os.sched_getaffinity(0)
    found = round_trips()
    assert os.sched_getaffinity(0) == cores
    if len(cores) < 2:
        assert found is None
    else:
        assert found is not None
        assert 0 < found["p50"] <= found["p95"]
