"""Whether `FI_EVENTS` still has what comes after a place, so that a partition may be taken back to it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from contracts.events import split_body
from contracts.receipts import SealRecord
from contracts.subjects import EVENTS, raw_filter
from stages.persist.names import FIRST_SHARD
from stages.runtime.api import Api
from stages.runtime.messages import StoredMessage


class _Config(msgspec.Struct):
    first_seq: int = 0


class _Info(msgspec.Struct):
    config: _Config


async def is_retained(api: Api, partition: int, origin: int, seals: Sequence[SealRecord]) -> bool:
    """Whether everything of the partition after `origin` is there: `FI_EVENTS` is purged from its beginning only.

    A purge always leaves the message at the origin that it goes up to. One that was made again begins above 1, and has
    nothing of what was before.

    Args:
        api: connected.
        partition: lane.
        origin: 0: from its first event on.
        seals: all the partition's seal records, by number.

    Raises:
        ClusterUnavailableError: as `Api.request`.
    """
    if origin:
        message = await api.message_at(EVENTS, origin)
        return message is not None and message.subject.startswith(raw_filter(partition).removesuffix(">"))
    if seals:
        first = await api.first_message(EVENTS, raw_filter(partition))
        return first is not None and begins_with(seals[0], first)
    return (await api.ask(EVENTS, f"$JS.API.STREAM.INFO.{EVENTS}", b"", _Info)).config.first_seq <= 1


def begins_with(seal: SealRecord, message: StoredMessage) -> bool:
    """Whether the first message that `FI_EVENTS` has of a partition is the first of its first shard too.

    The last one of the shard stays there, whatever is trimmed. It is the first if it holds all that the shard settled.
    """
    if message.seq != seal.last_origin or seal.resume is UNSET:
        return message.seq < seal.last_origin
    settled = seal.events + seal.resume.duplicates + seal.resume.dead_lettered
    return seal.shard == FIRST_SHARD and len(split_body(message.data)) == settled
