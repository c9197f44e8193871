"""A sealed shard's record beside it, so that the store can prove what is in it without the cluster.

A copy: the stream holds the record. Persist goes by that one alone, and a lost copy is no loss of data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from msgspec import UNSET, UnsetType

from contracts.errors import WireFormatError
from contracts.receipts import ResumePoint, SealRecord, decode_seal, encode_receipt
from contracts.statements import Vouching
from stages.persist.files import publish_file, read_own, write_new_file
from stages.persist.names import ShardFile, live_name, tmp_path
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


def speaks_of(record: SealRecord, store: str, first: int, trees: Mapping[int, tuple[int, str]]) -> bool:
    """Whether it is of a full shard as `store` has it, or of the one that the store's part begins after.

    One of the same number may be of a shard that was given up, or of an owner that was fenced off while it sealed: also
    where that owner's shard held the same events.

    Args:
        record: to be judged.
        store: the store's id.
        first: the shard that its part begins with.
        trees: as `PartitionFiles.trees`.
    """
    return record.is_of(store, first) and trees.get(record.shard) == (record.tree_size, record.root)


def record_path(shard: Path) -> Path:
    """Where the record of the sealed file `shard` lies."""
    return shard.with_name(shard.name + _SUFFIX)


def keep_record(shard: Path, record: SealRecord) -> None:
    """Writes the accepted record beside the sealed file `shard`, in place of one of a file that had its name before.

    If the process dies or the power fails here: there is none yet, or the old one; the next start writes it.
    Raises `OSError`.
    """
    if kept_record(shard) == record:
        return
    path = record_path(shard)
    tmp = tmp_path(path)
    write_new_file(tmp, encode_receipt(record))
    publish_file(tmp, path)


def kept_record(shard: Path) -> SealRecord | None:
    """The record beside the sealed file `shard`; None when there is none that can be read."""
    try:
        return decode_seal(read_own(record_path(shard)))
    except (OSError, WireFormatError):
        return None


class KeptRecords:
    """Holds the sealed shards of one partition, in order, against the records beside them.

    Attributes:
        found: how many have one.
    """

    def __init__(self, trusted: Collection[str]) -> None:
        """`trusted`: public keys (64 hex digits). With any given each shard must have a record, and `Vouching` says
        which must be signed by one of them.
        """
        self._trusted = trusted
        self._vouching = Vouching(trusted)
        self._perhaps: tuple[ShardFile, str, str] | None = None
        """The shard taken last, its SHA-256, and what is wrong unless it is just being sealed."""
        self.found = 0

    @property
    def signed(self) -> int:
        """How many of those found are signed."""
        return self._vouching.signed

    def take(self, shard: ShardFile, sha256: str) -> Iterator[tuple[str, str]]:
        """(file name, what is wrong) of a sealed shard's record. `sha256`: of the file, hex; empty where damaged."""
        if self._perhaps is not None:
            yield self._perhaps[0].path.name, self._perhaps[2]
        self._perhaps = None
        name, path = shard.path.name, record_path(shard.path)
        try:
            record = decode_seal(read_own(path))
        except FileNotFoundError:
            if self._trusted:
                self._perhaps = shard, sha256, f"{path.name} is missing: nobody vouches for the file"
            return
        except (OSError, WireFormatError) as error:
            yield name, f"{path.name} cannot be read ({error}); the cluster has the record too"
            return
        self.found += 1
        if sha256 and sha256 != record.sha256:
            what = f"{path.name} is of a file with SHA-256 {record.sha256}, this one has {sha256}"
            self._perhaps = shard, sha256, what
        if wrong := self._vouching.wrong_with(record):
            yield name, f"{path.name}: {wrong}"

    def end(self) -> Iterator[tuple[str, str]]:
        """What is wrong once all were taken."""
        if self._perhaps is not None:
            shard, sha256, what = self._perhaps
            # While the newest is sealed its live form stays until the record is there.
            live = shard.path.with_name(live_name(shard.partition, shard.shard))
            record = kept_record(shard.path)
            if shard.path.exists() and not live.exists() and (record is None or record.sha256 != sha256):
                yield shard.path.name, what
        if self._trusted and self.found and not self._vouching.begun:
            by = ", ".join(sorted(self._vouching.keys))
            yield "all shards", f"no record is signed by a key given, {f'but by {by}' if by else 'nor by any other'}"
