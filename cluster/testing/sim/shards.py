"""Shards in memory: what of them is in the page cache, and what on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from stages.persist.core import Group


@dataclass(slots=True)
class Shard:
    """One shard's file.

    Attributes:
        groups: commits in it. Those after `durable` are in the page cache only.
        watermark, durable_watermark: what readers are shown, and what of that survives a power cut.
        sealed: it is full, whole and immutable.
    """

    groups: list[Group] = field(default_factory=list)
    durable: int = 0
    watermark: int = 0
    durable_watermark: int = 0
    sealed: bool = False

    def copy(self) -> Shard:
        """The same, whatever becomes of this one."""
        return Shard(list(self.groups), self.durable, self.watermark, self.durable_watermark, self.sealed)


def rows_of(groups: Sequence[Group]) -> str:
    """What stands for the digest of the groups' index rows."""
    rows = [(group.prev_origin, group.origin, group.duplicates, group.dead_lettered) for group in groups]
    return sha256(repr(rows).encode()).hexdigest()


def copies_of(shards: dict[int, dict[int, Shard]]) -> dict[int, dict[int, Shard]]:
    """The same shards of each partition, whatever becomes of these."""
    return {partition: {number: shard.copy() for number, shard in some.items()} for partition, some in shards.items()}
