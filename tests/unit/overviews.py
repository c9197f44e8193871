"""Overviews of a pipeline that is well, and ways to make them worse."""

from __future__ import annotations

from typing import Any

import msgspec

from cluster.backlog import PartitionLook, StageLag
from cluster.health import ProcessHealth
from cluster.members import MembersReport, MemberStatus, Unheld
from cluster.overview import DiskLook, Letters, Overview, ProcessLook
from cluster.scrape import HISTOGRAMS, Held, Metered
from cluster.status import ReplicaStatus, ServerStatus, StreamStatus
from contracts.membership import Pause
from contracts.receipts import Receipt, StoreEnd, first_receipt
from contracts.subjects import STAGES, STREAMS, Stage
from contracts.telemetry import Instrument
from stages.runtime.facts import ClusterFacts
from stages.runtime.health import Check

PARTITIONS = 8
NOW_NS = 1_800_000_000 * 10**9
SECOND_NS = 10**9


def stream(name: str, **changes: Any) -> StreamStatus:
    replicas = tuple(ReplicaStatus(name=node, current=True, offline=False, lag=0) for node in ("n2", "n3"))
    fields: dict[str, Any] = {"messages": 10, "bytes": 1000, "first_seq": 1, "last_seq": 10, "bytes_max": 10**6}
    return StreamStatus(
        **{"name": name, "leader": "n1", "replicas": replicas, "used": 0.001, "copies_set": 3, **fields, **changes}
    )


def receipt(partition: int, persisted: int = 100, **changes: Any) -> Receipt:
    begun = first_receipt(partition, "c" * 32, "store", "writer")
    fields = {"origin": 1000, "persisted": persisted, "node": "a1", "ends": {"store": StoreEnd(shard=1, commits=1)}}
    return msgspec.structs.replace(begun, **{**fields, **changes})


def partition(number: int, lags: dict[Stage, StageLag] | None = None, persisted: int = 100) -> PartitionLook:
    quiet = {stage: StageLag(origin=1000, waiting=0) for stage in STAGES}
    return PartitionLook(partition=number, receipt=receipt(number, persisted), lags=quiet | (lags or {}), at_ns=NOW_NS)


def waiting(messages: int, age_s: float, origin: int = 1000) -> StageLag:
    return StageLag(origin=origin, waiting=messages, oldest_ns=NOW_NS - int(age_s * SECOND_NS))


def members(paused: Stage | None = None, unheld: tuple[Unheld, ...] = ()) -> MembersReport:
    gone = {(row.stage, row.partition) for row in unheld}
    found = []
    for number, stage in enumerate(STAGES):
        held = tuple(p for p in range(PARTITIONS) if stage != paused and (stage, p) not in gone)
        found.append(
            MemberStatus(
                stage=stage,
                name=f"{stage}-0",
                node="a1",
                pid=100 + number,
                partitions=held,
                opening=(),
                state="paused" if stage == paused else "works",
                pinned=False,
                store="",
                policy=1 if stage == "segment" else 0,
                holding=False,
                age_s=0.5,
            )
        )
    pauses = {} if paused is None else {paused: Pause(since_ns=NOW_NS, by="eve@ops1")}
    if paused is not None:
        unheld += tuple(Unheld(stage=paused, partition=p, why=f"{paused} is paused") for p in range(PARTITIONS))
    return MembersReport(members=tuple(found), unheld=unheld, moving=(), paused=pauses)


def histogram(what: Instrument, **at: int) -> tuple[int, ...]:
    """Counts with `at` values in the buckets that end at the bounds ``s_…``."""
    counts = [0] * (len(what.buckets) + 1)
    for name, count in at.items():
        counts[what.buckets.index(float(name.removeprefix("s_").replace("_", ".")))] = count
    return tuple(counts)


def process(name: str, pid: int, metered: Metered | None = None, **changes: Any) -> ProcessLook:
    health = ProcessHealth(
        **{
            "name": name,
            "kind": name.partition("-")[0],
            "pid": pid,
            "ready": True,
            "url": "http://127.0.0.1:1",
            "checks": {"connected": Check(True, "to n1")},
            **changes,
        }
    )
    empty = {what.name: (0,) * (len(what.buckets) + 1) for what in HISTOGRAMS}
    return ProcessLook(health=health, metered=metered or Metered(histograms=empty, memory_bytes=50_000_000))


def processes(**changed: ProcessLook) -> tuple[ProcessLook, ...]:
    """All four; `changed` by stage."""
    return tuple(changed.get(stage, process(f"{stage}-0", 100 + n)) for n, stage in enumerate(STAGES))


def holding(stage: Stage, *held: Held) -> ProcessLook:
    return process(f"{stage}-0", 100 + STAGES.index(stage), Metered(held=held))


def overview(at_s: float = 0.0, **changes: Any) -> Overview:
    """A pipeline that is well, `at_s` seconds after `NOW_NS`."""
    urls = [f"nats://n{number}:4222" for number in (1, 2, 3)]
    fields: dict[str, Any] = {
        "at_ns": NOW_NS + int(at_s * SECOND_NS),
        "streams_s": 100.0 + at_s,
        "receipts_s": 100.0 + at_s,
        "metrics_s": 100.0 + at_s,
        "connected": True,
        "servers": tuple(ServerStatus(url=url, reachable=True, name=url[7:9]) for url in urls),
        "streams": tuple(map(stream, STREAMS)),
        "facts": ClusterFacts(cluster_id="c" * 32, partitions=PARTITIONS, partition_by="consultation"),
        "partitions": tuple(map(partition, range(PARTITIONS))),
        "letters": Letters(by_stage={"ingest": 3}, recent=0),
        "members": members(),
        "processes": processes(),
        "disk": DiskLook(
            path="/var/lib/fi/shards",
            free_bytes=50 * 10**9,
            floor_bytes=10**9,
            live=dict.fromkeys(range(PARTITIONS), 1),
            sealed=dict.fromkeys(range(PARTITIONS), 0),
            size_bytes=dict.fromkeys(range(PARTITIONS), 64_000_000),
        ),
    }
    return Overview(**{**fields, **changes})


def with_streams(**changed: dict[str, Any]) -> tuple[StreamStatus, ...]:
    return tuple(stream(name, **changed.get(name, {})) for name in STREAMS)
