"""The audit hash of events of 1, 10 and 100 KB, beside what else could be taken, and why it is not.

A candidate takes the payload's JSON bytes, as the hash stage gets them, and gives a digest: parsing, canonical form and
hash together. The hash of the canonical bytes alone is measured beside it.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import blake3
import msgspec
import orjson
import xxhash

from benchmarks.experiments.harness import Bench, Row
from benchmarks.experiments.sources import HASH_MS
from benchmarks.report import markdown_table, spread
from contracts.hashing import canonical_json
from stages.hash.core import payload_hash

SIZES_KB = (1, 10, 100)
CALL_S = 0.2
QUICK_CALL_S = 0.01
_CALLS_MIN = 5

Hash = Callable[[bytes], Any]


class Candidate(NamedTuple):
    """One way to hash an event.

    Attributes:
        name: for tables.
        whole: payload's JSON bytes → digest.
        alone: canonical bytes → digest.
        fit: whether it is fit for an audit hash, in a sentence.
    """

    name: str
    whole: Hash
    alone: Hash
    fit: str


def _of_canonical(digest: Hash) -> Hash:
    return lambda payload: digest(canonical_json(msgspec.json.decode(payload)))


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _blake2b(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


def _blake3(data: bytes) -> bytes:
    return blake3.blake3(data).digest()


def _orjson_sha256(payload: bytes) -> bytes:
    return _sha256(orjson.dumps(orjson.loads(payload), option=orjson.OPT_SORT_KEYS))


OURS = "SHA-256 of json.dumps (ours)"
CANDIDATES = (
    Candidate(
        OURS,
        payload_hash,
        _sha256,
        "Fit: collision-resistant and in FIPS 180-4; anyone can check it with Python's json and hashlib alone, byte "
        "for byte as the source documents define it.",
    ),
    Candidate(
        "xxHash (XXH3, 128 bits)",
        _of_canonical(xxhash.xxh3_128_digest),
        xxhash.xxh3_128_digest,
        "Not fit: no cryptographic hash. Two payloads with the same digest can be made on purpose, so it finds "
        "accidents, not tampering.",
    ),
    Candidate(
        "BLAKE2b, 256 bits",
        _of_canonical(_blake2b),
        _blake2b,
        "Fit in strength, and in the standard library; not what the documents define, in no FIPS standard, and all of "
        "what it could save is the hash alone, a small part of the whole.",
    ),
    Candidate(
        "BLAKE3",
        _of_canonical(_blake3),
        _blake3,
        "Fit in strength and the fastest of these on large input; a dependency that every auditor would need too, in "
        "no standard library and no FIPS standard.",
    ),
    Candidate(
        "SHA-256 of orjson's sorted bytes",
        _orjson_sha256,
        _sha256,
        "Fit in strength, and saves most of the time; not the same bytes (no spaces, other floats, no integers beyond "
        "64 bits), so no digest would agree with what the documents define or others made of the same event.",
    ),
)


async def measure(bench: Bench) -> list[Row]:
    """Rows of ``{"variant", "at", "whole_us", "alone_us"}``; candidates take turns."""
    payloads = {size: made_payload(size) for size in SIZES_KB}
    limit_s = QUICK_CALL_S if bench.quick else CALL_S
    rows = []
    for turn in range(3 * bench.repetitions):
        bench.say(f"turn {turn + 1} of {3 * bench.repetitions}")
        for size, payload in payloads.items():
            canonical = canonical_json(msgspec.json.decode(payload))
            for candidate in CANDIDATES:
                whole_us = await asyncio.to_thread(_time_us, candidate.whole, payload, limit_s)
                alone_us = await asyncio.to_thread(_time_us, candidate.alone, canonical, limit_s)
                row = {"variant": candidate.name, "at": size, "whole_us": whole_us, "alone_us": alone_us}
                rows.append({"turn": turn, **row})
    return rows


def _time_us(call: Hash, data: bytes, limit_s: float) -> float:
    """The median of calls that go on for `limit_s`."""
    taken: list[int] = []
    end_s = time.perf_counter() + limit_s
    while len(taken) < _CALLS_MIN or time.perf_counter() < end_s:
        start_ns = time.perf_counter_ns()
        call(data)
        taken.append(time.perf_counter_ns() - start_ns)
    return statistics.median(taken) / 1e3


def made_payload(size_kb: int) -> bytes:
    """JSON of so many KB: texts, numbers and lists in objects, as extractions and notes have them."""
    rng = random.Random(size_kb)
    parts: list[dict[str, Any]] = []
    while True:
        words = " ".join(rng.choices(("dolor", "fiebre", "tos", "paciente", "años", "niega", "presión"), k=18))
        parts.append({"texto": words, "gravedad": rng.randint(1, 10), "confianza": rng.random(), "signos": ["a", None]})
        data = msgspec.json.encode({"extraction_data": parts, "iteration": 3})
        if len(data) >= size_kb * 1000:
            return data


def present(rows: Sequence[Row]) -> str:
    """Times by candidate and size, the sources' figures, and a sentence on each candidate."""
    lines = []
    for candidate in CANDIDATES:
        ours = [row for row in rows if row["variant"] == candidate.name]
        cells = [
            spread([row[kind] for row in ours if row["at"] == size])
            for kind in ("whole_us", "alone_us")
            for size in SIZES_KB
        ]
        lines.append([candidate.name, *cells])
    lines.append(["source documents", *(f"{HASH_MS[size] * 1e3:,.0f}" for size in SIZES_KB), "–", "–", "–"])
    head = ["of an event, µs", *(f"{size} KB" for size in SIZES_KB), *(f"hash alone, {size} KB" for size in SIZES_KB)]
    reasons = "\n".join(f"- {candidate.name}: {candidate.fit}" for candidate in CANDIDATES)
    return markdown_table(head, lines) + "\n" + reasons + "\n"
