"""What "the ceiling" depends on: who publishes to a bare stream, how, and what the stream has to do for it."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from nats.js.api import SubjectTransform

from benchmarks.ceiling import LIBRARY, STREAM, SUBJECTS, bare_stream, by_request, events_per_s, measure_library
from benchmarks.experiments.costs import LOAD, SERVERS, per_event, spent, stages_us
from benchmarks.experiments.harness import Bench, Row, Setup, running, warm_up
from benchmarks.load import IN_FLIGHT, Message, Pipeline, closed_loop, make_messages
from benchmarks.report import markdown_table, spread
from contracts.settings import Settings

MESSAGES = 30_000
OURS = "this pipeline, end to end to a durable record"
HEADLINE = "bare stream, our gateway's client: the headline's ceiling"

Measured = Callable[[Pipeline, Sequence[Message]], Awaitable[float]]
"""Publishes all messages; gives events a second."""


async def measure(bench: Bench) -> list[Row]:
    """Rows of ``{"turn", "variant", "events_per_s", "cpu_us"}``; the order changes from turn to turn."""
    rows = []
    setup = Setup()
    variants = list(_variants(setup.load()).items())
    async with running(bench.scratch / "pipeline", setup) as pipeline:
        await warm_up(bench, pipeline, _messages)
        for turn in range(bench.repetitions):
            messages = _messages(next(bench.seeds), bench.count(MESSAGES))
            at = turn % len(variants)
            for variant, publish_all in variants[at:] + variants[:at]:
                bench.say(f"turn {turn + 1} of {bench.repetitions}: {variant}")
                before = await spent(pipeline)
                rate = await publish_all(pipeline, messages)
                cost = per_event(before, await spent(pipeline), len(messages))
                rows.append({"turn": turn, "variant": variant, "events_per_s": round(rate), "cpu_us": cost["cpu_us"]})
    return rows


def _messages(seed: int, count: int) -> list[Message]:
    return make_messages(seed, count, 1)


def _variants(settings: Settings) -> dict[str, Measured]:
    transform = SubjectTransform(
        src=SUBJECTS, dest=f"bench.raw.{{{{partition({settings.partitions},1)}}}}.{{{{wildcard(1)}}}}"
    )
    return {
        OURS: _end_to_end,
        HEADLINE: _bare(),
        "… that has FI_EVENTS' partitions and limit": _bare(
            subject_transform=transform, max_bytes=settings.events_bytes_max, duplicate_window=settings.dedup_window_s
        ),
        "… without message ids, so that a retry is stored twice": _bare(ids=False),
        **{f"bare stream, nats-py's {way}, {IN_FLIGHT} under way": partial(measure_library, way) for way in LIBRARY},
    }


async def _end_to_end(pipeline: Pipeline, messages: Sequence[Message]) -> float:
    async with pipeline.tracked() as tracker:
        await closed_loop(pipeline, tracker, messages)
        return tracker.totals().settled / tracker.span_s()


def _bare(*, ids: bool = True, **differences: object) -> Measured:
    async def publish_all(pipeline: Pipeline, messages: Sequence[Message]) -> float:
        async with bare_stream(pipeline, **differences):
            return await events_per_s(messages, by_request(pipeline, ids=ids))

    return publish_all


def present(rows: Sequence[Row]) -> str:
    """A table of medians with their spread; how many times ours is of each is taken within a turn."""
    ours = {row["turn"]: row["events_per_s"] for row in rows if row["variant"] == OURS}
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in sorted(rows, key=lambda row: row["turn"])):
        found = [row for row in rows if row["variant"] == variant]
        lines.append(
            [
                variant,
                spread([row["events_per_s"] for row in found], 0),
                spread([ours[row["turn"]] / row["events_per_s"] for row in found], 2),
                *(
                    f"{statistics.median(cost(row) for row in found):.1f}"
                    for cost in (lambda row: row["cpu_us"][SERVERS], lambda row: row["cpu_us"][LOAD], stages_us)
                ),
            ]
        )
    head = [
        "one event a message, as fast as it is accepted",
        "events/s",
        "ours, of it",
        "CPU of servers, µs an event",
        "of the publisher",
        "of the stages",
    ]
    return markdown_table(head, lines) + "\n" + _NOTE


_NOTE = (
    f"All have the same messages, {IN_FLIGHT} under way at most over two connections to the same servers, three copies "
    f"and `sync_interval: always`. The stages are running throughout; `{STREAM}` has nothing behind it.\n"
)
