"""Telemetry that is on: the catalogue's instruments, and the probes that feed them.

What is recorded is kept in plain numbers, which whoever collects is given: `/metrics` writes them as text, and
`stages.runtime.otlp` makes them OpenTelemetry's. (Its SDK's own histogram takes 4 to 8 µs for a value, 33 µs for all
that one frame records; this takes a tenth.) Sums are cumulative, so any number may ask.
"""

from __future__ import annotations

import os
import resource as os_resource
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from contracts.subjects import Stage
from contracts.telemetry import (
    BACKPRESSURE_AGE,
    BACKUP_AGE,
    BREAKER_OPEN,
    BREAKER_TRIPS,
    BUFFER_SIZE,
    CATALOGUE,
    CIRCUIT_STATE,
    CONSUMER_LAG,
    CPU_TIME,
    EVENTS_FAILED,
    LANES,
    MEMORY_USAGE,
    MESSAGES_UNREADABLE,
    ORIGIN_REACHED,
    PAPER_DUE,
    QUEUE_BYTES,
    QUEUE_LENGTH,
    QUEUE_LIMIT,
    QUEUE_PENDING,
    STORAGE_FREE,
    STORAGE_SIZE,
    TARGET_DISK,
    Instrument,
)
from stages.runtime.circuit import Circuit, CircuitState
from stages.runtime.expiry import Paper
from stages.runtime.instruments import Counter, Family, Histogram
from stages.runtime.probes import LaneMeter, ReaderMeter, WriterMeter
from stages.runtime.telemetry import (
    LaneProbe,
    ReaderProbe,
    Readings,
    StreamFacts,
    Telemetry,
    Tripping,
    WriterProbe,
)

if TYPE_CHECKING:
    from stages.runtime.tracing import Tracer

_Attributes = tuple[tuple[str, str], ...]
_CIRCUIT_VALUES: Final[dict[CircuitState, float]] = {"closed": 0.0, "half-open": 0.5, "open": 1.0}


class Meters(Telemetry):
    """The instruments of one process.

    Attributes:
        lanes: the lanes that are there, by stage and partition.
        streams: what was last heard of the streams, by name. Kept by `stages.runtime.watch`.
        storage_free_bytes, storage_size_bytes: where the shards lie; None when there is no store.
        backed_up_ns: until when the store is copied to another disk; None when it is not, or there is none.
        papers: certificates and credentials, as `stages.runtime.expiry.papers_of`.
        tracer: makes spans; None when nothing takes them.
        begun_ns: since when sums are counted.
    """

    def __init__(self) -> None:
        self.lanes: dict[tuple[Stage, int], LaneMeter] = {}
        self.streams: dict[str, StreamFacts] = {}
        self.storage_free_bytes: int | None = None
        self.storage_size_bytes: int | None = None
        self.backed_up_ns: int | None = None
        self.papers: dict[str, Paper] = {}
        self.tracer: Tracer | None = None
        self._counters: dict[str, dict[_Attributes, Counter]] = {name: {} for name in CATALOGUE}
        self._writers: dict[str, WriterMeter] = {}
        self._circuits: dict[str, Circuit] = {}
        self._reads: dict[str, Callable[[], Readings]] = {}
        self._histograms: dict[str, dict[_Attributes, Histogram]] = {name: {} for name in CATALOGUE}
        self.begun_ns = time.time_ns()
        for gauge, read in (
            (QUEUE_LENGTH, lambda: self._stream_readings(0)),
            (QUEUE_BYTES, lambda: self._stream_readings(1)),
            (QUEUE_LIMIT, lambda: self._stream_readings(2)),
            (QUEUE_PENDING, lambda: self._lane_sums(LaneMeter.lag)),
            (BUFFER_SIZE, lambda: self._lane_sums(LaneMeter.buffered)),
            (CONSUMER_LAG, self._read_lags),
            (ORIGIN_REACHED, self._read_origins),
            (LANES, self._read_lanes),
            (BACKPRESSURE_AGE, self._read_holds),
            (STORAGE_FREE, lambda: _one(self.storage_free_bytes)),
            (STORAGE_SIZE, lambda: _one(self.storage_size_bytes)),
            (BACKUP_AGE, self._read_backup),
            (PAPER_DUE, self._read_papers),
            (CIRCUIT_STATE, self._read_circuits),
            (CPU_TIME, _read_cpu),
            (MEMORY_USAGE, _read_memory),
        ):
            self.read_from(gauge, read)

    def collect(self) -> list[Family]:
        """Every instrument that has a value, as it is now. Any thread."""
        families = (Family(what, list(self._points(what))) for what in CATALOGUE.values())
        return [family for family in families if family.points]

    def _points(self, what: Instrument) -> Iterator[tuple[Mapping[str, str], float | Histogram]]:
        read = self._reads.get(what.name)
        if read is not None:
            yield from read()
        # Copies: the event loop goes on meanwhile.
        for key, counter in tuple(self._counters[what.name].items()):
            yield dict(key), counter.value
        for key, histogram in tuple(self._histograms[what.name].items()):
            yield dict(key), histogram.now()

    def read_from(self, what: Instrument, read: Callable[[], Readings]) -> None:
        """See `Telemetry.read_from`."""
        self._reads[what.name] = read

    def counter(self, what: Instrument, attributes: Mapping[str, str]) -> Counter:
        """See `Telemetry.counter`."""
        key = _key(what, attributes)
        return self._counters[what.name].setdefault(key, Counter())

    def histogram(self, what: Instrument, attributes: Mapping[str, str]) -> Histogram:
        """See `Telemetry.histogram`."""
        key = _key(what, attributes)
        return self._histograms[what.name].setdefault(key, Histogram(what.buckets))

    def lane(self, stage: Stage, partition: int) -> LaneProbe:
        """See `Telemetry.lane`."""
        probe = LaneMeter(self, stage, partition)
        self.lanes[stage, partition] = probe
        return probe

    def writer(self, stream: str, subject: str) -> WriterProbe:
        """See `Telemetry.writer`."""
        if subject not in self._writers:
            self._writers[subject] = WriterMeter(self, stream, subject)
        return self._writers[subject]

    def reader(self, stream: str, filter_subject: str) -> ReaderProbe:
        """See `Telemetry.reader`."""
        return ReaderMeter(self, stream, filter_subject)

    def dead_letter(self, stage: Stage, reason: str) -> None:
        """See `Telemetry.dead_letter`."""
        self.counter(EVENTS_FAILED, {"stage": stage, "error_type": reason}).add()

    def unreadable(self, stream: str, server: str) -> None:
        """See `Telemetry.unreadable`."""
        self.counter(MESSAGES_UNREADABLE, {"stream": stream, "server": server}).add()

    def damaged(self) -> list[str]:
        """Of which stream which server could not read what it stored, since the process began: in words."""
        found = tuple(self._counters[MESSAGES_UNREADABLE.name].items())
        places = [(dict(key), int(counter.value)) for key, counter in found]
        return [f"{at['server']} could not read {at['stream']} {count} times" for at, count in places]

    def circuit(self, target: str, circuit: Circuit) -> None:
        """See `Telemetry.circuit`."""
        self._circuits[target] = circuit

    def circuits(self) -> dict[str, CircuitState]:
        """Target → state. Of the partitions' disks the worst counts: a partition stops by itself."""
        now_s = time.monotonic()
        states = {target: circuit.state(now_s) for target, circuit in tuple(self._circuits.items())}
        disks = [lane.disk.state(now_s) for lane in tuple(self.lanes.values()) if lane.disk is not None]
        if disks:
            states[TARGET_DISK] = max(disks, key=lambda state: _CIRCUIT_VALUES[state])
        return states

    def silent(self) -> dict[str, str]:
        """Streams that are known not to answer now → what the last try met."""
        now_s = time.monotonic()
        return {target: circuit.why for target, circuit in tuple(self._circuits.items()) if circuit.is_silent(now_s)}

    def breaker(self, stage: Stage, breaker: Tripping) -> None:
        """See `Telemetry.breaker`."""
        self.read_from(BREAKER_OPEN, lambda: [({"stage": stage}, int(breaker.is_open))])
        self.read_from(BREAKER_TRIPS, lambda: [({"stage": stage}, breaker.trips)])

    def _stream_readings(self, field: int) -> Readings:
        return [({"stream": name}, facts[field]) for name, facts in tuple(self.streams.items())]

    def _lane_sums(self, value: Callable[[LaneMeter], int | None]) -> Readings:
        sums: dict[str, int] = {}
        for lane in tuple(self.lanes.values()):
            if (one := value(lane)) is not None:
                sums[lane.stream] = sums.get(lane.stream, 0) + one
        return [({"stream": stream}, total) for stream, total in sums.items()]

    def _read_lags(self) -> Readings:
        return [(lane.place, lag) for lane in tuple(self.lanes.values()) if (lag := lane.lag()) is not None]

    def _read_origins(self) -> Readings:
        lanes = tuple(self.lanes.values())
        return [(lane.place, origin) for lane in lanes if (origin := lane.origin()) is not None]

    def _read_lanes(self) -> Readings:
        counts: dict[tuple[str, str], int] = {}
        for lane in tuple(self.lanes.values()):
            key = (lane.stage, lane.state)
            counts[key] = counts.get(key, 0) + 1
        return [({"stage": stage, "state": state}, count) for (stage, state), count in counts.items()]

    def _read_holds(self) -> Readings:
        """A partition may have several subjects in a stream, as its receipts and seals: the longest hold counts."""
        now_s = time.monotonic()
        held: dict[_Attributes, float] = {}
        for writer in tuple(self._writers.values()):
            since_s, place = writer.full_since_s, tuple(writer.place.items())
            held[place] = max(held.get(place, 0.0), 0.0 if since_s is None else now_s - since_s)
        return [(dict(place), age_s) for place, age_s in held.items()]

    def _read_circuits(self) -> Readings:
        now_s = time.monotonic()
        values = {target: _circuit_value(circuit, now_s) for target, circuit in tuple(self._circuits.items())}
        disks = [_circuit_value(lane.disk, now_s) for lane in tuple(self.lanes.values()) if lane.disk is not None]
        if disks:
            values[TARGET_DISK] = max(disks)
        return [({"target": target}, value) for target, value in values.items()]

    def _read_backup(self) -> Readings:
        return [] if self.backed_up_ns is None else [({}, max(0.0, (time.time_ns() - self.backed_up_ns) / 1e9))]

    def _read_papers(self) -> Readings:
        now_s = time.time()
        return [({"paper": name}, paper.due_s - now_s) for name, paper in self.papers.items()]


def _circuit_value(circuit: Circuit, now_s: float) -> float:
    """1 also while one tries in vain: a try takes longer than a pause, so that most looks would see half-open."""
    return 1.0 if circuit.is_silent(now_s) else 0.5 if circuit.is_open else 0.0


def _one(value: int | None) -> Readings:
    return [] if value is None else [({}, value)]


def _key(what: Instrument, attributes: Mapping[str, str]) -> _Attributes:
    given, required = set(attributes), set(what.attributes)
    if CATALOGUE.get(what.name) is not what or not required <= given <= required | set(what.optional):
        raise ValueError(f"{what.name} has the attributes {what.attributes}, and maybe {what.optional}; not {given}")
    return tuple(sorted(attributes.items()))


def _read_cpu() -> Readings:
    times = os.times()
    return [({"cpu.mode": "user"}, times.user), ({"cpu.mode": "system"}, times.system)]


def _read_memory() -> Readings:
    try:
        with open("/proc/self/statm", "rb") as file:
            return [({}, int(file.read().split()[1]) * os_resource.getpagesize())]
    except OSError:
        return []
