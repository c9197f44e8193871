"""The few figures that matter, out of everything measured, and what became of them since last time. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from benchmarks.ceiling import LIBRARY
from benchmarks.latency import RATES_PER_S

ACCEPTED_RATE_PER_S = 200
"""The rate that the headline's accepted latency is of."""
RIVALS: dict[str, tuple[str, ...]] = {
    "vs_classic": ("chain",),
    "vs_tuned": ("tuned",),
    "vs_redis": ("redis",),
    "vs_faststream": ("faststream", "faststream-batched"),
    "vs_one_process": ("one-process",),
}
"""Ratio → the baselines it is held against; of several, the fastest counts."""

Rows = list[dict[str, Any]]


def headline(latency: Rows, throughput: Rows, drain: Rows, baselines: Rows) -> dict[str, Any]:
    """Medians over the repetitions; null where nothing was measured.

    How many times a rival's rate ours is divides two medians, as the report's table does: rivals are visited less often
    than ours is repeated, and a visit of theirs has no repetition of ours that it belongs to.

    Args:
        latency: of `measure_latency`.
        throughput: of `measure_throughput`.
        drain: of `measure_drain`.
        baselines: of `benchmarks.baselines.measure.visit`.
    """
    found = ratios(throughput, baselines)
    batches = sorted({row["batch"] for row in throughput})
    rates = {batch: _median(row["events_per_s"] for row in throughput if row["batch"] == batch) for batch in batches}
    drained = _median(row["drained_per_s"] for row in drain)
    accepted = {str(rate): _latency(latency, rate, "accepted_ms", "p95") for rate in RATES_PER_S}
    return {
        "single_vs_ceiling": _median(found["single_vs_ceiling"], 3),
        **{f"single_vs_nats_py_{way}": _median(found[f"single_vs_nats_py_{way}"], 3) for way in LIBRARY},
        "batched_vs_ceiling": _median(found["batched_vs_ceiling"], 3),
        "batched_events_per_s": rates.get(16),
        "drain_events_per_s": drained,
        "durable_p95_ms": {str(rate): _latency(latency, rate, "durable_ms", "p95") for rate in RATES_PER_S},
        "accepted_p95_ms": accepted[str(ACCEPTED_RATE_PER_S)],
        "accepted_p95_ms_by_rate": accepted,
        "p99_over_p95": {str(rate): _tail(latency, rate) for rate in RATES_PER_S},
        **{name: _times(rates.get(1), _fastest(baselines, designs)) for name, designs in RIVALS.items()},
        **{f"events_per_s_batch_{batch}": rate for batch, rate in rates.items()},
    }


def ratios(throughput: Rows, baselines: Rows) -> dict[str, list[float]]:
    """The headline's ratios, one value for each repetition, so that their spread can be seen.

    Ours and the ceiling of one repetition belong together; a baseline's visit is held against our median.
    """
    found: dict[str, list[float]] = {}
    for name, batch in (("single_vs_ceiling", 1), ("batched_vs_ceiling", 16)):
        rows = [row for row in throughput if row["batch"] == batch]
        found[name] = [round(row["events_per_s"] / row["ceiling_events_per_s"], 3) for row in rows]
    single = [row for row in throughput if row["batch"] == 1]
    for way in LIBRARY:
        found[f"single_vs_nats_py_{way}"] = [
            round(row["events_per_s"] / row["library_events_per_s"][way], 3) for row in single
        ]
    ours = _median(row["events_per_s"] for row in single)
    for name, designs in RIVALS.items():
        found[name] = [] if ours is None else [round(ours / rate, 2) for rate in _fastest(baselines, designs)]
    return found


def _fastest(baselines: Rows, designs: Iterable[str]) -> list[float]:
    """The rates of that one of `designs` whose median is the highest, one for each visit; empty when none has any."""
    rates = (_rates(baselines, design) for design in designs)
    return max(filter(None, rates), key=statistics.median, default=[])


def _rates(baselines: Rows, design: str) -> list[float]:
    return [row["events_per_s"] for row in baselines if row["design"] == design and "events_per_s" in row]


def _times(ours: float | None, rates: list[float]) -> float | None:
    theirs = _median(rates)
    return None if ours is None or theirs is None else round(ours / theirs, 1)


def _latency(rows: Rows, rate: int, kind: str, percentile: str) -> float | None:
    return _median((row[kind][percentile] for row in rows if row["rate_per_s"] == rate), 2)


def _tail(rows: Rows, rate: int) -> float | None:
    """How many times its p95 the p99 of durable latency is."""
    return _median(
        (row["durable_ms"]["p99"] / row["durable_ms"]["p95"] for row in rows if row["rate_per_s"] == rate), 2
    )


def _median(values: Iterable[float], digits: int | None = None) -> float | None:
    known = list(values)
    return round(statistics.median(known), digits) if known else None


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Rows:
    """Old and new headline, figure by figure: ``{"figure", "old", "new", "ratio"}``; null where one has none."""
    before, after = dict(_flat(old)), dict(_flat(new))
    rows = []
    for figure in after:
        was, now = before.get(figure), after[figure]
        ratio = round(now / was, 3) if was and now is not None else None
        rows.append({"figure": figure, "old": was, "new": now, "ratio": ratio})
    return rows


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
