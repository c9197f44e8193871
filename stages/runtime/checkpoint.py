"""Where a partition stands: read from what was written, since a stage keeps no other state.

A stage goes on from the last frame on its output subject. The last receipt stands in where that subject is empty
(nothing written yet, or memory streams restarted) and wherever it is further on: what is committed need not be made
again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec
from msgspec import UNSET

from contracts.errors import CountsAnewError, HoleError, StrayFrameError, WireFormatError
from contracts.events import format_rfc3339, stored_ns_at
from contracts.frames import Frame, FrameHead, decode_frame, decode_frame_head, is_newer_frame
from contracts.receipts import Receipt, SealRecord, decode_receipt, decode_seal
from contracts.subjects import (
    EVENTS,
    INPUT_STREAM,
    OUTPUT_STREAM,
    RECEIPTS,
    STAGES,
    Stage,
    input_filter,
    output_subject,
    raw_filter,
    receipt_subject,
    seal_subject,
)
from stages.runtime.api import Api
from stages.runtime.messages import StoredMessage

F = TypeVar("F", bound=FrameHead)
R = TypeVar("R", Receipt, SealRecord)


class Cursor(msgspec.Struct, frozen=True):
    """A stage's place in one partition.

    Attributes:
        origin: everything up to here is finished.
        input_seq: sequence, in the input stream, of the message that reached `origin`; 0 when not known. Only a hint:
            it is used after the message there was seen to be that one.
        closed: segment's memory at `origin`.
        stored_ns: when `FI_EVENTS` stored the message at `origin`; 0 when not known. Only ingest asks.
    """

    origin: int = 0
    input_seq: int = 0
    closed: bytes = b""
    stored_ns: int = 0


class _State(msgspec.Struct):
    last_seq: int = 0


class _Info(msgspec.Struct):
    state: _State


class Checkpoint(msgspec.Struct, frozen=True):
    """A cursor and the sequence of the last message on the output subject (0: none)."""

    cursor: Cursor
    output_seq: int


async def last_receipt(api: Api, partition: int) -> tuple[Receipt | None, int]:
    """The partition's last receipt and its stream sequence; without a sequence (0) when there is nothing at all.

    (None, sequence) of a partition that nobody owned yet: see `contracts.receipts.place_kept`.

    Raises:
        WireFormatError: it cannot be read by this build.
        TopologyError: the stream does not exist.
    """
    message = await api.last_message(RECEIPTS, receipt_subject(partition))
    if message is None:
        return None, 0
    receipt = _read_record(message, decode_receipt)
    return receipt if receipt.store else None, message.seq


def _read_record(message: StoredMessage, decode: Callable[[bytes], R]) -> R:
    try:
        return decode(message.data)
    except WireFormatError as error:
        raise WireFormatError(
            f"{message.subject}: sequence {message.seq} of {RECEIPTS} is {error}; run the version that wrote it, or "
            "delete the message if nobody did"
        ) from error


async def last_seal(api: Api, partition: int, holds: Callable[[SealRecord], bool]) -> tuple[SealRecord | None, int]:
    """The last seal record that `holds`, and the sequence of the last record; (None, 0) before the first one.

    Not every record does: the shards of some were given up when the partition went back, and an owner that was fenced
    off may have been sealing.

    Raises:
        WireFormatError: a record cannot be read by this build.
        TopologyError: the stream does not exist.
    """
    subject = seal_subject(partition)
    last = await api.last_message(RECEIPTS, subject)
    if last is None:
        return None, 0
    record = _read_record(last, decode_seal)
    if holds(record):
        return record, last.seq
    found: SealRecord | None = None
    message = await api.first_message(RECEIPTS, subject)
    while message is not None and message.seq < last.seq:
        record = _read_record(message, decode_seal)
        found = record if holds(record) else found
        message = await api.first_message(RECEIPTS, subject, from_seq=message.seq + 1)
    return found, last.seq


async def read_checkpoint(api: Api, stage: Stage, partition: int) -> Checkpoint:
    """Where ingest, segment or hash goes on. Raises as `last_receipt`, and as `read_frame`."""
    receipt, _ = await last_receipt(api, partition)
    return checkpoint_from(
        receipt, stage, await api.last_message(OUTPUT_STREAM[stage], output_subject(stage, partition))
    )


def checkpoint_from(receipt: Receipt | None, stage: Stage, last: StoredMessage | None) -> Checkpoint:
    """Where ingest, segment or hash goes on, by the last receipt and the last message on its output.

    Raises:
        WireFormatError, StrayFrameError: `last` cannot be read (`read_frame`).
    """
    cursor = Cursor() if receipt is None else cursor_from_receipt(receipt, stage)
    if last is None:
        return Checkpoint(cursor, 0)
    head = read_frame(last, decode_frame if stage == "ingest" else decode_frame_head)
    if head.last >= cursor.origin:
        input_seq = head.trail[-1] if head.trail else head.last
        cursor = Cursor(head.last, input_seq, head.closed, _stored_ns(head))
    return Checkpoint(cursor, last.seq)


def _stored_ns(head: FrameHead) -> int:
    """When the message at the frame's last origin was stored; 0 when not known."""
    if not isinstance(head, Frame):
        return 0
    # A frame of a build before tells it by its events, if at all.
    return head.stored_ns or stored_ns_at(head.last, head.events[-1] if head.events else None)


def cursor_from_receipt(receipt: Receipt, stage: Stage) -> Cursor:
    """A stage's cursor at what is committed. The trail gives its input sequence; ingest's input counts in origins."""
    hop = STAGES.index(stage) - 1
    input_seq = receipt.origin if hop < 0 else (receipt.trail[hop] if hop < len(receipt.trail) else 0)
    return Cursor(receipt.origin, input_seq, receipt.closed, 0 if receipt.stored_ns is UNSET else receipt.stored_ns)


async def locate(api: Api, stage: Stage, partition: int, cursor: Cursor) -> int:
    """The input sequence to read from, so that nothing after `cursor.origin` is missed.

    For a hop, ``input_seq + 1`` only if the message at `input_seq` still is the frame that reached the origin (memory
    streams begin at 1 again after all servers restarted); else the beginning, and the frames' origins decide.
    """
    if stage == "ingest":
        await check_counting(api, partition, cursor)
        return cursor.origin + 1
    if cursor.input_seq == 0:
        return 1
    message = await api.message_at(INPUT_STREAM[stage], cursor.input_seq)
    if message is None or message.subject != input_filter(stage, partition):
        return 1
    try:
        head = read_frame(message, decode_frame_head)
    except WireFormatError:
        return 1
    return cursor.input_seq + 1 if head.last == cursor.origin else 1


async def check_counting(api: Api, partition: int, cursor: Cursor) -> None:
    """Holds that `FI_EVENTS` goes on counting from where it gave `cursor.origin`.

    Rolled back, or made by hand with that name, it gives gateways sequences that are settled: what they bear would be
    passed over, and trimmed. Where the message is gone, only the last sequence tells, until it has passed the cursor.

    Raises:
        CountsAnewError: it does not, or who answers is behind. Not to be read or trimmed until it does.
    """
    if not cursor.origin:
        return
    message, found = await api.message_at(EVENTS, cursor.origin), ""
    if message is None:
        info = await api.ask(EVENTS, f"$JS.API.STREAM.INFO.{EVENTS}", b"", _Info)
        if info.state.last_seq < cursor.origin:
            found = "it has not come so far"
        else:
            # Trimmed; or another one got its sequence between the two answers.
            message = await api.message_at(EVENTS, cursor.origin)
    if message is not None:
        found = _other_than(message, partition, cursor.stored_ns)
    if found:
        raise CountsAnewError(
            f"{EVENTS} was rolled back or made by hand: partition {partition} is settled up to message "
            f"{cursor.origin}, but {found}. Nothing of it is read or deleted; put the right one back, or see "
            "FiPartitionStalled in the runbooks"
        )


def _other_than(message: StoredMessage, partition: int, stored_ns: int) -> str:
    """Why it is not the partition's message that was stored then (0: nobody knows when); empty if it may be."""
    if not message.subject.startswith(raw_filter(partition).removesuffix(">")):
        return "that message is of another partition now"
    if stored_ns in (0, message.time_ns):
        return ""
    return f"that message is one of {format_rfc3339(message.time_ns)} now, and was of {format_rfc3339(stored_ns)}"


def read_frame(message: StoredMessage, decode: Callable[[bytes], F]) -> F:
    """The frame that a hop's message carries.

    Args:
        message: as the stream holds it.
        decode: one of the decoders in `contracts.frames`.

    Raises:
        StrayFrameError: it is no frame of any version, or not one of its subject's partition.
        WireFormatError: it may be a frame of a later version.
    """
    try:
        frame = decode(message.data)
    except WireFormatError as error:
        if is_newer_frame(message.data):
            raise WireFormatError(
                f"{message.subject}: sequence {message.seq} may be of a later version ({error}); run that version"
            ) from error
        raise StrayFrameError(message.subject, message.seq, str(error)) from error
    if message.subject.rpartition(".")[2] != str(frame.partition):
        raise StrayFrameError(message.subject, message.seq, f"it is a frame of partition {frame.partition}")
    if not frame.prev < frame.first <= frame.last:
        why = f"it says that it covers {frame.first} to {frame.last} after {frame.prev}"
        raise StrayFrameError(message.subject, message.seq, why)
    if not all(frame.prev < row.origin <= frame.last for row in frame.dead):
        raise StrayFrameError(message.subject, message.seq, "it counts dead letters of origins that it does not cover")
    return frame


def check_joined(subject: str, head: FrameHead, origin: int) -> None:
    """Holds the rule that a frame joins on to what its reader has: ``prev <= origin``.

    Raises:
        HoleError: frames between them are missing.
    """
    if head.prev > origin:
        raise HoleError(subject, origin, head.prev)
