"""A sealed shard's record beside it, so that the store can prove what is in it without the cluster.

A copy: the stream holds the record. Nothing in persist reads it back, and a lost one is no loss of data.
"""

from __future__ import annotations

from pathlib import Path

from msgspec import UNSET, UnsetType

from contracts.errors import WireFormatError
from contracts.receipts import ResumePoint, SealRecord, decode_seal, encode_receipt
from stages.persist.files import publish_file, write_new_file
from stages.persist.names import tmp_path
from stages.persist.seal import SealedInfo

_SUFFIX = ".seal.json"


def record_of(info: SealedInfo, resume: ResumePoint | UnsetType = UNSET) -> SealRecord:
    """What is published of a sealed shard, not signed yet. Args: `resume` is what the partition can go on from."""
    header = info.header
    return SealRecord(
        partition=header.partition,
        store=header.store,
        shard=header.shard,
        file=info.path.name,
        sha256=info.sha256,
        first_origin=header.first_origin,
        last_origin=header.last_origin,
        events=header.events,
        tree_size=header.tree_size,
        root=header.root,
        sealed_ns=header.sealed_ns,
        bytes=info.bytes,
        cluster=header.cluster,
        resume=resume,
    )


def record_path(shard: Path) -> Path:
    """Where the record of the sealed file `shard` lies."""
    return shard.with_name(shard.name + _SUFFIX)


def keep_record(shard: Path, record: SealRecord) -> None:
    """Writes the accepted record beside the sealed file `shard`, unless one is there.

    If the process dies or the power fails here: there is none yet; the next start writes it. Raises `OSError`.
    """
    path = record_path(shard)
    if path.exists():
        return
    tmp = tmp_path(path)
    write_new_file(tmp, encode_receipt(record))
    publish_file(tmp, path)


def kept_record(shard: Path) -> SealRecord | None:
    """The record beside the sealed file `shard`; None when there is none that can be read."""
    try:
        return decode_seal(record_path(shard).read_bytes())
    except (OSError, WireFormatError):
        return None
