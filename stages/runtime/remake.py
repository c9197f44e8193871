"""Streams in memory that are gone, or that no server will ever lead again, are made again.

Servers that are restarted one after the other, each before the one before it has caught up, can leave a replicated
stream in memory without a leader for good: the only member with its log waits for a snapshot that nobody has
("catchup aborted, no leader", nats-server 2.15.1). And a stream can be deleted: by hand, or by a request of a moment
ago that a new leader of the cluster finds in its log and carries out, when it had already been given up.

What such streams hold can be made again: hops from `FI_EVENTS` and the last receipts, announcements by the processes
they are of. So one that had no leader for `LEADER_GONE`, while the cluster answers for it, is deleted, and one that was
seen and is not there at two looks is created, with the configuration that it had.

A stream on disk is never touched. Two processes that do it at once, or one that is wrong about it, cost a rebuild and
nothing else; one that dies in between leaves it to the others, which saw the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from nats.errors import Error as NatsError

from contracts.budgets import LEADER_GONE, LEADER_LOOK
from contracts.subjects import HOPS
from contracts.wire import UNREADABLE
from stages.runtime.api import NO_STREAM, Api, ApiError

log = logging.getLogger(__name__)


_NOT_AGAIN: Final = (("sealed", "deny_purge"), ("sealed", "deny_purge", "allow_msg_ttl"))
"""Of a bucket, of a hop: what somebody set by hand, and only a new stream is rid of; none is made that is sealed."""


class _Cluster(msgspec.Struct):
    leader: str = ""


class _Info(msgspec.Struct):
    error: ApiError | None = None
    created: str = ""
    config: dict[str, Any] = {}
    cluster: _Cluster | None = None


class _Seen(msgspec.Struct):
    """A replicated stream in memory as it was when it was there.

    Attributes:
        created, config: of it.
        headless_s: since when it has had no leader; None: it has one.
        is_missing: it was not there at the last look.
    """

    created: str
    config: dict[str, Any]
    headless_s: float | None = None
    is_missing: bool = False


_decode_info = msgspec.json.Decoder(_Info).decode


class Remaker:
    """Looks at some streams from time to time.

    Args:
        api: connected.
        streams: names; what is not kept in memory is looked at and left alone.
        now_s: a clock that never steps; None: the event loop's.
    """

    def __init__(self, api: Api, streams: Sequence[str], now_s: Callable[[], float] | None = None) -> None:
        self._api = api
        self._streams = streams
        self._now_s = now_s or asyncio.get_running_loop().time
        self._seen: dict[str, _Seen] = {}

    async def run(self) -> None:
        """Looks until cancelled; at once for the first time, since what was never seen cannot be made again."""
        while True:
            for stream in self._streams:
                await self.look(stream)
            await asyncio.sleep(LEADER_LOOK.s)

    async def look(self, stream: str) -> None:
        """Asks after one stream, and makes it again if it must be. Never raises for what the cluster answers."""
        info = await self._ask(f"$JS.API.STREAM.INFO.{stream}", b"")
        if info is None or info.error is not None:
            is_missing = info is not None and info.error is not None and info.error.err_code == NO_STREAM
            await self._not_shown(stream, is_missing)
        elif _is_in_memory(info):
            await self._shown(stream, info)
        else:
            self._seen.pop(stream, None)

    async def _not_shown(self, stream: str, is_missing: bool) -> None:
        """Without an answer nothing is known: an election of the cluster's own leader is under way."""
        seen = self._seen.get(stream)
        if seen is None:
            return
        was_missing, seen.is_missing, seen.headless_s = seen.is_missing, is_missing, None
        if is_missing and was_missing:
            log.error("%s is gone: it is made again. What it held comes again from what is on disk", stream)
            await self._create(stream, seen.config)

    async def _shown(self, stream: str, info: _Info) -> None:
        seen = self._seen.get(stream)
        if seen is None or seen.created != info.created:
            seen = self._seen[stream] = _Seen(info.created, info.config)
        seen.config, seen.is_missing = info.config, False
        if not _is_headless(info):
            seen.headless_s = None
            return
        now_s = self._now_s()
        seen.headless_s = now_s if seen.headless_s is None else seen.headless_s
        if now_s - seen.headless_s < LEADER_GONE.s:
            return
        log.error(
            "%s has had no leader for %.0f s: it is made again. What it held comes again from what is on disk",
            stream,
            now_s - seen.headless_s,
        )
        deleted = await self._ask(f"$JS.API.STREAM.DELETE.{stream}", b"")
        if deleted is not None and deleted.error is None:
            await self._create(stream, seen.config)

    async def _create(self, stream: str, config: dict[str, Any]) -> None:
        # The server adds keys of its own under this prefix, and refuses to be told them.
        metadata = {key: text for key, text in config.get("metadata", {}).items() if not key.startswith("_nats.")}
        same = {field: value for field, value in config.items() if field not in _NOT_AGAIN[stream in HOPS]}
        body = msgspec.json.encode(same | {"metadata": metadata})
        answer = await self._ask(f"$JS.API.STREAM.CREATE.{stream}", body)
        if answer is not None and answer.error is None:
            log.warning("%s was made again", stream)
        elif answer is not None and answer.error is not None:
            log.error("%s cannot be made again: %s", stream, answer.error.description)

    async def _ask(self, subject: str, body: bytes) -> _Info | None:
        """One answer; None when there was none that can be read."""
        try:
            answer = await self._api.client.request(subject, body, timeout=self._api.settings.api_timeout_s)
            return _decode_info(answer.data)
        except (NatsError, *UNREADABLE) as error:
            log.debug("%s: %r", subject, error)
            return None


def _is_in_memory(info: _Info) -> bool:
    return info.config.get("storage") == "memory"


def _is_headless(info: _Info) -> bool:
    return info.cluster is not None and not info.cluster.leader
