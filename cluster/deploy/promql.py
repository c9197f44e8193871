"""PromQL built from the catalogue's instruments: a metric or a label that does not exist cannot be written.

Every function gives the text of an expression. A window is a PromQL duration, e.g. ``5m``; in a dashboard it is
`RATE_WINDOW`, which Grafana fills in.
"""

from __future__ import annotations

import re
from typing import Final

from contracts.telemetry import Instrument

RATE_WINDOW: Final = "$__rate_interval"
JOB: Final = "fi"
"""The scrape job of `prometheus/prometheus.yml`."""
TARGET_LABELS: Final = ("job", "instance")
"""Labels that Prometheus adds to everything it scrapes."""
UP: Final = f'up{{job="{JOB}"}}'
"""Prometheus' own: 1 for each process that answered its last scrape, else 0."""


def label(attribute: str) -> str:
    """An attribute's name as a label: what is neither letter nor digit becomes an underscore."""
    return "".join(char if char.isalnum() else "_" for char in attribute)


def labels(what: Instrument) -> tuple[str, ...]:
    """Every label that a series of `what` can have, but ``le``."""
    return (*map(label, (*what.attributes, *what.optional)), *TARGET_LABELS)


def series(what: Instrument, where: str = "", suffix: str = "") -> str:
    """The series of `what` that meet `where`, matchers such as ``stage="hash"``, with commas between them.

    Args:
        suffix: ``_bucket``, ``_sum`` or ``_count`` of a histogram.

    Raises:
        ValueError: a label that `what` does not have, or a suffix that does not fit its kind.
    """
    if (what.kind == "histogram") != bool(suffix):
        raise ValueError(f"{what.name} is a {what.kind}: suffix {suffix!r}")
    for matcher in filter(None, where.split(",")):
        _check(what, re.split("!|=", matcher, maxsplit=1)[0])
    return f"{what.prometheus_name}{suffix}" + (f"{{{where}}}" if where else "")


def over(function: str, expression: str, *by: str) -> str:
    """An aggregation, e.g. ``sum by (stage) (…)``."""
    return f"{function} by ({', '.join(by)}) ({expression})" if by else f"{function}({expression})"


def highest(what: Instrument, *by: str, where: str = "") -> str:
    """A gauge that several processes may report alike: the highest value of each group."""
    return over("max", series(what, where), *_checked(what, by))


def lowest(what: Instrument, *by: str) -> str:
    """The lowest value of a gauge in each group."""
    return over("min", series(what), *_checked(what, by))


def total(what: Instrument, *by: str, where: str = "") -> str:
    """The sum of a gauge that each process reports for itself."""
    return over("sum", series(what, where), *_checked(what, by))


def rate(what: Instrument, *by: str, where: str = "", window: str = RATE_WINDOW) -> str:
    """How fast a counter grows, a second; of a histogram, how many values a second."""
    return over("sum", f"rate({_counted(what, where)}[{window}])", *_checked(what, by))


def increase(what: Instrument, *by: str, window: str, offset: str = "") -> str:
    """By how much a counter that is there from the start grew; of a histogram, how many values came.

    Args:
        offset: the window ends so long ago.
    """
    past = f" offset {offset}" if offset else ""
    return over("sum", f"increase({_counted(what)}[{window}]{past})", *_checked(what, by))


def grown(what: Instrument, *by: str, window: str) -> str:
    """By how much a counter grew that is not there before its first value.

    `increase` alone does not see the step from nothing to the first value, which may stay the only one.
    """
    counter = series(what)
    new = f"({counter} unless {counter} offset {window})"
    return over("sum", f"increase({counter}[{window}]) > 0 or {new}", *_checked(what, by))


def quantile(share: float, what: Instrument, *by: str, window: str = RATE_WINDOW) -> str:
    """A quantile of a histogram's values, over all processes or for each group; NaN without values.

    Whether it is above a bound of the histogram is exact, whatever lies in the bucket.
    """
    buckets = over("sum", f"rate({series(what, suffix='_bucket')}[{window}])", "le", *_checked(what, by))
    return f"histogram_quantile({share:g}, {buckets})"


def mean(what: Instrument, *by: str, where: str = "") -> str:
    """The mean of a histogram's values; NaN without values."""
    sums = over("sum", f"rate({series(what, where, '_sum')}[{RATE_WINDOW}])", *_checked(what, by))
    return f"{sums} / {rate(what, *by, where=where)}"


def heat(what: Instrument) -> str:
    """How many values of a histogram came into each bucket, for a heatmap."""
    return over("sum", f"increase({series(what, suffix='_bucket')}[{RATE_WINDOW}])", "le")


def _counted(what: Instrument, where: str = "") -> str:
    if what.kind == "gauge":
        raise ValueError(f"{what.name} is a gauge: it has no rate")
    return series(what, where, "_count" if what.kind == "histogram" else "")


def _checked(what: Instrument, by: tuple[str, ...]) -> tuple[str, ...]:
    for name in by:
        _check(what, name)
    return by


def _check(what: Instrument, name: str) -> None:
    if name not in labels(what):
        raise ValueError(f"{what.name} has no label {name!r}; it has {', '.join(labels(what))}")
