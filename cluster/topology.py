"""The cluster's streams as data, and what differs from them. Pure: no I/O here (`cluster.apply` does it).

Always true: no event is ever dropped for its age or to make room (`discard: new`, no `max_age`), and the number of
partitions never changes while any stream holds data that was partitioned by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, StrEnum
from typing import Any

import msgspec
from nats.js.api import (
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
    StreamInfo,
    SubjectTransform,
)

from contracts import subjects
from contracts.budgets import HOP_DEDUP
from contracts.events import MESSAGE_BYTES_MAX
from contracts.settings import MIB, Settings
from stages.runtime.facts import META_CLUSTER_ID, META_PARTITION_BY, META_PARTITIONS

MEMBERS_BYTES_MAX = 8 * MIB
CONTROL_BYTES_MAX = 64 * MIB
CONTROL_HISTORY = 64
"""Values kept of each key, the most a bucket can keep."""

_COMPARED = (
    "subjects",
    "subject_transform",
    "storage",
    "retention",
    "discard",
    "max_bytes",
    "max_msgs",
    "max_msgs_per_subject",
    "max_msg_size",
    "max_age",
    "duplicate_window",
    "num_replicas",
    "allow_direct",
    "allow_rollup_hdrs",
    "discard_new_per_subject",
    "no_ack",
    "mirror",
    "sources",
    "subject_delete_marker_ttl",
    "sealed",
    "allow_msg_ttl",
    "allow_msg_schedules",
    "metadata",
)
"""Fields we set, in the order they are shown. All others are left as they are found."""
_LASTING = frozenset({"sealed", "allow_msg_ttl", "allow_msg_schedules", "deny_purge", "deny_delete"})
"""Set once, the servers never take them back (10052)."""
_IDENTITY = frozenset({"subject_transform", META_PARTITIONS, META_PARTITION_BY, META_CLUSTER_ID})
_FIXED = frozenset({"storage", "retention"})


class Drift(msgspec.Struct, frozen=True):
    """One field of one stream that is not as it should be.

    Attributes:
        stream: its name.
        field: field of the stream's configuration, or ``metadata.<key>``.
        wanted, found: both values, as JSON values.
    """

    stream: str
    field: str
    wanted: Any
    found: Any


class Remedy(StrEnum):
    """What can be done about a drift."""

    UPDATE = "update"
    """The server changes it in place."""
    EMPTY_ONLY = "empty_only"
    """It decides which partition data belongs to: only while the cluster holds none."""
    NEVER = "never"
    """The server cannot change it: the stream would have to be deleted."""
    LASTS = "lasts"
    """Somebody set it by hand, and the server does not take it back; what else differs is changed all the same."""


def streams(settings: Settings, cluster_id: str) -> tuple[StreamConfig, ...]:
    """Every stream, in the order they are created: `FI_EVENTS` comes last, so nothing is accepted before all are there.

    Args:
        settings: the topology part of it counts.
        cluster_id: id that origins are told apart by; kept in the metadata of `FI_EVENTS` and `FI_RECEIPTS`.
    """
    identity = {
        META_PARTITIONS: str(settings.partitions),
        META_PARTITION_BY: settings.partition_by,
        META_CLUSTER_ID: cluster_id,
    }
    source, destination = subjects.partition_transform(settings.partitions, settings.partition_by)
    receipts = _stream(settings, subjects.RECEIPTS, ["fi.receipts.*", "fi.seals.*"], settings.receipts_bytes_max)
    dead = _stream(settings, subjects.DLQ, ["fi.dlq.*.*"], settings.dlq_bytes_max)
    hops = [
        _stream(settings, name, [f"fi.{stage}.*"], settings.hop_bytes_max).evolve(
            storage=StorageType(settings.hop_storage)
        )
        for stage, name in subjects.INPUT_STREAM.items()
        if name in subjects.HOPS
    ]
    events = _stream(settings, subjects.EVENTS, [subjects.EVENTS_PUBLISH_PATTERN], settings.events_bytes_max)
    return (
        receipts.evolve(metadata=identity, deny_delete=True),
        dead,
        *hops,
        *_buckets(settings),
        events.evolve(
            metadata=identity,
            subject_transform=SubjectTransform(src=source, dest=destination),
            max_msg_size=MESSAGE_BYTES_MAX,
            duplicate_window=settings.dedup_window_s,
            # Or a message could go before it was read, and nothing would tell: only trimming, a purge, takes any.
            deny_delete=True,
        ),
    )


def _stream(settings: Settings, name: str, listens_on: list[str], bytes_max: int) -> StreamConfig:
    return StreamConfig(
        name=name,
        subjects=listens_on,
        storage=StorageType.FILE,
        retention=RetentionPolicy.LIMITS,
        discard=DiscardPolicy.NEW,
        max_bytes=bytes_max,
        max_msgs=-1,
        max_msgs_per_subject=-1,
        max_msg_size=-1,
        max_age=0,
        duplicate_window=HOP_DEDUP.s,
        num_replicas=settings.replicas,
        # A follower may answer a direct get with stale data; checkpoints must come from the leader.
        allow_direct=False,
        # Or a message of a gateway's could delete all those before it.
        allow_rollup_hdrs=False,
        deny_purge=False,
        deny_delete=False,
    )


def _buckets(settings: Settings) -> tuple[StreamConfig, ...]:
    """Key-value buckets, as any NATS client makes and reads them.

    Announcements are soft state, written many times a minute: in memory they cost no fsync. What operators said must
    outlive all servers. Both may be read from a follower: what is stale is read again a moment later.
    """
    bucket = {"allow_msg_ttl": True, "allow_rollup_hdrs": True, "deny_delete": True, "allow_direct": True}
    members = _stream(settings, subjects.MEMBERS, [subjects.bucket_pattern(subjects.MEMBERS)], MEMBERS_BYTES_MAX)
    control = _stream(settings, subjects.CONTROL, [subjects.bucket_pattern(subjects.CONTROL)], CONTROL_BYTES_MAX)
    return (
        members.evolve(**bucket, storage=StorageType.MEMORY, max_msgs_per_subject=1),
        control.evolve(**bucket, max_msgs_per_subject=CONTROL_HISTORY),
    )


def diff(wanted: Sequence[StreamConfig], found: Mapping[str, StreamConfig]) -> list[Drift]:
    """What differs, field by field, in the streams that exist. Missing streams are not drift.

    Args:
        wanted: from `streams`.
        found: stream name → its configuration on the cluster. Fields and metadata keys we do not set are not looked at.
    """
    drifts = []
    for config in wanted:
        name = str(config.name)
        if name not in found:
            continue
        theirs = _comparable(found[name])
        for field, value in _comparable(config).items():
            other = theirs.get(field)
            # What is not set, servers leave out or show as false.
            if (value or None) != (other or None):
                drifts.append(Drift(name, field, value, other))
    return drifts


def _comparable(config: StreamConfig) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in _fields(config):
        value = getattr(config, field)
        if field == "metadata":
            values.update({f"metadata.{key}": text for key, text in (value or {}).items()})
        elif isinstance(value, SubjectTransform):
            values[field] = f"{value.src} -> {value.dest}"
        elif isinstance(value, Enum):
            values[field] = value.value
        elif field in ("mirror", "sources"):
            values[field] = [source.name for source in (value if isinstance(value, list) else [value]) if source]
        else:
            values[field] = value
    return values


def _fields(config: StreamConfig) -> tuple[str, ...]:
    # What is deleted in a hop is a hole, which is seen; we purge all but buckets.
    deletes = () if config.name in subjects.HOPS else ("deny_delete",)
    return _COMPARED + deletes + (() if config.name in subjects.BUCKETS else ("deny_purge",))


def remedy(drift: Drift) -> Remedy:
    """What can be done about `drift`."""
    if drift.field in _LASTING and drift.found:
        return Remedy.LASTS
    if drift.field == "retention" and RetentionPolicy.WORK_QUEUE not in (drift.found, drift.wanted):
        return Remedy.UPDATE
    if drift.field in _FIXED:
        return Remedy.NEVER
    if drift.field.removeprefix("metadata.") in _IDENTITY:
        return Remedy.EMPTY_ONLY
    return Remedy.UPDATE


def data_held(found: Mapping[str, StreamInfo]) -> list[str]:
    """Names of the streams that hold messages partitioned by the present P: `FI_EVENTS`, the hops and `FI_RECEIPTS`."""
    partitioned = (subjects.EVENTS, *subjects.HOPS, subjects.RECEIPTS)
    return [name for name in partitioned if name in found and found[name].state.messages > 0]


def refusals(drifts: Sequence[Drift], holding: Sequence[str]) -> list[str]:
    """Why the drifts that must not, or cannot, be removed are refused: one sentence for each reason.

    Args:
        drifts: from `diff`.
        holding: from `data_held`.
    """
    reasons = []
    fixed = [drift for drift in drifts if remedy(drift) is Remedy.NEVER]
    identity = [drift for drift in drifts if remedy(drift) is Remedy.EMPTY_ONLY]
    if fixed:
        reasons.append(f"{_changes(fixed)}: the server cannot change this on a stream that exists; keep the setting")
    if identity and holding:
        reasons.append(
            f"{_changes(identity)}: {', '.join(holding)} hold data of the present partitions, and later events of a "
            "consultation would land in another one, out of order; keep the setting, or use a new cluster"
        )
    return reasons


def lasting(drifts: Sequence[Drift]) -> list[Drift]:
    """Those that nothing takes back from a stream that exists, in their order: `Remedy.LASTS`, and what hangs on it.

    Of a sealed stream no field can be changed any more, and one with schedules goes on dropping its oldest messages.
    """
    lasts = {(drift.stream, drift.field) for drift in drifts if remedy(drift) is Remedy.LASTS}
    hang_on = {"discard": "allow_msg_schedules"}
    return [
        drift
        for drift in drifts
        if not lasts.isdisjoint((drift.stream, name) for name in ("sealed", drift.field, hang_on.get(drift.field)))
    ]


def told_lasting(drifts: Sequence[Drift]) -> list[str]:
    """One sentence for each stream that has to be made again to be rid of `drifts`, with the way there."""
    by_stream: dict[str, list[Drift]] = {}
    for drift in drifts:
        by_stream.setdefault(drift.stream, []).append(drift)
    return [
        f"{stream}: {', '.join(f'{drift.field} is {drift.found!r}' for drift in found)}, and the servers do not take "
        f"that back. {_WAYS.get(stream, _AGAIN)}"
        for stream, found in by_stream.items()
    ]


_AGAIN = "Delete it with any NATS client, then `fictl cluster apply`: what it holds comes again"
_WAYS = {
    subjects.EVENTS: "Stop the gateways, `fictl flush` until it exits with 0, `fictl backup` if you make backups, "
    "delete it with any NATS client, then `fictl cluster apply`: it counts on from what is settled",
    subjects.RECEIPTS: "Delete it with any NATS client, then `fictl cluster apply`, and `fictl partitions restore` on "
    "each node with a store",
    subjects.DLQ: "Replay its letters or keep them (`fictl dlq show N --raw`), delete it with any NATS client, then "
    "`fictl cluster apply`",
    subjects.CONTROL: "What operators said is in it alone, every policy too (`fictl policy history`): leave it while "
    "none has to be set",
}


def _changes(drifts: Sequence[Drift]) -> str:
    return ", ".join(f"{d.stream} {d.field} from {d.found!r} to {d.wanted!r}" for d in drifts)


def merge(found: StreamConfig, wanted: StreamConfig) -> StreamConfig:
    """The configuration to send as an update: ours for the fields we set, theirs for all others, and what lasts."""
    lasts = {drift.field for drift in lasting(diff([wanted], {str(wanted.name): found}))}
    ours = {field: getattr(wanted, field) for field in _fields(wanted) if field not in lasts}
    # The server adds keys of its own under this prefix, and refuses to be told them.
    kept = {key: text for key, text in (found.metadata or {}).items() if not key.startswith("_nats.")}
    return found.evolve(**ours | {"metadata": kept | (wanted.metadata or {})})
