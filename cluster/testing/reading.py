"""What became of what was published: read from the cluster's streams and from the shards, as auditors and readers do.

Nothing is asked of the stage processes, which may be dead, frozen or wrong.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from cluster.testing.checker import Verdict, check, event_id_of
from cluster.testing.load import Load
from cluster.testing.waiting import SETTLED_LIMIT_S, until
from cluster.track import Totals
from contracts.events import Event
from contracts.letters import Letter, read_letter
from contracts.receipts import Receipt
from contracts.settings import Settings
from contracts.subjects import DLQ, EVENTS, raw_filter
from stages.persist.store import EventStore
from stages.persist.verify import VerifyReport, verify_store
from stages.runtime.api import Api
from stages.runtime.checkpoint import last_receipt
from stages.runtime.client import GuardedClient
from stages.runtime.messages import StoredMessage

_VISIBLE_LIMIT_S = 30.0


class Reading(ABC):
    """A cluster's outcome. Its methods wait for elections to end; none changes anything.

    Attributes:
        client: a connection to the cluster; also for publishing.
        api: the JetStream API over it.
        shards: the store's directory.
    """

    client: GuardedClient
    api: Api
    shards: Path

    @property
    @abstractmethod
    def settings(self) -> Settings:
        """What the cluster was started with."""

    @abstractmethod
    async def logs(self, lines: int = 12) -> str:
        """The last `lines` lines of every process's log."""

    async def receipts(self) -> list[Receipt]:
        """The last receipt of every partition that has one."""
        found = [await last_receipt(self.api, p) for p in range(self.settings.partitions)]
        return [receipt for receipt, _ in found if receipt is not None]

    async def totals(self) -> Totals:
        """Totals of the last receipts."""
        receipts = await self.receipts()
        return Totals(
            sum(r.persisted for r in receipts),
            sum(r.duplicates for r in receipts),
            sum(r.dead_lettered for r in receipts),
        )

    async def unsettled(self) -> dict[int, tuple[int, int]]:
        """Partition → (origin committed, origin stored), where they differ."""
        open_: dict[int, tuple[int, int]] = {}
        for partition in range(self.settings.partitions):
            last = await self.api.last_message(EVENTS, raw_filter(partition))
            receipt, _ = await last_receipt(self.api, partition)
            reached = receipt.origin if receipt is not None else 0
            if last is not None and reached < last.seq:
                open_[partition] = (reached, last.seq)
        return open_

    async def settled(self, limit_s: float = SETTLED_LIMIT_S) -> Totals:
        """Waits until the receipts reach everything that `FI_EVENTS` holds, and until readers may see it.

        Raises:
            AssertionError: it did not come to that within `limit_s`; ends with the logs.
        """
        seen: dict[int, tuple[int, int]] = {}

        async def done() -> bool:
            seen.clear()
            seen.update(await self.unsettled())
            return not seen

        try:
            await until(done, "receipts reach every stored origin", limit_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; (committed, stored) by partition: {seen}\n{await self.logs()}") from None
        totals = await self.totals()

        async def visible() -> bool:
            return await asyncio.to_thread(self.count) == totals.persisted

        await until(visible, f"{totals.persisted} events visible in the store", _VISIBLE_LIMIT_S)
        return totals

    def count(self) -> int:
        """Events that readers may see. Reads files: not for the event loop."""
        with EventStore(self.shards) as store:
            return store.count()

    def stored(self) -> list[Event]:
        """Everything in the store, in the order of storing. Reads files: not for the event loop."""
        with EventStore(self.shards) as store:
            return [row.event for row in store.iterate()]

    async def events(self) -> list[Event]:
        """`stored`, beside the event loop."""
        return await asyncio.to_thread(self.stored)

    async def letters(self) -> list[StoredMessage]:
        """Every message of `FI_DLQ`, oldest first."""
        letters: list[StoredMessage] = []
        seq = 0
        while (message := await self.api.first_message(DLQ, "fi.dlq.*.*", from_seq=seq + 1)) is not None:
            letters.append(message)
            seq = message.seq
        return letters

    async def dead_letters(self) -> list[Letter]:
        """Every refused event, with the reason and its bytes as they came, oldest first."""
        read = [read_letter(m.subject, m.seq, m.time_ns, m.data, m.headers) for m in await self.letters()]
        return [letter for letter in read if not letter.handled]

    async def verdict(self, load: Load, dead: Iterable[bytes] | None = None) -> Verdict:
        """The checker's word on `load` and all that is stored of its consultations. Call `settled` before.

        Args:
            load: what was published.
            dead: ids of its events that were dead-lettered, one for each letter; None: read from `FI_DLQ`.
        """
        return _judge(load, await self.events(), await self._refused() if dead is None else dead)

    async def _refused(self) -> list[bytes]:
        """The ids of all dead-lettered events, as far as they have one."""
        return [event_id_of(letter.data) for letter in await self.dead_letters()]

    async def verify(self) -> VerifyReport:
        """Every byte of the store, as ``fictl verify`` reads it."""
        return await asyncio.to_thread(verify_store, self.shards)

    async def assert_whole(self, *loads: Load) -> Totals:
        """Settles; then nothing of `loads` may be lost, doubled, reordered, altered or dead-lettered.

        Every byte of the store must hold, whoever published it.

        Raises:
            AssertionError: says what is wrong, with the first counter-example.
        """
        totals = await self.settled()
        events, refused = await self.events(), await self._refused()
        for load in loads:
            verdict = _judge(load, events, refused)
            assert verdict.ok, f"{verdict}\n{await self.logs()}"
            assert verdict.acknowledged == verdict.attempted == verdict.stored, str(verdict)
        report = await self.verify()
        assert report.ok, report.problems
        assert report.events == totals.persisted, f"{report.events} events verified, {totals.persisted} in receipts"
        ends = {end.partition: end for end in report.partitions}
        for receipt in await self.receipts():
            assert ends[receipt.partition].root == receipt.root, f"partition {receipt.partition}: another Merkle root"
        return totals


def _judge(load: Load, events: Iterable[Event], dead: Iterable[bytes]) -> Verdict:
    """The checker's word, from all that is stored and the ids of all that was refused: others' do not count."""
    attempts = load.attempts
    ours = {attempt.consultation_id for attempt in attempts} | {attempt.event_id for attempt in attempts}
    stored = [event for event in events if not ours.isdisjoint((event.consultation_id, event.event_id))]
    return check(attempts, stored, [event_id for event_id in dead if event_id in ours])
