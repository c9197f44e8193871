"""What a larger cluster would carry, from what one message and one event cost here, and which part breaks first. Pure.

Each resource bounds the rate on its own; the lowest bound is the answer (`cluster.capacity` does the same for rates
that were measured whole). Costs are lines through batches of several sizes, so that the model can tell what
fuller messages save. Taken for granted: frames stay as full as they were measured, one event costs what it did on
the measured cores, and streams' leaders and partitions are spread evenly over the nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from benchmarks.experiments.costs import LOAD, SERVERS
from benchmarks.experiments.fit import Line, fit_line
from cluster.capacity import DAY_S, EVENTS_PER_SESSION, Bound

CORES: Final = "cores of the cluster"
STREAM: Final = "FI_EVENTS, one stream"
DISK: Final = "disk, bytes written"
NETWORK: Final = "network"


class Costs(msgspec.Struct, frozen=True):
    """What was measured. Each line is of one message and its events, in the whole cluster.

    Attributes:
        stages: CPU seconds, by stage.
        servers: CPU seconds of all servers.
        written: bytes that the disk was written, by servers and persist.
        network: bytes sent.
        fsync_s: one fdatasync of the measured disk.
        stream_messages_per_s: what one replicated stream takes when nothing else runs; None: not known.
    """

    stages: dict[str, Line]
    servers: Line
    written: Line
    network: Line
    fsync_s: float
    stream_messages_per_s: float | None = None


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """What there would be.

    Attributes:
        nodes: each with a server and a share of the stages.
        cores, disk_bytes_per_s, fsync_s, network_bytes_per_s: of a node; the network's each way.
        partitions: P, with a process for each at every stage where the cores allow.
        busiest: load of the busiest partition or node over the mean.
        use_max: share of a resource that may be used, so that queues stay short.
    """

    nodes: int = 3
    cores: int = 16
    disk_bytes_per_s: float = 2e9
    fsync_s: float = 50e-6
    network_bytes_per_s: float = 1.25e9
    partitions: int = 8
    busiest: float = 1.2
    use_max: float = 0.75


def costs_from(rows: Sequence[Mapping[str, Any]], fsync_s: float, stream_messages_per_s: float | None) -> Costs:
    """Lines through rows of the batch curve (`curves.batch_cases`), each measured as fast as it goes.

    Raises:
        ValueError: too few sizes of batches.
    """
    batches = [float(row["at"]) for row in rows]

    def line(cost_of: Any) -> Line:
        # A stage that used no measurable time in a short run still costs more than nothing.
        return fit_line(batches, [max(cost_of(row["full"]) * row["at"], 1e-9) for row in rows])

    kinds = [kind for kind in rows[0]["full"]["cpu_us"] if kind not in (SERVERS, LOAD)]
    return Costs(
        stages={kind: line(lambda full, kind=kind: full["cpu_us"][kind] / 1e6) for kind in kinds},
        servers=line(lambda full: full["cpu_us"][SERVERS] / 1e6),
        written=line(lambda full: sum(full["written_bytes"].values())),
        network=line(lambda full: full["network_bytes"]),
        fsync_s=fsync_s,
        stream_messages_per_s=stream_messages_per_s,
    )


def bounds(costs: Costs, cluster: Cluster, batch: float) -> tuple[Bound, ...]:
    """What each resource allows with so many events a message, the tightest first."""
    found = [
        Bound(name, rate, int(rate * DAY_S / EVENTS_PER_SESSION), why)
        for name, rate, why in _all(costs, cluster, batch)
    ]
    return tuple(sorted(found, key=lambda bound: bound.events_per_s))


def _all(costs: Costs, cluster: Cluster, batch: float) -> Iterator[tuple[str, float, str]]:
    share = cluster.use_max / cluster.busiest
    for stage, line in costs.stages.items():
        cost_s = line.at(batch)
        words = f"{cluster.partitions} partitions, one core each at most, {cost_s * 1e6:,.1f} µs an event"
        yield f"{stage}, one core a partition", cluster.partitions * share / cost_s, words
    total_s = sum(line.at(batch) for line in costs.stages.values()) + costs.servers.at(batch)
    cores = cluster.nodes * cluster.cores
    servers_us = costs.servers.at(batch) * 1e6
    yield CORES, cores * share / total_s, f"{cores} cores, {total_s * 1e6:,.1f} µs an event, servers {servers_us:,.1f}"
    written = costs.written.at(batch)
    yield DISK, cluster.nodes * cluster.disk_bytes_per_s * share / written, f"{written:,.0f} B an event on all nodes"
    sent = costs.network.at(batch)
    words = f"{sent:,.0f} B an event between all processes, none of them on one node"
    yield NETWORK, cluster.nodes * cluster.network_bytes_per_s * share / sent, words
    if costs.stream_messages_per_s is not None:
        # A faster disk is not taken to make the stream faster: its leader's own work may be what bounds it.
        messages = costs.stream_messages_per_s * min(1.0, costs.fsync_s / cluster.fsync_s)
        words = f"{messages:,.0f} messages/s with nothing else on two cores, a lower bound on more"
        yield STREAM, messages * batch * cluster.use_max, words


def predicted_here(rows: Sequence[Mapping[str, Any]], costs: Costs, cpus: int) -> list[dict[str, float]]:
    """The model held against what it was made from: ``{"batch", "predicted", "measured"}``, events/s, on `cpus`.

    The load generator shares these cores, so its time counts here.
    """
    found = []
    for batch in sorted({row["at"] for row in rows}):
        ours = [row["full"] for row in rows if row["at"] == batch]
        load_s = sum(full["cpu_us"][LOAD] for full in ours) / len(ours) / 1e6
        total_s = sum(line.at(batch) for line in costs.stages.values()) + costs.servers.at(batch) + load_s
        measured = sorted(full["events_per_s"] for full in ours)[len(ours) // 2]
        found.append({"batch": float(batch), "predicted": cpus / total_s, "measured": float(measured)})
    return found
