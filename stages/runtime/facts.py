"""What a stage must know of the cluster it works for: its id and how it is partitioned, read from `FI_EVENTS`.

Stages take P from here and never from their own settings: two processes with different ideas of P would break order.
"""

from __future__ import annotations

import asyncio

import msgspec
from nats.errors import Error as NatsError
from nats.js.errors import APIError

from contracts.budgets import FACTS_PAUSE, FACTS_REQUEST, FIRST_FACTS
from contracts.errors import NotAppliedError
from contracts.subjects import EVENTS, PartitionBy
from stages.runtime.answers import DeniedError, unavailable
from stages.runtime.api import FOREIGN, NO_STREAM
from stages.runtime.client import GuardedClient

META_CLUSTER_ID = "fi.cluster_id"
META_PARTITIONS = "fi.partitions"
META_PARTITION_BY = "fi.partition_by"
META_RECEIPTS_LOST = "fi.receipts_lost"
"""Of `FI_RECEIPTS`: when it was made again after it was lost, RFC 3339."""


class ClusterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What never changes while a cluster holds data.

    Attributes:
        cluster_id: 32 hex digits; origins of one cluster are never compared with another's.
        partitions: P.
        partition_by: what keeps together in a partition.
    """

    cluster_id: str
    partitions: int
    partition_by: PartitionBy


def facts_from_metadata(metadata: dict[str, str] | None) -> ClusterFacts:
    """Facts from a stream's metadata.

    Raises:
        NotAppliedError: they are not there, or not ours.
    """
    found = metadata or {}
    try:
        return msgspec.convert(
            {
                "cluster_id": found[META_CLUSTER_ID],
                "partitions": found[META_PARTITIONS],
                "partition_by": found[META_PARTITION_BY],
            },
            ClusterFacts,
            strict=False,
        )
    except (KeyError, msgspec.ValidationError) as error:
        raise NotAppliedError(
            f"{EVENTS} does not say how it is partitioned ({error}): run `fictl cluster apply` first"
        ) from error


async def read_cluster(client: GuardedClient, *, wait_s: float = FIRST_FACTS.s) -> ClusterFacts:
    """Facts of the cluster `client` is connected to.

    Args:
        client: connected.
        wait_s: how long to try while the cluster elects its leaders.

    Raises:
        NotAppliedError: there is no `FI_EVENTS`, or it does not say how it is partitioned.
        ClusterUnavailableError: nobody answered within `wait_s`, or a server refuses to.
    """
    jetstream = client.jetstream(timeout=FACTS_REQUEST.s)
    now_s = asyncio.get_running_loop().time
    deadline_s = now_s() + wait_s
    while True:
        try:
            metadata = (await jetstream.stream_info(EVENTS)).config.metadata
        # What something else than JetStream says to it, nats-py takes apart unguarded.
        except (NatsError, KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, APIError) and error.err_code == NO_STREAM:
                raise NotAppliedError(
                    f"the cluster has no stream {EVENTS}: run `fictl cluster apply` first, with "
                    "--after-stores if there are stores of it"
                ) from error
            if isinstance(error, DeniedError):
                raise unavailable(EVENTS, error) from error
            if now_s() > deadline_s:
                met = error if isinstance(error, NatsError) else FOREIGN
                raise unavailable(f"no leader of {EVENTS} answered within {wait_s:.0f} s", met) from error
            await asyncio.sleep(FACTS_PAUSE.s)
        else:
            return facts_from_metadata(metadata)
