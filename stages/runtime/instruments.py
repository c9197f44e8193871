"""The plain numbers that instruments are kept in (ADR 12)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from contracts.telemetry import Instrument


class Counter:
    """A number that only grows. Not for concurrent use: event loop only."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def add(self, amount: float = 1) -> None:
        """Counts `amount` more."""
        self.value += amount


class Histogram:
    """Values, counted in buckets. Not for concurrent use: event loop only.

    Attributes:
        bounds: of the buckets, upper ones, inclusive; the last bucket has none.
        counts: of each bucket.
        sum, min, max: of the values; `min` is infinite while there are none.
    """

    __slots__ = ("bounds", "counts", "max", "min", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.min = math.inf
        self.max = 0.0

    def record(self, value: float, times: int = 1) -> None:
        """Counts a value that is not negative, `times` over."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times
        if value < self.min:
            self.min = value
        if value > self.max:
            self.max = value

    def now(self) -> Histogram:
        """A copy, which no longer changes. Any thread."""
        copy = Histogram(self.bounds)
        copy.counts, copy.sum, copy.min, copy.max = self.counts.copy(), self.sum, self.min, self.max
        return copy


class Family(NamedTuple):
    """An instrument's values at one moment.

    Attributes:
        what: the instrument.
        points: (attributes, value) of each; a histogram's values are histograms.
    """

    what: Instrument
    points: Sequence[tuple[Mapping[str, str], float | Histogram]]
