"""Evidence files: a proof with the statements it rests on, in one small JSON document that anyone can check.

An inclusion proof shows that an event, byte for byte, is in the tree that a receipt or seal record speaks of. A
consistency proof shows that the events of a later receipt begin with those of an earlier one. Hashes are hex, bytes
base64.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from uuid import UUID

import msgspec
from msgspec import UNSET

from contracts.errors import ProofError, WireFormatError
from contracts.events import decode_event
from contracts.hashing import HASH_BYTES, audit_hash, leaf_hash
from contracts.proofs import check_consistency, root_from_inclusion
from contracts.receipts import Receipt, SealRecord, Signature
from contracts.statements import Statement, check_signature, statement_of
from contracts.wire import UNREADABLE, Count


class TreeHead(msgspec.Struct, frozen=True, kw_only=True):
    """A Merkle root and who vouches for it.

    Attributes:
        tree_size: events under the root.
        root: hex.
        statement: the receipt or seal record that carries it; None when none was at hand.
        signature: over the statement; None when it is not signed.
    """

    tree_size: Count
    root: str
    statement: Statement | None = None
    signature: Signature | None = None


class InclusionProof(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag="inclusion-proof.1"):
    """One stored event is in the tree of its partition.

    Attributes:
        partition: lane.
        event_id: UUID.
        record: the event as it is stored (`contracts.events.encode_event`).
        index: its place in the tree, from 0.
        path: hashes from its leaf to the root, nearest first.
        head: the root, and who vouches for it.
    """

    partition: int
    event_id: str
    record: bytes
    index: Count
    path: tuple[str, ...]
    head: TreeHead


class ConsistencyProof(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag="consistency-proof.1"):
    """A partition's later tree begins with its earlier one: nothing was changed, dropped, added or swapped in that.

    Attributes:
        partition: lane.
        old, new: the two roots.
        path: hashes that lead to both.
    """

    partition: int
    old: TreeHead
    new: TreeHead
    path: tuple[str, ...]


Evidence = InclusionProof | ConsistencyProof
_decoder: msgspec.json.Decoder[Evidence] = msgspec.json.Decoder(Evidence)


def head_of(record: Receipt | SealRecord) -> TreeHead:
    """The root that a receipt or seal record carries, with its statement and signature."""
    statement = statement_of(record)
    signature = None if record.signature is UNSET else record.signature
    return TreeHead(tree_size=statement.tree_size, root=statement.root, statement=statement, signature=signature)


def encode_evidence(evidence: Evidence) -> bytes:
    """Indented JSON."""
    return msgspec.json.format(msgspec.json.encode(evidence))


def decode_evidence(data: bytes) -> Evidence:
    """Inverse of `encode_evidence`.

    Raises:
        ProofError: not evidence of a version this build reads.
    """
    try:
        return _decoder.decode(data)
    except UNREADABLE as error:
        raise ProofError(f"not a proof that `fictl prove` or `consistency` wrote: {error}") from error


def check_evidence(evidence: Evidence, trusted: Collection[str] = ()) -> None:
    """Holds everything that `evidence` claims, with nothing else at hand.

    Args:
        evidence: what to check.
        trusted: public keys (64 hex digits), one of which must have signed every root in it. None: a signature that is
            there must be right, by whichever key it names.

    Raises:
        ProofError: a claim does not hold; says which.
    """
    if isinstance(evidence, ConsistencyProof):
        _check_head(evidence.old, evidence.partition, trusted)
        _check_head(evidence.new, evidence.partition, trusted)
        old, new = evidence.old, evidence.new
        if len(found := clusters_of(evidence)) > 1:
            raise ProofError(f"its roots are of different clusters, {' and '.join(found)}")
        check_consistency(
            old.tree_size, _hash(old.root), new.tree_size, _hash(new.root), [_hash(text) for text in evidence.path]
        )
        return
    _check_head(evidence.head, evidence.partition, trusted)
    _check_record(evidence)
    path = [_hash(text) for text in evidence.path]
    root = root_from_inclusion(leaf_hash(evidence.record), evidence.index, evidence.head.tree_size, path)
    if root != _hash(evidence.head.root):
        raise ProofError(
            f"event {evidence.event_id} as given here is not number {evidence.index} of the {evidence.head.tree_size} "
            f"events under root {evidence.head.root}; the event, its number or the path was changed"
        )


def clusters_of(evidence: Evidence) -> tuple[str, ...]:
    """The ids of the clusters that its statements name: one, or none where nobody stands for its roots."""
    heads = (evidence.old, evidence.new) if isinstance(evidence, ConsistencyProof) else (evidence.head,)
    named = (head.statement.cluster for head in heads if head.statement is not None)
    # Seal records of the first builds name none.
    return tuple(dict.fromkeys(cluster for cluster in named if cluster))


def _check_head(head: TreeHead, partition: int, trusted: Collection[str]) -> None:
    statement = head.statement
    if statement is not None:
        stated = (statement.partition, statement.tree_size, statement.root)
        if stated != (partition, head.tree_size, head.root):
            raise ProofError(
                f"its statement is of {statement.tree_size} events in partition {statement.partition} with root "
                f"{statement.root}, not of {head.tree_size} in partition {partition} with root {head.root}"
            )
        if head.signature is not None:
            check_signature(statement, head.signature, trusted)
            return
    if trusted:
        raise ProofError(f"the root at {head.tree_size} events is not signed, so the key given says nothing about it")


def _check_record(proof: InclusionProof) -> None:
    try:
        event = decode_event(proof.record)
        found = audit_hash(json.loads(event.payload))
    except (WireFormatError, ValueError, RecursionError) as error:
        raise ProofError(f"its record is not a stored event: {error}") from error
    if str(UUID(bytes=event.event_id)) != proof.event_id:
        raise ProofError(f"its record is event {UUID(bytes=event.event_id)}, not {proof.event_id}")
    if found != event.audit_hash:
        raise ProofError(f"the payload of event {proof.event_id} hashes to {found.hex()}, not to its audit hash")


def _hash(text: str) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != HASH_BYTES:
        raise ProofError(f"{text!r} is not a hash of {HASH_BYTES} bytes in hex")
    return value
