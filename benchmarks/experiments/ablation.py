"""Each of our choices switched off, one at a time: what it is worth, as ratios to the pipeline as it is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.experiments.costs import SERVERS, stages_us
from benchmarks.experiments.curves import MIDDLE_RATE_PER_S, by_variant
from benchmarks.experiments.harness import Bench, Case, Row, Setup, measure_cases
from benchmarks.load import Message, make_messages
from benchmarks.report import markdown_table
from contracts.frames import FRAME_BYTES_MAX
from stages.persist.keys import create_key

BASE = "as it is"
MESSAGES = 10_000
SLOW_MESSAGES = 2_000
"""For what makes every event a message of its own on every hop."""
_KEY = "signing_key_file"


class Change(NamedTuple):
    """One choice turned round.

    Attributes:
        name: for the table.
        setup: the pipeline with it.
        about: what the choice is for.
        messages: offered as fast as they are accepted.
        batch: events in each.
    """

    name: str
    setup: Setup
    about: str
    messages: int = MESSAGES
    batch: int = 1


def _with(**settings: object) -> Setup:
    return Setup(tuple(settings.items()))


CHANGES = (
    Change(BASE, Setup(), "P = 1, hops in memory, R3, sync always, one event a message"),
    Change("hop streams in files", _with(hop_storage="file"), "hops hold derived data, so they may be in memory"),
    Change(
        "one message a frame",
        _with(frame_events_max=1),
        "frames take whatever waits",
        SLOW_MESSAGES,
    ),
    Change(
        "one message asked for at a time",
        _with(pull_batch=1, pull_batch_hop=1),
        "a standing request, topped up, instead of one request a message",
        SLOW_MESSAGES,
    ),
    Change("frames not paced", _with(frame_gap_s=0.0), "frames begin 8 ms apart while they gather company"),
    Change("frames not deflated", _with(frame_deflate_bytes_min=FRAME_BYTES_MAX + 1), "frames from 16 KB on are"),
    Change("4 partitions", _with(partitions=4), "lanes overlap their waits for acceptance; frames are emptier"),
    Change("8 partitions", _with(partitions=8), "the same, more so"),
    Change("16 events a message", Setup(), "what gateways can do themselves", MESSAGES // 4, 16),
    Change("4 partitions, 4 processes of each stage", Setup((("partitions", 4),), 4), "a process for each partition"),
    Change("streams not replicated", _with(replicas=1), "R3: a lost server loses nothing. Not safe"),
    Change("servers sync every 2 minutes", Setup(lazy=True), "sync always: a power cut loses nothing. Not safe"),
    Change("no fdatasync in persist", Setup(switches=("no-fdatasync",)), "a commit is on disk. Not safe"),
    Change("asyncio's own event loop", Setup(switches=("no-uvloop",)), "uvloop"),
    Change("no garbage collection", Setup(switches=("no-gc",)), "how much all collections cost; memory may grow"),
    Change("garbage collected rarely", Setup(switches=("rare-gc",)), "thresholds 50,000, 20, 50"),
    Change("metrics on", _with(health_port=0), "the health port and its instruments; off unless asked for"),
    Change("receipts signed", _with(**{_KEY: _KEY}), "Ed25519 on every receipt; off unless a key is given"),
)


def _make(batch: int) -> Callable[[int, int], list[Message]]:
    return lambda seed, count: make_messages(seed, count, batch)


def cases(key_file: str) -> list[Case]:
    """A case for each of `CHANGES`; `key_file` is to sign with."""
    made = []
    for change in CHANGES:
        settings = tuple((name, key_file if name == _KEY else value) for name, value in change.setup.settings)
        setup = change.setup._replace(settings=settings)
        rate = MIDDLE_RATE_PER_S / change.batch
        made.append(Case(change.name, 0, setup, _make(change.batch), change.messages, rate))
    return made


async def measure(bench: Bench) -> list[Row]:
    """Rows as `harness.measure_case` gives them."""
    key_file = bench.scratch / "signing.pem"
    create_key(key_file)
    return await measure_cases(bench, cases(str(key_file)))


FIGURES: dict[str, Callable[[Row], float]] = {
    "durable p50 at 500/s, ms": lambda row: float(row["paced"]["durable_ms"]["p50"]),
    "p95": lambda row: float(row["paced"]["durable_ms"]["p95"]),
    "accepted p95": lambda row: float(row["paced"]["accepted_ms"]["p95"]),
    "events/s": lambda row: float(row["full"]["events_per_s"]),
    "stages, µs CPU an event": lambda row: stages_us(row["full"]),
    "servers, µs": lambda row: float(row["full"]["cpu_us"][SERVERS]),
}
"""Columns of the table, by their heads."""


def ratios(rows: Sequence[Row], figure: Callable[[Row], float]) -> dict[str, float]:
    """For each variant, the median of its ratios to `BASE` within each turn."""
    base = {row["turn"]: figure(row) for row in rows if row["variant"] == BASE}
    found = {}
    for variant, ours in by_variant(rows).items():
        found[variant] = statistics.median(figure(row) / base[row["turn"]] for row in ours if base[row["turn"]] > 0)
    return found


def present(rows: Sequence[Row]) -> str:
    """Every figure with its ratio to the pipeline as it is."""
    variants = by_variant(rows)
    all_ratios = {name: ratios(rows, figure) for name, figure in FIGURES.items()}
    lines = []
    for change in CHANGES:
        ours = variants.get(change.name)
        if ours is None:
            continue
        cells = []
        for name, figure in FIGURES.items():
            middle = statistics.median(map(figure, ours))
            cells.append(f"{middle:,.{0 if middle >= 100 else 1}f} (× {all_ratios[name][change.name]:.2f})")
        lines.append([change.name, *cells, change.about])
    head = ["with", *FIGURES, "what it is about"]
    note = "In brackets: the median ratio to the pipeline as it is, measured in the same turn. 500/s are events.\n"
    return markdown_table(head, lines) + "\n" + note
