"""How large a live shard is made: room for blobs and for commits."""

from __future__ import annotations

from pathlib import Path

from contracts.hashing import MerkleFrontier
from contracts.settings import Settings
from stages.persist.live import create_live
from stages.persist.storedir import Store

ROW_FOR_BYTES = 1024
"""A live shard has room for one commit for each so many bytes, so that a quiet partition runs out of neither first."""


def create_shard(
    path: Path,
    store: Store,
    partition: int,
    number: int,
    settings: Settings,
    now_ns: int,
    begins_after: MerkleFrontier | None = None,
) -> None:
    """Makes an empty live shard with the capacity that `settings` give. As `create_live` besides."""
    capacity = settings.shard_bytes
    create_live(
        path,
        store=store,
        partition=partition,
        shard=number,
        capacity_bytes=capacity,
        rows=capacity // ROW_FOR_BYTES,
        created_ns=now_ns,
        begins_after=begins_after,
    )
