"""The experiments' pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.experiments import ablation, hashes
from benchmarks.experiments.curves import Curve, by_variant, fits, median_at, row_figures
from benchmarks.experiments.harness import Row
from benchmarks.experiments.sources import HASH_MS

_OURS = "#b3001b"
_COLOURS = (_OURS, "#1f4e79", "#2e8b57", "#8a6d00", "#6a3d9a")
_DPI = 130


def plot_curve(curve: Curve, rows: Sequence[Row], path: Path) -> None:
    """Throughput, and CPU of stages and servers, over the axis; each repetition a dot, a line through medians."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    exponents = fits(rows)
    for key, (name, figure_of) in row_figures().items():
        panel = panels[0] if key == "rate" else panels[1]
        colour = _COLOURS[list(row_figures()).index(key)]
        power = exponents[key]
        label = name if power is None else f"{name}\n({power})"
        dots = [(float(row["at"]), figure_of(row)) for row in rows if row["at"] > 0]
        medians = {at: value for at, value in median_at(rows, figure_of).items() if at > 0}
        panel.plot(*zip(*dots, strict=True), "o", color=colour, ms=3, alpha=0.5)
        panel.plot(list(medians), list(medians.values()), "-", color=colour, label=label)
    ticks = sorted({float(row["at"]) for row in rows if row["at"] > 0})
    for panel in panels:
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.xaxis.set_major_locator(FixedLocator(ticks))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:,.0f}"))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:,g}"))
        panel.yaxis.set_minor_formatter(FuncFormatter(lambda at, _: f"{at:,g}"))
        panel.set_xlabel(curve.axis)
        panel.grid(True, which="both", alpha=0.3)
        panel.legend(frameon=False, fontsize="small")
    _save(figure, path)


def plot_hashes(rows: Sequence[Row], path: Path) -> None:
    """Time of the whole hash of an event over its size."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for (variant, ours), colour in zip(by_variant(rows).items(), _COLOURS, strict=False):
        medians = median_at(ours, lambda row: row["whole_us"] / 1e3)
        axes.plot(list(medians), list(medians.values()), "o-", color=colour, label=variant)
    axes.plot(list(HASH_MS), list(HASH_MS.values()), "k^:", label="source documents")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(hashes.SIZES_KB)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
    axes.set_xlabel("KB of an event")
    axes.set_ylabel("parsed, canonical form, hash: ms (median)")
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    _save(figure, path)


def plot_ablation(rows: Sequence[Row], path: Path) -> None:
    """For each change, throughput and durable p95 as ratios to the pipeline as it is."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 6), layout="constrained", sharey=True)
    names = [change.name for change in ablation.CHANGES if change.name in by_variant(rows)]
    for panel, column in zip(panels, ("events/s", "p95"), strict=True):
        found = ablation.ratios(rows, ablation.FIGURES[column])
        panel.barh(names, [found[name] - 1 for name in names], left=1, color=_COLOURS[1])
        panel.axvline(1.0, color="black", lw=0.8)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel(f"{'durable p95 at 500/s' if column == 'p95' else column}, × the pipeline as it is")
        panel.grid(True, axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    _save(figure, path)


def plot_soak(result: dict[str, Any], path: Path) -> None:
    """Resident memory of every process over time, and events/s."""
    figure, panels = pyplot.subplots(2, 1, figsize=(10, 8), layout="constrained", sharex=True)
    samples = result["samples"]
    minutes = [sample["at_s"] / 60 for sample in samples]
    for name in samples[0]["resident_bytes"]:
        panels[0].plot(minutes, [sample["resident_bytes"][name] / 1e6 for sample in samples], label=name)
    panels[0].set_ylabel("resident memory, MB")
    panels[0].set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize="small", ncols=2)
    ends = [window["end_s"] / 60 for window in result["windows"]]
    panels[1].plot(ends, [window["events_per_s"] for window in result["windows"]], color=_OURS)
    panels[1].set_ylabel("events/s, by window")
    panels[1].set_ylim(bottom=0)
    panels[1].set_xlabel("minutes")
    for panel in panels:
        panel.grid(True, alpha=0.3)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)
