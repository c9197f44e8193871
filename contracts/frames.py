"""The frame: what a hop stream carries. Some events of one partition, in order, and what they cover.

Always true of a frame: `prev` <= `first` - 1 < `last` in origins; it covers every origin of its partition in
(prev, last]; each of those origins' events is either in `events` or counted in `dead`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from contracts.errors import WireFormatError
from contracts.events import Event
from contracts.wire import UNREADABLE, Count, Sequence, TimeNs


class Dead(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Events of one origin that a stage dead-lettered."""

    origin: Sequence
    count: Count


class FrameHead(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A frame's leading fields: what it covers, without its events (wire version 1).

    Attributes:
        partition: lane it belongs to.
        prev: origin its predecessor on this subject reached.
        first, last: origins it covers, both inclusive.
        trail: for each hop stream the frame came through, the sequence of the last message it was made from:
            ``()`` from ingest, ``(FI_SEGMENT,)`` from segment, ``(FI_SEGMENT, FI_HASH)`` from hash.
        writer: nonce of the process that made it.
        made_ns: when it was made.
        closed: segment's memory of committed consultations at `last` (stages/segment/core.py), handed down unchanged.
        dead: what has been dead-lettered of the covered origins, by any stage so far.
    """

    partition: Count
    prev: Count
    first: Sequence
    last: Sequence
    trail: Annotated[tuple[Sequence, ...], Meta(max_length=3)]
    writer: str
    made_ns: TimeNs
    closed: bytes
    dead: tuple[Dead, ...]


class Frame(FrameHead, frozen=True, array_like=True, tag=1):
    """A frame with its events decoded."""

    events: tuple[Event, ...]


class PackedFrame(FrameHead, frozen=True, array_like=True, tag=1):
    """A frame whose events are left as encoded bytes: persist stores them as they are."""

    events: tuple[msgspec.Raw, ...]


_encoder = msgspec.msgpack.Encoder()


class _Versioned(msgspec.Struct, array_like=True):
    version: int


_version_decoder = msgspec.msgpack.Decoder(_Versioned)
_head_decoder = msgspec.msgpack.Decoder(FrameHead)
_decoder = msgspec.msgpack.Decoder(Frame)
_packed_decoder = msgspec.msgpack.Decoder(PackedFrame)


def encode_frame(frame: Frame | PackedFrame) -> bytes:
    """The frame's wire bytes."""
    return _encoder.encode(frame)


def decode_frame(data: bytes) -> Frame:
    """Inverse of `encode_frame`, events decoded.

    Raises:
        WireFormatError: not a frame of a version this build reads.
    """
    try:
        return _decoder.decode(data)
    except UNREADABLE as error:
        raise WireFormatError(f"not a frame: {error}") from error


def decode_packed_frame(data: bytes) -> PackedFrame:
    """Like `decode_frame`, leaving each event as its encoded bytes. Raises as `decode_frame`."""
    try:
        return _packed_decoder.decode(data)
    except UNREADABLE as error:
        raise WireFormatError(f"not a frame: {error}") from error


def is_newer_frame(data: bytes) -> bool:
    """True for what may be a frame of a later version than this build reads: whole msgpack that begins like one."""
    try:
        return _version_decoder.decode(data).version > 1
    except UNREADABLE:
        return False


def decode_frame_head(data: bytes) -> FrameHead:
    """What a frame covers, without its events. Raises as `decode_frame`."""
    try:
        return _head_decoder.decode(data)
    except UNREADABLE as error:
        raise WireFormatError(f"not a frame: {error}") from error
