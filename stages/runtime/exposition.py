"""Prometheus text (exposition format 0.0.4) of what a process's instruments hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from stages.runtime.instruments import Family, Histogram

_NOT_IN_A_LABEL = re.compile(r"[^a-zA-Z0-9_]")


def prometheus_text(families: Iterable[Family], target: Mapping[str, Any]) -> bytes:
    """Every metric of `families`, with HELP and TYPE, and the attributes `target` of who is asked as `target_info`."""
    lines = ["# HELP target_info who is asked", "# TYPE target_info gauge", f"target_info{_labels(target)} 1"]
    for family in families:
        lines += _family(family)
    return ("\n".join(lines) + "\n").encode()


def _family(family: Family) -> Iterator[str]:
    name = family.what.prometheus_name
    yield f"# HELP {name} {_escaped(family.what.meaning)}"
    yield f"# TYPE {name} {family.what.kind}"
    for attributes, value in family.points:
        if isinstance(value, Histogram):
            yield from _histogram(name, attributes, value)
        else:
            yield f"{name}{_labels(attributes)} {_number(value)}"


def _histogram(name: str, attributes: Mapping[str, Any], value: Histogram) -> Iterator[str]:
    total = 0
    for bound, count in zip((*value.bounds, float("inf")), value.counts, strict=True):
        total += count
        bounded = {**attributes, "le": "+Inf" if bound == float("inf") else _number(bound)}
        yield f"{name}_bucket{_labels(bounded)} {total}"
    yield f"{name}_sum{_labels(attributes)} {_number(value.sum)}"
    yield f"{name}_count{_labels(attributes)} {total}"


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
