"""What chaos is done to: a whole pipeline of real processes, what is missing of verbs to hurt it, and a look at it."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from cluster.dlq import DeadLetters, Selection
from cluster.stageprocess import settings_environment
from cluster.testing.chaos.edge import BATCH_MAX
from cluster.testing.chaos.fleet import EdgeGateway
from cluster.testing.checker import event_id_of
from cluster.testing.embedded import EmbeddedBackend
from cluster.testing.ficluster import FiCluster
from contracts.errors import ClusterUnavailableError
from contracts.settings import Settings
from contracts.subjects import EVENTS
from stages.runtime.membership import read_receipts

ANSWER_S: Final = 10.0


class Ground:
    """A pipeline, its gateways, and what becomes of their events.

    Attributes:
        cluster: embedded, with links and clocks.
        gateways: name → gateway; set by whoever runs them.
        disk_is_small: its shards lie on a file system that can be filled.
    """

    def __init__(self, cluster: FiCluster, *, disk_is_small: bool) -> None:
        self.cluster = cluster
        self.gateways: dict[str, EdgeGateway] = {}
        self.disk_is_small = disk_is_small

    @property
    def settings(self) -> Settings:
        """Of the cluster."""
        return self.cluster.settings

    @asynccontextmanager
    async def second_owner(self, stage: str) -> AsyncIterator[None]:
        """A process that nobody looks after, told to hold every partition of `stage` whatever the others hold."""
        every = ",".join(map(str, range(self.settings.partitions)))
        async with self._fictl(f"{stage}-second", "run", stage, "--name", f"{stage}-second", "--partitions", every):
            yield

    def part(self, server: str) -> None:
        """Cuts a server off from the others, but not from its clients, until it is healed."""
        assert isinstance(self.cluster.backend, EmbeddedBackend)
        self.cluster.backend.part(server)

    async def restore_receipts(self) -> None:
        """`fictl partitions restore`. Raises `ClusterUnavailableError` while a partition has no receipt."""
        async with self._fictl("restore", "partitions", "restore") as restore:
            code = await restore.wait()
        receipts = await read_receipts(self.cluster.api, self.settings.partitions)
        if missing := set(range(self.settings.partitions)) - receipts.keys():
            raise ClusterUnavailableError(f"partitions {sorted(missing)} have no receipts; restore exited {code}")

    @asynccontextmanager
    async def _fictl(self, log: str, *arguments: str) -> AsyncIterator[Process]:
        """The command with these servers and shards, which ends with the context; it writes to a log of that name."""
        urls = [part for url in self.cluster.urls for part in ("--nats", url)]
        command = [sys.executable, "-P", "-m", "cluster", *arguments, *urls, "--shards", str(self.cluster.shards)]
        with (self.cluster.directory / "logs" / f"{log}.log").open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdout=output,
                stderr=output,
                env=os.environ | settings_environment(self.settings),
            )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def reached(self, limit_s: float) -> dict[int, int]:
        """Partition → origin committed, of those that can be read now."""
        try:
            async with asyncio.timeout(min(limit_s, 5)):
                receipts = await read_receipts(self.cluster.api, self.settings.partitions)
        except (ClusterUnavailableError, TimeoutError):
            return {}
        return {partition: receipt.origin for partition, receipt in receipts.items()}

    async def dead_ids(self) -> list[bytes]:
        """Ids of the events in the dead letters, one for each letter. What has no readable id gives an empty one."""
        letters = DeadLetters(self.cluster.api, "")
        span = await letters.span(Selection())
        return [
            event_id_of(letter.data) async for letter in letters.letters(Selection(), span, lambda done, total: None)
        ]

    async def problems(self, events_of: Mapping[int, int]) -> list[str]:
        """What does not add up: the store's own verification, its roots, and the accounting.

        Args:
            events_of: origin → events, of every message that was acknowledged.
        """
        report = await self.cluster.verify()
        found = [f"verify: {problem.shard}: {problem.where}: {problem.what}" for problem in report.problems]
        receipts = await read_receipts(self.cluster.api, self.settings.partitions)
        roots = {end.partition: end.root for end in report.partitions}
        found += [f"partition {p}: root differs from its receipt's" for p, r in receipts.items() if roots[p] != r.root]
        settled = sum(r.persisted + r.duplicates + r.dead_lettered for r in receipts.values())
        info = await self.cluster.client.jetstream(timeout=ANSWER_S).stream_info(EVENTS)
        # Messages that were stored for a gateway which died before it was told.
        untold = info.state.last_seq - len(events_of)
        known = sum(events_of.values())
        if not known + untold <= settled <= known + BATCH_MAX * untold:
            found.append(
                f"accounting: {known} events in acknowledged messages and {untold} messages nobody was told of, but "
                f"persisted + duplicates + dead-lettered = {settled}"
            )
        return found
