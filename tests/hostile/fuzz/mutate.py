"""Changes to bytes: blind ones, words put in, pieces of other inputs, and changes to JSON that leave it JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

BYTES_MAX = 8 * 1024
"""Longer inputs are cut: they find nothing that shorter ones do not, and take longer."""

_NUMBERS = (0, -1, 1, 63, 64, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 1e308, -0.0, 0.1, 1e-320)
_TEXTS = ("", "\x00", "é", "\ud800", "😀", " ", "a" * 300, "null", "\u2028", "../x", "A" * 36)


def mutate(rng: random.Random, data: bytes, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """One to six changes of `data`.

    Args:
        rng: decides everything.
        data: what to change.
        others: inputs to take pieces of.
        tokens: words to put in.
    """
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        data = rng.choice(_CHANGES)(rng, data, others, tokens)
    return data[:BYTES_MAX]


def _flip(rng: random.Random, data: bytes, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    if not data:
        return bytes([rng.randrange(256)])
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _set(rng: random.Random, data: bytes, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + bytes([rng.choice((0, 1, 9, 10, 13, 32, 34, 44, 58, 92, 127, 128, 255))]) + data[at + 1 :]


def _cut(rng: random.Random, data: bytes, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    start, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:start] + data[end:] if rng.random() < 0.7 else data[:end]


def _repeat(rng: random.Random, data: bytes, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    start, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:end] + data[start:end] * rng.choice((1, 1, 2, 70)) + data[end:]


def _splice(rng: random.Random, data: bytes, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    other = rng.choice(others)
    start, end = sorted((rng.randrange(len(other) + 1), rng.randrange(len(other) + 1)))
    at = rng.randrange(len(data) + 1)
    return data[:at] + other[start:end] + data[at + rng.choice((0, end - start)) :]


def _token(rng: random.Random, data: bytes, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    token = rng.choice(tokens)
    at = rng.randrange(len(data) + 1)
    return data[:at] + token + data[at + rng.choice((0, 0, len(token))) :]


def _json(rng: random.Random, data: bytes, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """A change of one value or name of a JSON line; a blind one where it is none."""
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    try:
        value = json.loads(lines[number].decode())
    except (ValueError, RecursionError):
        return _splice(rng, data, others, tokens)
    value = _change_value(rng, value)
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5, separators=rng.choice(((",", ":"), (", ", " : "))))
        lines[number] = text.encode(errors="surrogatepass")
    except (ValueError, RecursionError):
        return data
    return b"\n".join(lines)


def _change_value(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.6:
            return value | {name: _change_value(rng, value[name])}
        if kind < 0.75:
            return {key: child for key, child in value.items() if key != name}
        return value | {rng.choice((*_TEXTS, name.upper(), name + "_")): value[name]}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _change_value(rng, value[at]), *value[at + rng.choice((0, 1)) :]]
    return rng.choice(
        (rng.choice(_NUMBERS), rng.choice(_TEXTS), None, True, [], {}, [value], {"a": value}, [[value] * 3])
    )


_Change = Callable[[random.Random, bytes, Sequence[bytes], Sequence[bytes]], bytes]
_CHANGES: tuple[_Change, ...] = (_flip, _set, _cut, _repeat, _splice, _token, _token, _json, _json, _json)
