"""One sender, and many: latency of 1,000 events one after the other, and of 50 senders that each wait for their own."""

from __future__ import annotations

import asyncio
import statistics
from array import array
from collections.abc import Sequence
from typing import Any

from benchmarks.experiments.harness import Bench, Row, Setup, running, warm_up
from benchmarks.experiments.messages import sized_messages
from benchmarks.experiments.sources import ACCEPTED_MS, DURABLE_MS, percentiles
from benchmarks.load import Message, Pipeline, make_messages, settle
from benchmarks.report import markdown_table, spread
from cluster.gateway import Gateway
from cluster.track import Tracker, percentiles_ms

EVENTS = 1_000
SENDERS = 50
SENDER_EVENTS = 400
PERCENTILES = ("p50", "p95", "p99")
_KINDS = ("accepted_ms", "durable_ms")
ACCEPTED, DURABLE = "the one before is accepted", "the one before is durable"


def _by_batch(seed: int, count: int) -> list[Message]:
    return make_messages(seed, count, 1)


async def measure_sequential(bench: Bench) -> list[Row]:
    """Rows of ``{"variant", "accepted_ms", "durable_ms", "events_per_s"}``."""
    rows = []
    async with running(bench.scratch / "pipeline", Setup()) as pipeline:
        await warm_up(bench, pipeline, _by_batch)
        for turn in range(bench.repetitions):
            for variant in (ACCEPTED, DURABLE):
                bench.say(f"turn {turn + 1} of {bench.repetitions}: the next is sent when {variant}")
                messages = _by_batch(next(bench.seeds), bench.count(EVENTS))
                rows.append({"turn": turn, "variant": variant, **await _measure(pipeline, [messages], variant)})
    return rows


async def measure_senders(bench: Bench) -> list[Row]:
    """As `measure_sequential`, of `SENDERS` connections at the same time; each waits for its own acceptance."""
    rows = []
    async with running(bench.scratch / "pipeline", Setup(), SENDERS) as pipeline:
        await warm_up(bench, pipeline, _by_batch)
        for turn in range(bench.repetitions):
            bench.say(f"turn {turn + 1} of {bench.repetitions}")
            count = bench.count(SENDER_EVENTS)
            lanes = [sized_messages(next(bench.seeds), count, consultations=1) for _ in range(SENDERS)]
            variant = f"{SENDERS} senders, events of 1 KB"
            rows.append({"turn": turn, "variant": variant, **await _measure(pipeline, lanes, ACCEPTED)})
    return rows


async def _measure(pipeline: Pipeline, lanes: Sequence[Sequence[Message]], until: str) -> dict[str, Any]:
    """One sender and connection for each lane, which sends its next message when the one before is `until`."""
    latencies = array("q")

    async def send(gateway: Gateway, lane: Sequence[Message], tracker: Tracker) -> None:
        for message in lane:
            accepted = await gateway.publish(message.data, message.site, message.consultation, message.message_id)
            latencies.append(accepted.latency_ns)
            pipeline.note(tracker, message, accepted, accepted.sent_ns)
            if until == DURABLE:
                await settle(tracker)

    async with pipeline.tracked() as tracker:
        async with asyncio.TaskGroup() as tasks:
            for gateway, lane in zip(pipeline.gateways, lanes, strict=False):
                tasks.create_task(send(gateway, lane, tracker))
        await settle(tracker)
        return {
            "accepted_ms": percentiles_ms(latencies),
            "durable_ms": percentiles_ms(tracker.durable_ns()),
            "events_per_s": round(tracker.totals().settled / tracker.span_s(), 1),
        }


def present(rows: Sequence[Row]) -> str:
    """A table of medians with their spread, the sources' figures last."""
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        ours = [row for row in rows if row["variant"] == variant]
        cells = [spread([row[kind][name] for row in ours], 2) for kind in _KINDS for name in PERCENTILES]
        lines.append([variant, *cells, spread([row["events_per_s"] for row in ours], 0)])
    theirs = [f"{figures[name]:g}" for figures in (ACCEPTED_MS, DURABLE_MS) for name in PERCENTILES]
    lines.append(["source documents", *theirs, "–"])
    head = ["sent when", "accepted p50, ms", "p95", "p99", "durable p50, ms", "p95", "p99", "events/s"]
    return markdown_table(head, lines) + "\n" + _verdict(rows)


def _verdict(rows: Sequence[Row]) -> str:
    text = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        ours = [row for row in rows if row["variant"] == variant]
        for kind, theirs in zip(_KINDS, (ACCEPTED_MS, DURABLE_MS), strict=True):
            figures = {name: statistics.median(row[kind][name] for row in ours) for name in PERCENTILES}
            holds = all(figures[name] <= theirs[name] for name in PERCENTILES)
            word = "within" if holds else "**not** within"
            text.append(f"{variant}, {kind.removesuffix('_ms')}: {word} {percentiles(theirs)} ms.")
    return "  \n".join(text) + "\n"
