"""What persist signs: a receipt or seal record, said in the fields an auditor relies on.

The signature is Ed25519 over the statement's canonical form: the JSON object of its fields, the version tag `v` among
them, as ``json.dumps(fields, sort_keys=True, ensure_ascii=False)`` in UTF-8. A tag is never used for other fields, so
no signature can be taken for one over something else. Since a root covers everything stored before it, one signed
statement vouches for all earlier events too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import UNSET

from contracts.errors import ProofError
from contracts.hashing import canonical_json
from contracts.receipts import Receipt, SealRecord, Signature

Record = TypeVar("Record", Receipt, SealRecord)


class ReceiptStatement(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag="receipt-statement.1"):
    """A commit: these are all events of the partition up to `origin`. Fields as in `Receipt`.

    Attributes:
        tree_size: the receipt's `persisted`.
    """

    partition: int
    cluster: str
    store: str
    origin: int
    tree_size: int
    root: str
    duplicates: int
    dead_lettered: int
    takeover: bool
    committed_ns: int


class SealStatement(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag="seal-statement.1"):
    """A sealed shard: this is its file, and these are all events of the partition up to its end. As in `SealRecord`."""

    partition: int
    cluster: str
    store: str
    shard: int
    file: str
    sha256: str
    bytes: int
    first_origin: int
    last_origin: int
    events: int
    tree_size: int
    root: str
    sealed_ns: int


Statement = ReceiptStatement | SealStatement


def statement_of(record: Receipt | SealRecord) -> Statement:
    """What `record` states, signed or not."""
    if isinstance(record, Receipt):
        return ReceiptStatement(
            partition=record.partition,
            cluster=record.cluster,
            store=record.store,
            origin=record.origin,
            tree_size=record.persisted,
            root=record.root,
            duplicates=record.duplicates,
            dead_lettered=record.dead_lettered,
            takeover=record.takeover,
            committed_ns=record.committed_ns,
        )
    return SealStatement(
        partition=record.partition,
        cluster="" if record.cluster is UNSET else record.cluster,
        store=record.store,
        shard=record.shard,
        file=record.file,
        sha256=record.sha256,
        bytes=record.bytes,
        first_origin=record.first_origin,
        last_origin=record.last_origin,
        events=record.events,
        tree_size=record.tree_size,
        root=record.root,
        sealed_ns=record.sealed_ns,
    )


def statement_bytes(statement: Statement) -> bytes:
    """The bytes that are signed."""
    return canonical_json(msgspec.to_builtins(statement))


class Signer:
    """Signs records with one private key.

    Attributes:
        public_key: the key its signatures check with, 64 hex digits.
    """

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw().hex()

    def sign(self, record: Record) -> Record:
        """`record` with a signature over its statement, in place of one it may have."""
        value = self._key.sign(statement_bytes(statement_of(record)))
        return msgspec.structs.replace(record, signature=Signature(self.public_key, value))


def check_signature(statement: Statement, signature: Signature, trusted: Collection[str] = ()) -> None:
    """Holds that `signature` is over `statement`, by one of the `trusted` public keys (64 hex digits; none: by any).

    Raises:
        ProofError: it is not.
    """
    if trusted and signature.key not in trusted:
        raise ProofError(f"it is signed with key {signature.key}, which is not the one given")
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.key))
        key.verify(signature.value, statement_bytes(statement))
    except ValueError:
        raise ProofError(f"{signature.key!r} is not a public key") from None
    except InvalidSignature:
        raise ProofError(f"its signature is not over what it states, or not by key {signature.key}") from None


class Vouching:
    """Holds the signatures of one partition's records, in order, against the public keys that are trusted (none: any).

    From the first record on that a trusted key signed, each must be signed by one. What came before is under the later
    roots, whether it was not signed or by a key that was given up since.

    Attributes:
        signed: how many are signed, by whichever key.
        keys: those that signed them.
        begun: one is signed by a trusted key.
    """

    def __init__(self, trusted: Collection[str]) -> None:
        self._trusted = trusted
        self.signed = 0
        self.keys: set[str] = set()
        self.begun = False

    def wrong_with(self, record: Receipt | SealRecord, *, must: bool = False) -> str:
        """What is wrong with the next record's signature; empty if nothing is.

        Args:
            record: which.
            must: a trusted key has to have signed it whatever came before.
        """
        must = bool(self._trusted) and (must or self.begun)
        if record.signature is UNSET:
            return "is not signed" if must else ""
        self.signed += 1
        self.keys.add(record.signature.key)
        try:
            check_signature(statement_of(record), record.signature, self._trusted if must else ())
        except ProofError as error:
            return str(error)
        self.begun = self.begun or record.signature.key in self._trusted
        return ""
