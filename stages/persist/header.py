"""The first `HEADER_BYTES` of every shard: a checksummed JSON text in the HDF5 user block, before any HDF5 structure.

HDF5 readers skip a user block. Ours read it first, because a damaged HDF5 file can hang the library: the header says
what the file is, where its fixed arrays lie, and how to check the rest, without HDF5. The same facts are in the file's
HDF5 attributes for readers with other tools.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import msgspec

from contracts.errors import ShardCorruptError, ShardError
from contracts.hashing import MerkleFrontier
from contracts.wire import UNREADABLE, Count, HexHash, Sequence, TimeNs
from stages.persist.files import check_regular, has_hole, read_all_at, told_of
from stages.persist.names import ShardFile
from stages.persist.rows import ROW_BYTES

HEADER_BYTES = 8192
"""A power of two from 512, as HDF5 demands of a user block; holds the two frontiers of a tree of 2**60 leaves."""

WATERMARK_BYTES = 8
_ID_BYTES = 16
_MAGIC = b"FI-SHARD\n"
_CRC_CHARS = 9
_PIECE_BYTES = 1024 * 1024


class Area(msgspec.Struct, frozen=True, array_like=True):
    """An uncompressed contiguous dataset: where its bytes lie in the file.

    Attributes:
        offset: from the start of the file, in bytes.
        bytes: its length.
    """

    offset: Count
    bytes: Count


class LiveHeader(msgspec.Struct, frozen=True, kw_only=True, tag_field="format", tag="fi.live.1"):
    """What a live shard is. Written once, when the file is made.

    Attributes:
        partition, shard: which one; shard numbers grow by one in a partition.
        store, cluster: ids it belongs to.
        created_ns: when it was made.
        frames, index, watermark: its three arrays.
        file_bytes: the file's length, which never changes.
        structure_crc32: CRC-32 of everything after the header and outside the three arrays; never changes either.
        begins: as for a sealed shard.
        tree_size_before, frontier_before: where the store's part begins, the partition's Merkle tree before it.
    """

    partition: Count
    shard: Sequence
    store: str
    cluster: str
    created_ns: TimeNs
    frames: Area
    index: Area
    watermark: Area
    file_bytes: Count
    structure_crc32: Count
    begins: bool = False
    tree_size_before: Count = 0
    frontier_before: bytes = b""


class SealedHeader(msgspec.Struct, frozen=True, kw_only=True, tag_field="format", tag="fi.sealed.1"):
    """What a sealed shard is and what it holds.

    Attributes:
        partition, shard, store, cluster: as for a live shard.
        first_origin, last_origin: what it covers, both inclusive; its first commit's `prev_origin` is one less.
        commits, events: index rows and events in it.
        record_bytes: length of its events' bytes, uncompressed.
        timestamp_ns_min, timestamp_ns_max: of its events; 0 without any.
        sealed_ns: when.
        tree_size_before, frontier_before: the partition's Merkle tree before its first event.
        tree_size, frontier, root: and after its last one.
        areas: its contiguous datasets by name.
        file_bytes: length of the file.
        body_sha256: of all bytes after the header, hex.
        begins: the store took the partition over here; the shards before are in another store.
    """

    partition: Count
    shard: Sequence
    store: str
    cluster: str
    first_origin: Sequence
    last_origin: Sequence
    commits: Count
    events: Count
    record_bytes: Count
    timestamp_ns_min: TimeNs
    timestamp_ns_max: TimeNs
    sealed_ns: TimeNs
    tree_size_before: Count
    frontier_before: bytes
    tree_size: Count
    frontier: bytes
    root: HexHash
    areas: dict[str, Area]
    file_bytes: Count
    body_sha256: HexHash
    begins: bool = False


class _Format(msgspec.Struct):
    format: str


_encoder = msgspec.json.Encoder()
_format_decoder = msgspec.json.Decoder(_Format)
_decoders: dict[str, msgspec.json.Decoder[Any]] = {
    "fi.live.1": msgspec.json.Decoder(LiveHeader),
    "fi.sealed.1": msgspec.json.Decoder(SealedHeader),
}


def encode_header(header: LiveHeader | SealedHeader) -> bytes:
    """The user block's `HEADER_BYTES` bytes: magic line, JSON line, CRC-32 of both in hex, spaces.

    Raises:
        ShardError: it does not fit.
    """
    text = _MAGIC + _encoder.encode(header) + b"\n"
    text += b"%08x\n" % zlib.crc32(text)
    if len(text) >= HEADER_BYTES:
        raise ShardError(f"a shard header of {len(text)} bytes does not fit in {HEADER_BYTES}")
    return text.ljust(HEADER_BYTES - 1) + b"\n"


def decode_header(block: bytes, path: Path) -> LiveHeader | SealedHeader:
    """Inverse of `encode_header`; `path` is for messages only.

    Raises:
        ShardError: not one of our shards, or of a format this build does not know.
        ShardCorruptError: cut short or damaged.
    """
    if len(block) < HEADER_BYTES or block.count(0) == len(block):
        raise ShardCorruptError(f"{path}: cut short or empty; rebuild it from the stream")
    if not block.startswith(_MAGIC):
        raise ShardError(f"{path}: not a shard of this system; move it out of the store")
    end = block.find(b"\n", len(_MAGIC)) + 1
    if end == 0 or block[end : end + _CRC_CHARS] != b"%08x\n" % zlib.crc32(block[:end]):
        raise ShardCorruptError(f"{path}: its header is damaged; rebuild it from the stream")
    text = block[len(_MAGIC) : end]
    try:
        name = _format_decoder.decode(text).format
        decoder = _decoders.get(name)
        if decoder is None:
            raise ShardError(f"{path}: format {name[:40]!r} is not known to this build; use the version that wrote it")
        header: LiveHeader | SealedHeader = decoder.decode(text)
        _check_places(header)
        _check_trees(header)
    except (*UNREADABLE, ValueError) as error:
        raise ShardCorruptError(f"{path}: its header makes no sense ({error}); rebuild it from the stream") from error
    return header


def _check_places(header: LiveHeader | SealedHeader) -> None:
    """Raises `ValueError` for arrays that do not lie behind the header, in the file, and apart."""
    if isinstance(header, LiveHeader):
        areas = [header.frames, header.index, header.watermark]
        if header.watermark.bytes != WATERMARK_BYTES or header.index.bytes % ROW_BYTES:
            raise ValueError("its watermark is no number, or its index no rows")
    else:
        areas = [*header.areas.values()]
        # Ids lie there unpacked.
        if header.events * _ID_BYTES > header.file_bytes:
            raise ValueError(f"{header.events} events do not fit in {header.file_bytes} bytes")
    end = HEADER_BYTES
    for area in sorted((area for area in areas if area.bytes), key=lambda area: area.offset):
        if area.offset < end:
            raise ValueError(f"an array begins at byte {area.offset}, inside of what ends at {end}")
        end = area.offset + area.bytes
    if end > header.file_bytes:
        raise ValueError(f"an array ends at byte {end} of {header.file_bytes}")


def _check_trees(header: LiveHeader | SealedHeader) -> None:
    """Raises `ValueError` for frontiers that are of no tree of their size."""
    MerkleFrontier.from_bytes(header.tree_size_before, header.frontier_before)
    if isinstance(header, SealedHeader):
        MerkleFrontier.from_bytes(header.tree_size, header.frontier)


def read_header(path: Path) -> LiveHeader | SealedHeader:
    """The header of the file at `path`, whose length must be what it says. Raises as `decode_header`, and `OSError`."""
    check_regular(path)
    with told_of(path), path.open("rb") as file:
        header = decode_header(file.read(HEADER_BYTES), path)
        size = file.seek(0, 2)
        hollow = isinstance(header, SealedHeader) and has_hole(file.fileno(), 0, size)
    if size != header.file_bytes:
        raise ShardCorruptError(
            f"{path}: is {size} bytes long but was written with {header.file_bytes}; rebuild it from the stream"
        )
    if hollow:
        raise ShardCorruptError(f"{path}: is mostly hole, as no sealed shard is; rebuild it from the stream")
    return header


def is_named(header: LiveHeader | SealedHeader, shard: ShardFile) -> bool:
    """Whether a shard's name says what its header says: under another one its events would be taken for others."""
    if (header.partition, header.shard) != (shard.partition, shard.shard):
        return False
    return not isinstance(header, SealedHeader) or (header.first_origin, header.last_origin) == (
        shard.first_origin,
        shard.last_origin,
    )


def is_padding(path: Path) -> bool:
    """True when spaces and a line break follow a header that was read from `path`: no checksum is over them."""
    with path.open("rb") as file:
        block = file.read(HEADER_BYTES)
    end = block.find(b"\n", len(_MAGIC)) + 1 + _CRC_CHARS
    return block[end:] == b"\n".rjust(HEADER_BYTES - end)


def read_live_header(path: Path) -> LiveHeader:
    """The header of a live (or prepared) shard. Raises as `read_header`, and `ShardError` for a sealed one."""
    header = read_header(path)
    if not isinstance(header, LiveHeader):
        raise ShardError(f"{path}: is a sealed shard under the name of a live one; give it its name back")
    return header


def read_sealed_header(path: Path) -> SealedHeader:
    """The header of a sealed shard. Raises as `read_header`, and `ShardError` for a live one."""
    header = read_header(path)
    if not isinstance(header, SealedHeader):
        raise ShardError(f"{path}: is a live shard under the name of a sealed one; give it its name back")
    return header


def structure_crc32(fd: int, path: Path, size: int, areas: list[Area]) -> int:
    """CRC-32 of what HDF5 wrote: the bytes after the header and outside `areas`."""
    crc = 0
    at = HEADER_BYTES
    for area in [*sorted(areas, key=lambda area: area.offset), Area(size, 0)]:
        # A forged header may place them at the end of a file that is terabytes long and takes no room.
        while at < area.offset:
            piece = read_all_at(fd, min(_PIECE_BYTES, area.offset - at), at, path)
            crc = zlib.crc32(piece, crc)
            at += len(piece)
        at = area.offset + area.bytes
    return crc
