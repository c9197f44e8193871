"""What people do in a run: they copy stores, put the copies in the place of a lost one, and take partitions back.

The verbs are the real ones (`cluster.rewind.Rewinder`), on the files in memory. Who types them may be killed at any
moment too; somebody types them again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from cluster.rewind import Rewinder
from cluster.testing.sim.disk import MemoryDisk
from cluster.testing.sim.loop import Host
from cluster.testing.sim.network import Network
from cluster.testing.sim.shards import Shard, rows_of
from contracts.errors import FiError
from contracts.events import decode_event, stored_ns_at
from contracts.flush import Flush, encode_flush
from contracts.hashing import MerkleFrontier
from contracts.lifecycle import ClosedConsultations
from contracts.receipts import Receipt, SealRecord, StoreEnd
from contracts.rules import CLOSED_REMEMBERED_MAX
from contracts.settings import Settings
from contracts.subjects import CONTROL, FLUSH_SUBJECT
from stages.persist.disk import StoreFiles
from stages.persist.names import ShardFile
from stages.persist.rewind import Damage, Place
from stages.persist.storedir import Store
from stages.runtime.api import Api
from stages.runtime.checkpoint import last_receipt
from stages.runtime.writer import replace_last

LOOK_S_MIN, LOOK_S_MAX = 0.5, 2.0
BACKUP_S_MIN, BACKUP_S_MAX = 0.3, 2.0
"""Until somebody looks again whether a partition stands still."""
SLIPS: Final = 0.3
"""The share of verbs that are killed on their way."""


class MemoryStore:
    """What `Rewinder` asks of the files of one partition or more, in memory. See `StoreFiles`."""

    def __init__(self, disk: MemoryDisk) -> None:
        self._disk = disk

    def as_files(self) -> StoreFiles:
        """What a `Rewinder` is handed."""
        return StoreFiles(
            lock=self._disk.lock,
            shards=self._list,
            last_place=self._last_place,
            last_good_place=self._last_good_place,
            prepare_begin=self._never,
            begin_at=self._never,
            given_up=self._given_up,
            prepare_aside=lambda store, files, end: self._disk.refuse_if_failing(),
            set_aside=self._set_aside,
            forget_copies=self._forget_copies,
        )

    def _list(self, directory: Path) -> dict[int, list[ShardFile]]:
        return {
            partition: [self._file(partition, number) for number in sorted(self._disk.shards(partition))]
            for partition in self._disk.partitions()
        }

    def _file(self, partition: int, number: int) -> ShardFile:
        path = self._disk.store.directory / f"p{partition}-{number}"
        return ShardFile(path, partition, number, self._disk.shards(partition)[number].sealed)

    def _last_place(self, files: Sequence[ShardFile], *, unshown: bool = False) -> tuple[Place, Damage | None]:
        walk = _Walk()
        for file in files:
            shard = self._disk.shards(file.partition)[file.shard]
            if file.shard != walk.number:
                return walk.place, Damage(walk.number, file.path, f"shard {walk.number} is missing")
            if unshown:
                shard.durable = len(shard.groups)
            is_full = file is not files[-1] or shard.sealed
            walk.take(shard, len(shard.groups) if is_full or unshown else shard.watermark)
            if is_full:
                walk.end()
        return walk.place, None

    def _last_good_place(
        self, store: Store, partition: int, receipts: Sequence[Receipt], seals: Sequence[SealRecord]
    ) -> tuple[Place, Damage | None]:
        end = receipts[-1].end_of(store.store_id)
        walk, shards = _Walk(), self._disk.shards(partition)
        told = {receipt.origin: receipt for receipt in receipts}
        sealed = {seal.shard: seal for seal in seals}
        good = walk.place
        for number in range(1, end.shard + 1):
            shard = shards.get(number)
            if shard is None and number == end.shard and not end.commits:
                break
            if shard is None:
                return good, Damage(number, store.directory, f"shard {number} is missing")
            if number > walk.number:
                walk.end()
            commits = end.commits if number == end.shard and not shard.sealed else len(shard.groups)
            whole = min(commits, len(shard.groups))
            # A sealed file is looked at as a whole: there is no place within it.
            for count in [whole] if shard.sealed else range(1, whole + 1):
                walk.take(shard, count, after=0 if shard.sealed else count - 1)
                if shard.sealed:
                    record = sealed.get(number)
                    if record is not None and not walk.fits(record.tree_size, record.root):
                        return good, Damage(number, store.directory, "is not the file that its seal record speaks of")
                    walk.end()
                receipt = told.get(shard.groups[count - 1].origin)
                if receipt is not None and not walk.fits(receipt.persisted, receipt.root):
                    return good, Damage(number, store.directory, "its events are not those that were committed")
                good = walk.place if shard.sealed or receipt is not None else good
            if whole < commits:
                return good, Damage(number, store.directory, f"{whole} of {commits} are whole")
            if not shard.sealed and end.rows.get(number) not in (None, rows_of(shard.groups[:commits])):
                return good, Damage(number, store.directory, "its rows are not as they were committed")
        return walk.place, None

    def _given_up(
        self, store: Store, partition: int, end: StoreEnd, seals: Sequence[SealRecord] = (), *, unseen: bool = False
    ) -> list[ShardFile]:
        def is_beyond(number: int, shard: Shard) -> bool:
            if number != end.shard:
                return number > end.shard
            if shard.sealed:
                return not end.commits
            return shard.watermark > end.commits or (unseen and len(shard.groups) > end.commits)

        shards = self._disk.shards(partition).items()
        return [self._file(partition, number) for number, shard in shards if is_beyond(number, shard)]

    def _set_aside(self, store: Store, files: Sequence[ShardFile], end: StoreEnd, now_ns: int) -> list[Path]:
        for file in files:
            shards = self._disk.shards(file.partition)
            if file.shard not in shards:
                # The store was put back, or taken away, while the verb was at work.
                raise FileNotFoundError(file.path)
            kept = shards[file.shard].groups[: end.commits] if file.shard == end.shard else []
            del shards[file.shard]
            if kept:
                shards[file.shard] = Shard(kept, len(kept), len(kept), len(kept))
        return [file.path for file in files]

    def _forget_copies(self, directory: Path, partition: int, shard: int) -> None:
        self._disk.forget_copies(partition, shard)

    def _never(self, *arguments: object) -> None:
        raise AssertionError("no store is ever moved here")


class _Walk:
    """Goes through shards in order, and knows the place behind what was taken."""

    def __init__(self) -> None:
        self.number = 1
        self._commits = self._origin = self._duplicates = self._dead_lettered = self._stored_ns = 0
        self._tree = MerkleFrontier()
        self._closed = ClosedConsultations(b"", CLOSED_REMEMBERED_MAX)
        self._rows: dict[int, str] = {}

    def take(self, shard: Shard, commits: int, *, after: int = 0) -> None:
        """The first `commits` of a shard; `after` so many that were taken before."""
        self._commits = commits
        if commits and not shard.sealed:
            self._rows[self.number] = rows_of(shard.groups[:commits])
        for group in shard.groups[after:commits]:
            self._tree.extend(group.records)
            event = None
            for event in map(decode_event, group.records):
                self._closed.note(event)
            self._origin, self._stored_ns = group.origin, stored_ns_at(group.origin, event)
            self._duplicates += group.duplicates
            self._dead_lettered += group.dead_lettered

    def fits(self, size: int, root: str) -> bool:
        """Whether that is what it has come to."""
        return (size, root) == (self._tree.size, self._tree.root().hex())

    def end(self) -> None:
        """The shard was full."""
        self.number, self._commits = self.number + 1, 0

    @property
    def place(self) -> Place:
        return Place(
            self._origin,
            self.number,
            self._commits,
            self._tree.copy(),
            self._duplicates,
            self._dead_lettered,
            self._closed.packed,
            dict(self._rows),
            self._stored_ns,
        )


class People:
    """Who looks after the stores of a run.

    Args:
        network: of the servers.
        rng: draws when they look, and when a verb of theirs is killed.
        disks: the stores.
        settings: of the run.
        stands: gives the partitions that stand still now, and whether they have receipts.
        counts_anew: whether ingest says that `FI_EVENTS` counts anew.
        make_receipts_again: has `FI_RECEIPTS` deleted and applied.
        make_events_again: has it deleted and applied, and what was sent since sent again.
    """

    def __init__(
        self,
        network: Network,
        rng: random.Random,
        disks: Sequence[MemoryDisk],
        settings: Settings,
        stands: Callable[[], dict[int, bool]],
        counts_anew: Callable[[], bool],
        make_receipts_again: Callable[[], None],
        make_events_again: Callable[[], Awaitable[None]],
    ) -> None:
        self._network = network
        self._rng = rng
        self._disks = disks
        self._settings = settings
        self._stands = stands
        self._counts_anew = counts_anew
        self._make_receipts_again = make_receipts_again
        self._make_events_again = make_events_again
        self._verbs = 0
        self.needed = False
        """Something was done to the streams or stores that does not mend itself."""
        self.receipts_are_old = False
        """`FI_RECEIPTS` was put back to what it was before."""
        self.is_careful = False
        """Nothing of theirs is killed any more."""
        self.typing: list[asyncio.Task[None]] = []
        """What they do."""

    async def look(self) -> None:
        """Looks again and again, and does what is to be done, until cancelled."""
        while True:
            await asyncio.sleep(self._rng.uniform(LOOK_S_MIN, LOOK_S_MAX))
            if not self.needed:
                continue
            if self._counts_anew():
                await self._make_events_again()
            if self.receipts_are_old:
                self._make_receipts_again()
                self.receipts_are_old = False
            for partition, has_receipts in self._stands().items():
                owners = [disk for disk in self._disks if disk.shards(partition)]
                for disk in self._disks if has_receipts else owners:
                    await self._type(disk, "rebuild" if has_receipts else "restore", partition)
                if not (has_receipts or owners):
                    await self._type(self._rng.choice(self._disks), "begin anew", partition)

    def type_twice(self, disk: MemoryDisk, verb: str, partition: int) -> None:
        """Two people type the same, at about the same time."""
        self.typing += [asyncio.create_task(self._type(disk, verb, partition)) for _ in range(2)]

    def flush(self) -> None:
        """Somebody wants all sealed that is committed now."""
        self.typing.append(asyncio.create_task(self._flush()))

    async def _flush(self) -> None:
        host = Host("flush")
        client = self._network.connect(host.name, host)
        api = Api(client, self._settings, self._rng.random, give_up_s=20.0)
        try:
            targets = {p: (await last_receipt(api, p))[0] for p in range(self._settings.partitions)}
            flush = Flush(
                cluster=self._disks[0].store.cluster_id,
                targets={p: receipt.origin for p, receipt in targets.items() if receipt is not None},
                since_ns=self._network.broker.now_ns(),
                by="people",
            )
            token = f"flush-{self._rng.getrandbits(48):012x}"
            await replace_last(api, CONTROL, FLUSH_SUBJECT, lambda last: encode_flush(flush), token)
        except FiError as error:
            self._network.broker.say(f"flush: {error}")
        finally:
            await client.close()

    async def back_up(self) -> None:
        """Copies what is sealed again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._rng.uniform(BACKUP_S_MIN, BACKUP_S_MAX))
            for disk in self._disks:
                if disk.backed_up:
                    disk.back_up()
                    self._network.broker.say(f"{disk.store.directory} is copied: {disk.copied}")

    async def _type(self, disk: MemoryDisk, verb: str, partition: int) -> None:
        self._verbs += 1
        host = Host(f"operator.{self._verbs}")
        broker = self._network.broker

        async def run() -> None:
            client = self._network.connect(host.name, host)
            api = Api(client, self._settings, self._rng.random, give_up_s=20.0)
            token = f"{self._rng.getrandbits(48):012x}"
            verbs = Rewinder(
                api, disk.store, None, broker.now_ns, MemoryStore(disk).as_files(), lambda: token, disk.store.store_id
            )
            try:
                if verb == "rebuild":
                    done = await verbs.rebuild(partition)
                else:
                    done = await verbs.restore(partition, begin_anew=verb == "begin anew")
                broker.say(f"{host.name} did {done}")
            except (FiError, OSError) as error:
                broker.say(f"{host.name}: {error}")
            finally:
                await client.close()

        task = broker.loop.create_task(run(), name=host.name, context=host.context)
        limit_s = None
        if not self.is_careful and self._rng.random() < SLIPS:
            limit_s = self._rng.uniform(0.0, 0.05)
        await asyncio.wait((task,), timeout=limit_s)
        if not task.done():
            broker.say(f"{host.name} is killed")
            host.dead = True
            task.cancel()
            await asyncio.wait((task,))
