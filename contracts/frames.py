"""The frame: what a hop stream carries. Some events of one partition, in order, and what they cover.

Always true of a frame: `prev` <= `first` - 1 < `last` in origins; it covers every origin of its partition in
(prev, last]; each of those origins' events is either in `events` or counted in `dead`.

On the wire it is MessagePack in one of two versions: plain, or with its events deflated (RFC 1950). We inflate them
once where servers copy, keep and send them a dozen times (ADR 0024).
"""

from __future__ import annotations

from typing import Annotated, Final, NamedTuple, cast

import msgspec
from isal import isal_zlib
from msgspec import Meta

from contracts.errors import WireFormatError
from contracts.events import Event
from contracts.wire import UNREADABLE, Count, Sequence, TimeNs

FRAME_BYTES_MAX: Final = 8 * 1024 * 1024
"""Most bytes that the events of one frame may take: the servers' `max_payload`."""


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
    """A frame with its events decoded.

    Attributes:
        events: in order.
        stored_ns: when `FI_EVENTS` stored the message at `last`; 0 in frames that builds before made.
    """

    events: tuple[Event, ...]
    stored_ns: TimeNs = 0


class PackedFrame(FrameHead, frozen=True, array_like=True, tag=1):
    """A frame whose events are left as encoded bytes: persist stores them as they are."""

    events: tuple[msgspec.Raw, ...]
    stored_ns: TimeNs = 0


class DeflatedHead(FrameHead, frozen=True, array_like=True, tag=2):
    """The leading fields of a frame with its events deflated (wire version 2).

    Attributes:
        events_bytes: length of the events' MessagePack array.
    """

    events_bytes: Annotated[int, Meta(ge=1, le=FRAME_BYTES_MAX)]


class _RawFrame(FrameHead, frozen=True, array_like=True, tag=1):
    events: msgspec.Raw
    stored_ns: TimeNs


class _DeflatedFrame(DeflatedHead, frozen=True, array_like=True, tag=2):
    deflated: bytes
    stored_ns: TimeNs = 0


class Encoded(NamedTuple):
    """A frame ready to be published.

    Attributes:
        data: its wire bytes.
        held_bytes: as the function of that name.
    """

    data: bytes
    held_bytes: int


class _Versioned(msgspec.Struct, array_like=True):
    version: int


_LEVEL: Final = 1
"""Of ISA-L's; 0 is as fast and leaves a tenth more, 2 is slower and leaves no less."""

_INFLATE_ERROR = cast(type[Exception], isal_zlib.error)

_encoder = msgspec.msgpack.Encoder()
_version_decoder = msgspec.msgpack.Decoder(_Versioned)
_head_decoder = msgspec.msgpack.Decoder(FrameHead | DeflatedHead)
_decoder = msgspec.msgpack.Decoder(Frame | _DeflatedFrame)
_packed_decoder = msgspec.msgpack.Decoder(PackedFrame | _DeflatedFrame)
_events_decoder = msgspec.msgpack.Decoder(tuple[Event, ...])
_packed_events_decoder = msgspec.msgpack.Decoder(tuple[msgspec.Raw, ...])


def encode_frame(frame: Frame | PackedFrame) -> bytes:
    """The frame's wire bytes, plain."""
    return _encoder.encode(frame)


def deflate_frame(frame: Frame, bytes_min: int) -> Encoded:
    """The frame's wire bytes, its events deflated where they are `bytes_min` bytes or more and that makes them fewer.

    Blocking: half a microsecond for an event.
    """
    events = _encoder.encode(frame.events)
    if bytes_min <= len(events) <= FRAME_BYTES_MAX:
        deflated = isal_zlib.compress(events, _LEVEL)
        if len(deflated) < len(events):
            data = _encoder.encode(_DeflatedFrame(*_head_fields(frame), len(events), deflated, frame.stored_ns))
            return Encoded(data, len(data) + len(events))
    data = _encoder.encode(_RawFrame(*_head_fields(frame), msgspec.Raw(events), frame.stored_ns))
    return Encoded(data, len(data))


def held_bytes(data: bytes) -> int:
    """What reading a frame's wire bytes takes: their own length, and that of the events inflated from them.

    Never raises: what is no frame is as long as it is.
    """
    try:
        head = _head_decoder.decode(data)
    except UNREADABLE:
        return len(data)
    return len(data) + (head.events_bytes if isinstance(head, DeflatedHead) else 0)


def decode_frame(data: bytes) -> Frame:
    """The frame in wire bytes of either version, events decoded.

    Raises:
        WireFormatError: not a frame of a version this build reads.
    """
    try:
        frame = _decoder.decode(data)
        if type(frame) is Frame:
            return frame
        return Frame(*_head_fields(frame), _events_decoder.decode(_inflate(frame)), frame.stored_ns)
    except UNREADABLE as error:
        raise WireFormatError(f"not a frame: {error}") from error


def decode_packed_frame(data: bytes) -> PackedFrame:
    """Like `decode_frame`, leaving each event as its encoded bytes. Raises as `decode_frame`."""
    try:
        frame = _packed_decoder.decode(data)
        if type(frame) is PackedFrame:
            return frame
        return PackedFrame(*_head_fields(frame), _packed_events_decoder.decode(_inflate(frame)), frame.stored_ns)
    except UNREADABLE as error:
        raise WireFormatError(f"not a frame: {error}") from error


def is_newer_frame(data: bytes) -> bool:
    """True for what may be a frame of a later version than this build reads: whole msgpack that begins like one."""
    try:
        return _version_decoder.decode(data).version > 2
    except UNREADABLE:
        return False


def decode_frame_head(data: bytes) -> FrameHead:
    """What a frame covers, without its events. Raises as `decode_frame`."""
    try:
        head: FrameHead = _head_decoder.decode(data)
    except UNREADABLE as error:
        raise WireFormatError(f"not a frame: {error}") from error
    return head


def _head_fields(frame: FrameHead) -> tuple[int, int, int, int, tuple[int, ...], str, int, bytes, tuple[Dead, ...]]:
    return (
        frame.partition,
        frame.prev,
        frame.first,
        frame.last,
        frame.trail,
        frame.writer,
        frame.made_ns,
        frame.closed,
        frame.dead,
    )


def _inflate(frame: _DeflatedFrame) -> bytes:
    """The events' MessagePack array. Takes no more memory than the frame itself says, whatever its bytes are."""
    inflater = isal_zlib.decompressobj()
    try:
        # One more than it says, so that a stream that ends there is seen to end.
        events = inflater.decompress(frame.deflated, frame.events_bytes + 1)
    except _INFLATE_ERROR as error:
        raise WireFormatError(f"not a frame: its events cannot be inflated: {error}") from error
    if len(events) != frame.events_bytes or not inflater.eof or inflater.unused_data:
        raise WireFormatError(f"not a frame: its events are not the {frame.events_bytes} bytes that it says")
    return events
