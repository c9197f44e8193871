"""Whether a stream, as it is configured now, keeps what it is given and lets go of what is settled.

Somebody may have changed it by hand under running stages. Where that drops events that were acknowledged, or stores
them where nobody looks, no reader can see it: only the configuration shows it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from contracts.errors import TopologyError
from contracts.events import MESSAGE_BYTES_MAX
from contracts.subjects import EVENTS, partition_transform
from stages.runtime.facts import facts_from_metadata


class _Transform(msgspec.Struct, frozen=True):
    src: str = ""
    dest: str = ""


class StreamRules(msgspec.Struct):
    """The parts of a stream's configuration that decide it, with the servers' defaults."""

    name: str = ""
    max_bytes: int = -1
    discard: str = "old"
    retention: str = "limits"
    max_age: int = 0
    max_msgs_per_subject: int = -1
    sealed: bool = False
    deny_purge: bool = False
    allow_rollup_hdrs: bool = False
    allow_msg_ttl: bool = False
    no_ack: bool = False
    max_msgs: int = -1
    max_msg_size: int = -1
    sources: list[Any] = []
    subject_transform: _Transform | None = None
    metadata: dict[str, Any] = {}


def keeping_problem(rules: StreamRules) -> str:
    """What is wrong with a stream's configuration, and what to do; empty if nothing is."""
    found = wrong_with(rules)
    return f"{found}: somebody changed it; see `fictl cluster plan`" if found else ""


def wrong_with(rules: StreamRules) -> str:
    """What a stream, as it is configured, does with messages that it should not; empty if nothing. Not for buckets."""
    wrong = {
        "drops messages to make room": rules.discard != "new",
        "drops messages that were read": rules.retention != "limits",
        "drops messages for their age": rules.max_age > 0,
        "drops all but the last messages of a subject": rules.max_msgs_per_subject > 0,
        "lets a message drop all those before it": rules.allow_rollup_hdrs,
        "lets messages vanish that bear a TTL": rules.allow_msg_ttl,
        "takes in what other streams hold": bool(rules.sources),
        "acknowledges nothing": rules.no_ack,
        "takes no message": rules.sealed,
        f"takes no more than {rules.max_msgs} messages": rules.max_msgs > 0,
        f"takes no message of over {rules.max_msg_size} bytes": 0 < rules.max_msg_size < MESSAGE_BYTES_MAX,
        "cannot be emptied of what is settled": rules.deny_purge,
        "stores messages where no partition looks for them": rules.name == EVENTS and not _is_partitioned(rules),
    }
    return ", ".join(words for words, is_so in wrong.items() if is_so)


def _is_partitioned(rules: StreamRules) -> bool:
    try:
        facts = facts_from_metadata(rules.metadata)
    except TopologyError:
        return False
    return rules.subject_transform == _Transform(*partition_transform(facts.partitions, facts.partition_by))
