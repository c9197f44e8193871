"""Ephemeral pull consumers, as a reader asks the servers for them: without acknowledgements, each on one server."""

from __future__ import annotations

import asyncio
import logging
from typing import Final, NamedTuple

import msgspec
from nats.errors import Error as NatsError

from contracts.budgets import CONSUMER_INACTIVE, CONSUMER_MADE
from contracts.wire import UNREADABLE
from stages.runtime.api import Api, RequestRefusedError

log = logging.getLogger(__name__)

_NS: Final = 1_000_000_000


class Made(NamedTuple):
    """A consumer: messages it has to deliver, and the server it is on; empty where there is no cluster.

    `batch_max`: how many messages may be asked of it at once, by the servers' own limit; 0: they have none.
    """

    pending: int
    server: str
    batch_max: int


class _Group(msgspec.Struct):
    leader: str = ""


class _Config(msgspec.Struct, frozen=True):
    max_batch: int = 0


class _Consumer(msgspec.Struct):
    num_pending: int = 0
    cluster: _Group | None = None
    config: _Config = _Config()


_decode_consumer = msgspec.json.Decoder(_Consumer).decode


async def create_consumer(
    api: Api, stream: str, filter_subject: str, name: str, start: int, *, headers_only: bool
) -> Made:
    """Makes a consumer that gives what is stored from `start` on, on a server that the servers choose by chance.

    Raises:
        RequestRefusedError: the stream is not there, or takes no more consumers.
        NatsError: it was not made in time: ask again, by another name.
    """
    config = {
        "name": name,
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": max(1, start),
        "ack_policy": "none",
        "filter_subject": filter_subject,
        "num_replicas": 1,
        "mem_storage": True,
        "inactive_threshold": round(CONSUMER_INACTIVE.s * _NS),
        "max_waiting": 8,
        "headers_only": headers_only,
    }
    request = {"stream_name": stream, "config": config, "action": "create"}
    subject = f"$JS.API.CONSUMER.CREATE.{stream}.{name}.{filter_subject}"
    # A lost answer is safe to repeat: creating the same consumer again gives the same one. But what was given to a
    # server whose JetStream ended just then stays there: only another name is put elsewhere.
    try:
        async with asyncio.timeout(CONSUMER_MADE.s):
            made = await api.ask(stream, subject, msgspec.json.encode(request), _Consumer)
    except TimeoutError as error:
        raise NatsError("no server made the consumer, another one is asked for") from error
    return Made(made.num_pending, "" if made.cluster is None else made.cluster.leader, made.config.max_batch)


async def delete_consumer(api: Api, stream: str, name: str) -> None:
    """Deletes a consumer that nobody needs; what refuses that is passed over: servers drop it by themselves."""
    try:
        await api.request(stream, f"$JS.API.CONSUMER.DELETE.{stream}.{name}", b"")
    except RequestRefusedError as error:
        log.debug("%s: %s", name, error)


async def pending_of(api: Api, stream: str, name: str) -> int | None:
    """Messages that a consumer has to deliver; None where that cannot be told now."""
    try:
        answer = await api.client.request(
            f"$JS.API.CONSUMER.INFO.{stream}.{name}", b"", timeout=api.settings.api_timeout_s
        )
        return _decode_consumer(answer.data).num_pending
    except (NatsError, *UNREADABLE) as error:
        log.debug("%s: pending is not known: %r", name, error)
        return None
