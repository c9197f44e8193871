"""The result of ``python -m benchmarks`` as Markdown. Pure: figures in, text out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.baselines.designs import DESIGNS
from benchmarks.baselines.measure import BEHIND_S, WINDOW
from benchmarks.latency import RATES_PER_S
from benchmarks.report import markdown_table, spread
from contracts.subjects import STAGES

GOALS: tuple[tuple[str, str, float, bool], ...] = (
    ("one event a message, of the ceiling", "single_vs_ceiling", 0.75, True),
    ("… times the classic chain", "vs_classic", 30, True),
    ("… times the tuned chain", "vs_tuned", 3, True),
    ("… times Redis Streams", "vs_redis", 8, True),
    ("16 events a message, events/s", "batched_events_per_s", 40_000, True),
    ("a backlog of 100,000 drains, events/s", "drain_events_per_s", 80_000, True),
    ("durable p95 at 200/s, ms", "durable_p95_ms.200", 8, False),
    ("durable p95 at 500/s, ms", "durable_p95_ms.500", 15, False),
    ("durable p95 at 2,000/s, ms", "durable_p95_ms.2000", 30, False),
    ("accepted p95 at 200/s, ms", "accepted_p95_ms", 5, False),
    ("p99 / p95 at 200/s", "p99_over_p95.200", 2, False),
    ("p99 / p95 at 500/s", "p99_over_p95.500", 2, False),
    ("p99 / p95 at 2,000/s", "p99_over_p95.2000", 2, False),
)
"""(words, headline figure, goal, whether more is better): what the pipeline is held to."""
OURS_TITLE = "this pipeline, one event a message"
OURS_KILLED = OURS_POWER = "nothing committed"

Rows = list[dict[str, Any]]


def as_markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    parts = [
        "# Speed: this pipeline, its ceiling and the alternatives, in one run",
        _method(result),
        "![sustained rates and latency](latest.png)",
        "## Goals",
        _goals(result),
        "## Beside the alternatives",
        _alternatives(result),
        "## Latency, one event a message",
        "Open loop: from the moment a message was due. Median of the repetitions (least-greatest).\n",
        _latency(result["latency"]),
        "## Sustained rate and ceiling",
        "The ceiling is nothing but publishing the same messages to one R3 file stream, as many at once.\n",
        _throughput(result["throughput"]),
        "## A backlog",
        _drain(result["drain"]),
        "## What 1,000 events cost",
        _costs(result),
        "## Since the result kept before",
        _before(result["before"]),
        "## Environment",
        _environment(result["environment"]),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _method(result: dict[str, Any]) -> str:
    seconds = result["took_s"]
    return (
        "Three nats-server processes with `sync_interval: always`, streams R3, four stage processes and the load "
        "generator share this machine. Ours, the ceiling and the alternatives take turns; our stages are stopped while "
        "an alternative is measured. Events are made up (`cluster.workload`), about 0.5 KB. An alternative's rate is "
        f"what came out of it in a fixed time with {WINDOW:,} events under way at most; where more than {BEHIND_S:g} s "
        f"of a load are still under way it falls behind. The run took {seconds:,.0f} s."
    )


def _goals(result: dict[str, Any]) -> str:
    rows = []
    for words, figure, goal, more in GOALS:
        found = figure_of(result["headline"], figure)
        met = "not measured" if found is None else "yes" if (found >= goal if more else found <= goal) else "no"
        bound = f"{'at least' if more else 'at most'} {goal:,g}"
        rows.append([words, bound, "" if found is None else f"{found:,g}", met])
    return markdown_table(["figure", "goal", "found", "met"], rows)


def figure_of(headline: dict[str, Any], name: str) -> float | None:
    """A headline figure by its name, e.g. ``durable_p95_ms.200``; None where there is none."""
    value: Any = headline
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None


def _alternatives(result: dict[str, Any]) -> str:
    ours = [row["events_per_s"] for row in result["throughput"] if row["batch"] == 1]
    rows = [[OURS_TITLE, spread(ours, 0), "1", *_ours_at(result["latency"]), OURS_KILLED, OURS_POWER]] if ours else []
    for name, design in DESIGNS.items():
        visits = [row for row in result["baselines"] if row["design"] == name]
        missing = [row["failed"] for row in visits if "failed" in row]
        rates = [row["events_per_s"] for row in visits if "events_per_s" in row]
        if rates:
            times = f"{statistics.median(ours) / statistics.median(rates):,.1f}" if ours else ""
            cells = [spread(rates, 0), times, *_theirs_at(visits)]
        elif missing:
            cells = [missing[0], "", "", ""]
        else:
            continue
        rows.append([design.title, *cells, design.killed, design.power])
    head = ["end to end to a record", "events/s", "ours, times", "p50/p95/p99 ms at 200/s", "at 500/s"]
    return markdown_table([*head, "a process killed: lost", "power cut: lost"], rows)


def _ours_at(latency: Rows) -> list[str]:
    return [_three(_medians(latency, rate, "durable_ms")) for rate in (200, 500)]


def _theirs_at(visits: Rows) -> list[str]:
    cells = []
    for rate in (200, 500):
        tried = [row for visit in visits for row in visit.get("latency", ())]
        found = next((row for row in tried if row["rate_per_s"] == rate), None)
        if found is None:
            cells.append("falls behind" if any(row["falls_behind"] for row in tried) else "")
        else:
            cells.append("falls behind" if found["falls_behind"] else _three(found["durable_ms"]))
    return cells


def _three(values: dict[str, float]) -> str:
    return "/".join(f"{values[name]:,.1f}" for name in ("p50", "p95", "p99")) if values else ""


def _medians(rows: Rows, rate: int, kind: str) -> dict[str, float]:
    at = [row[kind] for row in rows if row["rate_per_s"] == rate]
    return {name: statistics.median(row[name] for row in at) for name in at[0]} if at else {}


def _latency(rows: Rows) -> str:
    lines = []
    for rate in RATES_PER_S:
        at = [row for row in rows if row["rate_per_s"] == rate]
        if at:
            cells = [
                spread([row[kind][p] for row in at])
                for kind in ("accepted_ms", "durable_ms")
                for p in ("p50", "p95", "p99")
            ]
            tail = spread([row["durable_ms"]["p99"] / row["durable_ms"]["p95"] for row in at], 2)
            lines.append([f"{rate:,}", *cells, tail])
    head = ["events/s", "accepted p50, ms", "p95", "p99", "durable p50, ms", "p95", "p99", "p99 / p95"]
    return markdown_table(head, lines)


def _throughput(rows: Rows) -> str:
    lines = []
    for batch in sorted({row["batch"] for row in rows}):
        of = [row for row in rows if row["batch"] == batch]
        ratio = spread([row["events_per_s"] / row["ceiling_events_per_s"] for row in of], 2)
        rates = [spread([row[kind] for row in of], 0) for kind in ("events_per_s", "ceiling_events_per_s")]
        lines.append([str(batch), *rates, ratio])
    text = markdown_table(["events a message", "events/s, send to receipt", "ceiling, events/s", "ratio"], lines)
    single = [row for row in rows if row["batch"] == 1]
    if not single:
        return text
    ways: list[list[str]] = []
    for way in single[0]["library_events_per_s"]:
        found: list[float] = [row["library_events_per_s"][way] for row in single]
        ratio = spread([row["events_per_s"] / rate for row, rate in zip(single, found, strict=True)], 2)
        ways.append([f"nats-py's `{way}`", spread(found, 0), ratio])
    head = ["who publishes to the bare stream, one event a message", "events/s", "ours, end to end, of it"]
    return f"{text}\nThe ceiling's client is our gateway's. With the library's own, as many messages at once:\n\n" + (
        markdown_table(head, ways)
    )


def _drain(rows: Rows) -> str:
    if not rows:
        return "Not measured."
    text = (
        "Published with persist paused, until all of it waits in front of persist; then from the command to resume to "
        "the last receipt seen. The checker held every event against the shards.\n\n"
    )
    lines = [
        [
            f"{row['events']:,}",
            str(row["batch"]),
            f"{row['gathered_per_s']:,.0f}",
            f"{row['drained_s']:.2f}",
            f"{row['drained_per_s']:,.0f}",
            f"{row['checked']['lost']}, {row['checked']['duplicated']}, {row['checked']['reordered']}",
        ]
        for row in rows
    ]
    head = ["events", "a message", "gathered, events/s", "drained in, s", "events/s", "lost, doubled, reordered"]
    return text + markdown_table(head, lines)


def _costs(result: dict[str, Any]) -> str:
    loads: list[tuple[str, Rows]] = [
        (f"{rate:,}/s", [row["costs"] for row in result["latency"] if row["rate_per_s"] == rate])
        for rate in RATES_PER_S
    ]
    for batch in sorted({row["batch"] for row in result["throughput"]}):
        title = f"full speed, {batch} a message"
        loads.append((title, [row["costs"] for row in result["throughput"] if row["batch"] == batch]))
    loads = [(title, rows) for title, rows in loads if rows]
    if not loads:
        return "Not measured."
    lines = [[words, *(_middle(rows, of) for _, rows in loads)] for words, of in _cost_lines(loads)]
    text = markdown_table(["for 1,000 events", *(title for title, _ in loads)], lines)
    memory = result["throughput"][-1]["costs"]["resident_bytes"] if result["throughput"] else {}
    resident = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in memory.items())
    text += f"\nResident memory at the end, MB: {resident}.\n" if resident else ""
    text += "\nWhat the disk was written is the whole machine's, new live shards (zero-filled whole) included.\n"
    for idle in result["idle"]:
        per = idle["per_second"]
        text += (
            f"\nWith nothing published, each second: {per['cpu_s']['pipeline'] * 1e3:,.0f} ms of CPU, "
            f"{(per['disk_bytes'] or 0) / 1e3:,.0f} KB written to the disk, {per['raft_entries']:,.1f} Raft entries.\n"
        )
    return text


Cost = Callable[[dict[str, Any]], float]


def _cost_lines(loads: list[tuple[str, Rows]]) -> Iterable[tuple[str, Cost]]:
    def cpu(kind: str) -> Cost:
        return lambda row: row["cpu_s"][kind] * 1e3

    def messages(stream: str) -> Cost:
        return lambda row: row["messages"][stream]

    yield "CPU of all but the load generator, ms", cpu("pipeline")
    for kind in ("servers", *STAGES):
        yield f"CPU of {kind}, ms", cpu(kind)
    yield "CPU of the load generator, ms", cpu("load")
    if loads[0][1][0]["disk_bytes"] is not None:
        yield "written to the disk, KB", lambda row: row["disk_bytes"] / 1e3
    for stream in loads[0][1][0]["messages"]:
        yield f"messages into {stream}", messages(stream)
    yield "Raft entries", lambda row: row["raft_entries"]
    yield "sent by all clients to the servers, KB", lambda row: row["received_bytes"] / 1e3


def _middle(rows: Rows, of: Cost) -> str:
    value = statistics.median(map(of, rows))
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def _before(before: dict[str, Any]) -> str:
    taken = before["environment"].get("taken")
    if not before["compared"] or taken is None:
        return "There was none."
    lines = [
        [row["figure"], *("" if row[key] is None else f"{row[key]:,g}" for key in ("old", "new", "ratio"))]
        for row in before["compared"]
    ]
    return f"Kept: {taken}.\n\n" + markdown_table(["figure", "kept", "now", "now / kept"], lines)


def _environment(environment: dict[str, Any]) -> str:
    return markdown_table(["what", "value"], ([name, str(value)] for name, value in environment.items()))
