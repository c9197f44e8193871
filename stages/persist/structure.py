"""What a shard must be to every HDF5 program: the datasets and attributes of its format, and nothing else.

Our readers take fixed arrays from where the header places them and unpack chunks themselves; other programs follow what
the HDF5 structure says. A shard whose bytes are right shows the same events to both only where both must come to the
same place: no link, filter, external storage or type that one of them follows and the other does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from contracts.events import format_rfc3339
from stages.persist.columns import DESCRIPTIONS, NAMES_CHARS_MAX
from stages.persist.header import Area, LiveHeader, SealedHeader
from stages.persist.rows import ROW_BYTES, ROW_COLUMNS

_LIVE_KINDS = {"frames": "u1", "index": "<i8", "watermark": "<i8"}
_SEALED_KINDS = {
    **dict.fromkeys(DESCRIPTIONS, "u1"),
    **dict.fromkeys(("offset", "timestamp_ns", "origin", "index", "commits"), "<i8"),
    **dict.fromkeys(("site", "event_type"), "<u4"),
    **dict.fromkeys(("names/site", "names/event_type"), f"S{NAMES_CHARS_MAX}"),
    **dict.fromkeys(("by_event_id/rows", "by_consultation/start", "by_consultation/rows"), "<u4"),
    "by_event_id/filter": "<u8",
}
_STORED = ("format", "partition", "shard", "store", "cluster", "created")
_SEALED = (*_STORED, "first_origin", "last_origin", "events", "tree_size", "root")


def structure_problems(path: Path, header: LiveHeader | SealedHeader) -> Iterator[tuple[str, str]]:
    """(where, what) of all in which the file's HDF5 structure is not that of a shard with this header.

    Only in a process that may hang or die: HDF5 reads the file. Raises what h5py raises.
    """
    kinds = _LIVE_KINDS if isinstance(header, LiveHeader) else _SEALED_KINDS
    shapes, areas = _places(header)
    rows = {"index" if isinstance(header, LiveHeader) else "commits": {"columns": ",".join(ROW_COLUMNS)}}
    with h5py.File(path, "r", locking=False) as file:
        yield from _attributes(file.attrs, _told_by(header), {"about"})
        for place, names in _groups(kinds).items():
            if place and not (_is_here(file, place) and isinstance(file[place], h5py.Group)):
                yield place, "is not a group"
                continue
            group = file[place or "/"]
            yield from _links(group, place, names)
            if place:
                yield from ((f"{place}: {where}", what) for where, what in _attributes(group.attrs, {}, set()))
            for name in sorted(names & {*group}):
                full = f"{place}/{name}" if place else name
                if full in kinds and _is_here(group, name):
                    found = _dataset(group[name], kinds[full], shapes.get(full), areas.get(full), rows.get(full, {}))
                    yield from ((f"{full}{where}", what) for where, what in found)


def _told_by(header: LiveHeader | SealedHeader) -> dict[str, Any]:
    """The file's attributes as the header has them."""
    live = isinstance(header, LiveHeader)
    told = {name: getattr(header, name, None) for name in (_STORED if live else _SEALED)}
    told["format"] = type(header).__struct_config__.tag
    told["created"] = format_rfc3339(header.created_ns if isinstance(header, LiveHeader) else header.sealed_ns)
    return told


def _places(header: LiveHeader | SealedHeader) -> tuple[dict[str, tuple[int, ...]], dict[str, Area]]:
    """Shapes and places of the arrays that nothing else is held against."""
    if isinstance(header, SealedHeader):
        return {"records": (header.record_bytes,)}, {}
    areas = {name: getattr(header, name) for name in _LIVE_KINDS}
    shapes = {name: (area.bytes // np.dtype(_LIVE_KINDS[name]).itemsize,) for name, area in areas.items()}
    return {**shapes, "index": (header.index.bytes // ROW_BYTES, len(ROW_COLUMNS))}, areas


def _groups(kinds: Mapping[str, str]) -> dict[str, set[str]]:
    """What each group holds, the root first."""
    groups: dict[str, set[str]] = {"": set()}
    for name in kinds:
        place, _, last = name.rpartition("/")
        groups[""].add(place or last)
        groups.setdefault(place, set()).add(last)
    return groups


def _links(group: h5py.Group, place: str, names: set[str]) -> Iterator[tuple[str, str]]:
    found = {*group}
    for name in sorted(found | names):
        full = f"{place}/{name}" if place else name
        if name not in names:
            yield full, "does not belong in a shard"
        elif name not in found:
            yield full, "is missing"
        elif not _is_here(group, name):
            yield full, "is a link to somewhere else"


def _is_here(group: h5py.Group, name: str) -> bool:
    return isinstance(group.get(name, getlink=True), h5py.HardLink)


def _dataset(
    item: Any, kind: str, shape: tuple[int, ...] | None, area: Area | None, columns: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """`shape`, `area`: None where the values themselves are held against the records. `columns`: its attribute."""
    if not isinstance(item, h5py.Dataset):
        yield "", "is not a dataset"
        return
    made = item.id.get_create_plist()
    filters = [made.get_filter(number)[0] for number in range(made.get_nfilters())]
    expected = np.dtype(kind)
    if item.dtype != expected:
        yield "", f"is of type {item.dtype}, not {expected}"
    elif item.id.get_type() != h5py.h5t.py_create(expected, logical=True):
        # numpy has no word for numbers of fewer bits than their bytes have.
        yield "", f"is of type {expected}, but not of all its bits: other programs see other values there than we do"
    if made.get_external_count() or made.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED):
        yield "", "does not lie in the file as the arrays of a shard do"
    elif made.get_layout() == h5py.h5d.CHUNKED:
        if filters != [h5py.h5z.FILTER_DEFLATE]:
            yield "", f"is stored through filters {filters}, not through gzip alone"
        elif (masked := item.id.chunk_iter(lambda chunk: chunk if chunk.filter_mask else None)) is not None:
            where = masked.chunk_offset[0]
            yield "", f"is marked as not packed from {where} on: other programs see something else there than we do"
    if shape is not None and item.shape != shape:
        yield "", f"is of shape {item.shape}, not {shape}"
    if area is not None and item.id.get_offset() != area.offset:
        yield "", f"begins at byte {item.id.get_offset()}, but the header places it at {area.offset}"
    about = set() if area is not None else {"about"}
    yield from ((f": {where}", what) for where, what in _attributes(item.attrs, columns, about))


def _attributes(attributes: Any, told: Mapping[str, Any], free: set[str]) -> Iterator[tuple[str, str]]:
    """Attributes are those `told`, with these values, and the `free` ones, with any."""
    names = {*attributes}
    for name in sorted(names | {*told} | free):
        if name not in told and name not in free:
            yield f"attribute {name}", "does not belong in a shard"
        elif name not in names:
            yield f"attribute {name}", "is missing"
        elif name in told and not _equal(found := attributes[name], told[name]):
            yield f"attribute {name}", f"is {found}, it should be {told[name]}"


def _equal(found: Any, told: Any) -> bool:
    return bool(np.ndim(found) == 0 and found == told)
