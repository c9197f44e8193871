"""All experiments by name: what measures each, what shows it, and the report made of their kept sections."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.experiments import ablation, capacity, ceilings, hashes, sequential, stores
from benchmarks.experiments.curves import CURVES
from benchmarks.experiments.curves import present as present_curve
from benchmarks.experiments.harness import Bench, Row, measure_cases
from benchmarks.experiments.plots import plot_ablation, plot_curve, plot_hashes

Rows = Sequence[Row]


class Experiment(NamedTuple):
    """One section of the report.

    Attributes:
        title: its heading.
        measure: gives its rows.
        present: rows → Markdown.
        plot: draws them into a file; None: there is no picture.
    """

    title: str
    measure: Callable[[Bench], Awaitable[list[Row]]]
    present: Callable[[Rows], str]
    plot: Callable[[Rows, Path], None] | None = None


def _curve(title: str, name: str) -> Experiment:
    curve = CURVES[name]

    async def measure(bench: Bench) -> list[Row]:
        return await measure_cases(bench, curve.cases())

    return Experiment(title, measure, partial(present_curve, curve), partial(plot_curve, curve) if curve.axis else None)


EXPERIMENTS: dict[str, Experiment] = {
    "sequential": Experiment("1,000 events one after the other", sequential.measure_sequential, sequential.present),
    "senders": Experiment("50 senders at the same time", sequential.measure_senders, sequential.present),
    "ceilings": Experiment("Ceilings: who publishes, and to what", ceilings.measure, ceilings.present),
    "storage": Experiment("Storage and append cost", stores.measure, stores.present),
    "hashes": Experiment("The audit hash and its alternatives", hashes.measure, hashes.present, plot_hashes),
    "workers": _curve("Processes of each stage", "workers"),
    "servers": _curve("Servers", "servers"),
    "sizes": _curve("Size of an event", "sizes"),
    "consultations": _curve("Consultations at the same time", "consultations"),
    "hot": _curve("A hot site, a hot consultation", "hot"),
    "batch": _curve("Events a message", "batch"),
    "stored": _curve("Events stored before", "stored"),
    "ablation": Experiment("Each choice switched off", ablation.measure, ablation.present, plot_ablation),
    "model": Experiment("What three nodes of 16 cores would carry", capacity.measure, capacity.present),
}
"""In the order they run and stand in the report; the model is fed by what comes before it."""


def picture_of(name: str) -> str:
    """The file name of an experiment's picture."""
    return f"full-{name}.png"


def as_markdown(sections: Mapping[str, Any]) -> str:
    """The report of all sections that are kept."""
    parts = [
        "# Experiments\n",
        "Written by `benchmarks/experiments`. Each section can be measured on its own and says when it was: `make "
        "bench-full` measures all. Figures are medians of the repetitions (least-greatest), which take turns. Latency "
        "at a rate is open loop: it counts from when a message was due. Processes, servers and the load generator "
        "share one machine. A fitted exponent is the slope of a straight line through logarithms, ± its standard "
        "error: 0 is flat, 1 is proportional.\n",
    ]
    for name, experiment in EXPERIMENTS.items():
        section = sections.get(name)
        if section is not None:
            parts += [f"## {experiment.title}\n", _conditions(section), experiment.present(section["rows"])]
            if experiment.plot is not None:
                parts.append(f"![{experiment.title}]({picture_of(name)})\n")
    return "\n".join(parts)


def _conditions(section: Mapping[str, Any]) -> str:
    environment = section["environment"]
    sync, trip = environment["fdatasync_4k_ms"], environment.get("round_trip_us")
    woken = f", to another core and back p50 {trip['p50']:.0f} µs" if trip else ""
    loop = environment.get("python_loop_ns")
    turned = f", a turn of a Python loop p50 {loop['p50']:.0f} ns" if loop else ""
    quick = " A quick run: the figures mean nothing." if section["quick"] else ""
    return (
        f"Taken {environment['taken']}: {environment['cpus']} CPUs ({environment['machine']}), load average "
        f"{environment['load_1_min']} before it began, kernel {environment['kernel']}, Python {environment['python']}, "
        f"{environment['nats_server']}, 4 KB fdatasync p50 {sync['p50']} ms, p95 {sync['p95']} ms{woken}{turned}; "
        f"{section['repetitions']} repetitions, {section['took_s']:,.0f} s.{quick}\n"
    )
