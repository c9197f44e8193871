"""Lines through measurements: exponents of cost curves, and what one message and one event cost. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

_POINTS_MIN = 3
"""Through two points every line is exact: their error says nothing."""

Points = Sequence[float] | npt.NDArray[np.float64]


class Power(msgspec.Struct, frozen=True):
    """``y = factor · x ** exponent``, fitted to logarithms by least squares.

    Attributes:
        error: standard error of the exponent.
        points: how many the fit is through.
    """

    exponent: float
    error: float
    factor: float
    points: int

    def __str__(self) -> str:
        return f"exponent {self.exponent:.2f} ± {self.error:.2f}"


class Line(msgspec.Struct, frozen=True):
    """``cost = per_message + per_event · events`` of a message that holds so many events; both at least 0."""

    per_message: float
    per_event: float

    def at(self, events: float) -> float:
        """What one event costs in messages of so many events."""
        return self.per_message / events + self.per_event


def fit_power(xs: Sequence[float], ys: Sequence[float]) -> Power | None:
    """The power law through the points above zero; None for fewer than three, or all at the same x."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if x > 0 and y > 0]
    if len(points) < _POINTS_MIN or len({x for x, _ in points}) == 1:
        return None
    x, y = np.array(points).T
    exponent, error = fit_slope(x, y)
    return Power(exponent, error, math.exp(float(y.mean()) - exponent * float(x.mean())), len(points))


def fit_line(events: Sequence[float], costs: Sequence[float]) -> Line:
    """What a message and what an event costs, from costs of whole messages of so many events.

    Weighted so that a large message does not outvote the small ones: relative errors count. A negative part is
    set to 0 and the other fitted alone.

    Raises:
        ValueError: fewer than two different numbers of events, or a cost that is not above zero.
    """
    if len(set(events)) < 2 or min(costs) <= 0:
        raise ValueError("a line needs messages of two sizes at least, and costs above zero")
    count, cost = np.array(events, float), np.array(costs, float)
    columns = np.stack([1 / cost, count / cost], axis=1)
    ones = np.ones(len(cost))
    (per_message, per_event), *_ = np.linalg.lstsq(columns, ones, rcond=None)
    if per_message < 0:
        return Line(0.0, _alone(columns[:, 1]))
    if per_event < 0:
        return Line(_alone(columns[:, 0]), 0.0)
    return Line(float(per_message), float(per_event))


def _alone(column: npt.NDArray[np.float64]) -> float:
    return float(column.sum() / (column @ column))


def fit_slope(xs: Points, ys: Points) -> tuple[float, float]:
    """Slope of the straight line through the points, and its standard error.

    Raises:
        ValueError: fewer than three points, or all at the same x.
    """
    if len(xs) < _POINTS_MIN or len(set(xs)) == 1:
        raise ValueError("a slope needs three points at least")
    x, y = np.array(xs, float), np.array(ys, float)
    off = x - x.mean()
    spread = float(off @ off)
    slope = float(off @ y) / spread
    rest = y - y.mean() - slope * off
    return slope, math.sqrt(float(rest @ rest) / (len(x) - 2) / spread)
