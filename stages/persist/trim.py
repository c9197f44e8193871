"""Trimming: what is committed leaves the hop streams, what is sealed leaves `FI_EVENTS`.

Never a message that is still needed: a purge goes up to a frame that was just seen to lie at or before the committed
origin. That frame is kept: as the subject's last it is its writer's checkpoint. A large one is not, or the last frames
of quiet partitions could fill the stream for good; its writer is then refused once, and goes on from the receipt.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final

from contracts.errors import CountsAnewError, WireFormatError
from contracts.frames import decode_frame_head
from contracts.receipts import Receipt
from contracts.subjects import EVENTS, HOPS, RECEIPTS, Stage, input_filter, raw_filter, receipt_subject
from stages.persist.disk import Files
from stages.persist.room import EventsRoom
from stages.runtime.api import Api, RequestRefusedError
from stages.runtime.checkpoint import check_counting, cursor_from_receipt

log = logging.getLogger(__name__)

KEPT_SHARE: Final = 0.25
"""The part of a hop stream that kept frames may take."""
_NOT_COPIED: Final = (
    f"what no backup has leaves {EVENTS}, which is over half full: until one has it, it is on this disk alone. Run "
    "`fictl backup` more often, or raise FI_EVENTS_BYTES_MAX"
)
_HOP_STAGES: tuple[Stage, ...] = ("segment", "hash", "persist")


class Trimmer:
    """Trims the streams of one partition, in the background, to what it was last told.

    Args:
        api, partition: whose.
        room: of `FI_EVENTS`.
        look_again: called when a claim is needed, and again and again while `FI_EVENTS` has no room to spare.
    """

    def __init__(self, api: Api, partition: int, room: EventsRoom, look_again: Callable[[], None]) -> None:
        self._api = api
        self._partition = partition
        self._room = room
        self._look_again = look_again
        self._committed: Receipt | None = None
        self._sealed_origin = self._claimed_origin = self._trimmed_origin = 0
        self._news = asyncio.Event()
        settings = api.settings
        self._kept_bytes_max = KEPT_SHARE * settings.hop_bytes_max / settings.partitions

    def committed(self, receipt: Receipt) -> None:
        """A receipt was accepted (now, or before this process began: what it settles may not be trimmed yet)."""
        self._committed = receipt
        self._news.set()

    def sealed(self, origin: int) -> bool:
        """What is before `origin` is in sealed shards that are recorded: it may leave `FI_EVENTS` after a claim.

        Returns: whether that is more than was told before.

        Records are not fenced by receipts: who was fenced off while it sealed records on, and what its successor was
        just told to make again from `FI_EVENTS` must stay there.
        """
        if origin <= self._sealed_origin:
            return False
        self._sealed_origin = origin
        self._look_again()
        return True

    def settle(self, files: Files, copied: int | None) -> None:
        """Has `FI_EVENTS` trimmed of what is in sealed shards: of all but the newest, `sealed_kept`.

        While it has room to spare it also keeps those that no backup has. With little room, and nothing of the
        partition in a live shard, it keeps none: they may be what keeps everything out of it.

        Args:
            files: the partition's.
            copied: the newest sealed shard that is copied to another disk; None: the store was never backed up.
        """
        kept = 0 if self._room.short and files.is_empty() else self._api.settings.sealed_kept
        safe = files.settled_origin(kept, copied)
        origin = safe if self._room.spare else files.settled_origin(kept, None)
        if self.sealed(origin) and origin > safe:
            log.warning("partition %d: %s", self._partition, _NOT_COPIED)

    @property
    def unclaimed(self) -> int:
        """The origin that was told as sealed since the last claim; 0: none."""
        return self._sealed_origin if self._sealed_origin > self._claimed_origin else 0

    def claimed(self, origin: int) -> None:
        """A claim was accepted that was made when `origin` was `unclaimed`."""
        self._claimed_origin = origin
        self._news.set()

    async def run(self) -> None:
        """Trims every `trim_s` while there is news, or what was refused, and looks for room, until cancelled."""
        settings = self._api.settings
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(settings.probe_s):
                    await self._news.wait()
            try:
                if self._news.is_set():
                    await asyncio.sleep(settings.trim_s)
                    self._news.clear()
                    await self._trim()
            except (RequestRefusedError, CountsAnewError) as error:
                log.warning("partition %d is not trimmed now: %s", self._partition, error)
                # A stream that is full of what should have left lets nothing in that would be news.
                self._news.set()
            await self._room.look()
            if not self._room.spare:
                self._look_again()

    async def _trim(self) -> None:
        receipt, origin = self._committed, self._claimed_origin
        if receipt is not None:
            for stage, stream, seq in zip(_HOP_STAGES, HOPS, receipt.trail, strict=False):
                size_bytes = await self._committed_bytes(stream, seq, stage, receipt.origin)
                if size_bytes is not None:
                    below_seq = seq if size_bytes <= self._kept_bytes_max else seq + 1
                    await self._api.purge(stream, input_filter(stage, self._partition), below_seq=below_seq)
            await self._api.purge(RECEIPTS, receipt_subject(self._partition), keep=self._api.settings.receipts_kept)
        if receipt is not None and origin > self._trimmed_origin:
            # Exclusive: the message at the sealed origin itself stays, so the sequence is never beyond the last. Nor
            # does what is not committed go, whatever origins the names of files say.
            await check_counting(self._api, self._partition, cursor_from_receipt(receipt, "ingest"))
            await self._api.purge(EVENTS, raw_filter(self._partition), below_seq=min(origin, receipt.origin))
            self._trimmed_origin = origin

    async def _committed_bytes(self, stream: str, seq: int, stage: Stage, origin: int) -> int | None:
        """The size of the message at `seq` if it is a frame of this partition that is wholly committed, else None.

        Sequences begin again when memory streams restart, so a remembered one proves nothing by itself.
        """
        message = await self._api.message_at(stream, seq)
        if message is None or message.subject != input_filter(stage, self._partition):
            return None
        try:
            return len(message.data) if decode_frame_head(message.data).last <= origin else None
        except WireFormatError:
            return None
