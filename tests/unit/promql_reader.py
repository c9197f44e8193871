"""What is wrong with a PromQL expression, for one who knows only what a process really shows at `/metrics`."""

from __future__ import annotations

import re

from contracts.telemetry import CATALOGUE
from stages.runtime.exposition import prometheus_text
from stages.runtime.meters import Meters

TOKEN = re.compile(
    r"""(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>[A-Za-z_][A-Za-z0-9_]*)|(?P<number>[0-9.]+(?:e[0-9]+|ms|[smhdwy])?)"""
    r"""|(?P<variable>\$\w+)|(?P<sign>=~|!~|!=|==|<=|>=|[-+*/<>=(){}\[\],:])|(?P<space>\s+)|(?P<wrong>.)""",
    re.DOTALL,
)
PAIRS = {")": "(", "]": "[", "}": "{"}
GROUPING = {"by", "without", "on", "ignoring"}
AGGREGATIONS = {"sum", "min", "max", "count"}
KEYWORDS = GROUPING | {"and", "or", "unless", "offset"}
OF_COUNTERS = {"rate", "increase"}
OF_GAUGES = {"deriv", "predict_linear", "min_over_time", "max_over_time"}
FUNCTIONS = AGGREGATIONS | OF_COUNTERS | OF_GAUGES | {"histogram_quantile", "absent", "vector", "clamp_min"}
TARGET = {"job", "instance"}


def shown() -> dict[str, tuple[str, set[str]]]:
    """Name → (type, labels) of every series at `/metrics`, once each instrument has a value, and of Prometheus' own."""
    meters = Meters()
    for what in CATALOGUE.values():
        attributes = dict.fromkeys((*what.attributes, *what.optional), "x")
        if what.kind == "counter":
            meters.counter(what, attributes).add()
        elif what.kind == "histogram":
            meters.histogram(what, attributes).record(1.0)
        else:
            meters.read_from(what, lambda attributes=attributes: [(attributes, 1)])  # type: ignore[misc]
    lines = prometheus_text(meters.collect(), {}).decode().splitlines()
    kinds = dict(line.split()[2:] for line in lines if line.startswith("# TYPE"))
    found: dict[str, tuple[str, set[str]]] = {"up": ("gauge", TARGET)}
    for line in lines:
        if line.startswith("#"):
            continue
        name, labels = re.match(r"(\w+)(?:\{(.*)\})? ", line).groups()  # type: ignore[union-attr]
        family = name if name in kinds else name.rpartition("_")[0]
        kind = "counter" if kinds[family] == "histogram" else kinds[family]
        known = found.setdefault(name, (kind, set(TARGET)))
        known[1].update(re.findall(r'(\w+)="', labels or ""))
    return found


def problems(expression: str, metrics: dict[str, tuple[str, set[str]]]) -> list[str]:
    """What is wrong with `expression`; empty when all its names exist, fit each other, and its brackets close."""
    tokens = [(str(m.lastgroup), m.group()) for m in TOKEN.finditer(expression) if m.lastgroup != "space"]
    texts = [text for _, text in tokens]
    wrong = [f"{text!r} is no PromQL" for kind, text in tokens if kind == "wrong"]
    ends = _ends(texts)
    if ends is None:
        return [*wrong, "brackets do not match"]
    skip: set[int] = set()
    for at, (kind, text) in enumerate(tokens):
        after = texts[at + 1] if at + 1 < len(texts) else ""
        if kind != "word" or at in skip:
            continue
        if text in GROUPING:
            names = range(at + 2, ends[at + 1])
            skip.update(names)
            begin = ends[at + 1] + 1
            # `on` joins two sides; `by` belongs to the bracket that follows it.
            inner = texts if text in {"on", "ignoring"} else texts[begin : ends.get(begin, begin) + 1]
            used = [name for name in inner if name in metrics]
            wrong += [
                f"{text} {texts[n]}: not of {m}"
                for n in names
                if texts[n] != ","
                for m in used
                if texts[n] not in metrics[m][1]
            ]
            wrong += [f"{text} groups nothing"] if not used else []
        elif text in KEYWORDS or (text in AGGREGATIONS and after in GROUPING):
            continue
        elif after == "(":
            if text not in FUNCTIONS:
                wrong.append(f"no function {text}")
                continue
            inner = texts[at + 1 : ends[at + 1] + 1]
            ranged = text in OF_COUNTERS | OF_GAUGES
            if ranged and "[" not in inner:
                wrong.append(f"{text} needs a range")
            kind_wanted = "counter" if text in OF_COUNTERS else "gauge"
            wrong += [
                f"{text} of the {metrics[m][0]} {m}"
                for m in inner
                if ranged and m in metrics and metrics[m][0] != kind_wanted
            ]
        elif text not in metrics:
            wrong.append(f"no metric {text}")
        elif after == "{":
            inside = range(at + 2, ends[at + 1])
            skip.update(inside)
            names = [n for n in inside if tokens[n][0] == "word"]  # type: ignore[assignment]
            wrong += [f"{text} has no label {texts[n]}" for n in names if texts[n] not in metrics[text][1]]
            wrong += [f"{texts[n]} is not matched" for n in names if texts[n + 1] not in {"=", "!=", "=~", "!~"}]
    return wrong


def _ends(texts: list[str]) -> dict[int, int] | None:
    """Where each bracket closes; None when one does not."""
    open_at: list[int] = []
    ends: dict[int, int] = {}
    for at, text in enumerate(texts):
        if text in PAIRS.values():
            open_at.append(at)
        elif text in PAIRS:
            if not open_at or texts[open_at[-1]] != PAIRS[text]:
                return None
            ends[open_at.pop()] = at
    return None if open_at else ends
