"""The cluster of one run: servers, network, disks, processes and gateways, as its seed makes them up."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from cluster.gateway import Gateway
from cluster.testing.sim.broker import Broker
from cluster.testing.sim.consumers import Consumer
from cluster.testing.sim.disk import MemoryDisk
from cluster.testing.sim.load import Site, make_sites, send_all
from cluster.testing.sim.loop import Host, VirtualLoop
from cluster.testing.sim.network import Network
from cluster.testing.sim.people import People
from cluster.testing.sim.processes import SimProcess
from cluster.testing.sim.streams import Message, Stream
from cluster.topology import streams
from contracts.events import format_rfc3339
from contracts.frames import decode_frame_head
from contracts.receipts import Receipt, decode_receipt
from contracts.settings import MIB, Settings
from contracts.subjects import DLQ, EVENTS, HOPS, RECEIPTS, STAGES, raw_filter, receipt_subject, split_raw_subject
from contracts.telemetry import DEAD_HANDLED, HEADER_MSG_ID
from stages.persist.storedir import Store
from stages.runtime.facts import META_RECEIPTS_LOST
from stages.runtime.graveyard import place_of
from stages.runtime.messages import StoredMessage

CLUSTER: Final = "c" * 32
SERVERS: Final = ("n1", "n2", "n3")
DAMAGED: Final = SERVERS[0]
TOLD_S: Final = 15.0
"""How long a stage may take to say that `FI_EVENTS` counts anew, and people to hear it."""
REMADE_S: Final = 6.0
"""From the deletion of `FI_EVENTS` until it is applied: longer than anything stays on its way."""


class World:
    """A cluster, its processes and its gateways."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, trace: list[str] | None) -> None:
        self.rng = rng
        self.loop = loop
        self.settings = make_settings(rng)
        line = None if trace is None else lambda text: trace.append(f"{loop.time():10.6f} {text}")
        self.broker = Broker(loop, rng, streams(self.settings, CLUSTER), line)
        self.broker.applied = self._note_applied
        self.broker.placed = self._place
        self.unreadable: set[int] = set()
        """Sequences of `FI_EVENTS` that one server has, and cannot read."""
        self.network = Network(self.broker, rng)
        self.accepted: Counter[int] = Counter()
        """Partition → events in accepted messages."""
        self.letters: list[Message] = []
        self.traps: list[Callable[[str, str], bool]] = []
        """Called with every stream and writer of a message that was stored, until they give True."""
        self.disks = [
            MemoryDisk(Store(Path(f"/node{number}"), f"{number:032x}", CLUSTER), rng)
            for number in range(rng.choice((1, 1, 2)))
        ]
        self.processes = [process for stage in STAGES for process in self._make(stage)]
        self.sites = make_sites(rng, rng.randint(1, 2), rng.randint(2, 6), rng.randint(2, 8))
        in_use = [disk for disk in self.disks if any(p.stage == "persist" and p.disk is disk for p in self.processes)]
        self.people = People(
            self.network,
            rng,
            in_use,
            self.settings,
            self._standing,
            self._counts_anew,
            self._delete_receipts,
            self._make_events_again,
        )
        self.rolled_back = False
        """`FI_EVENTS` was, at some time: dedup ids were forgotten, and what it took since may be gone."""
        self.is_rolled_back = False
        """It is now."""
        self.is_healed = False
        self.is_copied = False
        """Two disks are the same store."""
        self.is_taken_twice = False
        """Servers that had forgotten a message's id took it again."""
        self._ids_taken: set[str] = set()
        self._hosts = [Host(site.name) for site in self.sites]
        self._gateways = [self._make_gateway(number) for number in range(len(self.sites))]

    def _make(self, stage: Any) -> Iterator[SimProcess]:
        every = tuple(range(self.settings.partitions))
        for number in range(self.rng.choice((1, 1, 2))):
            # Two owners for every partition, on purpose.
            pinned = every if number and self.rng.random() < 0.5 else None
            yield self._process(stage, f"{stage}-{number}", self.disks[number % len(self.disks)], pinned)

    def _process(self, stage: Any, name: str, disk: MemoryDisk, pinned: tuple[int, ...] | None) -> SimProcess:
        return SimProcess(
            stage,
            name,
            broker=self.broker,
            network=self.network,
            rng=self.rng,
            settings=self.settings,
            disk=disk,
            pinned=pinned,
        )

    def _make_gateway(self, number: int) -> Gateway:
        name = f"{self.sites[number].name}.{self.rng.getrandbits(32):08x}"
        return Gateway(self.network.connect(name, self._hosts[number]), jitter=self.rng.random)

    def restart_gateway(self, number: int) -> None:
        """A gateway dies and starts again: what it does not know to be accepted it sends once more."""
        number %= len(self.sites)
        before = self._gateways[number]
        self._gateways[number] = self._make_gateway(number)
        # Its requests under way end in their time-outs, and nothing they are answered counts.
        self.broker.loop.create_task(before.client.close(), context=self.broker.context)

    def damage(self, share: float) -> None:
        """A server can no longer read some of what it stored of `FI_EVENTS`, which consumers there pass over."""
        stream = self.broker.streams.get(EVENTS)
        hit = [seq for seq in ([] if stream is None else stream.seqs) if self.rng.random() < share]
        self.unreadable.update(hit)
        self.broker.say(f"{DAMAGED} cannot read {hit}")

    def kill_persist(self, disk: MemoryDisk) -> None:
        """All persisters on a disk are killed."""
        for process in self.processes:
            if process.stage == "persist" and process.disk is disk:
                process.kill()

    def run_copy(self, disk: MemoryDisk) -> None:
        """The disk is copied, and persist runs there too, as the same store."""
        copy = disk.copy()
        self.is_copied = True
        self.disks.append(copy)
        self.processes.append(self._process("persist", "persist-copy", copy, tuple(range(self.settings.partitions))))
        self.processes[-1].start()

    def _place(self, consumer: Consumer) -> None:
        consumer.server = self.rng.choice(SERVERS)
        if consumer.server == DAMAGED and consumer.stream.name == EVENTS:
            # What was read before, or came since, is in the server's memory.
            consumer.unreadable = set(self.unreadable)

    def _note_applied(self, stream: Stream, message: Message) -> None:
        if stream.name == EVENTS:
            self.accepted[split_raw_subject(message.subject)[0]] += message.data.count(b"\n") + 1
            message_id = message.headers.get(HEADER_MSG_ID, "")
            self.is_taken_twice = self.is_taken_twice or message_id in self._ids_taken
            self._ids_taken.add(message_id)
        elif stream.name == DLQ and DEAD_HANDLED not in message.headers:
            self.letters.append(message)
        if self.traps:
            nonce = message.headers.get(HEADER_MSG_ID, "").partition(":")[0]
            writer = nonce.rpartition("-")[0]
            self.traps = [trap for trap in self.traps if not trap(stream.name, writer)]

    def send(self, over_s: float) -> None:
        """All gateways send all they have, over about so long, from the first on. `sending` ends when that is done."""
        self._over_s = over_s
        repeats = self.rng.random() < 0.5

        def sending(number: int, site: Site) -> Any:
            return send_all(lambda: self._gateways[number], site, self.rng, over_s, again=repeats)

        async def all_sites() -> None:
            await asyncio.gather(*(sending(number, site) for number, site in enumerate(self.sites)))

        self.sending = asyncio.create_task(all_sites())

    def heal(self) -> None:
        """Nothing goes wrong any more."""
        self.broker.say("heal")
        self.is_healed = True
        self.traps.clear()
        self.make_receipts_again()
        self.people.is_careful = True
        self.network.heal()
        self.broker.heal()
        if self.is_copied:
            self._tell_copies_apart()
        for disk in self.disks:
            disk.failing = False
            disk.kill_in_commit = lambda host: False
        for process in self.processes:
            process.thaw()

    def receipt(self, partition: int) -> Receipt | None:
        """The last receipt, as a majority of servers has it."""
        stream = self.broker.streams.get(RECEIPTS)
        message = None if stream is None else stream.last_by_subject(receipt_subject(partition))
        receipt = None if message is None else decode_receipt(message.data)
        return receipt if receipt is not None and receipt.store else None

    def _standing(self) -> dict[int, bool]:
        """Partition → whether it has receipts, for those that do not get on."""
        receipts = {partition: self.receipt(partition) for partition in range(self.settings.partitions)}
        behind = self.behind()
        return {p: receipt is not None for p, receipt in receipts.items() if receipt is None or p in behind}

    def make_receipts_again(self) -> None:
        """What `fictl cluster apply` does with a `FI_RECEIPTS` that is gone."""
        if RECEIPTS not in self.broker.streams:
            config = next(config for config in streams(self.settings, CLUSTER) if config.name == RECEIPTS)
            lost = {META_RECEIPTS_LOST: format_rfc3339(self.broker.now_ns())}
            self.broker.create(Stream(config.evolve(metadata={**(config.metadata or {}), **lost})))

    def _delete_receipts(self) -> None:
        if RECEIPTS in self.broker.streams:
            self.broker.delete(RECEIPTS)
        self.make_receipts_again()

    def roll_back(self, backup: Stream) -> bool:
        """Puts `FI_EVENTS` back to `backup`; False when that cannot be now.

        What it has lost then must be committed: no stage could bring back the rest. And somebody must be further than
        it is: that gives sequences a second time, which is what is looked at here. Where receipts or a store are lost
        too, only `FI_EVENTS` as it was could tell that nothing is missing.
        """
        if self.is_copied or (self.people.needed and not self.rolled_back):
            return False
        stream = self.broker.streams.get(EVENTS)
        reached = [receipt.origin for p in range(self.settings.partitions) if (receipt := self.receipt(p))]
        if stream is None or self.behind() or max(reached, default=0) <= backup.last_seq:
            return False
        self.broker.delete(EVENTS)
        self.unreadable.clear()
        self.broker.create(backup)
        self.broker.say(f"{EVENTS} is rolled back from {stream.last_seq} to {backup.last_seq}")
        self.rolled_back = self.is_rolled_back = self.people.needed = True
        return True

    @property
    def must_not_lose(self) -> bool:
        """Receipts or a store that were lost now would take with them what alone tells that nothing is missing."""
        return self.rolled_back or self.is_copied

    def _counts_anew(self) -> bool:
        return self.is_rolled_back and any(process.refused for process in self.processes if process.stage == "ingest")

    async def _make_events_again(self) -> None:
        """As the runbook has it: gateways stop, the stream is deleted and applied, and all is sent again in order."""
        self.sending.cancel()
        await asyncio.wait((self.sending,))
        for number in range(len(self.sites)):
            self.restart_gateway(number)
        self.broker.delete(EVENTS)
        self.unreadable.clear()
        # What was on its way for longer than that is not in anybody's order any more.
        await asyncio.sleep(REMADE_S)
        config = next(config for config in streams(self.settings, CLUSTER) if config.name == EVENTS)
        made = Stream(config)
        made.count_from(self._origin_next())
        self.broker.create(made)
        self.broker.say(f"{EVENTS} is made again, and counts from {made.last_seq + 1}")
        self.is_rolled_back = False
        self.send(self._over_s)

    def _origin_next(self) -> int:
        """See `cluster.apply`."""
        origins = [receipt.origin for p in range(self.settings.partitions) if (receipt := self.receipt(p))]
        for name, view in self.broker.streams.items():
            if name in HOPS:
                origins += [decode_frame_head(message.data).last for message in view.last_of_each([">"])]
            elif name == DLQ:
                origins += [place_of(_stored(message))[0] for message in view.last_of_each([">"])]
        return max(origins, default=0) + 1

    @property
    def is_busy(self) -> bool:
        """Something is still to be sent, committed, or done by people."""
        return not self.sending.done() or self.people.receipts_are_old or bool(self.behind())

    @property
    def told_s(self) -> float:
        """How long nothing must happen until all is over: ingest may still have to say that the stream counts anew."""
        return TOLD_S if self.is_rolled_back else 0.0

    def disk_of(self, receipt: Receipt) -> MemoryDisk:
        """The disk of the store that owns the receipt's partition; of two, one that has got as far as it says."""
        disks = [disk for disk in self.disks if disk.store.store_id == receipt.store]
        return next((disk for disk in disks if disk.reaches(receipt)), disks[0])

    def _tell_copies_apart(self) -> None:
        """Who finds out that two disks are one store has each work on what only it has the last commits of."""
        for process in self.processes:
            process.kill()
        parts: dict[MemoryDisk, list[int]] = {}
        for partition in range(self.settings.partitions):
            receipt = self.receipt(partition)
            parts.setdefault(self.disks[0] if receipt is None else self.disk_of(receipt), []).append(partition)
        for process in self.processes:
            if process.stage == "persist":
                process.pinned = tuple(parts.get(process.disk, ()))

    def behind(self) -> dict[int, tuple[int, int]]:
        """Partition → (origin committed, origin stored), where they differ or readers are not shown all of it yet."""
        found = {}
        stream = self.broker.streams.get(EVENTS)
        if stream is None:
            return dict.fromkeys(range(self.settings.partitions), (0, 0))
        for partition in range(self.settings.partitions):
            last = stream.last_by_subject(raw_filter(partition))
            receipt = self.receipt(partition)
            reached = 0 if receipt is None else receipt.origin
            # After a power cut readers may be shown less, until persist is up again.
            shown = receipt is None or len(self.disk_of(receipt).records(partition)) == receipt.persisted
            if last is not None and (reached < last.seq or not shown):
                found[partition] = (reached, last.seq)
        return found


def _stored(message: Message) -> StoredMessage:
    return StoredMessage(message.subject, message.seq, message.time_ns, message.data, message.headers)


def make_settings(rng: random.Random) -> Settings:
    """Small batches, short shards and frequent trims, so that little traffic passes through many edges."""
    return Settings(
        partitions=rng.randint(1, 3),
        frame_events_max=rng.choice((1, 2, 512)),
        pull_batch=rng.choice((2, 8)),
        pull_batch_hop=rng.choice((2, 4)),
        pull_expires_s=5.0,
        probe_s=1.0,
        trim_s=rng.choice((0.2, 1.0)),
        shard_events_max=rng.choice((3, 10, 1000)),
        shard_age_s_max=rng.choice((5.0, 3600.0)),
        sealed_kept=rng.choice((0, 1)),
        receipts_kept=rng.choice((1, 4, 1024)),
        hop_bytes_max=MIB,
        dead_share_max=1.0,
        member_ttl_s=5,
        member_renew_s=2.0,
        frame_deflate_bytes_min=1,
    )
