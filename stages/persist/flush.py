"""What `fictl flush` last asked for, and the lanes that are to hear of it at once."""

from __future__ import annotations

import logging
from typing import Protocol
from weakref import WeakValueDictionary

from contracts.flush import decode_flush
from stages.runtime.messages import StoredMessage

log = logging.getLogger(__name__)


class FlushedLane(Protocol):
    """A lane of persist."""

    def look_again(self) -> None:
        """There is something new."""


class Flushes:
    """One for each process. `cluster` is the id of the cluster it works for.

    Attributes:
        lanes: partition → lane, to be told to look again when there is something new.
    """

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster
        self._targets: dict[int, int] = {}
        self.lanes: WeakValueDictionary[int, FlushedLane] = WeakValueDictionary()

    def target(self, partition: int) -> int:
        """Everything committed up to this origin is to be sealed; 0: nothing was asked."""
        return self._targets.get(partition, 0)

    async def take(self, told: StoredMessage | None) -> None:
        """Takes what stands in the bucket. Raises `WireFormatError` for what this build cannot read."""
        if told is None or not told.data:
            self._targets = {}
            return
        flush = decode_flush(told.data)
        if flush.cluster == self._cluster:
            log.info("flush asked for", extra={"by": flush.by, "targets": str(flush.targets)})
            self._targets = flush.targets
            for lane in list(self.lanes.values()):
                lane.look_again()
