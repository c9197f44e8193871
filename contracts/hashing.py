"""The audit hash and the Merkle tree.

`audit_hash` is SHA-256 over ``json.dumps(payload, sort_keys=True, ensure_ascii=False)`` in UTF-8, byte for byte: other
serialisers differ in spaces and floats, so the standard library's encoder is used. The tree is RFC 6962,
section 2.1: leaf = SHA-256(0x00 ‖ data), node = SHA-256(0x01 ‖ left ‖ right), empty tree = SHA-256("").
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Any

HASH_BYTES = 32
EMPTY_ROOT = sha256(b"").digest()
INCREMENTAL_BYTES_MIN = 100 * 1024
"""Above this size of JSON a payload is hashed field by field (DOMAIN: hash stage)."""

_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False)
_C_ENCODER = json.encoder.c_make_encoder  # type: ignore[attr-defined]
_encode_pieces: Callable[[Any, int], Iterable[str]] = (
    # What `_ENCODER.encode` makes anew for each call. What was decoded from JSON needs no look for circles.
    _C_ENCODER(None, _ENCODER.default, json.encoder.encode_basestring, None, ": ", ", ", True, False, True)
    if _C_ENCODER is not None
    else lambda payload, _: _ENCODER.iterencode(payload)
)


def canonical_json(payload: Any) -> bytes:
    """The bytes the audit hash is taken over.

    Raises:
        UnicodeEncodeError: a string holds a lone surrogate.
        TypeError: the payload holds something JSON has no word for.
    """
    return "".join(_encode_pieces(payload, 0)).encode()


def audit_hash(payload: Any) -> bytes:
    """SHA-256 of the canonical JSON of `payload`, 32 bytes. Raises as `canonical_json`."""
    return sha256(canonical_json(payload)).digest()


def audit_hash_incremental(payload: Any) -> bytes:
    """The same hash as `audit_hash`, an object's fields one after the other: no more is held than that of the largest.

    Raises as `canonical_json`.
    """
    if type(payload) is not dict or not payload:
        return audit_hash(payload)
    digest = sha256()
    mark = b"{"
    for name in sorted(payload):
        digest.update(mark + canonical_json({name: payload[name]})[1:-1])
        mark = b", "
    digest.update(b"}")
    return digest.digest()


def leaf_hash(data: bytes) -> bytes:
    """RFC 6962 leaf hash of one stored record's bytes."""
    return sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """RFC 6962 interior node hash."""
    return sha256(b"\x01" + left + right).digest()


class MerkleFrontier:
    """The right edge of an append-only RFC 6962 tree: at most log2(n) hashes, enough to append and to give the root.

    Invariant: one hash for each set bit of `size`, largest subtree first.
    """

    __slots__ = ("_nodes", "size")

    def __init__(self, size: int = 0, nodes: Iterable[bytes] = ()) -> None:
        self._nodes = list(nodes)
        self.size = size
        if len(self._nodes) != size.bit_count() or any(len(node) != HASH_BYTES for node in self._nodes):
            raise ValueError(f"a tree of {size} leaves has {size.bit_count()} frontier hashes of {HASH_BYTES} bytes")

    def copy(self) -> MerkleFrontier:
        """An independent frontier of the same tree."""
        return MerkleFrontier(self.size, self._nodes)

    def append(self, leaf: bytes) -> None:
        """Adds a leaf *hash* (see `leaf_hash`)."""
        node = leaf
        size = self.size
        while size & 1:
            node = node_hash(self._nodes.pop(), node)
            size >>= 1
        self._nodes.append(node)
        self.size += 1

    def extend(self, records: Iterable[bytes]) -> None:
        """Adds the leaf of each stored record, as `append` of its `leaf_hash` does, without three calls for each."""
        nodes, size = self._nodes, self.size
        for record in records:
            node = sha256(b"\x00" + record).digest()
            rest = size
            while rest & 1:
                node = sha256(b"\x01" + nodes.pop() + node).digest()
                rest >>= 1
            nodes.append(node)
            size += 1
        self.size = size

    def root(self) -> bytes:
        """The root over all leaves so far, 32 bytes."""
        if not self._nodes:
            return EMPTY_ROOT
        node = self._nodes[-1]
        for left in reversed(self._nodes[:-1]):
            node = node_hash(left, node)
        return node

    def to_bytes(self) -> bytes:
        """The frontier's hashes, largest subtree first, joined (32 bytes each)."""
        return b"".join(self._nodes)

    @classmethod
    def from_bytes(cls, size: int, data: bytes) -> MerkleFrontier:
        """Inverse of `to_bytes`.

        Raises:
            ValueError: the number of hashes does not fit `size`.
        """
        return cls(size, [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)])
