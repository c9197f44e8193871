"""What stores still say of a cluster whose streams are gone: its id, how far it had counted, how it was partitioned.

Always true: nothing is written. A shard that cannot be read says nothing, and stands in nobody's way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final
from uuid import UUID

import msgspec

from contracts.errors import ShardCorruptError, ShardError
from contracts.settings import Settings
from contracts.subjects import partition_of
from stages.persist.store import EventStore
from stages.persist.storedir import read_store

_SAMPLES_MAX: Final = 64
"""Events of a partition that tell how the cluster was partitioned: with another number at most half of them fit."""


class Remains(msgspec.Struct, frozen=True, kw_only=True):
    """What some stores of one cluster say of it.

    Attributes:
        cluster_id: its id.
        origin: the last that any of them has; 0 without any.
        samples: by partition, (site, consultation) of events that are stored there.
    """

    cluster_id: str
    origin: int
    samples: dict[int, frozenset[tuple[str, UUID]]]

    def refusals(self, settings: Settings) -> list[str]:
        """Why streams that are partitioned by `settings` would not go on with these stores; empty if they would."""
        for partition, samples in self.samples.items():
            if not all(_fits(partition, site, consultation, settings) for site, consultation in samples):
                return [
                    f"the stores have events in partition {partition} that {settings.partitions} partitions by "
                    f"{settings.partition_by} would not put there: set `partitions` and `partition_by` as they were"
                ]
        return []


def read_remains(directories: Sequence[Path]) -> Remains:
    """What the stores in `directories` say. Blocks.

    Args:
        directories: each a store's; one at least.

    Raises:
        ShardError: one is no store, cannot be known, or they are of several clusters.
        OSError: one cannot be read.
    """
    stores = [read_store(directory) for directory in directories]
    for store in stores[1:]:
        if store.cluster_id != stores[0].cluster_id:
            raise ShardError(
                f"{store.directory} is of cluster {store.cluster_id}, and {stores[0].directory} of "
                f"{stores[0].cluster_id}: name the stores of one cluster"
            )
    origin = 0
    samples: dict[int, frozenset[tuple[str, UUID]]] = {}
    for directory in directories:
        with EventStore(directory) as held:
            with suppress(ShardCorruptError):
                origin = max([origin, *(info.last_origin or 0 for info in held.shards())])
            for partition in held.partitions():
                with suppress(ShardCorruptError):
                    events = (stored.event for stored in islice(held.iterate(partition), _SAMPLES_MAX))
                    seen = frozenset((event.site, UUID(bytes=event.consultation_id)) for event in events)
                    samples[partition] = samples.get(partition, frozenset()) | seen
    return Remains(cluster_id=stores[0].cluster_id, origin=origin, samples=samples)


def _fits(partition: int, site: str, consultation: UUID, settings: Settings) -> bool:
    """The server goes by the subject, where gateways may write an id in capitals."""
    return partition in {
        partition_of(site, text, settings.partitions, settings.partition_by)
        for text in (str(consultation), str(consultation).upper())
    }
