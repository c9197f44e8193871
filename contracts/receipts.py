"""Persist's public words: the commit receipt and the seal record. JSON, so that an auditor can read them.

A receipt is the commit: until one is accepted by the replicated stream, nothing it speaks of is committed.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType

from contracts.errors import WireFormatError
from contracts.hashing import EMPTY_ROOT
from contracts.wire import UNREADABLE, Count, FileName, HexHash, Sequence, TimeNs


class Signature(msgspec.Struct, frozen=True):
    """An Ed25519 signature over a record's statement (`contracts.statements`).

    Attributes:
        key: the public key that it checks with, 64 hex digits.
        value: 64 bytes, base64 on the wire.
    """

    key: HexHash
    value: bytes


class StoreEnd(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far one store's files are committed for a partition. Shards are numbered through all of its stores.

    Attributes:
        shard: number of the live shard.
        commits: how many of its index rows are committed; later rows are a tail to be cut.
        first: the shard that the store's own part of the partition begins with; the ones before are in other stores.
        rows: for each shard that was not sealed yet, by number, SHA-256 of its committed index rows as they lie in the
            file, hex: what a root does not cover, as when and where each commit ended. Not there in receipts of builds
            before.
    """

    shard: Sequence
    commits: Count
    first: Sequence = 1
    rows: dict[Sequence, HexHash] = {}


_NO_FILES: Final = StoreEnd(shard=1, commits=0)


class ResumePoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the partition can go on from after a sealed shard, if everything later is lost.

    Attributes:
        frontier: of the Merkle tree at the record's `tree_size`, 32 bytes a hash, largest subtree first.
        duplicates, dead_lettered: running totals of the partition up to there, in events.
        closed: segment's memory there, as far as the stored events tell.
        stored_ns: when `FI_EVENTS` stored the message there, likewise; 0 where they do not tell.
    """

    frontier: bytes
    duplicates: Count
    dead_lettered: Count
    closed: bytes
    stored_ns: TimeNs = 0


class Receipt(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag="receipt.1"):
    """One commit of one partition (or, with `takeover`, the claim of a new owner; it commits nothing).

    A takeover may go back: its `origin` is then before that of the receipt it follows, and everything after it is made
    again from `FI_EVENTS`, because the files that held it are damaged or gone.

    Attributes:
        partition: lane.
        cluster: id of the cluster the origins count in.
        writer: nonce of the persister process.
        node: its host name, for people.
        store: id of the store (shards directory) that owns the partition; empty in a `place_kept`.
        ends: for every store that ever owned it, how far its files are committed.
        origin: all events up to this origin are settled.
        trail: sequences in `FI_SEGMENT`, `FI_HASH`, `FI_PERSIST` of the last frame this commit covers.
        persisted, duplicates, dead_lettered: running totals of the partition, in events.
        root: Merkle root over the `persisted` events so far, hex.
        closed: segment's memory at `origin` (opaque, base64 on the wire).
        committed_ns: when the data was durable on disk.
        takeover: claims the partition; totals and origin repeat an earlier receipt's or seal record's.
        stored_ns: when `FI_EVENTS` stored the message at `origin`; not there where its writer did not know.
        signature: there when persist has a signing key.
    """

    partition: Count
    cluster: str
    writer: str
    node: str
    store: str
    ends: dict[str, StoreEnd]
    origin: Count
    trail: Annotated[tuple[Count, ...], Meta(max_length=3)]
    persisted: Count
    duplicates: Count
    dead_lettered: Count
    root: HexHash
    closed: bytes
    committed_ns: TimeNs
    takeover: bool = False
    stored_ns: TimeNs | UnsetType = UNSET
    signature: Signature | UnsetType = UNSET

    def end_of(self, store: str) -> StoreEnd:
        """How far the files of a store are committed, by its id: nothing where it never owned the partition."""
        return self.ends.get(store, _NO_FILES)


class SealRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag="seal.1"):
    """A shard became immutable. Kept for ever: with the receipts it is the off-box witness.

    Attributes:
        partition: lane.
        store: id of the store that holds the file.
        shard: its number, growing by one in the partition.
        file: its name.
        sha256: of the file's bytes, hex.
        first_origin, last_origin: what it covers.
        events: events in it.
        tree_size: events of the partition up to its end.
        root: Merkle root at `tree_size`, hex.
        sealed_ns: when.
        bytes: file size.
        cluster: id of the cluster the origins count in; not there in records of the first builds.
        resume: what the partition can go on from after it; not there in records of the first builds.
        signature: there when persist has a signing key.
    """

    partition: Count
    store: str
    shard: Sequence
    file: FileName
    sha256: HexHash
    first_origin: Sequence
    last_origin: Sequence
    events: Count
    tree_size: Count
    root: HexHash
    sealed_ns: TimeNs
    bytes: Count
    cluster: str | UnsetType = UNSET
    resume: ResumePoint | UnsetType = UNSET
    signature: Signature | UnsetType = UNSET

    def is_of(self, store: str, first: int) -> bool:
        """Whether that store goes by it: its own one, or of a shard before `first`, with which its part begins."""
        return self.store == store or self.shard < first


def first_receipt(partition: int, cluster: str, store: str, writer: str) -> Receipt:
    """What a partition begins with: nothing is stored, and `store` is the first to own it. Arguments as `Receipt`."""
    return Receipt(
        partition=partition,
        cluster=cluster,
        writer=writer,
        node="",
        store=store,
        ends={},
        origin=0,
        trail=(),
        persisted=0,
        duplicates=0,
        dead_lettered=0,
        root=EMPTY_ROOT.hex(),
        closed=b"",
        committed_ns=0,
    )


def place_kept(partition: int, cluster: str, writer: str) -> Receipt:
    """What stands where a partition's receipts will be, of a new cluster: that nobody owned it yet.

    So one without anything there is not new: its receipts were lost. Arguments as `Receipt`.
    """
    return msgspec.structs.replace(first_receipt(partition, cluster, "", writer), takeover=True)


_encoder = msgspec.json.Encoder()
_receipt_decoder = msgspec.json.Decoder(Receipt)
_seal_decoder = msgspec.json.Decoder(SealRecord)


def encode_receipt(receipt: Receipt | SealRecord) -> bytes:
    """Wire bytes (JSON)."""
    return _encoder.encode(receipt)


def decode_receipt(data: bytes) -> Receipt:
    """Inverse of `encode_receipt`.

    Raises:
        WireFormatError: not a receipt of a version this build reads.
    """
    try:
        return _receipt_decoder.decode(data)
    except UNREADABLE as error:
        raise WireFormatError(f"not a receipt: {error}") from error


def decode_seal(data: bytes) -> SealRecord:
    """Inverse of `encode_receipt` for seal records. Raises `WireFormatError`."""
    try:
        return _seal_decoder.decode(data)
    except UNREADABLE as error:
        raise WireFormatError(f"not a seal record: {error}") from error
