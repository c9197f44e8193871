"""A small in-memory filter over event ids: "certainly not here" or "perhaps here".

A register-blocked Bloom filter: an id picks one 64-bit word and five bits in it. Twelve bits an id give about one false
"perhaps" in a hundred. Ids may be counters, clocks or chosen by an adversary, so bits are taken from a hash keyed with
the store's id, which gateways do not know; and a wrong "perhaps" costs a look-up, never a wrong answer.

Many filters lie in one array (`Filters`), so that one numpy operation asks them all.
"""

from __future__ import annotations

from mmap import mmap
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


def empty_filter(ids: int, bits_per_id: int = BITS_PER_ID) -> Words:
    """A filter for so many ids that holds none yet: ids * `bits_per_id` bits, at least one word."""
    return np.zeros(max(1, -(-ids * bits_per_id // _WORD_BITS)), np.uint64)


def add_to_filter(words: Words, hashes: Words) -> None:
    """Notes ids, given their hashes."""
    np.bitwise_or.at(words, word_indices(hashes, np.uint64(len(words))), masks_of(hashes))


def build_filter(ids: Bytes2D, store_id: str) -> Words:
    """The filter over `ids` (n×16 u1) that a sealed shard holds."""
    words = empty_filter(len(ids))
    add_to_filter(words, hash_ids(ids, store_id))
    return words


class Filters:
    """Filters in one array. Adding one copies all."""

    def __init__(self) -> None:
        self._words: Words = np.empty(0, np.uint64)
        self._first: Words = np.empty(0, np.uint64)
        self._count: Words = np.empty(0, np.uint64)

    def __len__(self) -> int:
        return len(self._count)

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return self._words.nbytes

    def add(self, words: Words) -> None:
        """Takes a filter in, as the last one."""
        self._first = np.append(self._first, np.uint64(len(self._words)))
        self._count = np.append(self._count, np.uint64(len(words)))
        self._words = _joined(self._words, words)

    def perhaps(self, hashes: Words) -> tuple[Words, Words]:
        """Which filters say "perhaps" of which of the ids: two arrays of numbers from 0, ordered by filter."""
        masks = masks_of(hashes)[None, :]
        places = self._first[:, None] + word_indices(hashes[None, :], self._count[:, None])
        filters, needles = np.nonzero((self._words[places] & masks) == masks)
        return filters.astype(np.uint64), needles.astype(np.uint64)


def _joined(first: Words, second: Words) -> Words:
    """Both, in memory of their own that is given back whole: the heap would keep what each former array took."""
    words = np.frombuffer(mmap(-1, first.nbytes + second.nbytes), np.uint64)
    np.concatenate([first, second], out=words)
    return words
