"""What a shard must be for its owner to go on with it.

The root in a receipt covers the events. When each commit came, and where it ended, stands in the index rows alone,
under checksums that anybody can make anew. So a receipt also has the digest of the rows of each shard that is not
sealed (`StoreEnd.rows`), for its owner that starts again, for who takes the partition back, and for an auditor.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from hashlib import sha256
from pathlib import Path

from contracts.errors import ShardCorruptError, ShardError
from contracts.hashing import MerkleFrontier
from stages.persist.header import LiveHeader, SealedHeader, read_live_header, read_sealed_header
from stages.persist.live import LiveReader
from stages.persist.names import ShardFile
from stages.persist.sealed import SealedReader
from stages.persist.storedir import Store

_OLDER = (
    "run `fictl rebuild` if one was interrupted; else the cluster's receipts are older than the store, see `fictl "
    "partitions restore --help`"
)


def sealed_rows(path: Path) -> str:
    """The digest of a sealed shard's rows, as `StoreEnd.rows`. Raises as `SealedReader`, `read`."""
    with closing(SealedReader(path)) as reader:
        return sha256(reader.read("commits").astype("<i8").tobytes()).hexdigest()


def check_rows(path: Path, shard: int, told: Mapping[int, str], found: str) -> None:
    """Holds that a shard's rows are those of which its last receipt tells, if it does.

    Args:
        path: the shard's.
        shard: its number.
        told: as `StoreEnd.rows`.
        found: the digest of its rows.

    Raises:
        ShardCorruptError: they are not.
    """
    if told.get(shard, found) != found:
        raise ShardCorruptError(name_changed_rows(path))


def name_changed_rows(path: Path) -> str:
    """What is wrong with the shard at `path` where its rows are others."""
    return (
        f"{path}: the rows that say when each of its commits came and where it ended are not those that were "
        "committed: it was changed since; run `fictl rebuild`"
    )


def check_committed(
    path: Path, shard: int, tree: MerkleFrontier, rows: str, committed: tuple[int, str, str] | None
) -> None:
    """Holds that a shard that is being sealed has the events and rows that were committed.

    Args:
        path: the shard's.
        shard: its number.
        tree: the partition's after it, as it was read.
        rows: the digest of its rows, likewise.
        committed: size and root of that tree, and that digest, as its owner knows them; None: nobody does.

    Raises:
        ShardCorruptError: it has others.
    """
    if committed is None:
        return
    found = tree.size, tree.root().hex()
    if found != committed[:2]:
        raise ShardCorruptError(
            f"{path}: holds {found[0]} events with root {found[1][:16]}… up to its end, but {committed[0]} with "
            f"{committed[1][:16]}… were committed: it was changed since; run `fictl rebuild`"
        )
    check_rows(path, shard, {shard: committed[2]}, rows)


def check_belongs(path: Path, header: LiveHeader | SealedHeader, store: Store, partition: int, number: int) -> None:
    """Raises `ShardError` for a shard of another store, or under another's name."""
    found = (header.cluster, header.store, header.partition, header.shard)
    if found != (store.cluster_id, store.store_id, partition, number):
        raise ShardError(
            f"{path}: is shard {header.shard} of partition {header.partition} of store {header.store} of cluster "
            f"{header.cluster}, not what its name and place say; move it out and put the right file back"
        )


def check_shown(live: LiveReader, accepted: int) -> None:
    """Readers are only ever shown what a receipt accepted: then it was, and must not be cut.

    Raises `ShardCorruptError` if they were shown more than `accepted` commits.
    """
    if accepted < live.watermark() <= live.rows_max:
        raise ShardCorruptError(
            f"{live.path}: readers were shown {live.watermark()} commits, but its last receipt accepts {accepted}; "
            f"{_OLDER}"
        )


def refuse_unaccepted(file: ShardFile) -> None:
    """Raises `ShardCorruptError` for a sealed shard of which no receipt speaks."""
    if file.sealed:
        raise ShardCorruptError(f"{file.path}: is sealed, but no receipt speaks of it; {_OLDER}")


def frontier_at_begin(store: Store, partition: int, file: ShardFile | None, number: int) -> MerkleFrontier:
    """The tree before the store's own part, as its first shard says; the receipt's root is held against it.

    Raises:
        ShardCorruptError: the shard is missing, or does not say.
    """
    if file is None:
        raise ShardCorruptError(
            f"{store.directory}: shard {number} of partition {partition}, with which the store took it over, is "
            "missing; run `fictl rebuild`"
        )
    header = read_sealed_header(file.path) if file.sealed else read_live_header(file.path)
    if not header.begins:
        raise ShardCorruptError(f"{file.path}: is not the shard with which the store took the partition over")
    return MerkleFrontier.from_bytes(header.tree_size_before, header.frontier_before)
