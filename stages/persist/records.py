"""A sealed shard's record beside it, so that the store can prove what is in it without the cluster.

A copy: the stream holds the record. Persist goes by that one alone, and a lost copy is no loss of data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from msgspec import UNSET, UnsetType

from contracts.errors import ProofError, WireFormatError
from contracts.receipts import ResumePoint, SealRecord, decode_seal, encode_receipt
from contracts.statements import check_signature, statement_of
from stages.persist.files import check_regular, publish_file, write_new_file
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
        return _read(record_path(shard))
    except (OSError, WireFormatError):
        return None


def _read(path: Path) -> SealRecord:
    check_regular(path)
    return decode_seal(path.read_bytes())


class KeptRecords:
    """Holds the sealed shards of one partition, in order, against the records beside them.

    Attributes:
        found: how many have one.
        signed: how many of these are signed.
    """

    def __init__(self, trusted: Collection[str]) -> None:
        """`trusted`: public keys (64 hex digits). With any given each shard must have a record, and from the first
        signed one on each must be signed by one of them: what came before is under the later roots.
        """
        self._trusted = trusted
        self._perhaps: tuple[ShardFile, str, str] | None = None
        """The shard taken last, its SHA-256, and what is wrong unless it is just being sealed."""
        self.found = 0
        self.signed = 0

    def take(self, shard: ShardFile, sha256: str) -> Iterator[tuple[str, str]]:
        """(file name, what is wrong) of a sealed shard's record. `sha256`: of the file, hex; empty where damaged."""
        if self._perhaps is not None:
            yield self._perhaps[0].path.name, self._perhaps[2]
        self._perhaps = None
        name, path = shard.path.name, record_path(shard.path)
        try:
            record = _read(path)
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
        if record.signature is not UNSET:
            self.signed += 1
            try:
                check_signature(statement_of(record), record.signature, self._trusted)
            except ProofError as error:
                yield name, f"{path.name}: {error}"
        elif self._trusted and self.signed:
            yield name, f"{path.name} is not signed, though one before it is"

    def end(self) -> Iterator[tuple[str, str]]:
        """What is wrong once all were taken."""
        if self._perhaps is not None:
            shard, sha256, what = self._perhaps
            # While the newest is sealed its live form stays until the record is there.
            live = shard.path.with_name(live_name(shard.partition, shard.shard))
            record = kept_record(shard.path)
            if shard.path.exists() and not live.exists() and (record is None or record.sha256 != sha256):
                yield shard.path.name, what
        if self._trusted and self.found and not self.signed:
            yield "all shards", "none is signed, so the key given says nothing about them"
