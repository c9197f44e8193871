"""Proofs over an RFC 6962 Merkle tree: that an event is in it, and that a later tree only added to an earlier one.

Making a proof needs the leaf hashes; checking one needs nothing but the proof and the roots. The tree is that of
`contracts.hashing`; the algorithms are RFC 6962 sections 2.1.1 and 2.1.2 (making) and RFC 9162 sections 2.1.3.2
and 2.1.4.2 (checking).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from contracts.errors import ProofError
from contracts.hashing import EMPTY_ROOT, HASH_BYTES, node_hash

_PAIR_BYTES = 2 * HASH_BYTES


class MerkleTree:
    """All complete subtrees over some leaf hashes: one hash for each leaf to build, then every proof is cheap.

    Memory is 64 bytes a leaf. Building takes about a second for a million leaves.

    Attributes:
        size: number of leaves.
    """

    def __init__(self, leaves: bytes) -> None:
        """`leaves`: leaf hashes (`contracts.hashing.leaf_hash`), 32 bytes each, joined.

        Raises:
            ValueError: a hash is cut short.
        """
        if len(leaves) % HASH_BYTES:
            raise ValueError(f"{len(leaves)} bytes are not a whole number of {HASH_BYTES}-byte hashes")
        self.size = len(leaves) // HASH_BYTES
        self._levels = [leaves]
        while len(level := self._levels[-1]) >= _PAIR_BYTES:
            pairs = range(0, len(level) - _PAIR_BYTES + 1, _PAIR_BYTES)
            self._levels.append(b"".join([sha256(b"\x01" + level[at : at + _PAIR_BYTES]).digest() for at in pairs]))

    def root(self, size: int | None = None) -> bytes:
        """Root over the first `size` leaves (all, when None), 32 bytes. Raises `ValueError` beyond the tree."""
        return self._range_root(0, self._checked(size))

    def leaf(self, index: int) -> bytes:
        """The hash of leaf `index`, from 0. Raises `ValueError` beyond the tree."""
        self._checked(index + 1)
        return self._node(0, index)

    def inclusion_path(self, index: int, size: int | None = None) -> list[bytes]:
        """The hashes that, with leaf `index` (from 0), give the root over the first `size` leaves; nearest first.

        Raises:
            ValueError: no such leaf or tree.
        """
        size = self._checked(size)
        if not 0 <= index < size:
            raise ValueError(f"a tree of {size} leaves has no leaf {index}")
        path: list[bytes] = []
        start, end = 0, size
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._range_root(middle, end))
                end = middle
            else:
                path.append(self._range_root(start, middle))
                start = middle
        return path[::-1]

    def consistency_path(self, old_size: int, new_size: int | None = None) -> list[bytes]:
        """The hashes that give both roots, over the first `old_size` and over the first `new_size` leaves.

        Raises:
            ValueError: ``0 <= old_size <= new_size <= size`` does not hold.
        """
        new_size = self._checked(new_size)
        if not 0 <= old_size <= new_size:
            raise ValueError(f"a tree of {old_size} leaves is not the beginning of one of {new_size}")
        if old_size in (0, new_size):
            return []
        path: list[bytes] = []
        start, end = 0, new_size
        while old_size != end:
            middle = start + _split(end - start)
            if old_size <= middle:
                path.append(self._range_root(middle, end))
                end = middle
            else:
                path.append(self._range_root(start, middle))
                start = middle
        if start:
            # Not needed where the old tree is itself one complete subtree from the first leaf on: its root is known.
            path.append(self._range_root(start, end))
        return path[::-1]

    def _checked(self, size: int | None) -> int:
        if size is None:
            return self.size
        if not 0 <= size <= self.size:
            raise ValueError(f"there are {self.size} leaves, not {size}")
        return size

    def _node(self, level: int, number: int) -> bytes:
        return self._levels[level][number * HASH_BYTES : (number + 1) * HASH_BYTES]

    def _range_root(self, start: int, end: int) -> bytes:
        """Root over leaves [start, end), a range RFC 6962's recursion meets: `start` is aligned to its subtrees."""
        if start == end:
            return EMPTY_ROOT
        subtrees: list[bytes] = []
        while start < end:
            level = (end - start).bit_length() - 1
            subtrees.append(self._node(level, start >> level))
            start += 1 << level
        root = subtrees.pop()
        while subtrees:
            root = node_hash(subtrees.pop(), root)
        return root


def root_from_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """The root that an inclusion path leads to from a leaf hash; the leaf is in the tree if that is the tree's root.

    Args:
        leaf: its hash, 32 bytes.
        index: its place, from 0.
        size: leaves in the tree.
        path: hashes of 32 bytes, nearest first.

    Raises:
        ProofError: no path for this index and size has that shape.
    """
    _check_hashes((leaf, *path))
    if not 0 <= index < size:
        raise ProofError(f"a tree of {size} leaves has no leaf {index}")
    number, last, root = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            raise ProofError(f"its path of {len(path)} hashes is too long for leaf {index} of {size}")
        if number & 1 or number == last:
            root = node_hash(sibling, root)
            while number and not number & 1:
                number, last = number >> 1, last >> 1
        else:
            root = node_hash(root, sibling)
        number, last = number >> 1, last >> 1
    if last:
        raise ProofError(f"its path of {len(path)} hashes is too short for leaf {index} of {size}")
    return root


def check_consistency(old_size: int, old_root: bytes, new_size: int, new_root: bytes, path: Sequence[bytes]) -> None:
    """Holds that the tree with `new_root` begins with all leaves of the tree with `old_root`, in their order.

    Raises:
        ProofError: the path does not show that.
    """
    _check_hashes((old_root, new_root, *path))
    if not 0 <= old_size <= new_size:
        raise ProofError(f"a tree of {old_size} leaves is not the beginning of one of {new_size}")
    if old_size in (0, new_size):
        is_known = old_size > 0 or old_root == EMPTY_ROOT
        if path or not is_known or (old_size == new_size and old_root != new_root):
            raise ProofError(f"the roots at {old_size} and {new_size} leaves contradict each other")
        return
    whole = old_size & (old_size - 1) == 0
    nodes = [old_root, *path] if whole else list(path)
    if not nodes:
        raise ProofError("its path is empty")
    number, last = old_size - 1, new_size - 1
    while number & 1:
        number, last = number >> 1, last >> 1
    old = new = nodes[0]
    for node in nodes[1:]:
        if last == 0:
            raise ProofError(f"its path of {len(path)} hashes is too long for {old_size} and {new_size} leaves")
        if number & 1 or number == last:
            old, new = node_hash(node, old), node_hash(node, new)
            while number and not number & 1:
                number, last = number >> 1, last >> 1
        else:
            new = node_hash(new, node)
        number, last = number >> 1, last >> 1
    if last:
        raise ProofError(f"its path of {len(path)} hashes is too short for {old_size} and {new_size} leaves")
    if old != old_root:
        raise ProofError(f"its path does not lead to the root at {old_size} leaves")
    if new != new_root:
        raise ProofError(f"its path does not lead to the root at {new_size} leaves")


def _split(count: int) -> int:
    """The largest power of two below `count`, which is more than 1: where RFC 6962 splits a tree."""
    return 1 << ((count - 1).bit_length() - 1)


def _check_hashes(hashes: Sequence[bytes]) -> None:
    if any(len(value) != HASH_BYTES for value in hashes):
        raise ProofError(f"one of its hashes is not {HASH_BYTES} bytes long")
