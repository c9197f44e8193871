"""The audit hash is the definition's, byte for byte; the Merkle tree is RFC 6962's."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from contracts.hashing import (
    EMPTY_ROOT,
    INCREMENTAL_BYTES_MIN,
    MerkleFrontier,
    audit_hash,
    audit_hash_incremental,
    canonical_json,
    leaf_hash,
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(text, inner, max_size=5))
payloads = st.dictionaries(text, values, max_size=6)


def by_definition(payload: Any) -> bytes:
    return sha256(json.dumps(payload, sort_keys=True, ensure_ascii=False).encode("utf-8")).digest()


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"z": 1, "a": 2}
    for _ in range(depth):
        value = {"z": [value], "ñ": -0.0}
    return value


@given(payloads)
@example({"b": 1, "a": 2, "á": 3, "B": 4, "": 5, "😀": 6, "\uffff": 7})
@example({"f": [1e16, 1e-7, 0.1, -0.0, 5e-324, 1.7976931348623157e308, 1e22, 123456789012345680.0, 1.0]})
@example({"i": [2**53 + 1, 2**64, -(2**63) - 1, 10**4299]})
@example({"s": '\x00\x1f\x7f\u2028"\\/é中😀'})
@example(nested(31))
def test_the_audit_hash_is_the_definitions(payload: dict[str, Any]) -> None:
    assert audit_hash(payload) == by_definition(payload)
    assert audit_hash_incremental(payload) == by_definition(payload)


@given(payloads, st.randoms())
def test_the_order_keys_were_sent_in_does_not_matter(payload: dict[str, Any], random: Any) -> None:
    items = list(payload.items())
    random.shuffle(items)
    assert audit_hash(dict(items)) == audit_hash(payload)


@given(payloads, st.booleans(), st.none() | st.integers(0, 2))
def test_the_layout_the_json_was_sent_in_does_not_matter(
    payload: dict[str, Any], escaped: bool, indent: int | None
) -> None:
    sent = json.dumps(payload, ensure_ascii=escaped, indent=indent).encode()
    assert audit_hash(msgspec.json.decode(sent)) == by_definition(payload)


def test_the_bytes_hashed_are_pinned() -> None:
    payload = {"b": [1, 2.0, None, True], "a": {"ñ": "día\n"}, "big": 12345678901234567890123}
    assert canonical_json(payload) == (
        '{"a": {"ñ": "día\\n"}, "b": [1, 2.0, null, true], "big": 12345678901234567890123}'.encode()
    )
    assert audit_hash({}) == sha256(b"{}").digest()


@pytest.mark.parametrize("unit", ["x", "é", "😀"])
def test_hashing_piece_by_piece_equals_hashing_the_whole(unit: str) -> None:
    payload = {f"k{i}": [unit * 997, i, {"n": i / 7}] for i in range(INCREMENTAL_BYTES_MIN // 300)}
    assert len(canonical_json(payload)) > 3 * INCREMENTAL_BYTES_MIN
    assert audit_hash_incremental(payload) == audit_hash(payload)


def test_what_utf8_cannot_hold_is_an_error_in_both() -> None:
    for function in (audit_hash, audit_hash_incremental):
        with pytest.raises(UnicodeEncodeError):
            function({"a": "\ud800"})


def naive_root(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, as it is written there."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return sha256(b"\x00" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return sha256(b"\x01" + naive_root(leaves[:split]) + naive_root(leaves[split:])).digest()


def grown(leaves: list[bytes]) -> MerkleFrontier:
    frontier = MerkleFrontier()
    for leaf in leaves:
        frontier.append(leaf_hash(leaf))
    return frontier


CT_LEAVES = [
    bytes.fromhex(text)
    for text in (
        "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
    )
]  # fmt: skip
CT_ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
"""The reference tree of google/certificate-transparency, cpp/merkletree/merkle_tree_test.cc, sizes 1 to 8."""


def test_roots_are_those_of_the_certificate_transparency_reference_tree() -> None:
    assert MerkleFrontier().root() == EMPTY_ROOT == sha256(b"").digest()
    for size, root in enumerate(CT_ROOTS, 1):
        assert grown(CT_LEAVES[:size]).root().hex() == root


@given(st.lists(st.binary(max_size=8), max_size=70))
def test_the_frontier_gives_the_naive_trees_root(leaves: list[bytes]) -> None:
    frontier = grown(leaves)
    assert frontier.root() == naive_root(leaves)
    assert frontier.size == len(leaves)


@given(st.lists(st.binary(max_size=8), max_size=40), st.lists(st.binary(max_size=8), max_size=40))
def test_a_frontier_taken_from_bytes_grows_like_the_original(before: list[bytes], after: list[bytes]) -> None:
    original = grown(before)
    restored = MerkleFrontier.from_bytes(original.size, original.to_bytes())
    copied = original.copy()
    for leaf in after:
        restored.append(leaf_hash(leaf))
        copied.append(leaf_hash(leaf))
    assert restored.root() == copied.root() == naive_root(before + after)
    assert original.root() == naive_root(before)


@pytest.mark.parametrize(("size", "data"), [(3, b"x" * 32), (1, b"x" * 31), (0, b"x" * 32), (2, b"")])
def test_a_frontier_that_does_not_fit_its_size_is_refused(size: int, data: bytes) -> None:
    with pytest.raises(ValueError, match="frontier hashes"):
        MerkleFrontier.from_bytes(size, data)
