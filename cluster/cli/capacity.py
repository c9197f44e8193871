"""`fictl capacity`: sessions a day from measured rates, and what runs out first."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from cluster.cli.common import JsonOption, above_zero, console, make_table, print_json
from contracts.errors import SettingsError
from contracts.subjects import EVENTS
from stages.persist.files import read_small

if TYPE_CHECKING:
    from cluster.capacity import Capacity, Measured

_SENT = "events_per_s_batch_"
_number = partial(typer.Option, callback=above_zero)
"""An option that takes a measured number."""


def capacity(
    rate: Annotated[float | None, _number("--rate", help="Sustained events/s, measured.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="What `make bench` wrote, instead of --rate.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="With --from: the rate at so many events a message.")] = 1,
    workers: Annotated[float, _number(help="Pipelines like the measured one, side by side.")] = 1.0,
    servers_cpus: Annotated[float | None, _number(help="CPUs the servers kept busy at that rate.")] = None,
    stages_cpus: Annotated[float | None, _number(help="CPUs the stages kept busy at that rate.")] = None,
    cpus: Annotated[float | None, _number(help="CPUs there are. With --from: the measured machine's.")] = None,
    disk_write: Annotated[float | None, _number(help="Bytes/s written to the disk at that rate.")] = None,
    disk_write_max: Annotated[float | None, _number(help="Bytes/s the disk takes.")] = None,
    free: Annotated[float | None, _number(help="Free bytes for shards.")] = None,
    stored_bytes: Annotated[float | None, _number(help="Bytes of an event in a sealed shard.")] = None,
    keep_days: Annotated[float, _number(help="How long shards stay on that disk.")] = 1.0,
    event_bytes: Annotated[float | None, _number(help="Bytes of an event in its stream.")] = None,
    stream: Annotated[
        list[str] | None, typer.Option(metavar="NAME=BYTES", help="Limit of a stream; repeatable.", show_default=False)
    ] = None,
    hold_s: Annotated[float, _number(help="Seconds a stream must hold while nothing is taken from it.")] = 3600.0,
    session_events: Annotated[float, _number(help="Events a session.")] = 20.0,
    peak: Annotated[float, _number(help="Rate of the busiest time over the day's mean.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Says how many sessions a day a measured pipeline carries, and which resource runs out first.

    workers × rate × 86,400 / events a session. CPU, disk and streams bound the rate too when their numbers are given;
    those that are not are named. --from has CPUs, bytes written and bytes of an event in FI_EVENTS; what else is given
    counts instead.

    Example: fictl capacity --from benchmarks/results/latest.json --free 500e9 --stored-bytes 279 --keep-days 30
    """
    from cluster.capacity import Measured
    from cluster.capacity import capacity as work_out

    if (rate is None) == (source is None):
        raise SettingsError(
            "give either --rate EVENTS_PER_S or --from FILE, e.g. --from benchmarks/results/latest.json"
        )
    given = {
        "servers_cpus": servers_cpus,
        "stages_cpus": stages_cpus,
        "cpus": cpus,
        "disk_write_bytes_per_s": disk_write,
        "stream_bytes_per_event": event_bytes,
    }
    measured = read_benchmark(source, batch) if source is not None else Measured(events_per_s=rate or 0.0)
    measured = msgspec.structs.replace(
        measured,
        **{name: value for name, value in given.items() if value is not None},
        workers=workers,
        disk_write_bytes_per_s_max=disk_write_max,
        stored_bytes_per_event=stored_bytes,
        free_bytes=free,
        keep_days=keep_days,
        stream_bytes_max=parse_limits(stream or []),
        hold_s=hold_s,
    )
    found = work_out(measured, session_events, peak)
    if as_json:
        print_json(found)
    else:
        _show(found)


def _show(found: Capacity) -> None:
    table = make_table("resource", "events/s", "sessions a day", "because")
    for bound in found.bounds:
        table.add_row(bound.resource, f"{bound.events_per_s:,.0f}", f"{bound.sessions_per_day:,}", bound.why)
    out = console()
    out.print(table)
    out.print(f"{found.sessions_per_day:,} sessions a day. Runs out first: {found.limited_by}.")
    out.print(f"Assumed: {found.assumption}.")
    if found.unknown:
        out.print(f"Not known, so not counted: {', '.join(found.unknown)}.")


def read_benchmark(path: Path, batch: int) -> Measured:
    """What `make bench` found at full speed with `batch` events a message: rate, CPU, disk, bytes; medians.

    Raises:
        SettingsError: it is no such file, or that rate was not measured.
        OSError: it cannot be read.
    """
    from cluster.capacity import Measured

    try:
        result: dict[str, Any] = msgspec.json.decode(read_small(path), type=dict[str, Any])
        headline, cpus = result["headline"], float(result["environment"]["cpus"])
        rates = {int(name[len(_SENT) :]): float(headline[name]) for name in headline if name.startswith(_SENT)}
        turns = [turn["costs"] for turn in result["throughput"] if turn["batch"] == batch]
        # Costs are of 1,000 events; those of the pipeline are of servers and stages.
        servers, all_cpus, disk, stored = (
            statistics.median(map(read, turns)) / 1000 if turns else 0.0
            for read in (
                lambda costs: float(costs["cpu_s"]["servers"]),
                lambda costs: float(costs["cpu_s"]["pipeline"]),
                lambda costs: float(costs["disk_bytes"]),
                lambda costs: float(costs["bytes"].get(EVENTS, 0.0)),
            )
        )
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        raise SettingsError(f"{path}: not what `make bench` writes ({type(error).__name__}: {error})") from None
    if batch not in rates:
        known = ", ".join(map(str, sorted(rates))) or "none"
        raise SettingsError(f"--batch {batch}: {path} has rates for these numbers of events a message: {known}")
    rate = rates[batch]
    return Measured(
        events_per_s=rate,
        servers_cpus=round(servers * rate, 3) or None,
        stages_cpus=round((all_cpus - servers) * rate, 3) or None,
        cpus=cpus,
        disk_write_bytes_per_s=disk * rate or None,
        stream_bytes_per_event=stored or None,
    )


def parse_limits(texts: list[str]) -> dict[str, float]:
    """``["FI_EVENTS=4e9"]`` → ``{"FI_EVENTS": 4e9}``. Raises `SettingsError` for what is not of that form."""
    limits = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            limits[name] = float(number)
        except ValueError:
            raise SettingsError(f"--stream {text}: write NAME=BYTES, e.g. --stream FI_EVENTS=4e9") from None
    return limits
