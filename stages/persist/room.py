"""Whether `FI_EVENTS` has room left, as the servers say.

What a live shard keeps there cannot be told from the shard: duplicates, refused events, subjects and headers are not in
it. One for each process: all its lanes ask.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import msgspec

from contracts.subjects import EVENTS
from stages.runtime.api import Api

log = logging.getLogger(__name__)

SHORT_AT: Final = 0.9
"""The part of its limit that is taken when the stream counts as short of room."""


class _Config(msgspec.Struct):
    max_bytes: int = -1


class _State(msgspec.Struct):
    bytes: int = 0


class _Info(msgspec.Struct):
    config: _Config
    state: _State


class EventsRoom:
    """See the module's text.

    Attributes:
        short: little of it was left when it was last looked.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._asking = asyncio.Lock()
        self._next_s = 0.0
        self.short = False

    async def look(self) -> bool:
        """Looks, once every `probe_s` at most, and gives `short`.

        Raises:
            RequestRefusedError: the stream is not there.
            ClusterUnavailableError: the connection was closed.
        """
        loop = asyncio.get_running_loop()
        async with self._asking:
            if loop.time() >= self._next_s:
                info = msgspec.json.decode(
                    await self._api.request(EVENTS, f"$JS.API.STREAM.INFO.{EVENTS}", b""), type=_Info
                )
                self._next_s = loop.time() + self._api.settings.probe_s
                taken, limit = info.state.bytes, info.config.max_bytes
                was_short, self.short = self.short, 0 < SHORT_AT * limit < taken
                if self.short and not was_short:
                    log.warning("%s is nearly full (%d of %d bytes): shards are sealed sooner", EVENTS, taken, limit)
        return self.short
