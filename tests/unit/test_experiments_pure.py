"""The experiments' sums by hand: fits, the model, verdicts, messages, and a report of kept sections."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.experiments import ablation, capacity, ceilings, hashes, stores
from benchmarks.experiments.__main__ import read_kept, write_results
from benchmarks.experiments.catalogue import as_markdown, picture_of
from benchmarks.experiments.costs import Spent, per_event, stages_us
from benchmarks.experiments.curves import CURVES, fits, median_at
from benchmarks.experiments.fit import Line, Power, fit_line, fit_power, fit_slope
from benchmarks.experiments.harness import Bench, new_seeds
from benchmarks.experiments.launch import SWITCHES
from benchmarks.experiments.messages import renewed, sized_messages
from benchmarks.experiments.model import (
    CORES,
    DISK,
    NETWORK,
    STREAM,
    Cluster,
    Costs,
    bounds,
    costs_from,
    predicted_here,
)
from benchmarks.experiments.soak import FILTER_BYTES_PER_EVENT, judge
from contracts.hashing import canonical_json
from contracts.subjects import STAGES
from stages.hash.core import payload_hash
from stages.ingest.core import parse_message

ENVIRONMENT = {
    "taken": "2026-01-05T09:00:00Z",
    "cpus": 2,
    "load_1_min": 0.1,
    "machine": "x86_64",
    "kernel": "6",
    "python": "3.11",
    "fdatasync_4k_ms": {"p50": 0.1, "p95": 0.2},
    "nats_server": "nats-server: v2",
}


def test_an_exact_power_law_is_found_without_error() -> None:
    power = fit_power([1, 2, 4, 8], [3, 6, 12, 24])
    assert power is not None
    assert (power.exponent, power.factor, power.points) == (pytest.approx(1), pytest.approx(3), 4)
    assert power.error == pytest.approx(0, abs=1e-9)


def test_the_error_of_an_exponent_is_that_of_the_slope_of_logarithms() -> None:
    # Logarithms (base e): x 0, 1, 2; y 0, 2, 1. Mean y 1, slope 0.5, rests -0.5, 1, -0.5, their squares 1.5.
    power = fit_power([1, math.e, math.e**2], [1, math.e**2, math.e])
    assert power is not None
    assert power.exponent == pytest.approx(0.5)
    assert power.error == pytest.approx(math.sqrt(1.5 / 1 / 2))
    assert str(power) == "exponent 0.50 ± 0.87"


@pytest.mark.parametrize("points", [([1, 2], [1, 2]), ([0, 1, 2], [5, 1, 2]), ([3, 3, 3], [1, 2, 3])])
def test_there_is_no_exponent_through_too_few_points(points: tuple[list[float], list[float]]) -> None:
    assert fit_power(*points) is None


def test_a_messages_cost_and_an_events_are_told_apart() -> None:
    line = fit_line([1, 4, 16, 64], [5 + 2 * events for events in (1, 4, 16, 64)])
    assert (line.per_message, line.per_event) == (pytest.approx(5), pytest.approx(2))
    assert line.at(10) == pytest.approx(2.5)


def test_no_part_of_a_cost_is_negative() -> None:
    assert fit_line([1, 2, 4], [1, 2.2, 4.6]).per_message == 0
    assert fit_line([1, 2, 4], [5, 4, 3]).per_event == 0
    with pytest.raises(ValueError, match="two sizes"):
        fit_line([4, 4], [1, 2])


def test_a_slope_comes_with_its_error() -> None:
    assert fit_slope([0, 1, 2], [0, 2, 1]) == (pytest.approx(0.5), pytest.approx(math.sqrt(0.75)))
    with pytest.raises(ValueError, match="three points"):
        fit_slope([0, 1], [0, 1])


def spent(factor: float) -> Spent:
    kinds = dict.fromkeys((*STAGES, "server", "load"), 0.001 * factor)
    return Spent(kinds, {"disk": 4096 * factor}, 100 * factor, {"FI_EVENTS": int(10 * factor)})


def test_costs_are_differences_by_event() -> None:
    found = per_event(spent(1), spent(3), 10)
    assert found["cpu_us"]["hash"] == pytest.approx(200)
    assert stages_us(found) == pytest.approx(800)
    assert found["written_bytes"] == {"disk": pytest.approx(819.2)}
    assert found["network_bytes"] == 20
    assert found["messages"] == {"FI_EVENTS": 2}


COSTS = Costs(
    stages={"ingest": Line(30e-6, 10e-6), "persist": Line(10e-6, 10e-6)},
    servers=Line(130e-6, 10e-6),
    written=Line(9_000, 1_000),
    network=Line(2_000, 3_000),
    fsync_s=100e-6,
    stream_messages_per_s=20_000,
)
ALL_OF_IT = {"busiest": 1.0, "use_max": 1.0}


def test_ours_is_held_against_the_ceiling_of_its_own_turn() -> None:
    cpu_us = {**dict.fromkeys(STAGES, 2.0), "server": 30.0, "load": 14.0}
    rows = [
        {"turn": turn, "variant": variant, "events_per_s": rate, "cpu_us": cpu_us}
        for turn, rates in enumerate([(10_000, 20_000), (30_000, 40_000), (20_000, 25_000)])
        for variant, rate in zip((ceilings.OURS, "bare"), rates, strict=True)
    ]
    assert "| bare | 25,000 (20,000-40,000) | 0.75 (0.50-0.80) | 30.0 | 14.0 | 8.0 |" in ceilings.present(rows[::-1])


def test_each_resource_bounds_the_rate_and_the_tightest_comes_first() -> None:
    cluster = Cluster(partitions=4, disk_bytes_per_s=1e9, fsync_s=100e-6, **ALL_OF_IT)
    found = bounds(COSTS, cluster, 1)
    assert {bound.resource: bound.events_per_s for bound in found} == pytest.approx(
        {
            STREAM: 20_000,
            "ingest, one core a partition": 4 / 40e-6,
            "persist, one core a partition": 4 / 20e-6,
            CORES: 48 / 200e-6,
            DISK: 3 * 1e9 / 10_000,
            NETWORK: 3 * 1.25e9 / 5_000,
        }
    )
    assert found[0].resource == STREAM
    assert found[0].sessions_per_day == 20_000 * 86_400 // 20
    rates = [bound.events_per_s for bound in found]
    assert rates == sorted(rates)


def test_fuller_messages_and_more_partitions_move_what_breaks_first() -> None:
    few, many = Cluster(partitions=1, **ALL_OF_IT), Cluster(partitions=64, **ALL_OF_IT)
    assert bounds(COSTS, few, 16)[0].resource == "ingest, one core a partition"
    assert bounds(COSTS, few, 16)[0].events_per_s == pytest.approx(1 / (30e-6 / 16 + 10e-6))
    assert bounds(COSTS, many, 16)[0].resource == STREAM
    assert bounds(COSTS, many, 16)[0].events_per_s == pytest.approx(16 * 20_000)


def test_a_slower_disk_slows_the_stream_and_a_faster_one_is_not_trusted_to_help() -> None:
    def stream(fsync_s: float) -> float:
        found = bounds(COSTS, Cluster(fsync_s=fsync_s, **ALL_OF_IT), 1)
        return next(bound.events_per_s for bound in found if bound.resource == STREAM)

    assert (stream(200e-6), stream(10e-6)) == (pytest.approx(10_000), pytest.approx(20_000))


def test_room_is_kept_for_bursts_and_for_the_busiest_partition() -> None:
    tight, whole = Cluster(use_max=0.5, busiest=2.0), Cluster(**ALL_OF_IT)
    (least, *_), (most, *_) = ([b for b in bounds(COSTS, c, 1) if b.resource == CORES] for c in (tight, whole))
    assert least.events_per_s == pytest.approx(most.events_per_s / 4)


def batch_row(batch: int, turn: int = 0) -> dict[str, Any]:
    stage_us, server_us = 10 + 30 / batch, 10 + 130 / batch
    costs = {
        "cpu_us": {**dict.fromkeys(STAGES, stage_us), "server": server_us, "load": 20.0},
        "written_bytes": {"disk": 1_500 + 9_000 / batch},
        "network_bytes": 3_000.0,
        "messages": {"FI_EVENTS": 1 / batch},
    }
    percentiles = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    paced = {"rate_per_s": 500 / batch, "accepted_ms": percentiles, "durable_ms": percentiles, **costs}
    full = {"events": 100, "events_per_s": 1_000.0 * batch, **costs}
    return {"turn": turn, "variant": f"{batch} a message", "at": batch, "paced": paced, "full": full}


ROWS = [batch_row(batch, turn) for turn in (0, 1) for batch in (1, 4, 16, 64)]


def test_the_models_costs_are_fitted_to_the_batch_curve() -> None:
    costs = costs_from(ROWS, 100e-6, None)
    assert set(costs.stages) == set(STAGES)
    assert costs.stages["hash"].per_message == pytest.approx(30e-6)
    assert costs.servers.per_event == pytest.approx(10e-6)
    assert costs.written.at(1) == pytest.approx(10_500)
    assert STREAM not in {bound.resource for bound in bounds(costs, Cluster(), 1)}
    # On 2 CPUs, 4 stages, servers and load together: 4 · 40 + 140 + 20 µs an event.
    assert predicted_here(ROWS, costs, 2)[0] == {"batch": 1.0, "predicted": pytest.approx(6250), "measured": 1000.0}


async def test_the_model_wants_the_batch_curve_first(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="run that first"):
        await capacity.measure(Bench(tmp_path, True, 1, lambda _: None, {}, new_seeds()))
    kept = {"batch": {"environment": ENVIRONMENT, "rows": ROWS}}
    (row,) = await capacity.measure(Bench(tmp_path, True, 1, lambda _: None, kept, new_seeds()))
    text = capacity.present([row])
    assert "one core a partition" in text
    assert "predicted events/s" in text


def test_curves_have_exponents_and_medians() -> None:
    rate = fits(ROWS)["rate"]
    assert isinstance(rate, Power)
    assert rate.exponent == pytest.approx(1)
    assert median_at(ROWS, lambda row: row["full"]["events_per_s"]) == {1: 1000, 4: 4000, 16: 16_000, 64: 64_000}


def test_a_report_has_a_section_for_what_is_kept_and_its_pictures(tmp_path: Path) -> None:
    section = {"environment": ENVIRONMENT, "quick": False, "repetitions": 2, "took_s": 1.0}
    changed = [{**batch_row(1, turn), "variant": name} for turn in (0, 1) for name in (ablation.BASE, "1 partition")]
    sections = {"ablation": {**section, "rows": changed}, "batch": {**section, "rows": ROWS}}
    write_results(sections, ["batch", "ablation"], tmp_path)
    text = (tmp_path / "full.md").read_text()
    assert text == as_markdown(sections)
    assert text.index("## Events a message") < text.index("## Each choice switched off")
    assert "exponent 1.00 ± 0.00" in text
    assert "(× 1.00)" in text
    for name in sections:
        assert (tmp_path / picture_of(name)).read_bytes().startswith(b"\x89PNG")
    assert list(read_kept(tmp_path)) == ["batch", "ablation"]


def test_a_ratio_is_taken_within_its_turn() -> None:
    rows = [
        {"turn": 0, "variant": ablation.BASE, "at": 0, "figure": 1.0},
        {"turn": 0, "variant": "other", "at": 0, "figure": 2.0},
        {"turn": 1, "variant": ablation.BASE, "at": 0, "figure": 100.0},
        {"turn": 1, "variant": "other", "at": 0, "figure": 400.0},
    ]
    assert ablation.ratios(rows, lambda row: row["figure"]) == {ablation.BASE: 1, "other": 3}


def test_every_case_has_valid_settings_and_a_name_of_its_own(tmp_path: Path) -> None:
    for cases in [*(curve.cases() for curve in CURVES.values()), ablation.cases(str(tmp_path / "key.pem"))]:
        assert len({case.variant for case in cases}) == len(cases)
        for case in cases:
            assert case.setup.load().replicas <= case.setup.servers
            assert case.setup.processes <= case.setup.load().partitions
            assert set(case.setup.switches) <= set(SWITCHES)


@pytest.mark.parametrize("size_bytes", [210, 1_000, 100_000])
def test_sized_messages_have_their_size_and_pass_ingest(size_bytes: int) -> None:
    for message in sized_messages(7, 5, size_bytes, consultations=2):
        assert len(message.data) == size_bytes
        parsed = parse_message(
            message.data,
            subject_site=message.site,
            subject_consultation=message.consultation,
            origin=1,
            accepted_ns=1,
            traceparent="",
            now_ns=1,
        )
        assert (len(parsed.events), len(parsed.rejected)) == (1, 0)
    with pytest.raises(ValueError, match="too few"):
        sized_messages(7, 1, 100)


def test_traffic_is_even_or_hot_as_asked() -> None:
    even = sized_messages(7, 400, consultations=100)
    hot = sized_messages(7, 400, consultations=100, hot_consultation=0.5)
    site = sized_messages(7, 400, consultations=100, hot_site=0.5)
    first = even[0].consultation
    assert sum(message.consultation == first for message in even) == 4
    assert sum(message.consultation == hot[0].consultation for message in hot) == pytest.approx(200, abs=4)
    assert sum(message.site == "clinic-0" for message in site) == 200


def test_renewed_messages_are_the_same_but_for_their_ids() -> None:
    base = sized_messages(7, 4, consultations=2, batch=3)
    again = [*renewed(base, 1), *renewed(base, 2)]
    ids = [msgspec.json.decode(line)["event_id"] for message in [*base, *again] for line in message.data.split(b"\n")]
    assert len(set(ids)) == len(ids) == 36
    assert len({message.message_id for message in [*base, *again]}) == 12
    for old, new in zip(base, renewed(base, 1), strict=True):
        old_line, new_line = (msgspec.json.decode(message.data.split(b"\n")[0]) for message in (old, new))
        assert new_line["consultation_id"] == new.consultation != old.consultation
        assert new_line["payload"] == old_line["payload"]
    assert renewed(base, 0) == base


def test_our_hash_of_the_comparison_is_the_stages() -> None:
    ours = next(candidate for candidate in hashes.CANDIDATES if candidate.name == hashes.OURS)
    for size in hashes.SIZES_KB:
        payload = hashes.made_payload(size)
        assert size * 1000 <= len(payload) <= size * 1000 + 500
        canonical = canonical_json(msgspec.json.decode(payload))
        assert ours.whole(payload) == payload_hash(payload) == ours.alone(canonical)


def samples(growth_bytes_per_h: float) -> list[dict[str, Any]]:
    return [
        {"at_s": 5.0 * number, "resident_bytes": {"hash-0": int(1e8 + growth_bytes_per_h * number * 5 / 3600)}}
        for number in range(720)
    ]


def test_memory_that_stays_is_flat_and_memory_that_grows_is_not() -> None:
    assert judge(samples(0), 1000)["hash-0"]["flat"]
    grown = judge(samples(5e6), 1000)["hash-0"]
    assert not grown["flat"]
    assert grown["slope_bytes_per_h"] == pytest.approx(5e6, rel=0.01)


def test_what_persist_must_remember_of_every_event_is_not_held_against_it() -> None:
    known = FILTER_BYTES_PER_EVENT * 1000 * 3600
    grown = [
        {**sample, "resident_bytes": {"persist-0": sample["resident_bytes"]["hash-0"]}} for sample in samples(known)
    ]
    verdict = judge(grown, 1000)["persist-0"]
    assert verdict["flat"]
    assert verdict["known_bytes_per_h"] == round(known)


def test_the_storage_table_shows_ours_and_theirs() -> None:
    rows = [
        {"turn": 0, "variant": stores.AT_ONCE, "compression": "gzip-4", "ms": 20.0, "kb": 265.0},
        {"turn": 0, "variant": stores.OURS, "compression": "gzip", "sync_ms": 200.0, "seal_ms": 90.0, "kb": 500.0},
    ]
    text = stores.present(rows)
    assert "| 20 (20-20) | – | – | 265 (265-265) | 300 | 250 |" in text
    assert "| – | 200 (200-200) | 90 (90-90) | 500 (500-500) | – | – |" in text
