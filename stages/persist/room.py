"""Whether `FI_EVENTS` has room left, as the servers say.

What a live shard keeps there cannot be told from the shard: duplicates, refused events, subjects and headers are not in
it. One for each process: all its lanes ask.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import msgspec
from nats.errors import Error as NatsError

from contracts.subjects import EVENTS
from contracts.wire import UNREADABLE
from stages.runtime.api import Api

log = logging.getLogger(__name__)

SHORT_AT: Final = 0.9
"""The part of its limit that is taken when the stream counts as short of room."""

SPARE_UP_TO: Final = 0.5
"""The part of its limit up to which the stream keeps what no backup has yet: others' events must find room too."""

EARLY_SHARE: Final = 1 / 60
"""Of a shard's age limit: for want of room, which others' events may have taken, none is sealed sooner."""


class _Config(msgspec.Struct):
    max_bytes: int = -1


class _State(msgspec.Struct):
    bytes: int = 0


class _Info(msgspec.Struct):
    config: _Config
    state: _State


_decode_info = msgspec.json.Decoder(_Info).decode


class EventsRoom:
    """See the module's text.

    Attributes:
        short: little of it was left when it was last looked.
        spare: enough of it was, to keep more there than must be.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._asking = asyncio.Lock()
        self._next_s = 0.0
        self.short = False
        self.spare = True

    async def look(self) -> None:
        """Looks, once every `probe_s` at most. Where the stream does not answer, all stays as it was."""
        loop, settings = asyncio.get_running_loop(), self._api.settings
        async with self._asking:
            if loop.time() < self._next_s:
                return
            subject = f"$JS.API.STREAM.INFO.{EVENTS}"
            try:
                # Once: what waits for this must go on trimming, also while nobody leads the stream.
                answer = await self._api.client.request(subject, b"", timeout=settings.api_timeout_s)
                info = _decode_info(answer.data)
            except (NatsError, *UNREADABLE) as error:
                log.debug("%s: %r", subject, error)
                return
            finally:
                self._next_s = loop.time() + settings.probe_s
            taken, limit = info.state.bytes, info.config.max_bytes
            was_short, self.short = self.short, 0 < SHORT_AT * limit < taken
            self.spare = limit <= 0 or taken <= SPARE_UP_TO * limit
            if self.short and not was_short:
                log.warning("%s is nearly full (%d of %d bytes): shards are sealed sooner", EVENTS, taken, limit)
