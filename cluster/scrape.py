"""What a process's `/metrics` says, as far as people are shown it; and percentiles of histograms. Pure.

Always true: what is not in the text stays unknown (None, or missing), and never becomes a zero.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

import msgspec

from contracts.telemetry import (
    BACKPRESSURE_AGE,
    DURABLE_LATENCY,
    LANES,
    LOOP_LAG,
    MEMORY_USAGE,
    MESSAGES_UNREADABLE,
    STAGE_LATENCY,
    STORAGE_FREE,
    Instrument,
)

HISTOGRAMS: Final[tuple[Instrument, ...]] = (*STAGE_LATENCY.values(), DURABLE_LATENCY, LOOP_LAG)
"""None of them has attributes."""
_SAMPLE: Final = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)")
_LABEL: Final = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')


class Held(msgspec.Struct, frozen=True):
    """A publish that waits because its stream is full: for `age_s` seconds now."""

    stream: str
    partition: str
    age_s: float


class Unreadable(msgspec.Struct, frozen=True):
    """How often `server` could not read a message of `stream` that it stored, since the process that saw it began."""

    stream: str
    server: str
    messages: int


class Metered(msgspec.Struct, frozen=True, kw_only=True):
    """One process's metrics at one time.

    Attributes:
        histograms: name of the instrument → values in each of its buckets since the process began, the last one for
            those above all bounds.
        held: publishes that a full stream holds.
        unreadable: what files of servers are damaged.
        lanes: state → how many.
        memory_bytes: resident.
        storage_free_bytes: where the shards lie (persist).
    """

    histograms: dict[str, tuple[int, ...]] = {}
    held: tuple[Held, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    lanes: dict[str, int] = {}
    memory_bytes: int | None = None
    storage_free_bytes: int | None = None


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of the values of a histogram: how many, and percentiles in seconds, linear within a bucket."""

    count: int
    p50_s: float
    p95_s: float
    p99_s: float


def parse_metrics(text: str) -> Metered:
    """The body of `/metrics` → what is shown of it.

    Raises:
        ValueError: it is not Prometheus text.
    """
    samples: defaultdict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
    for name, labels, value in _samples(text):
        samples[name].append((labels, value))

    def first(what: Instrument) -> float | None:
        found = samples.get(what.prometheus_name)
        return found[0][1] if found else None

    histograms = {}
    for what in HISTOGRAMS:
        # In the order of their bounds, as `stages.runtime.exposition` writes them.
        totals = [int(value) for _, value in samples.get(f"{what.prometheus_name}_bucket", ())]
        if len(totals) == len(what.buckets) + 1:
            histograms[what.name] = tuple(after - before for before, after in pairwise((0, *totals)))
    memory, free = first(MEMORY_USAGE), first(STORAGE_FREE)
    return Metered(
        histograms=histograms,
        held=tuple(
            Held(labels["stream"], labels["partition"], age_s)
            for labels, age_s in samples.get(BACKPRESSURE_AGE.prometheus_name, ())
            if age_s > 0
        ),
        unreadable=tuple(
            Unreadable(labels["stream"], labels["server"], int(messages))
            for labels, messages in samples.get(MESSAGES_UNREADABLE.prometheus_name, ())
        ),
        lanes={labels["state"]: int(value) for labels, value in samples.get(LANES.prometheus_name, ())},
        memory_bytes=None if memory is None else int(memory),
        storage_free_bytes=None if free is None else int(free),
    )


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for line in text.splitlines():
        if line and not line.startswith("#"):
            match = _SAMPLE.fullmatch(line)
            if match is None:
                raise ValueError(f"not a metric: {line[:80]!r}")
            name, labels, value = match.groups()
            yield name, dict(_LABEL.findall(labels or "")), float(value)


def grown(before: Sequence[int] | None, now: Sequence[int]) -> tuple[int, ...]:
    """What came into a histogram's buckets since `before`; all of `now` when the process is a new one."""
    if before is None or any(late < early for early, late in zip(before, now, strict=True)):
        return tuple(now)
    return tuple(late - early for early, late in zip(before, now, strict=True))


def percentiles(bounds: Sequence[float], counts: Sequence[int]) -> Percentiles | None:
    """Percentiles of a histogram with these upper bounds; None when it is empty.

    Values above all bounds count as the highest bound.
    """
    total = sum(counts)
    if not total:
        return None

    def at(share: float) -> float:
        rank, reached, low = share * total, 0, 0.0
        for bound, count in zip((*bounds, bounds[-1]), counts, strict=True):
            if count and reached + count >= rank:
                return low + (bound - low) * (rank - reached) / count
            reached, low = reached + count, bound
        return bounds[-1]

    return Percentiles(count=total, p50_s=at(0.50), p95_s=at(0.95), p99_s=at(0.99))
