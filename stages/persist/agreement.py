"""Whether a sealed shard says in every place what its records say.

The root in a receipt or seal record covers the records alone. What readers look events up by, and what other programs
see, lies beside them, under check sums that anybody can make anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from uuid import UUID

import h5py
import numpy as np

from contracts.errors import ShardCorruptError, ShardError, WireFormatError
from contracts.events import decode_event
from contracts.hashing import MerkleFrontier
from stages.persist.columns import Array, ColumnsBuilder
from stages.persist.hdf5 import read_back
from stages.persist.header import Area, SealedHeader
from stages.persist.rows import CommitRow
from stages.persist.sealed import SealedReader
from stages.persist.structure import structure_problems

_Problems = Iterator[tuple[str, str]]

_RECORDS_AT_ONCE = 4096


def check_agreement(reader: SealedReader) -> None:
    """Holds that a sealed shard's events are under the root that it says, and that all else in it follows from them.

    Reads and decodes every record. Left out are audit hashes and the rows' checksums: neither can make one record, or
    one row, of another that was committed.

    Raises:
        ShardCorruptError: it is not so.
        OSError: the system refused.
    """
    path, header = reader.path, reader.header
    tree = MerkleFrontier.from_bytes(header.tree_size_before, header.frontier_before)
    builder = ColumnsBuilder()
    records = reader.records()
    while some := list(islice(records, _RECORDS_AT_ONCE)):
        tree.extend(some)
        try:
            builder.extend([decode_event(record) for record in some], some)
        except (WireFormatError, ValueError) as error:
            raise ShardCorruptError(f"{path}: holds what is no event ({error}); run `fictl rebuild`") from error
    if (tree.size, tree.to_bytes(), tree.root().hex()) != (header.tree_size, header.frontier, header.root):
        raise ShardCorruptError(f"{path}: its events are not those under the root that it says; run `fictl rebuild`")
    rows = [CommitRow(*row) for row in reader.read("commits").tolist()]
    with read_back(path):
        problems = chain(
            commit_problems(header, rows),
            content_problems(reader, builder.finish(header.store), tree),
            structure_problems(path, header),
            place_problems(path, header),
        )
        for where, what in problems:
            raise ShardCorruptError(f"{path}: {where} {what}; it was changed since it was sealed; run `fictl rebuild`")


def content_problems(reader: SealedReader, columns: Mapping[str, Array], tree: MerkleFrontier) -> _Problems:
    """(where, what) of all in which a sealed shard differs from its columns and tree, as its records give them."""
    yield from _columns(reader, columns)
    yield from _facts(reader.header, columns)
    yield from _tree(reader, tree)


def commit_problems(header: SealedHeader, rows: Sequence[CommitRow]) -> _Problems:
    """(where, what) of all in which a sealed shard's header differs from its commits."""
    if len(rows) != header.commits or not rows:
        yield "commits", f"are {len(rows)}, the header says {header.commits}"
    elif (rows[0].prev_origin + 1, rows[-1].origin) != (header.first_origin, header.last_origin):
        yield (
            "commits",
            f"cover origins {rows[0].prev_origin + 1}-{rows[-1].origin}, "
            f"the header says {header.first_origin}-{header.last_origin}",
        )


def place_problems(path: Path, header: SealedHeader) -> _Problems:
    """(where, what) if the arrays are not where the header says. Raises what h5py raises."""
    if areas_of(path) != header.areas:
        yield "header", "does not place the arrays where they are"


def areas_of(path: Path) -> dict[str, Area]:
    """The contiguous datasets of the file."""
    areas: dict[str, Area] = {}

    def note(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset) and item.chunks is None:
            areas[name] = Area(int(item.id.get_offset()) if item.nbytes else 0, int(item.nbytes))

    with h5py.File(path, "r", locking=False) as file:
        file.visititems(note)
    return areas


def _columns(reader: SealedReader, expected: Mapping[str, Array]) -> _Problems:
    for name, array in expected.items():
        try:
            found = reader.read(name)
        except ShardError as error:
            yield name, str(error)
            continue
        if np.array_equal(found, array):
            continue
        where = name
        if found.shape == array.shape and len(array) == reader.header.events and "/" not in name:
            differs = found != array
            row = int(np.flatnonzero(differs if differs.ndim == 1 else differs.any(axis=1))[0])
            where = f"{name}, event {UUID(bytes=expected['event_id'][row].tobytes())}"
        yield where, "differs from the events' records"


def _facts(header: SealedHeader, columns: Mapping[str, Array]) -> _Problems:
    """What readers go by before they read: a search by time passes over a shard whose times are not wanted."""
    times = columns["timestamp_ns"]
    facts = {
        "timestamp_ns_min": int(times.min()) if len(times) else 0,
        "timestamp_ns_max": int(times.max()) if len(times) else 0,
        "record_bytes": int(columns["offset"][-1]),
    }
    for name, found in facts.items():
        if getattr(header, name) != found:
            yield "header", f"says {name} is {getattr(header, name)}, the events say {found}"


def _tree(reader: SealedReader, tree: MerkleFrontier) -> _Problems:
    header = reader.header
    try:
        before, after = reader.read("merkle/before").tobytes(), reader.read("merkle/after").tobytes()
    except ShardError as error:
        yield "merkle", str(error)
        return
    if (tree.size, tree.to_bytes(), tree.root().hex()) != (header.tree_size, header.frontier, header.root):
        yield "merkle", f"the events give a tree of {tree.size} with root {tree.root().hex()}, not {header.root}"
    if (before, after) != (header.frontier_before, header.frontier):
        yield "merkle", "the frontiers in the file differ from those in its header"
