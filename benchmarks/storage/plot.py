"""The storage benchmark's picture: what one more event costs, by how many are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, ScalarFormatter

from benchmarks.storage.tables import by_size, points_of

_NONE_AT = 20
"""Where "0 stored" stands on an axis that has no 0."""
_OURS_COLOUR = "#b3001b"
_COLOURS = ("#1f4e79", "#2e8b57", "#8a6d00", "#6a3d9a", "#444444")


def plot_append(result: dict[str, Any], path: Path) -> None:
    """Writes a PNG to `path`: lines through medians, bars over the middle half of the repetitions."""
    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    ours = by_size(result["ours"]["append"], "p50")
    _line(axes, ours, _OURS_COLOUR, "persist's shards", width=3.0)
    for design, colour in zip(result["classic"], _COLOURS, strict=True):
        _line(axes, by_size(points_of(design, sync=True), "p50"), colour, design["design"])
        _line(axes, by_size(points_of(design, sync=False), "p50"), colour, None, style=":", width=1.0)
    sizes = sorted(ours)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator([size or _NONE_AT for size in sizes]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: "0" if at == _NONE_AT else f"{at:,.0f}"))
    axes.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10, 20]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("events stored before")
    axes.set_ylabel("one event appended, ms (median)")
    axes.set_title(
        "Append cost by stored events\n"
        "solid: on disk when it returns; dotted: flushed to the kernel only; bars: the middle half of the repetitions",
        fontsize="medium",
    )
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _line(
    axes: Any, costs: dict[int, list[float]], colour: str, label: str | None, *, style: str = "-", width: float = 1.6
) -> None:
    sizes = sorted(costs)
    low, middle, high = (np.array([np.percentile(costs[size], part) for size in sizes]) for part in (25, 50, 75))
    at = [size or _NONE_AT for size in sizes]
    bars = (middle - low, high - middle) if style == "-" else None
    look = {"color": colour, "ls": style, "lw": width, "marker": "o", "ms": 4, "capsize": 3, "elinewidth": 0.8}
    axes.errorbar(at, middle, bars, label=label, **look)
