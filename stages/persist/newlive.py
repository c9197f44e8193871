"""Making an empty live shard, with room for blobs and commits and for no more than may wait in `FI_EVENTS` for it."""

from __future__ import annotations

import os
from pathlib import Path

import h5py

from contracts.events import format_rfc3339
from contracts.hashing import MerkleFrontier
from contracts.settings import SHARD_BYTES_MIN, Settings
from stages.persist.columns import RECORD_ABOUT
from stages.persist.files import PAGE_BYTES, publish_file, sync_file, write_all_at, zero_fill
from stages.persist.hdf5 import new_hdf5
from stages.persist.header import WATERMARK_BYTES, Area, LiveHeader, encode_header, structure_crc32
from stages.persist.names import tmp_path
from stages.persist.rows import ROW_BYTES, ROW_COLUMNS
from stages.persist.storedir import Store

_ABOUT = (
    "Live shard: being appended to. Only the first watermark[0] rows of index hold. Row k covers the bytes of frames "
    "from the end_bytes of row k-1 (0 for the first) to its own: for each event a little-endian u32 length and a "
    f"record of that many bytes, {RECORD_ABOUT}. crc32 is the CRC-32 of the row's other eight columns and then of "
    "those bytes. ordinal 0 is an empty row."
)

ROW_FOR_BYTES = 1024
"""A live shard has room for one commit for each so many bytes, so that a quiet partition runs out of neither first."""


def share_bytes(settings: Settings) -> int:
    """What a partition's live shard may keep in `FI_EVENTS`.

    That is purged of all but the newest sealed shards: unsealed ones may hold as much there as two of those, or a full
    stream would wait for them to grow old.
    """
    return settings.events_bytes_max // ((2 + settings.sealed_kept) * settings.partitions)


def create_shard(
    path: Path,
    store: Store,
    partition: int,
    number: int,
    settings: Settings,
    now_ns: int,
    begins_after: MerkleFrontier | None = None,
) -> None:
    """Makes an empty live shard with the capacity that `settings` give. As `create_live` besides.

    No more than it can come to hold, for all of it is written; but any group finds room in `SHARD_BYTES_MIN`.
    """
    capacity = min(settings.shard_bytes, max(SHARD_BYTES_MIN, share_bytes(settings)))
    create_live(
        path,
        store=store,
        partition=partition,
        shard=number,
        capacity_bytes=capacity,
        rows=capacity // ROW_FOR_BYTES,
        created_ns=now_ns,
        begins_after=begins_after,
    )


def create_live(
    path: Path,
    *,
    store: Store,
    partition: int,
    shard: int,
    capacity_bytes: int,
    rows: int,
    created_ns: int,
    begins_after: MerkleFrontier | None = None,
) -> None:
    """Makes an empty live shard at `path`, zero-filled and durable before it has its name. As slow as writing it all.

    If the process dies or the power fails here: a `.tmp` file that nobody reads, or the whole file.

    Args:
        path: final path, under a live or a prepared name.
        store: whose shard it is.
        partition, shard: which one.
        capacity_bytes: room for blobs.
        rows: room for commits.
        created_ns: now.
        begins_after: the partition's Merkle tree so far, where the store takes over from another one.

    Raises:
        OSError: the disk refused.
    """
    tmp = tmp_path(path)
    arrays = {"frames": (capacity_bytes,), "index": (rows, len(ROW_COLUMNS)), "watermark": (1,)}
    with new_hdf5(tmp, align_from_bytes=PAGE_BYTES, align_to_bytes=PAGE_BYTES) as file:
        file.attrs.update(
            {
                "about": _ABOUT,
                "format": "fi.live.1",
                "partition": partition,
                "shard": shard,
                "store": store.store_id,
                "cluster": store.cluster_id,
                "created": format_rfc3339(created_ns),
            }
        )
        offsets = {name: _allocate(file, name, shape) for name, shape in arrays.items()}
        file["index"].attrs["columns"] = ",".join(ROW_COLUMNS)
    areas = {
        "frames": Area(offsets["frames"], capacity_bytes),
        "index": Area(offsets["index"], rows * ROW_BYTES),
        "watermark": Area(offsets["watermark"], WATERMARK_BYTES),
    }
    fd = os.open(tmp, os.O_RDWR)
    try:
        for area in areas.values():
            zero_fill(fd, area.offset, area.bytes)
        size = os.fstat(fd).st_size
        header = LiveHeader(
            partition=partition,
            shard=shard,
            store=store.store_id,
            cluster=store.cluster_id,
            created_ns=created_ns,
            **areas,
            file_bytes=size,
            structure_crc32=structure_crc32(fd, tmp, size, list(areas.values())),
            begins=begins_after is not None,
            tree_size_before=begins_after.size if begins_after is not None else 0,
            frontier_before=begins_after.to_bytes() if begins_after is not None else b"",
        )
        write_all_at(fd, encode_header(header), 0)
        sync_file(fd)
    finally:
        os.close(fd)
    publish_file(tmp, path)


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...]) -> int:
    """Makes a contiguous dataset with its room in the file taken now, and gives the room's offset in bytes."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    kind = h5py.h5t.STD_U8LE if name == "frames" else h5py.h5t.STD_I64LE
    dataset = h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple(shape), layout)
    return int(dataset.get_offset())
