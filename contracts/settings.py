"""Every number and path a process can be told, in one frozen struct.

Precedence: an override from the command line, then the environment (``FI_`` + the name in capitals), then the default.
Units are last in a name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from contracts.errors import SettingsError
from contracts.subjects import PartitionBy

ENV_PREFIX = "FI_"
MIB = 1024 * 1024

_Positive = Annotated[int, Meta(ge=1)]
_Seconds = Annotated[float, Meta(gt=0)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be set. The topology part is applied to the cluster once; stages read it back from there.

    Attributes:
        partitions: P, fixed for the life of a cluster's data.
        partition_by: what keeps together in a partition.
        replicas: copies of every stream.
        hop_storage: where hop streams (derived data) live.
        events_bytes_max, hop_bytes_max, receipts_bytes_max, dlq_bytes_max: stream limits; a full stream refuses.
        dedup_window_s: how long servers remember a gateway's message ids. Correctness does not depend on it.
        frame_events_max, frame_bytes_max: a frame takes no further message once it has reached either.
        pull_batch, pull_batch_hop: messages asked for at once, from `FI_EVENTS` and from a hop.
        pull_bytes_max: bytes asked for at once.
        pull_expires_s, heartbeat_s, heartbeats_missed_max: the standing pull request and when to reopen.
        probe_s: an idle partition checks its position and its output this often.
        publish_timeout_s, api_timeout_s, retry_s_min, retry_s_max: requests and their retries.
        shard_bytes: capacity of a live shard; reaching it seals.
        shard_events_max: events in a live shard; reaching it seals.
        shard_age_s_max: a live shard with events older than this is sealed.
        sealed_kept: the newest sealed shards of a partition whose events stay in `FI_EVENTS`, so that `fictl rebuild`
            can make them again.
        seal_on_drain: seal what is committed when persist is told to stop.
        trim_s: how often committed data is purged from the streams.
        receipts_kept: commit receipts kept for each partition.
        drain_s: how long a stage may take to finish after SIGTERM.
        signing_key_file: Ed25519 key (`fictl key new`) that persist signs receipts and seal records with; empty: none.
        dead_share_max: a process that would dead-letter a larger share of its last events holds instead; 1: never.
        dead_events_min: that share is judged over so many events at least.
        breaker_pause_s: a process that holds tries again after so long, and doubles it each time in vain.
        member_ttl_s: a process that was silent for so long counts as dead, and others take its partitions over.
        member_renew_s: how often a process announces itself and looks at the others; well below `member_ttl_s`.
        health_port: where a stage answers `/livez`, `/readyz` and `/metrics`; 0: a free port; -1: nowhere. `fictl up`
            gives each stage a free one unless this is set.
        health_host: the address that port is on. `0.0.0.0` for a container's probes.
        disk_floor_bytes: persist says that it is not ready when less is free where its shards lie.
        otlp_endpoint: collector that metrics and traces are sent to by OTLP over HTTP, e.g. `http://host:4318`;
            empty: the one that OTEL_EXPORTER_OTLP_ENDPOINT names, if any.
        otlp_interval_s: between two exports.
        trace_share: of messages that bring no trace context, how many start a trace; 0 to 1. A gateway's own choice is
            kept.
    """

    partitions: Annotated[int, Meta(ge=1, le=1024)] = 8
    partition_by: PartitionBy = "consultation"
    replicas: Annotated[int, Meta(ge=1, le=5)] = 3
    hop_storage: Literal["memory", "file"] = "memory"
    events_bytes_max: _Positive = 4096 * MIB
    hop_bytes_max: _Positive = 256 * MIB
    receipts_bytes_max: _Positive = 1024 * MIB
    dlq_bytes_max: _Positive = 1024 * MIB
    dedup_window_s: _Seconds = 120.0
    frame_events_max: _Positive = 512
    frame_bytes_max: Annotated[int, Meta(ge=1024, le=2 * MIB)] = MIB // 2
    pull_batch: _Positive = 256
    pull_batch_hop: _Positive = 16
    pull_bytes_max: Annotated[int, Meta(ge=8 * MIB)] = 16 * MIB
    pull_expires_s: _Seconds = 30.0
    heartbeat_s: _Seconds = 0.5
    heartbeats_missed_max: Annotated[float, Meta(ge=1)] = 2.5
    probe_s: _Seconds = 5.0
    publish_timeout_s: _Seconds = 2.0
    api_timeout_s: _Seconds = 1.5
    retry_s_min: _Seconds = 0.05
    retry_s_max: _Seconds = 0.2
    shard_bytes: Annotated[int, Meta(ge=16 * MIB, le=4096 * MIB)] = 64 * MIB
    shard_events_max: _Positive = 1_000_000
    shard_age_s_max: _Seconds = 3600.0
    sealed_kept: Annotated[int, Meta(ge=0, le=16)] = 1
    seal_on_drain: bool = True
    trim_s: _Seconds = 2.0
    receipts_kept: _Positive = 1024
    drain_s: _Seconds = 20.0
    signing_key_file: str = ""
    dead_share_max: Annotated[float, Meta(gt=0, le=1)] = 0.5
    dead_events_min: _Positive = 200
    breaker_pause_s: _Seconds = 5.0
    member_ttl_s: _Positive = 3
    member_renew_s: _Seconds = 1.0
    health_port: Annotated[int, Meta(ge=-1, le=65535)] = -1
    health_host: str = "127.0.0.1"
    disk_floor_bytes: Annotated[int, Meta(ge=0)] = 1024 * MIB
    otlp_endpoint: str = ""
    otlp_interval_s: _Seconds = 10.0
    trace_share: Annotated[float, Meta(ge=0, le=1)] = 0.0


def load_settings(env: Mapping[str, str], overrides: Mapping[str, Any] | None = None) -> Settings:
    """Settings from defaults, `env` and `overrides` (the strongest; None values are passed over).

    Raises:
        SettingsError: an unknown ``FI_`` variable or override, or a value out of range. Names it and its source.
    """
    names = Settings.__struct_fields__
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, text in env.items():
        if key.startswith(ENV_PREFIX):
            name = key[len(ENV_PREFIX) :].lower()
            _known(name, names, f"environment variable {key}")
            values[name], sources[name] = text, f"environment variable {key}"
    for name, value in (overrides or {}).items():
        if value is not None:
            _known(name, names, f"setting {name}")
            values[name], sources[name] = value, "command line"
    try:
        return msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        name = str(error).rpartition("$.")[2].strip("`")
        raise SettingsError(f"{name} = {values.get(name)!r} from {sources.get(name, 'defaults')}: {error}") from None


def _known(name: str, names: tuple[str, ...], where: str) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SettingsError(f"{where} names no setting{hint}")
