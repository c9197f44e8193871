"""How cost and throughput change with what grows: processes, servers, sizes, consultations, stored events, batches.

Each curve is a list of cases, measured by `harness.measure_cases`; exponents are fitted through all repetitions.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.experiments.costs import SERVERS, stages_us
from benchmarks.experiments.fit import Power, fit_power
from benchmarks.experiments.harness import Case, Make, Row, Setup
from benchmarks.experiments.messages import sized_messages
from benchmarks.load import Message, make_messages
from benchmarks.report import markdown_table, spread

PERCENTILES = ("p50", "p95", "p99")
WORKERS = (1, 2, 4, 8)
EVENT_BYTES = (210, 1_000, 10_000, 100_000)
SIZE_MESSAGES = {210: 10_000, 1_000: 10_000, 10_000: 3_000, 100_000: 400}
SIZE_RATE_PER_S = 20
"""Two megabytes a second of the largest events, each byte of which goes to three servers on every hop."""
CONSULTATIONS = {1: 1_000, 100: 10_000, 10_000: 20_000}
"""Consultations → messages offered: of one consultation only one is in flight at a time."""
BATCHES = {1: 20_000, 4: 10_000, 16: 4_000, 64: 1_000}
STORED = (0, 10_000, 100_000, 1_000_000)
MIDDLE_RATE_PER_S = 500
LOW_RATE_PER_S = 100
"""For cases that carry less: a single consultation."""


def _mixed(seed: int, count: int) -> list[Message]:
    return make_messages(seed, count, 1)


def worker_cases() -> list[Case]:
    """1, 2, 4 and 8 processes of each stage on 8 partitions."""
    return [
        Case(f"{count} of each stage", count, Setup((("partitions", 8),), count), _mixed, 10_000, MIDDLE_RATE_PER_S)
        for count in WORKERS
    ]


def server_cases() -> list[Case]:
    """1, 3 and 5 servers, with as many replicas, and with three on five."""

    def case(servers: int, replicas: int) -> Case:
        name = f"{servers} servers, R{replicas}" if servers > 1 else "1 server, R1"
        setup = Setup((("replicas", replicas),), servers=servers)
        return Case(name, replicas, setup, _mixed, 10_000, MIDDLE_RATE_PER_S)

    return [case(1, 1), case(3, 3), case(5, 3), case(5, 5)]


def size_cases() -> list[Case]:
    """Events of 0.2, 1, 10 and 100 KB."""

    def make(size: int) -> Make:
        return lambda seed, count: sized_messages(seed, count, size)

    return [
        Case(f"{size / 1000:.1f} KB", size, Setup(), make(size), SIZE_MESSAGES[size], SIZE_RATE_PER_S)
        for size in EVENT_BYTES
    ]


def consultation_cases() -> list[Case]:
    """1, 100 and 10,000 consultations at the same time."""

    def make(consultations: int) -> Make:
        return lambda seed, count: sized_messages(seed, count, consultations=consultations)

    return [
        Case(f"{number:,} at the same time", number, Setup(), make(number), count, LOW_RATE_PER_S)
        for number, count in CONSULTATIONS.items()
    ]


def hot_cases() -> list[Case]:
    """Half of the traffic from one site, or of one consultation."""
    by_site = Setup((("partition_by", "site"),))

    def make(site: float, consultation: float) -> Make:
        return lambda seed, count: sized_messages(seed, count, hot_site=site, hot_consultation=consultation)

    even, site, consultation = make(0, 0), make(0.5, 0), make(0, 0.5)
    return [
        Case("even, partitions by consultation", 0, Setup(), even, 5_000, LOW_RATE_PER_S),
        Case("one site has half, partitions by consultation", 0, Setup(), site, 5_000, LOW_RATE_PER_S),
        Case("one consultation has half", 0, Setup(), consultation, 2_000, LOW_RATE_PER_S),
        Case("even, partitions by site", 0, by_site, even, 5_000, LOW_RATE_PER_S),
        Case("one site has half, partitions by site", 0, by_site, site, 5_000, LOW_RATE_PER_S),
    ]


def batch_cases() -> list[Case]:
    """1, 4, 16 and 64 events a message, at the same rate of events."""

    def make(batch: int) -> Make:
        return lambda seed, count: make_messages(seed, count, batch)

    return [
        Case(f"{batch} a message", batch, Setup(), make(batch), count, MIDDLE_RATE_PER_S / batch)
        for batch, count in BATCHES.items()
    ]


def stored_cases() -> list[Case]:
    """0 to a million events stored before, in a store that grows from one to the next."""
    steps = [size - before for before, size in zip((0, *STORED), STORED, strict=False)]
    return [
        Case(f"{size:,} stored", size, Setup(), _mixed, 10_000, MIDDLE_RATE_PER_S, backlog=step)
        for size, step in zip(STORED, steps, strict=True)
    ]


class Curve(NamedTuple):
    """What a curve is called and made of.

    Attributes:
        axis: name of what grows; empty where nothing does.
        cases: its points.
        note: how to read it.
    """

    axis: str
    cases: Callable[[], list[Case]]
    note: str


CURVES = {
    "workers": Curve(
        "processes of each stage",
        worker_cases,
        "8 partitions. All processes and servers share this machine's cores, so more processes than cores only cost.",
    ),
    "servers": Curve("replicas", server_cases, "All servers share this machine's cores and one disk."),
    "sizes": Curve("bytes of an event", size_cases, "100 consultations, one event a message."),
    "consultations": Curve(
        "consultations",
        consultation_cases,
        "Events of 1 KB. Of one consultation a gateway has one message in flight: with a single one, the rate is that "
        "of one acceptance after the other.",
    ),
    "hot": Curve(
        "",
        hot_cases,
        "100 consultations. As fast as it goes, a hot consultation is still being sent, one message after the other, "
        "when all others are done.",
    ),
    "batch": Curve("events a message", batch_cases, "The same rate of events in fewer and fuller messages."),
    "stored": Curve(
        "events stored before",
        stored_cases,
        "One store that grows, also by up to 15,000 measured events at each point. The fit leaves out 0.",
    ),
}


def row_figures() -> dict[str, tuple[str, Callable[[Row], float]]]:
    """Curves that are fitted and drawn: key → (name with its unit, the figure of a row)."""
    return {
        "rate": ("events/s, as fast as it goes", lambda row: float(row["full"]["events_per_s"])),
        "stages": ("CPU of the stages, µs an event", lambda row: stages_us(row["full"])),
        "servers": ("CPU of the servers, µs an event", lambda row: float(row["full"]["cpu_us"][SERVERS])),
    }


def fits(rows: Sequence[Row]) -> dict[str, Power | None]:
    """The power law of each of `row_figures` over the axis; None where there is no line to fit."""
    xs = [float(row["at"]) for row in rows]
    return {key: fit_power(xs, [figure(row) for row in rows]) for key, (_, figure) in row_figures().items()}


def present(curve: Curve, rows: Sequence[Row]) -> str:
    """The curve's table, fits and note."""
    lines = []
    for variant, ours in by_variant(rows).items():
        lines.append([variant, *cells(ours)])
    text = [markdown_table(["", *HEAD], lines)]
    if curve.axis:
        text += [f"Over {curve.axis}: {fit_words(rows)}.\n"]
    return "\n".join([*text, curve.note + "\n"])


def fit_words(rows: Sequence[Row]) -> str:
    """The fitted exponents, in words."""
    names = row_figures()
    found = [f"{names[key][0]}: {power}" for key, power in fits(rows).items() if power is not None]
    return "; ".join(found) or "too few points for a fit"


HEAD = (
    "paced at, messages/s",
    "accepted p95, ms",
    *(f"durable {name}, ms" for name in PERCENTILES),
    "stages, µs CPU an event",
    "servers, µs",
    "as fast as it goes, events/s",
    "stages, µs CPU an event",
    "servers, µs",
)
"""Of `cells`."""


def cells(rows: Sequence[Row]) -> list[str]:
    """Medians and spread of one case's repetitions, under `HEAD`."""
    paced, full = [row["paced"] for row in rows], [row["full"] for row in rows]
    return [
        f"{paced[0]['rate_per_s']:g}",
        spread([row["accepted_ms"]["p95"] for row in paced]),
        *(spread([row["durable_ms"][name] for row in paced]) for name in PERCENTILES),
        *_cpu_cells(paced),
        spread([row["events_per_s"] for row in full], 0),
        *_cpu_cells(full),
    ]


def _cpu_cells(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [spread([stages_us(row) for row in rows], 0), spread([row["cpu_us"][SERVERS] for row in rows], 0)]


def by_variant(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The repetitions of each case, in the order they were first seen in."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: float(row["at"])):
        found.setdefault(row["variant"], []).append(row)
    return found


def median_at(rows: Sequence[Row], figure: Callable[[Row], float]) -> dict[float, float]:
    """The median of a figure at each point of the axis."""
    points: dict[float, list[float]] = {}
    for row in rows:
        points.setdefault(float(row["at"]), []).append(figure(row))
    return {at: statistics.median(values) for at, values in sorted(points.items())}
