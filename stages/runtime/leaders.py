"""Streams in memory that no server will ever lead again are made again.

Servers that are restarted one after the other, each before the one before it has caught up, can leave a replicated
stream in memory without a leader for good: the only member with its log waits for a snapshot that nobody has
("catchup aborted, no leader", nats-server 2.15.1). What such streams hold can be made again: hops from `FI_EVENTS` and
the last receipts, announcements by the processes they are of. So a stream in memory that had no leader for
`LEADER_GONE`, while the cluster answers for it, is deleted and created with the configuration that the answer gives.

A stream on disk is never touched. Two processes that do it at once, or one that is wrong about it, cost a rebuild and
nothing else; one that dies in between leaves it to the others, which saw the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from nats.errors import Error as NatsError

from contracts.budgets import LEADER_GONE, LEADER_LOOK
from stages.runtime.api import NO_STREAM, Api, ApiError

log = logging.getLogger(__name__)


class _Cluster(msgspec.Struct):
    leader: str = ""


class _Info(msgspec.Struct):
    error: ApiError | None = None
    created: str = ""
    config: dict[str, Any] = {}
    cluster: _Cluster | None = None


class _Gone(msgspec.Struct):
    """A stream without a leader. `condemned`: its time is over, and it is to be made again."""

    since_s: float
    created: str
    config: dict[str, Any]
    condemned: bool = False


_decode_info = msgspec.json.Decoder(_Info).decode


class LeaderWatch:
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
        self._gone: dict[str, _Gone] = {}

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            await asyncio.sleep(LEADER_LOOK.s)
            for stream in self._streams:
                await self.look(stream)

    async def look(self, stream: str) -> None:
        """Asks after one stream, and makes it again if its time is over. Never raises for what the cluster answers."""
        info = await self._ask(f"$JS.API.STREAM.INFO.{stream}", b"")
        gone = self._gone.get(stream)
        if info is not None and info.error is not None and info.error.err_code == NO_STREAM:
            if gone is not None and gone.condemned:
                await self._create(stream, gone)
            return
        if info is None or info.error is not None or not _is_headless(info):
            # Without an answer nothing is known: an election of the cluster's own leader is under way.
            self._gone.pop(stream, None)
            return
        now_s = self._now_s()
        if gone is None or gone.created != info.created:
            self._gone[stream] = gone = _Gone(now_s, info.created, info.config)
        if now_s - gone.since_s < LEADER_GONE.s:
            return
        gone.condemned = True
        log.error(
            "%s has had no leader for %.0f s: it is made again. What it held comes again from what is on disk",
            stream,
            now_s - gone.since_s,
        )
        deleted = await self._ask(f"$JS.API.STREAM.DELETE.{stream}", b"")
        if deleted is not None and deleted.error is None:
            await self._create(stream, gone)

    async def _create(self, stream: str, gone: _Gone) -> None:
        # The server adds keys of its own under this prefix, and refuses to be told them.
        metadata = {key: text for key, text in gone.config.get("metadata", {}).items() if not key.startswith("_nats.")}
        config = gone.config | {"metadata": metadata}
        answer = await self._ask(f"$JS.API.STREAM.CREATE.{stream}", msgspec.json.encode(config))
        if answer is not None and answer.error is None:
            log.warning("%s was made again", stream)
            self._gone.pop(stream, None)
        elif answer is not None and answer.error is not None:
            log.error("%s cannot be made again: %s", stream, answer.error.description)

    async def _ask(self, subject: str, body: bytes) -> _Info | None:
        """One answer; None when there was none that can be read."""
        try:
            answer = await self._api.client.request(subject, body, timeout=self._api.settings.api_timeout_s)
            return _decode_info(answer.data)
        except (NatsError, msgspec.MsgspecError) as error:
            log.debug("%s: %r", subject, error)
            return None


def _is_headless(info: _Info) -> bool:
    return info.config.get("storage") == "memory" and info.cluster is not None and not info.cluster.leader
