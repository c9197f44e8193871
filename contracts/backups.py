"""What `fictl backup` leaves in the store it copied, for persist: until when, and up to which shards, it is copied.

Beside the copies lies another, of no shards: for the store that is put back from them.
"""

from __future__ import annotations

from typing import Final

import msgspec

from contracts.errors import WireFormatError
from contracts.wire import UNREADABLE

BACKUP_FILE: Final = "backup.json"


class LastBackup(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag="backup.1"):
    """The last run after which nothing was left to copy.

    Attributes:
        at_ns: what was sealed by then is copied; nanoseconds since 1970.
        to: where the copies are, on the node that made them.
        copied: partition → the newest sealed shard that there was, by number.
    """

    at_ns: int
    to: str
    copied: dict[int, int]


_decoder = msgspec.json.Decoder(LastBackup)


def encode_last_backup(last: LastBackup) -> bytes:
    """The file's bytes (JSON)."""
    return msgspec.json.encode(last)


def decode_last_backup(data: bytes) -> LastBackup:
    """Inverse of `encode_last_backup`.

    Raises:
        WireFormatError: not written by a version that this build reads.
    """
    try:
        return _decoder.decode(data)
    except UNREADABLE as error:
        raise WireFormatError(f"{BACKUP_FILE} cannot be read by this build: {error}") from error
