"""How many sessions a day a pipeline carries, and what runs out first, from what was measured. Pure.

DOMAIN, "sessions a day": workers × rate × 86,400 / events a session. Each resource bounds that rate in its own way; the
lowest bound is the capacity. What one event costs is taken to stay as it was measured, which is on the safe side:
frames take what waits, so an event costs less as load grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import msgspec

from contracts.errors import SettingsError

DAY_S: Final = 86_400
EVENTS_PER_SESSION: Final = 20
"""DOMAIN, "sessions a day"."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured while the pipeline carried `events_per_s`, and what there is. None: not known.

    Attributes:
        events_per_s: sustained, by one worker: a pipeline like the measured one.
        workers: how many of these there are.
        servers_cpus, stages_cpus: CPUs that servers and stages kept busy.
        cpus: CPUs there are.
        disk_write_bytes_per_s: written to the disk.
        disk_write_bytes_per_s_max: what the disk takes.
        stored_bytes_per_event: of an event in a sealed shard.
        free_bytes: for shards.
        keep_days: for so long shards stay on that disk.
        stream_bytes_per_event: of an event in its stream, on one server.
        stream_bytes_max: limit of each stream that must hold what comes in, by name.
        hold_s: for so long a stream must take everything while nothing is taken from it.
    """

    events_per_s: float
    workers: float = 1.0
    servers_cpus: float | None = None
    stages_cpus: float | None = None
    cpus: float | None = None
    disk_write_bytes_per_s: float | None = None
    disk_write_bytes_per_s_max: float | None = None
    stored_bytes_per_event: float | None = None
    free_bytes: float | None = None
    keep_days: float = 1.0
    stream_bytes_per_event: float | None = None
    stream_bytes_max: dict[str, float] = {}
    hold_s: float = 3600.0


class Bound(msgspec.Struct, frozen=True):
    """What one resource allows.

    Attributes:
        resource: ``workers``, ``cpu``, ``disk writes``, ``disk space`` or the name of a stream.
        events_per_s: the highest rate it carries; of disk space, the highest mean rate.
        sessions_per_day: the same, as sessions.
        why: the sum, in words.
    """

    resource: str
    events_per_s: float
    sessions_per_day: int
    why: str


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """The answer.

    Attributes:
        sessions_per_day, events_per_s: what all resources together carry.
        limited_by: the resource that runs out first.
        bounds: each resource that was measured, the tightest first.
        unknown: resources that nothing was given for.
        assumption: what the numbers rest on.
    """

    sessions_per_day: int
    events_per_s: float
    limited_by: str
    bounds: tuple[Bound, ...]
    unknown: tuple[str, ...]
    assumption: str


def capacity(measured: Measured, events_per_session: float = EVENTS_PER_SESSION, peak: float = 1.0) -> Capacity:
    """What `measured` makes possible.

    Args:
        events_per_session: at least so many events make one session.
        peak: rate of the busiest time over the day's mean; 1: the day is even, as in DOMAIN's formula.

    Raises:
        SettingsError: a number that is not above zero, a peak below 1, or more than can be counted.
    """
    _check(measured, events_per_session, peak)

    def bound(resource: str, events_per_s: float, why: str) -> Bound:
        mean = events_per_s / (1.0 if resource == _SPACE else peak)
        sessions_per_day = mean * DAY_S / events_per_session
        if not math.isfinite(sessions_per_day):
            raise SettingsError(f"{resource} ({why}): more than can be counted; look at the numbers' size")
        return Bound(resource, events_per_s, int(sessions_per_day), why)

    given = [bound(*found) for found in _bounds(measured)]
    bounds = tuple(sorted(given, key=lambda found: found.sessions_per_day))
    names = {found.resource for found in bounds}
    unknown = [name for name in (_CPU, _WRITES, _SPACE) if name not in names]
    if not measured.stream_bytes_max or measured.stream_bytes_per_event is None:
        unknown.append("streams")
    even = "at an even rate all day" if peak == 1 else f"with a busiest time of {peak:g} times the day's mean"
    return Capacity(
        sessions_per_day=bounds[0].sessions_per_day,
        events_per_s=bounds[0].events_per_s,
        limited_by=bounds[0].resource,
        bounds=bounds,
        unknown=tuple(unknown),
        assumption=f"{events_per_session:g} events a session, {even}, events as large as the measured ones",
    )


_CPU: Final = "cpu"
_WRITES: Final = "disk writes"
_SPACE: Final = "disk space"


def _bounds(measured: Measured) -> Iterator[tuple[str, float, str]]:
    """(resource, events a second, why) of each that was measured."""
    rate = measured.events_per_s
    yield "workers", measured.workers * rate, f"{measured.workers:g} × {rate:,.0f} events/s, sustained"
    if measured.cpus is not None and measured.servers_cpus is not None and measured.stages_cpus is not None:
        busy = measured.servers_cpus + measured.stages_cpus
        parts = f"servers {measured.servers_cpus:g} + stages {measured.stages_cpus:g}"
        yield _CPU, rate * measured.cpus / busy, f"{parts} of {measured.cpus:g} CPUs busy at {rate:,.0f} events/s"
    if measured.disk_write_bytes_per_s is not None and measured.disk_write_bytes_per_s_max is not None:
        used, most = measured.disk_write_bytes_per_s, measured.disk_write_bytes_per_s_max
        yield (
            _WRITES,
            rate * most / used,
            f"{used / 1e6:,.1f} of {most / 1e6:,.1f} MB/s written at {rate:,.0f} events/s",
        )
    if measured.free_bytes is not None and measured.stored_bytes_per_event is not None:
        events = measured.free_bytes / measured.stored_bytes_per_event
        size = f"{measured.stored_bytes_per_event:,.0f} B"
        words = f"room for {events:,.0f} events of {size}, kept {measured.keep_days:g} days"
        yield _SPACE, events / (measured.keep_days * DAY_S), words
    if measured.stream_bytes_per_event is not None:
        for stream, limit in measured.stream_bytes_max.items():
            events = limit / measured.stream_bytes_per_event
            yield (
                stream,
                events / measured.hold_s,
                f"holds {events:,.0f} events, all that come in {measured.hold_s:,.0f} s",
            )


def _check(measured: Measured, events_per_session: float, peak: float) -> None:
    numbers = {
        name: value for name, value in msgspec.structs.asdict(measured).items() if isinstance(value, int | float)
    }
    numbers |= {f"stream_bytes_max of {name}": value for name, value in measured.stream_bytes_max.items()}
    for name, value in {**numbers, "events_per_session": events_per_session}.items():
        if not 0 < value < float("inf"):
            raise SettingsError(f"{name} = {value:g}: must be a number above 0")
    if not 1 <= peak < float("inf"):
        raise SettingsError(f"peak = {peak:g}: the busiest time has at least the day's mean rate: 1 or more")
