"""Whether a stream, as it is configured now, keeps what it is given and lets go of what is settled.

Somebody may have changed it by hand under running stages. Where that drops events that were acknowledged, or stores
them where nobody looks, no reader can see it: only the configuration shows it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from contracts.errors import TopologyError
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
    subject_transform: _Transform | None = None
    metadata: dict[str, Any] = {}


def keeping_problem(rules: StreamRules) -> str:
    """What is wrong with a stream's configuration, and what to do; empty if nothing is."""
    wrong = {
        "drops messages to make room": rules.discard != "new",
        "drops messages that were read": rules.retention != "limits",
        "drops messages for their age": rules.max_age > 0,
        "drops all but the last messages of a subject": rules.max_msgs_per_subject > 0,
        "lets a message drop all those before it": rules.allow_rollup_hdrs,
        "takes no message": rules.sealed,
        "cannot be emptied of what is settled": rules.deny_purge,
        "stores messages where no partition looks for them": rules.name == EVENTS and not _is_partitioned(rules),
    }
    found = [words for words, is_so in wrong.items() if is_so]
    return f"{', '.join(found)}: somebody changed it; see `fictl cluster plan`" if found else ""


def _is_partitioned(rules: StreamRules) -> bool:
    try:
        facts = facts_from_metadata(rules.metadata)
    except TopologyError:
        return False
    return rules.subject_transform == _Transform(*partition_transform(facts.partitions, facts.partition_by))
