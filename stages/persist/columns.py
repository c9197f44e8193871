"""The columns and search indexes of a sealed shard, computed from its records alone.

Sealing writes what this module computes; verification computes it again and compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice
from typing import Any

import numpy as np

from contracts.events import Event
from contracts.hashing import HASH_BYTES
from contracts.policy import CRITICALITIES, GROUPS
from stages.persist.idfilter import ID_BYTES, build_filter

Array = np.ndarray[Any, Any]

NAMES_CHARS_MAX = 64
"""Longest site or event type, in ASCII characters (DOMAIN: subject tokens)."""

_ID_TEXT = f"S{ID_BYTES}"


class ColumnsBuilder:
    """Takes a shard's events in order, and gives its datasets by HDF5 path."""

    def __init__(self) -> None:
        self._event_ids: list[bytes] = []
        self._consultation_ids: list[bytes] = []
        self._hashes: list[bytes] = []
        self._sites: dict[str, int] = {}
        self._types: dict[str, int] = {}
        self._site_codes: list[int] = []
        self._type_codes: list[int] = []
        self._timestamps: list[int] = []
        self._origins: list[int] = []
        self._indexes: list[int] = []
        self._offsets = [0]

    def extend(self, events: Sequence[Event], records: Sequence[bytes]) -> None:
        """The next events, and the record of each. After an error the builder is of no more use.

        Raises:
            ValueError: an id, hash or name has a length that no column holds.
        """
        for event in events:
            if len(event.event_id) != ID_BYTES or len(event.consultation_id) != ID_BYTES:
                raise ValueError(f"event {event.event_id.hex()} has an id that is not {ID_BYTES} bytes long")
            if len(event.audit_hash) != HASH_BYTES:
                raise ValueError(f"event {event.event_id.hex()} has a hash of {len(event.audit_hash)} bytes")
        self._event_ids += [event.event_id for event in events]
        self._consultation_ids += [event.consultation_id for event in events]
        self._hashes += [event.audit_hash for event in events]
        self._site_codes += _codes([event.site for event in events], self._sites)
        self._type_codes += _codes([event.event_type for event in events], self._types)
        self._timestamps += [event.timestamp_ns for event in events]
        self._origins += [event.origin for event in events]
        self._indexes += [event.index for event in events]
        self._offsets += islice(accumulate(map(len, records), initial=self._offsets[-1]), 1, None)

    def finish(self, store_id: str) -> dict[str, Array]:
        """All datasets but `records`, `commits` and the Merkle frontiers, by HDF5 path.

        Args:
            store_id: keys the id filter.
        """
        event_ids = as_rows(self._event_ids, ID_BYTES)
        consultation_ids = as_rows(self._consultation_ids, ID_BYTES)
        return {
            "offset": np.array(self._offsets, "<i8"),
            "event_id": event_ids,
            "consultation_id": consultation_ids,
            "site": np.array(self._site_codes, "<u4"),
            "event_type": np.array(self._type_codes, "<u4"),
            "timestamp_ns": np.array(self._timestamps, "<i8"),
            "origin": np.array(self._origins, "<i8"),
            "index": np.array(self._indexes, "<i8"),
            "audit_hash": as_rows(self._hashes, HASH_BYTES),
            "names/site": np.array(list(self._sites), f"S{NAMES_CHARS_MAX}"),
            "names/event_type": np.array(list(self._types), f"S{NAMES_CHARS_MAX}"),
            **_by_event_id(event_ids, store_id),
            **_by_consultation(consultation_ids),
        }


def _codes(names: list[str], known: dict[str, int]) -> list[int]:
    """The number of each name; new ones are added to `known`. Raises `ValueError` for one that no column holds."""
    for name in set(names) - known.keys():
        if not (name.isascii() and 0 < len(name) <= NAMES_CHARS_MAX):
            raise ValueError(f"{name!r} is not a site or type of 1 to {NAMES_CHARS_MAX} ASCII characters")
    return [known.setdefault(name, len(known)) for name in names]


def as_rows(values: list[bytes], width: int) -> Array:
    """Equally long byte strings as a u1 array, one a row."""
    return np.frombuffer(b"".join(values), np.uint8).reshape(len(values), width)


def as_text(rows: Array) -> Array:
    """n×16 u1 as n 16-byte strings that numpy compares like `bytes` of equal length; no copy of contiguous rows."""
    return np.ascontiguousarray(rows).view(_ID_TEXT).reshape(-1)


def _by_event_id(ids: Array, store_id: str) -> dict[str, Array]:
    order = np.argsort(as_text(ids), kind="stable").astype("<u4")
    return {
        "by_event_id/ids": ids[order],
        "by_event_id/rows": order,
        "by_event_id/filter": build_filter(ids, store_id).astype("<u8"),
    }


def _by_consultation(ids: Array) -> dict[str, Array]:
    order = np.argsort(as_text(ids), kind="stable").astype("<u4")
    ordered = as_text(ids[order])
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(ordered)), bool), ordered[1:] != ordered[:-1]]))
    return {
        "by_consultation/ids": ids[order][starts],
        "by_consultation/start": np.append(starts, len(ordered)).astype("<u4"),
        "by_consultation/rows": order,
    }


COMPRESSED = ("offset", "consultation_id", "site", "event_type", "timestamp_ns", "origin", "index", "commits")
"""Columns worth compressing; the others are random bytes, or are read in place."""

RECORD_ABOUT = (
    f"a MessagePack array of: version (1), {', '.join(Event.__struct_fields__)}. Ids are UUIDs' bytes; payload and "
    "metadata are JSON texts, payload byte for byte as the gateway sent it; audit_hash is SHA-256 of Python's "
    "json.dumps(json.loads(payload), sort_keys=True, ensure_ascii=False) in UTF-8; times are nanoseconds since "
    f"1970-01-01 UTC; group counts from 0 in {', '.join(GROUPS)}, criticality in {', '.join(CRITICALITIES)}"
)
"""What a stored event's bytes are, for whoever has nothing but the file."""

DESCRIPTIONS = {
    "records": f"the events' records, one after the other; event k is records[offset[k]:offset[k+1]], {RECORD_ABOUT}",
    "offset": "where each event's record begins, and where the last one ends",
    "event_id": "16 bytes (UUID)",
    "consultation_id": "16 bytes (UUID)",
    "site": "index into names/site",
    "event_type": "index into names/event_type",
    "timestamp_ns": "when it happened, nanoseconds since 1970-01-01 UTC",
    "origin": "sequence in FI_EVENTS of the message it came in",
    "index": "its position within that message",
    "audit_hash": "SHA-256 of json.dumps(payload, sort_keys=True, ensure_ascii=False)",
    "commits": "one row a commit, as it stood in the live shard",
    "names/site": "sites in order of appearance",
    "names/event_type": "event types in order of appearance",
    "by_event_id/ids": "event_id, sorted",
    "by_event_id/rows": "which event each of them is",
    "by_event_id/filter": "blocked Bloom filter, 12 bits an id, keyed with the store id",
    "by_consultation/ids": "each consultation once, sorted",
    "by_consultation/start": "where each one's rows begin in by_consultation/rows, and where the last ones end",
    "by_consultation/rows": "events by consultation, in stored order within each",
    "merkle/before": "frontier of the partition's RFC 6962 tree (SHA-256; the leaves' data are the events' records) "
    "before the first event: the roots of its complete subtrees, largest first",
    "merkle/after": "and after the last one",
}
"""What each dataset of a sealed shard holds; written as its `about` attribute."""
