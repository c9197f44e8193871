"""Trimming: what is committed leaves the hop streams, what is sealed leaves `FI_EVENTS`.

Never a message that is still needed: a purge goes up to a frame that was just seen to lie at or before the committed
origin. That frame is kept: as the subject's last it is its writer's checkpoint. A large one is not, or the last frames
of quiet partitions could fill the stream for good; its writer is then refused once, and goes on from the receipt.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from contracts.errors import WireFormatError
from contracts.frames import decode_frame_head
from contracts.receipts import Receipt
from contracts.subjects import EVENTS, HOPS, RECEIPTS, Stage, input_filter, raw_filter, receipt_subject
from stages.runtime.api import Api, RequestRefusedError

log = logging.getLogger(__name__)

KEPT_SHARE: Final = 0.25
"""The part of a hop stream that kept frames may take."""
_HOP_STAGES: tuple[Stage, ...] = ("segment", "hash", "persist")


class Trimmer:
    """Trims the streams of one partition, in the background, to what it was last told."""

    def __init__(self, api: Api, partition: int) -> None:
        self._api = api
        self._partition = partition
        self._committed: Receipt | None = None
        self._sealed_origin: int | None = None
        self._news = asyncio.Event()
        settings = api.settings
        self._kept_bytes_max = KEPT_SHARE * settings.hop_bytes_max / settings.partitions

    def committed(self, receipt: Receipt) -> None:
        """A receipt was accepted (now, or before this process began: what it settles may not be trimmed yet)."""
        self._committed = receipt
        self._news.set()

    def sealed(self, origin: int) -> None:
        """`FI_EVENTS` need not keep what is before `origin` (0: nothing): it is in sealed shards that are recorded."""
        if origin:
            self._sealed_origin = origin
            self._news.set()

    async def run(self) -> None:
        """Trims every `trim_s` while there is news, until cancelled."""
        while True:
            await self._news.wait()
            await asyncio.sleep(self._api.settings.trim_s)
            self._news.clear()
            try:
                await self._trim()
            except RequestRefusedError as error:
                log.warning("partition %d is not trimmed now: %s", self._partition, error)

    async def _trim(self) -> None:
        receipt, sealed_origin = self._committed, self._sealed_origin
        if receipt is not None:
            for stage, stream, seq in zip(_HOP_STAGES, HOPS, receipt.trail, strict=False):
                size_bytes = await self._committed_bytes(stream, seq, stage, receipt.origin)
                if size_bytes is not None:
                    below_seq = seq if size_bytes <= self._kept_bytes_max else seq + 1
                    await self._api.purge(stream, input_filter(stage, self._partition), below_seq=below_seq)
            await self._api.purge(RECEIPTS, receipt_subject(self._partition), keep=self._api.settings.receipts_kept)
        if sealed_origin is not None:
            # Exclusive: the message at the sealed origin itself stays, so the sequence is never beyond the last.
            await self._api.purge(EVENTS, raw_filter(self._partition), below_seq=sealed_origin)
            self._sealed_origin = None

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
