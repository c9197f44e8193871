"""Names of streams and subjects, the tokens they are made of, and the partition function.

The partition of a message is decided by the server (a subject transform); `partition_of` computes the same
number anywhere else. It is FNV-1a 32 over the chosen tokens, joined with nothing between them, modulo P
(nats-server, server/subject_transform.go, `getHashPartition`).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

EVENTS = "FI_EVENTS"
SEGMENT = "FI_SEGMENT"
HASH = "FI_HASH"
PERSIST = "FI_PERSIST"
RECEIPTS = "FI_RECEIPTS"
DLQ = "FI_DLQ"
MEMBERS = "KV_FI_MEMBERS"
"""The stream of the key-value bucket `FI_MEMBERS`: which processes live. Its keys expire."""
CONTROL = "KV_FI_CONTROL"
"""The stream of the bucket `FI_CONTROL`: what operators told all processes. Its keys stay."""

HOPS = (SEGMENT, HASH, PERSIST)
BUCKETS = (MEMBERS, CONTROL)
STREAMS = (EVENTS, *HOPS, RECEIPTS, DLQ, *BUCKETS)

Stage = Literal["ingest", "segment", "hash", "persist"]
STAGES: tuple[Stage, ...] = ("ingest", "segment", "hash", "persist")
"""The four process kinds, in flow order."""

INPUT_STREAM: dict[Stage, str] = {"ingest": EVENTS, "segment": SEGMENT, "hash": HASH, "persist": PERSIST}
OUTPUT_STREAM: dict[Stage, str] = {"ingest": SEGMENT, "segment": HASH, "hash": PERSIST, "persist": RECEIPTS}
READER: dict[str, Stage] = {stream: stage for stage, stream in INPUT_STREAM.items()}
WRITER: dict[str, Stage] = {stream: stage for stage, stream in OUTPUT_STREAM.items()}

PartitionBy = Literal["consultation", "site"]

EVENTS_PUBLISH_PATTERN = "fi.events.*.*"
"""What `FI_EVENTS` listens on. A subject of any other shape has no responder, so its publisher is told at once."""

TOKEN_PATTERN = r"[A-Za-z0-9_-]{1,64}"
_TOKEN = re.compile(TOKEN_PATTERN)

VERSION_DIGITS_MAX = 9

_FNV_OFFSET = 2166136261
_FNV_PRIME = 16777619


def is_token(text: str) -> bool:
    """True when `text` may stand as a site or consultation token (DOMAIN: ``[A-Za-z0-9_-]{1,64}``)."""
    return _TOKEN.fullmatch(text) is not None


def publish_subject(site: str, consultation: str) -> str:
    """The subject an edge gateway publishes an event to. Both must be tokens (`is_token`)."""
    return f"fi.events.{site}.{consultation}"


def raw_filter(partition: int) -> str:
    """Filter for all stored input of one partition."""
    return f"fi.raw.{partition}.>"


def input_filter(stage: Stage, partition: int) -> str:
    """The filter subject a stage reads for one partition."""
    return raw_filter(partition) if stage == "ingest" else f"fi.{stage}.{partition}"


def output_subject(stage: Stage, partition: int) -> str:
    """The subject a stage writes for one partition: the next stage's input, or receipts for persist."""
    if stage == "persist":
        return receipt_subject(partition)
    return f"fi.{STAGES[STAGES.index(stage) + 1]}.{partition}"


def receipt_subject(partition: int) -> str:
    """Subject of a partition's commit receipts."""
    return f"fi.receipts.{partition}"


def seal_subject(partition: int) -> str:
    """Subject of a partition's sealed-shard records."""
    return f"fi.seals.{partition}"


def dlq_subject(stage: Stage, partition: int) -> str:
    """Subject of what one stage dead-lettered in one partition."""
    return f"fi.dlq.{stage}.{partition}"


def bucket_pattern(stream: str) -> str:
    """Every subject of a key-value bucket, by the name of its stream."""
    return f"$KV.{stream.removeprefix('KV_')}.>"


def member_subject(stage: Stage, node: str, name: str) -> str:
    """Where a process announces itself: the key ``member.<stage>.<node>.<name>`` of `FI_MEMBERS`."""
    return f"$KV.FI_MEMBERS.member.{stage}.{_as_token(node)}.{_as_token(name)}"


def members_pattern(stage: Stage) -> str:
    """Matches the announcements of all processes of a stage."""
    return f"$KV.FI_MEMBERS.member.{stage}.*.*"


def pause_subject(stage: Stage) -> str:
    """The key ``pause.<stage>`` of `FI_CONTROL`: there while the stage is paused."""
    return f"$KV.FI_CONTROL.pause.{stage}"


POLICY_PATTERN = "$KV.FI_CONTROL.policy.*"
"""Matches every version of the policy."""
FLUSH_SUBJECT = "$KV.FI_CONTROL.flush"
"""The key ``flush`` of `FI_CONTROL`: what was last asked to be sealed."""


def policy_subject(version: int) -> str:
    """The key ``policy.<version>`` of `FI_CONTROL`: written once, and never again."""
    return f"$KV.FI_CONTROL.policy.{version}"


def policy_version(subject: str) -> int:
    """Inverse of `policy_subject`; 0 for a key that is no version's."""
    token = subject.rpartition(".")[2]
    canonical = token.isascii() and token.isdecimal() and len(token) <= VERSION_DIGITS_MAX and str(int(token)) == token
    return int(token) if canonical else 0


def _as_token(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", text) or "_"


def raw_subject(partition: int, site: str, consultation: str) -> str:
    """Where `FI_EVENTS` stores what was published of a consultation. Inverse of `split_raw_subject`."""
    return f"fi.raw.{partition}.{site}.{consultation}"


@lru_cache(maxsize=4096)
def split_raw_subject(subject: str) -> tuple[int, str, str]:
    """``fi.raw.<p>.<site>.<consultation>`` → (partition, site, consultation).

    Raises:
        ValueError: the subject has another shape.
    """
    tokens = subject.split(".")
    if len(tokens) != 5 or tokens[0] != "fi" or tokens[1] != "raw":
        raise ValueError(f"not a stored event subject: {subject!r}")
    return int(tokens[2]), tokens[3], tokens[4]


def partition_transform(partitions: int, by: PartitionBy) -> tuple[str, str]:
    """(source, destination) of the `FI_EVENTS` subject transform."""
    key = "1,2" if by == "consultation" else "1"
    return (
        EVENTS_PUBLISH_PATTERN,
        f"fi.raw.{{{{partition({partitions},{key})}}}}.{{{{wildcard(1)}}}}.{{{{wildcard(2)}}}}",
    )


@lru_cache(maxsize=4096)
def partition_of(site: str, consultation: str, partitions: int, by: PartitionBy = "consultation") -> int:
    """The partition the server stores this subject under, in ``range(partitions)``."""
    key = site + consultation if by == "consultation" else site
    value = _FNV_OFFSET
    for byte in key.encode():
        value = ((value ^ byte) * _FNV_PRIME) & 0xFFFFFFFF
    return value % partitions
