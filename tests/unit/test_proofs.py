"""Merkle proofs are RFC 6962's, held against its own recursion; no proof that was changed in any way is accepted."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import ProofError
from contracts.hashing import EMPTY_ROOT, MerkleFrontier, leaf_hash
from contracts.proofs import MerkleTree, check_consistency, root_from_inclusion

SIZES = 70
LEAVES = [leaf_hash(b"%d" % number) for number in range(1000)]


def tree_of(size: int) -> MerkleTree:
    return MerkleTree(b"".join(LEAVES[:size]))


def split(count: int) -> int:
    k = 1
    while k * 2 < count:
        k *= 2
    return k


def naive_root(leaves: list[bytes]) -> bytes:
    """MTH of RFC 6962, 2.1."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = split(len(leaves))
    return sha256(b"\x01" + naive_root(leaves[:k]) + naive_root(leaves[k:])).digest()


def naive_path(index: int, leaves: list[bytes]) -> list[bytes]:
    """PATH of RFC 6962, 2.1.1."""
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    if index < k:
        return [*naive_path(index, leaves[:k]), naive_root(leaves[k:])]
    return [*naive_path(index - k, leaves[k:]), naive_root(leaves[:k])]


def naive_subproof(old: int, leaves: list[bytes], known: bool) -> list[bytes]:
    """SUBPROOF of RFC 6962, 2.1.2."""
    if old == len(leaves):
        return [] if known else [naive_root(leaves)]
    k = split(len(leaves))
    if old <= k:
        return [*naive_subproof(old, leaves[:k], known), naive_root(leaves[k:])]
    return [*naive_subproof(old - k, leaves[k:], False), naive_root(leaves[:k])]


def test_every_root_and_inclusion_path_is_the_rfcs_and_leads_to_the_root() -> None:
    tree = tree_of(SIZES)
    for size in range(SIZES + 1):
        root = naive_root(LEAVES[:size])
        assert tree.root(size) == tree_of(size).root() == root
        for index in range(size):
            path = tree.inclusion_path(index, size)
            assert path == naive_path(index, LEAVES[:size])
            assert root_from_inclusion(LEAVES[index], index, size, path) == root


def test_every_consistency_path_is_the_rfcs_and_is_accepted() -> None:
    tree = tree_of(SIZES)
    for new in range(1, SIZES + 1):
        for old in range(new + 1):
            path = tree.consistency_path(old, new)
            assert path == (naive_subproof(old, LEAVES[:new], True) if old else [])
            check_consistency(old, tree.root(old), new, tree.root(new), path)


@given(st.integers(1, 1000).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1))))
def test_a_tree_of_any_size_agrees_with_the_frontier(case: tuple[int, int]) -> None:
    size, index = case
    tree = tree_of(size)
    frontier = MerkleFrontier()
    for leaf in LEAVES[:size]:
        frontier.append(leaf)
    assert tree.root() == frontier.root()
    assert tree.leaf(index) == LEAVES[index]
    assert root_from_inclusion(LEAVES[index], index, size, tree.inclusion_path(index)) == frontier.root()
    check_consistency(index, tree.root(index), size, tree.root(), tree.consistency_path(index))


def test_no_other_leaf_place_or_size_is_accepted() -> None:
    tree = tree_of(SIZES)
    for size in range(1, SIZES + 1):
        for index in range(size):
            path = tree.inclusion_path(index, size)
            assert root_from_inclusion(LEAVES[index + 1], index, size, path) != tree.root(size)
            for other in range(size):
                assert other == index or not leads(LEAVES[index], other, size, path, tree.root(size))


def leads(leaf: bytes, index: int, size: int, path: list[bytes], root: bytes) -> bool:
    try:
        return root_from_inclusion(leaf, index, size, path) == root
    except ProofError:
        return False


def consistent(old: int, old_root: bytes, new: int, new_root: bytes, path: list[bytes]) -> bool:
    try:
        check_consistency(old, old_root, new, new_root, path)
    except ProofError:
        return False
    return True


def changed(value: bytes, bit: int) -> bytes:
    flipped = bytearray(value)
    flipped[bit // 8 % len(value)] ^= 1 << bit % 8
    return bytes(flipped)


pairs = st.integers(2, SIZES).flatmap(lambda new: st.tuples(st.integers(1, new - 1), st.just(new)))


@given(pairs, st.integers(0, 255), st.integers(0, 20), st.sampled_from(["flip", "drop", "add", "swap"]))
def test_a_changed_path_is_refused(sizes: tuple[int, int], bit: int, at: int, how: str) -> None:
    old, new = sizes
    tree = tree_of(new)
    for path, accepted in (
        (tree.inclusion_path(old), lambda path: leads(LEAVES[old], old, new, path, tree.root())),
        (tree.consistency_path(old), lambda path: consistent(old, tree.root(old), new, tree.root(), path)),
    ):
        assert accepted(path)
        place = at % len(path)
        other = (at + 1) % len(path)
        spoiled = list(path)
        if how == "flip":
            spoiled[place] = changed(path[place], bit)
        elif how == "drop":
            del spoiled[place]
        elif how == "add":
            spoiled.insert(place, path[place])
        else:
            spoiled[place], spoiled[other] = spoiled[other], spoiled[place]
        assert spoiled == path or not accepted(spoiled)


@given(pairs, st.integers(0, 255))
def test_trees_that_are_not_each_others_beginning_are_refused(sizes: tuple[int, int], bit: int) -> None:
    old, new = sizes
    tree = tree_of(new)
    path = tree.consistency_path(old)
    assert not consistent(old, changed(tree.root(old), bit), new, tree.root(), path)
    assert not consistent(old, tree.root(old), new, changed(tree.root(), bit), path)
    assert not consistent(new, tree.root(), old, tree.root(old), path)
    # Not every size that a path says nothing about can be told from its hashes, but no other *root* can pass.
    rewritten = MerkleTree(b"".join([changed(LEAVES[0], bit), *LEAVES[1:new]]))
    assert not consistent(old, tree.root(old), new, rewritten.root(), rewritten.consistency_path(old))


def test_an_empty_tree_begins_every_tree_and_equal_trees_need_no_path() -> None:
    tree = tree_of(5)
    check_consistency(0, EMPTY_ROOT, 5, tree.root(), [])
    check_consistency(5, tree.root(), 5, tree.root(), [])
    for old, root, path in (
        (0, tree.root(), []),
        (5, tree.root(4), []),
        (5, tree.root(), [LEAVES[0]]),
        (3, LEAVES[0], []),
    ):
        assert not consistent(old, root, 5, tree.root(), path)
    check_consistency(0, EMPTY_ROOT, 0, EMPTY_ROOT, [])
    assert not consistent(0, EMPTY_ROOT, 0, tree.root(), [])
    assert not consistent(0, tree.root(), 0, tree.root(), [])


def test_a_path_too_long_or_short_for_its_sizes_is_refused_though_it_leads_to_a_root() -> None:
    tree = tree_of(16)
    with pytest.raises(ProofError, match="too long for leaf 7 of 8"):
        root_from_inclusion(LEAVES[15], 7, 8, tree.inclusion_path(15))
    with pytest.raises(ProofError, match="too short for 4 and 16"):
        check_consistency(4, tree.root(4), 16, tree.root(8), tree.consistency_path(4, 8))
    with pytest.raises(ProofError, match="too long for 6 and 7"):
        check_consistency(6, tree.root(6), 7, tree.root(16), tree.consistency_path(6, 16))


def test_what_makes_no_sense_is_refused() -> None:
    tree = tree_of(5)
    for call in (
        lambda: tree.root(6),
        lambda: tree.leaf(5),
        lambda: tree.inclusion_path(4, 4),
        lambda: tree.inclusion_path(-1),
        lambda: tree.consistency_path(4, 3),
        lambda: tree.consistency_path(-1),
        lambda: MerkleTree(b"x" * 33),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(ProofError, match="has no leaf"):
        root_from_inclusion(LEAVES[0], 5, 5, [])
    with pytest.raises(ProofError, match="32 bytes"):
        root_from_inclusion(b"short", 0, 1, [])
