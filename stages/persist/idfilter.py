"""A small in-memory filter over event ids: "certainly not here" or "perhaps here".

A register-blocked Bloom filter: an id picks one 64-bit word and five bits in it. Twelve bits an id give about one false
"perhaps" in a hundred. Ids may be counters, clocks or chosen by an adversary, so bits are taken from a hash keyed with
the store's id, which gateways do not know; and a wrong "perhaps" costs a look-up, never a wrong answer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Bytes2D = np.ndarray[Any, np.dtype[np.uint8]]
Words = np.ndarray[Any, np.dtype[np.uint64]]

ID_BYTES = 16
BITS_PER_ID = 12

_WORD_BITS = 64
_BITS_SET = 5
_BIT_CHOICE = 6
_HALF = np.uint64(32)
_LOW_HALF = np.uint64(0xFFFFFFFF)


def hash_ids(ids: Bytes2D, store_id: str) -> Words:
    """One 64-bit hash for each row of `ids` (n×16 u1), keyed with the store's id (32 hex digits)."""
    key = np.frombuffer(bytes.fromhex(store_id), "<u8").astype(np.uint64)
    halves = np.ascontiguousarray(ids).view("<u8").astype(np.uint64)
    return _mix(_mix(halves[:, 0] ^ key[0]) ^ halves[:, 1] ^ key[1])


def _mix(x: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit moves every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def masks_of(hashes: Words) -> Words:
    """The bits an id sets in its word, from the lower half of its hash."""
    mask = np.zeros_like(hashes)
    for choice in range(_BITS_SET):
        mask |= np.uint64(1) << ((hashes >> np.uint64(choice * _BIT_CHOICE)) & np.uint64(_WORD_BITS - 1))
    return mask


def word_indices(hashes: Words, words: Words | np.uint64) -> Words:
    """Which word each id picks in a filter of `words` words (shape broadcast), from the upper half of its hash."""
    return ((hashes >> _HALF) * (words & _LOW_HALF)) >> _HALF


def build_filter(ids: Bytes2D, store_id: str) -> Words:
    """The filter over `ids` (n×16 u1): n * `BITS_PER_ID` bits, at least one word."""
    words = np.zeros(max(1, -(-len(ids) * BITS_PER_ID // _WORD_BITS)), np.uint64)
    hashes = hash_ids(ids, store_id)
    np.bitwise_or.at(words, word_indices(hashes, np.uint64(len(words))), masks_of(hashes))
    return words
