"""Making proofs from the shards of a store: one pass over a partition, holding nothing of it but its leaf hashes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from uuid import UUID

from contracts.errors import ShardCorruptError, ShardError
from contracts.evidence import ConsistencyProof, InclusionProof, TreeHead, head_of
from contracts.hashing import HASH_BYTES, leaf_hash
from contracts.proofs import MerkleTree
from contracts.receipts import Receipt, SealRecord
from contracts.statements import SealStatement
from stages.persist.names import list_shards
from stages.persist.records import kept_record
from stages.persist.store import EventStore, find_store


def kept_seals(path: Path, partition: int) -> list[SealRecord]:
    """The seal records that lie beside a partition's sealed shards, by shard number."""
    shards = list_shards(find_store(path)).get(partition, [])
    records = [kept_record(shard.path) for shard in shards if shard.sealed]
    return [record for record in records if record is not None]


def prove_event(path: Path, event_id: UUID, records: Iterable[Receipt | SealRecord]) -> InclusionProof:
    """Proof that an event is in the first tree that one of `records` (of its partition) speaks of and that holds it.

    Signed records go before others, and seal records, which the cluster keeps for ever, before receipts. Without a
    suitable one the proof is for all that is stored now, and nobody vouches for its root.

    Args:
        path: the store, or the directory it is in.
        event_id: which event.
        records: receipts and seal records.

    Raises:
        ShardError: no such event is stored, or the partition does not begin in this store.
        ShardCorruptError: a shard cannot be read, or the shards contradict the record; `fictl verify` says where.
    """
    with EventStore(path) as store:
        stored = store.event(event_id)
        if stored is None:
            raise ShardError(f"no event {event_id} is stored in {path}; was it published to this cluster?")
        tree, record = _tree(store, stored.partition, stored.leaf)
    index = stored.leaf or 0
    head = _checked(tree, _best([head_of(one) for one in records], index + 1, tree.size, tree), path)
    return InclusionProof(
        partition=stored.partition,
        event_id=str(event_id),
        record=record,
        index=index,
        path=_hex(tree.inclusion_path(index, head.tree_size)),
        head=head,
    )


def prove_consistency(
    path: Path, partition: int, old_size: int, new_size: int | None, records: Iterable[Receipt | SealRecord]
) -> ConsistencyProof:
    """Proof that the first `new_size` events of a partition (None: all stored) begin with its first `old_size`.

    The roots carry the statements of `records` at these very sizes, where there are any.

    Raises:
        ShardError: there are not so many events, the partition does not begin in this store, or has no shard in it.
        ShardCorruptError: as for `prove_event`.
    """
    with EventStore(path) as store:
        if partition not in store.partitions():
            there = ", ".join(map(str, store.partitions())) or "none"
            raise ShardError(f"{path}: has no shard of partition {partition}; it has those of {there}")
        tree, _ = _tree(store, partition, None)
    size = tree.size if new_size is None else new_size
    if not 0 <= old_size <= size <= tree.size:
        raise ShardError(
            f"partition {partition} holds {tree.size} events: none can be from {old_size} to {size} of them"
        )
    heads = [head_of(one) for one in records]
    old, new = (_checked(tree, _best(heads, at, at, tree), path) for at in (old_size, size))
    return ConsistencyProof(partition=partition, old=old, new=new, path=_hex(tree.consistency_path(old_size, size)))


def event_partition(path: Path, event_id: UUID) -> int | None:
    """The partition in which an event is stored; None when it is not."""
    with EventStore(path) as store:
        stored = store.event(event_id)
    return None if stored is None else stored.partition


def _tree(store: EventStore, partition: int, wanted: int | None) -> tuple[MerkleTree, bytes]:
    """The partition's tree, and the record of its leaf `wanted`."""
    leaves = bytearray()
    found = b""
    for leaf, record in store.records(partition):
        if leaf is None or leaf * HASH_BYTES != len(leaves):
            raise ShardError(f"partition {partition} does not begin in this store, so its tree cannot be computed")
        leaves += leaf_hash(record)
        if leaf == wanted:
            found = record
    return MerkleTree(bytes(leaves)), found


def _best(heads: Sequence[TreeHead], size_min: int, size_max: int, tree: MerkleTree) -> TreeHead:
    """The head to rest on, of those that speak of so many events; one of our own making, at `size_max`, without any."""
    suitable = [head for head in heads if size_min <= head.tree_size <= size_max]
    if not suitable:
        return TreeHead(tree_size=size_max, root=tree.root(size_max).hex())
    return min(
        suitable,
        key=lambda head: (head.signature is None, not isinstance(head.statement, SealStatement), head.tree_size),
    )


def _checked(tree: MerkleTree, head: TreeHead, path: Path) -> TreeHead:
    root = tree.root(head.tree_size).hex()
    if head.root != root:
        said = head.statement
        whose = f"seal record of {said.file}" if isinstance(said, SealStatement) else "receipt"
        raise ShardCorruptError(
            f"the shards give root {root} over {head.tree_size} events, the {whose} says {head.root}: one of them was "
            f"changed; `fictl verify {path} --receipts` says which"
        )
    return head


def _hex(path: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(value.hex() for value in path)
