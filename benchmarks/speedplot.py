"""The pictures of ``python -m benchmarks``: sustained rates, latency, and what an event costs as load grows."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.latency import RATES_PER_S

_OURS, _OTHERS, _CEILING = "#b3001b", "#1f4e79", "#999999"
_KINDS = {"servers": "#1f4e79", "ingest": "#8a6d00", "segment": "#2e8b57", "hash": "#6a3d9a", "persist": "#b3001b"}
_PERCENTILES = {"p50": "#9ecae1", "p95": "#1f4e79", "p99": "#444444"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Writes a PNG to `path`."""
    figure, (rates, latency, costs) = pyplot.subplots(1, 3, figsize=(18, 6), layout="constrained")
    _rates(rates, result)
    _latency(latency, result)
    _costs(costs, result)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _rates(axes: Any, result: dict[str, Any]) -> None:
    bars: list[tuple[str, list[float], str]] = []
    for design in dict.fromkeys(row["design"] for row in result["baselines"]):
        found = [
            row["events_per_s"] for row in result["baselines"] if row["design"] == design and "events_per_s" in row
        ]
        bars.append((design, found, _OTHERS))
    for batch in sorted({row["batch"] for row in result["throughput"]}):
        rows = [row for row in result["throughput"] if row["batch"] == batch]
        bars.append((f"ours, {batch} a message", [row["events_per_s"] for row in rows], _OURS))
        bars.append((f"ceiling, {batch} a message", [row["ceiling_events_per_s"] for row in rows], _CEILING))
    bars = [bar for bar in bars if bar[1]]
    for at, (_, values, colour) in enumerate(bars):
        middle = statistics.median(values)
        axes.barh(at, middle, color=colour, xerr=[[middle - min(values)], [max(values) - middle]], capsize=3)
        axes.text(max(values), at, f" {middle:,.0f}", va="center", fontsize="small")
    axes.set_yticks(range(len(bars)), [title for title, _, _ in bars])
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("events/s")
    axes.set_title("Sustained, send to record (median, least to greatest)", fontsize="medium")


def _latency(axes: Any, result: dict[str, Any]) -> None:
    groups: list[tuple[str, dict[str, float]]] = []
    for visit in result["baselines"]:
        groups += [
            (f"{visit['design']}, {row['rate_per_s']:,}/s", row["durable_ms"])
            for row in visit.get("latency", ())
            if row["durable_ms"] is not None
        ]
    for rate in RATES_PER_S:
        rows = [row["durable_ms"] for row in result["latency"] if row["rate_per_s"] == rate]
        if rows:
            groups.append((f"ours, {rate:,}/s", {p: statistics.median(row[p] for row in rows) for p in _PERCENTILES}))
    for number, (percentile, colour) in enumerate(_PERCENTILES.items()):
        places = [at + 0.27 * (number - 1) for at in range(len(groups))]
        axes.barh(places, [values[percentile] for _, values in groups], 0.25, color=colour, label=percentile)
    axes.set_yticks(range(len(groups)), [title for title, _ in groups])
    axes.set_xscale("log")
    axes.set_xlabel("ms from due to record")
    axes.set_title("Latency where it keeps up (others: they fall behind)", fontsize="medium")
    if groups:
        axes.legend(frameon=False)


def _costs(axes: Any, result: dict[str, Any]) -> None:
    loads = [(f"{rate:,}/s", [r for r in result["latency"] if r["rate_per_s"] == rate]) for rate in RATES_PER_S]
    batches = sorted({row["batch"] for row in result["throughput"]})
    loads += [
        (f"full speed,\n{batch} a message", [r for r in result["throughput"] if r["batch"] == batch])
        for batch in batches
    ]
    loads = [load for load in loads if load[1]]
    below = [0.0] * len(loads)
    for kind, colour in _KINDS.items():
        values = [statistics.median(row["costs"]["cpu_s"][kind] for row in rows) * 1e3 for _, rows in loads]
        axes.bar(range(len(loads)), values, bottom=below, color=colour, label=kind)
        below = [low + value for low, value in zip(below, values, strict=True)]
    axes.set_xticks(range(len(loads)), [title for title, _ in loads], fontsize="small")
    axes.set_ylabel("ms of CPU for 1,000 events")
    axes.set_title("What events cost as load grows", fontsize="medium")
    if loads:
        axes.legend(frameon=False)
