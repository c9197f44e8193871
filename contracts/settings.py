"""Every number and path a process can be told, in one frozen struct.

Precedence: an override from the command line, then the environment (``FI_`` + the name in capitals), then the settings
file (flat TOML, a line ``name = value`` for each), then the default. Units are last in a name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta

from contracts.budgets import disorders
from contracts.errors import SettingsError
from contracts.subjects import PartitionBy

ENV_PREFIX = "FI_"
CONFIG_VARIABLE = "FI_CONFIG"
"""Names the settings file, and is no setting itself. Empty: there is no file."""
MIB = 1024 * 1024
PARTITIONS_MAX: Final = 1024
SHARD_BYTES_MIN: Final = 16 * MIB
HIDDEN: Final = "***"
_SHOWN_CHARS_MAX: Final = 200

_Positive = Annotated[int, Meta(ge=1, le=2**53 - 1)]
"""As large as JSON numbers are exact."""
_Seconds = Annotated[float, Meta(gt=0, le=366 * 86_400)]
"""At most a year, so not ``inf`` either: timers and JSON take no such number."""
_SecretUrl = Annotated[str, Meta(extra={"secret": "user, password and query"})]
"""A URL that may carry credentials: it is shown without them (`shown_value`)."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be set. The topology part is applied to the cluster; stages take from there how it is partitioned.

    Attributes:
        partitions: P, fixed for the life of a cluster's data.
        partition_by: what keeps together in a partition.
        replicas: copies of every stream.
        hop_storage: where hop streams (derived data) live.
        events_bytes_max, hop_bytes_max, receipts_bytes_max, dlq_bytes_max: stream limits; a full stream refuses. By
            the first two, as it is told them, persist shares out among partitions what may stay in those streams.
        dedup_window_s: how long servers remember a gateway's message ids. An event without an `event_id` that is sent
            again later than that is stored twice; of others persist knows the ids for ever. What is remembered costs
            each server some 250 bytes a message, and time (ADR 29).
        frame_events_max, frame_bytes_max: a frame takes no further message once it has reached either.
        frame_deflate_bytes_min: events of a frame are deflated from so many bytes on. Builds without this
            setting wait for a later one to read such frames: while they run, set it to 16 MiB, which no frame reaches.
        frame_gap_s: ingest begins a partition's frames so far apart at least; 0: none waits for company.
        pull_batch, pull_batch_hop: messages asked for at once, from `FI_EVENTS` and from a hop.
        pull_bytes_max: bytes asked for at once.
        pull_expires_s, heartbeat_s, heartbeats_missed_max: the standing pull request and when to reopen.
        probe_s: an idle partition checks its position and its output this often.
        publish_timeout_s, api_timeout_s, retry_s_min, retry_s_max: requests and their retries.
        shard_bytes: capacity of a live shard; reaching it seals. Less, down to 16 MiB, where many partitions share
            `FI_EVENTS`: `events_bytes_max` / ((2 + `sealed_kept`) x `partitions`).
        shard_events_max: events in a live shard; reaching it seals.
        shard_age_s_max: a live shard with events older than this is sealed.
        sealed_kept: the newest sealed shards of a partition whose events stay in `FI_EVENTS`, so that `fictl rebuild`
            can make them again; none while it is nearly full and nothing else of the partition is in it. Those that
            `fictl backup` has not copied stay too, once it copied any, while the stream is at most half full.
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
        nats_ca_file: certificates, as PEM, that sign those of the servers at `--nats`; empty: those the system trusts.
            Once this or `nats_cert_file` is set, nothing is said to a server that does not speak TLS.
        nats_cert_file, nats_key_file: our own certificate and its key, as PEM, for servers that verify clients. Empty
            key file: the key stands with the certificate.
        nats_creds_file: a user's JWT and nkey seed, as `nsc` writes them, or an nkey seed alone. All four files are
            read anew for each connection; the servers of `fictl up` need none of them.
        disk_floor_bytes: persist says that it is not ready when less is free where its shards lie.
        otlp_endpoint: collector that metrics and traces are sent to by OTLP over HTTP, e.g. `http://host:4318`;
            empty: the one that OTEL_EXPORTER_OTLP_ENDPOINT names, if any.
        otlp_interval_s: between two exports.
        trace_share: of messages that bring no trace context, how many start a trace; 0 to 1. A gateway's own choice is
            kept.
    """

    partitions: Annotated[int, Meta(ge=1, le=PARTITIONS_MAX)] = 8
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
    frame_deflate_bytes_min: _Positive = 16 * 1024
    frame_gap_s: Annotated[float, Meta(ge=0, le=1)] = 0.008
    pull_batch: _Positive = 256
    pull_batch_hop: _Positive = 16
    pull_bytes_max: Annotated[int, Meta(ge=8 * MIB)] = 16 * MIB
    pull_expires_s: _Seconds = 30.0
    heartbeat_s: _Seconds = 0.5
    heartbeats_missed_max: Annotated[float, Meta(ge=1, le=1000)] = 2.5
    probe_s: _Seconds = 5.0
    publish_timeout_s: _Seconds = 2.0
    api_timeout_s: _Seconds = 1.5
    retry_s_min: _Seconds = 0.05
    retry_s_max: _Seconds = 0.2
    shard_bytes: Annotated[int, Meta(ge=SHARD_BYTES_MIN, le=4096 * MIB)] = 64 * MIB
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
    health_host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    nats_ca_file: str = ""
    nats_cert_file: str = ""
    nats_key_file: str = ""
    nats_creds_file: str = ""
    disk_floor_bytes: Annotated[int, Meta(ge=0)] = 1024 * MIB
    otlp_endpoint: _SecretUrl = ""
    otlp_interval_s: _Seconds = 10.0
    trace_share: Annotated[float, Meta(ge=0, le=1)] = 0.0


_URL: Final = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*://|)(.*@|)([^?#]*)(.*)", re.DOTALL)
"""Scheme, credentials (to the last ``@``: a password may hold any sign), host and path, query."""
_NAMES: Final = Settings.__struct_fields__
_SECRET_URLS: Final = frozenset(field.name for field in msgspec.structs.fields(Settings) if field.type == _SecretUrl)


class SettingsFile(msgspec.Struct, frozen=True):
    """A settings file that was read.

    Attributes:
        name: its path, for messages.
        values: key → value, as TOML gives them.
    """

    name: str
    values: Mapping[str, Any]


class Source(msgspec.Struct, frozen=True):
    """Where a value came from.

    Attributes:
        layer: each is stronger than those before it.
        name: the file's path, the variable, or ``--set NAME``; empty for a default.
    """

    layer: Literal["default", "file", "environment", "command line"]
    name: str = ""


class ResolvedSettings(msgspec.Struct, frozen=True):
    """Settings, and for each by name where its value came from."""

    settings: Settings
    sources: Mapping[str, Source]


def load_settings(
    env: Mapping[str, str],
    overrides: Mapping[str, Any] | None = None,
    *,
    file: SettingsFile | None = None,
) -> Settings:
    """The settings of `resolve_settings`."""
    return resolve_settings(env, overrides, file=file).settings


def resolve_settings(
    env: Mapping[str, str],
    overrides: Mapping[str, Any] | None = None,
    *,
    file: SettingsFile | None = None,
    defaults: Settings | None = None,
) -> ResolvedSettings:
    """Settings from `defaults`, `file`, `env` and `overrides`, each stronger than the one before.

    A value is checked even where a stronger one hides it.

    Args:
        env: text; variables without the prefix ``FI_`` are not looked at.
        overrides: from the command line; text or values. None is passed over.
        file: its values have TOML's types: text is not taken for a number.
        defaults: in place of the built-in ones.

    Raises:
        SettingsError: names no setting, or a value of the wrong type or out of range: every one and its source. Or
            values that break the order of waits (`contracts.budgets.ORDERS`).
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(_NAMES, Source("default"))
    problems = []
    for given in _given(file, env, overrides or {}):
        try:
            values[given.name] = _check(given)
            sources[given.name] = given.source
        except SettingsError as error:
            problems.append(str(error))
    if problems:
        raise SettingsError("; ".join(problems))
    settings = msgspec.structs.replace(defaults or Settings(), **values)
    breaking = [str(disorder) for disorder in disorders(settings) if disorder.order.breaks]
    if breaking:
        raise SettingsError("; ".join(breaking))
    return ResolvedSettings(settings, sources)


def shown_value(name: str, value: Any) -> Any:
    """`value` of the setting `name` as it may be shown: what is secret in it is `HIDDEN`."""
    if name not in _SECRET_URLS:
        return value
    return hide_credentials(value) if isinstance(value, str) else HIDDEN


def hide_credentials(url: str) -> str:
    """``http://user:password@host/path?token=x`` → ``http://***@host/path?***``; also of text that is no proper URL."""
    parts = _URL.fullmatch(url)
    assert parts is not None, "every text matches"
    scheme, credentials, place, query = parts.groups()
    return f"{scheme}{HIDDEN + '@' if credentials else ''}{place}{'?' + HIDDEN if query else ''}"


class _Given(NamedTuple):
    """One value, the key it has where it was given, and the setting that this names."""

    key: str
    name: str
    value: Any
    source: Source


def _given(file: SettingsFile | None, env: Mapping[str, str], overrides: Mapping[str, Any]) -> Iterator[_Given]:
    """All that was given, the weakest first."""
    if file is not None:
        for key, value in file.values.items():
            yield _Given(key, key, value, Source("file", file.name))
    for key, text in env.items():
        if key.startswith(ENV_PREFIX) and key != CONFIG_VARIABLE:
            yield _Given(key, key[len(ENV_PREFIX) :].lower(), text, Source("environment", key))
    for key, value in overrides.items():
        if value is not None:
            yield _Given(key, key, value, Source("command line", f"--set {key}"))


def _check(given: _Given) -> Any:
    layer = given.source.layer
    where = {
        "file": f"{given.source.name}: {_cut(given.key, str)}",
        "environment": f"environment variable {_cut(given.key, str)}",
        "command line": f"command line: {_cut(given.key, str)}",
    }[layer]
    if layer == "file" and isinstance(given.value, dict):
        raise SettingsError(f"{where} is a section: settings have none, write each as NAME = VALUE at the top level")
    if given.name not in _NAMES:
        raise SettingsError(f"{where} names no setting; {_hint(given.name, layer)}")
    try:
        checked = msgspec.convert({given.name: given.value}, Settings, strict=layer == "file")
    except msgspec.ValidationError as error:
        reason = str(error).partition(" - at ")[0]
        raise SettingsError(f"{where} = {_cut(shown_value(given.name, given.value))}: {_cut(reason, str)}") from None
    except UnicodeEncodeError:
        # What the system gives for bytes that are no UTF-8.
        raise SettingsError(f"{where} = {_cut(shown_value(given.name, given.value))}: is not UTF-8 text") from None
    return getattr(checked, given.name)


def _cut(value: Any, show: Callable[[Any], str] = ascii) -> str:
    """`value` for a message: a variable can hold a megabyte."""
    try:
        text = show(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN_CHARS_MAX else f"{text[:_SHOWN_CHARS_MAX]}…"


def _hint(name: str, layer: str) -> str:
    plain = name.lower().replace("-", "_").removeprefix(ENV_PREFIX.lower())
    near = difflib.get_close_matches(plain, _NAMES, n=1)
    if not near:
        return "`fictl config show` lists them all"
    return f"did you mean {ENV_PREFIX + near[0].upper() if layer == 'environment' else near[0]}?"
