"""Prometheus text (exposition format 0.0.4) of what the SDK collected.

`opentelemetry-exporter-prometheus` would do it with a second SDK reader, which doubles the cost of every histogram
value; this writes what the one reader gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from opentelemetry.sdk.metrics.export import Histogram, HistogramDataPoint, Metric, MetricsData, NumberDataPoint

from contracts.telemetry import CATALOGUE

_NOT_IN_A_LABEL = re.compile(r"[^a-zA-Z0-9_]")


def prometheus_text(data: MetricsData | None) -> bytes:
    """Every metric of `data`, with HELP and TYPE, and the resource's attributes as `target_info`."""
    lines: list[str] = []
    for resource in data.resource_metrics if data is not None else ():
        attributes = {str(key): value for key, value in resource.resource.attributes.items()}
        lines += ["# HELP target_info who is asked", "# TYPE target_info gauge", f"target_info{_labels(attributes)} 1"]
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                lines += _family(metric)
    return ("\n".join(lines) + "\n").encode()


def _family(metric: Metric) -> Iterator[str]:
    instrument = CATALOGUE[metric.name]
    name = instrument.prometheus_name
    yield f"# HELP {name} {_escaped(instrument.meaning)}"
    yield f"# TYPE {name} {instrument.kind}"
    for point in metric.data.data_points:
        attributes = dict(point.attributes or {})
        if isinstance(metric.data, Histogram):
            assert isinstance(point, HistogramDataPoint)
            yield from _histogram(name, attributes, point)
        else:
            assert isinstance(point, NumberDataPoint)
            yield f"{name}{_labels(attributes)} {_number(point.value)}"


def _histogram(name: str, attributes: Mapping[str, Any], point: HistogramDataPoint) -> Iterator[str]:
    total = 0
    for bound, count in zip((*point.explicit_bounds, float("inf")), point.bucket_counts, strict=True):
        total += count
        bounded = {**attributes, "le": "+Inf" if bound == float("inf") else _number(bound)}
        yield f"{name}_bucket{_labels(bounded)} {total}"
    yield f"{name}_sum{_labels(attributes)} {_number(point.sum)}"
    yield f"{name}_count{_labels(attributes)} {point.count}"


def _labels(attributes: Mapping[str, Any]) -> str:
    if not attributes:
        return ""
    pairs = (f'{_NOT_IN_A_LABEL.sub("_", key)}="{_escaped(str(value), True)}"' for key, value in attributes.items())
    return "{" + ",".join(pairs) + "}"


def _escaped(text: str, quoted: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quoted else text


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))
