"""Holding the rows of a partition's commits against its receipts: what no root covers, as when each commit came."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from contracts.hashing import HASH_BYTES
from contracts.receipts import Receipt
from stages.persist.verify import ShardContents


def changed_rows(
    shards: Sequence[ShardContents], receipts: Sequence[Receipt], store_id: str
) -> Iterator[tuple[str, str]]:
    """(commits, what is wrong) of each shard whose rows are not those of which receipts tell, at the first of these.

    Args:
        shards: the partition's.
        receipts: the store's, in stream order, perhaps some that are newer than what was read of the shards.
        store_id: whose shards they are.
    """
    unchanged = {contents.shard.shard: contents for contents in shards if not contents.check.findings}
    agreed = dict.fromkeys(unchanged, 0)
    for receipt in receipts:
        end = receipt.end_of(store_id)
        contents, told = unchanged.get(end.shard), end.rows.get(end.shard)
        if contents is None or told is None or end.commits > contents.check.commits:
            continue
        if contents.check.rows[(end.commits - 1) * HASH_BYTES : end.commits * HASH_BYTES].hex() == told:
            agreed[end.shard] = end.commits
            continue
        del unchanged[end.shard]
        yield (
            f"{contents.shard.path.name}, commits {agreed[end.shard] + 1} to {end.commits}",
            "the rows that say when each of them came and where it ended are not those that were committed: the "
            f"receipt at origin {receipt.origin} has another digest over them",
        )
