"""What `fictl flush` tells persist: to seal what is committed up to an origin of each partition."""

from __future__ import annotations

import msgspec

from contracts.errors import WireFormatError
from contracts.wire import UNREADABLE


class Flush(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag="flush.1"):
    """What stands in `FI_CONTROL` under ``flush``. It stays: who takes a partition later obeys it too.

    Obeying it again is harmless: a live shard that begins after the target is left alone.

    Attributes:
        cluster: id of the cluster the origins count in.
        targets: partition → everything committed up to this origin is to be sealed.
        since_ns: when it was asked for.
        by: who asked, as ``user@node``.
    """

    cluster: str
    targets: dict[int, int]
    since_ns: int
    by: str

    def merged(self, before: Flush | None) -> Flush:
        """This one, with what an earlier one asks for beyond it: that may not be done yet."""
        if before is None or before.cluster != self.cluster:
            return self
        both = before.targets.keys() | self.targets.keys()
        targets = {p: max(before.targets.get(p, 0), self.targets.get(p, 0)) for p in sorted(both)}
        return msgspec.structs.replace(self, targets=targets)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Flush)


def encode_flush(flush: Flush) -> bytes:
    """Wire bytes (JSON)."""
    return _encoder.encode(flush)


def decode_flush(data: bytes) -> Flush:
    """Inverse of `encode_flush`.

    Raises:
        WireFormatError: not a request of a version this build reads.
    """
    try:
        return _decoder.decode(data)
    except UNREADABLE as error:
        raise WireFormatError(f"flush cannot be read by this build: {error}") from error
