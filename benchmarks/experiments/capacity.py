"""The model as an experiment: fed with the kept batch curve, asked about three nodes of 16 cores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benchmarks.experiments.harness import Bench, Row
from benchmarks.experiments.model import Cluster, bounds, costs_from, predicted_here
from benchmarks.report import RESULTS, markdown_table

BATCHES = (1, 16)
PARTITIONS = (4, 8, 16, 32, 64)
KEPT = RESULTS / "latest.json"
SOURCE = "batch"
"""The experiment whose rows feed the model."""


async def measure(bench: Bench) -> list[Row]:
    """Measures nothing: one row with the fitted costs, the model's answers, and its check on this machine.

    Raises:
        RuntimeError: the batch curve was not measured.
    """
    kept = bench.kept.get(SOURCE)
    if kept is None:
        raise RuntimeError(f"the model is fed by the experiment {SOURCE!r}: run that first")
    environment, rows = kept["environment"], kept["rows"]
    costs = costs_from(rows, environment["fdatasync_4k_ms"]["p50"] / 1e3, bare_messages_per_s(KEPT))
    answers = [
        {
            "batch": batch,
            "partitions": partitions,
            "bounds": [msgspec.to_builtins(bound) for bound in bounds(costs, Cluster(partitions=partitions), batch)],
        }
        for batch in BATCHES
        for partitions in PARTITIONS
    ]
    check = predicted_here(rows, costs, environment["cpus"])
    return [{"costs": msgspec.to_builtins(costs), "answers": answers, "check": check, "fed_by": environment["taken"]}]


def bare_messages_per_s(path: Path) -> float | None:
    """What nothing but publishing to one replicated stream made in the kept `make bench`; None when it has none."""
    if not path.exists():
        return None
    rows = msgspec.json.decode(path.read_bytes()).get("throughput", [])
    found = [row["ceiling_events_per_s"] for row in rows if row.get("batch") == 1 and "ceiling_events_per_s" in row]
    return median(found) if found else None


def present(rows: Sequence[Row]) -> str:
    """Fitted costs, what each resource allows, what breaks first, and how the model does on this machine."""
    (row,) = rows
    cluster = Cluster()
    default = cluster.partitions
    parts = [
        f"Fed by the batch curve of {row['fed_by']}. The cluster: {cluster.nodes} nodes, each {cluster.cores} cores, "
        f"NVMe ({cluster.disk_bytes_per_s / 1e9:g} GB/s, fsync {cluster.fsync_s * 1e6:g} µs) and 10 GbE; at most "
        f"{cluster.use_max:.0%} of anything is used, and the busiest partition or node has {cluster.busiest:g} times "
        "the mean. Frames stay as full as they were measured.\n",
        _costs_table(row["costs"]),
        _answers_table(row["answers"]),
    ]
    for batch in BATCHES:
        answer = next(a for a in row["answers"] if (a["batch"], a["partitions"]) == (batch, default))
        parts += [f"With {default} partitions and {batch} events a message:\n", _bounds_table(answer["bounds"])]
    parts += ["The model against what it was made from, on this machine's cores, the load generator among them:\n"]
    lines = [[f"{c['batch']:g}", f"{c['predicted']:,.0f}", f"{c['measured']:,.0f}"] for c in row["check"]]
    parts += [markdown_table(["events a message", "predicted events/s", "measured"], lines)]
    return "\n".join(parts)


def _costs_table(costs: dict[str, Any]) -> str:
    def line(name: str, found: dict[str, float], factor: float) -> list[str]:
        at = [found["per_message"] / batch + found["per_event"] for batch in BATCHES]
        return [name, *(f"{value * factor:,.1f}" for value in (found["per_message"], found["per_event"], *at))]

    lines = [line(f"{stage}, µs CPU", found, 1e6) for stage, found in costs["stages"].items()]
    lines += [line("servers, µs CPU", costs["servers"], 1e6)]
    lines += [line("disk, bytes", costs["written"], 1), line("network, bytes", costs["network"], 1)]
    head = ["cost", "a message", "an event in it", *(f"an event at {batch} a message" for batch in BATCHES)]
    return markdown_table(head, lines)


def _answers_table(answers: Sequence[dict[str, Any]]) -> str:
    lines = []
    for answer in answers:
        first, second = answer["bounds"][:2]
        rate, sessions = f"{first['events_per_s']:,.0f}", f"{first['sessions_per_day']:,}"
        then = f"{second['resource']} at {second['events_per_s']:,.0f}"
        lines.append([str(answer["batch"]), str(answer["partitions"]), rate, sessions, first["resource"], then])
    return markdown_table(
        ["events a message", "partitions", "events/s", "sessions a day", "breaks first", "then"], lines
    )


def _bounds_table(found: Sequence[dict[str, Any]]) -> str:
    lines = [[bound["resource"], f"{bound['events_per_s']:,.0f}", bound["why"]] for bound in found]
    return markdown_table(["resource", "events/s at most", "because"], lines)
