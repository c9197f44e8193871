"""What a stream holds, as the stages are given it."""

from __future__ import annotations

import msgspec


class StoredMessage(msgspec.Struct, frozen=True, gc=False):
    """One message as a stream holds it. `time_ns` is when it was stored."""

    subject: str
    seq: int
    time_ns: int
    data: bytes
    headers: dict[str, str]
