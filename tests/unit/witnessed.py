"""A partition's shards together with what the cluster would witness of them."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from shard_maker import CLUSTER, NOW_NS, PartitionMaker, make_event, new_store

from contracts.events import Event, encode_event
from contracts.hashing import MerkleFrontier, leaf_hash
from contracts.receipts import Receipt, SealRecord, StoreEnd
from contracts.settings import Settings
from contracts.statements import Signer
from stages.persist.records import keep_record, record_of
from stages.persist.resume import BEGINNING, resume_after
from stages.persist.rewind import Place, begin_at, prepare_begin
from stages.persist.storedir import Store

SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
PLAN = ((1, 7, 0, 20), (3, 1), (2, 5, 1))
"""Events in each commit of each shard; the last shard stays live."""


class Witnessed(PartitionMaker):
    """Fills a partition from a given list of events, and keeps what the cluster would."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        super().__init__(new_store(directory), 3)
        self.receipts: list[Receipt] = []
        self.seals: list[SealRecord] = []
        self.tree = MerkleFrontier()
        self.resume = BEGINNING

    def fill(self, commits: list[list[Event]], origins: list[int]) -> None:
        """Lays `commits` down, rolled and sealed as `PLAN` says."""
        shards, done = [len(plan) for plan in PLAN], 0
        for number, count in enumerate(shards, 1):
            live = self.begin()
            for events, origin in list(zip(commits, origins, strict=True))[done : done + count]:
                live.append(
                    [encode_event(event) for event in events],
                    prev_origin=self.origin, origin=origin, duplicates=1, dead_lettered=0, committed_ns=NOW_NS,
                )  # fmt: skip
                live.sync()
                live.set_watermark(live.commits)
                self.origin = origin
                for event in events:
                    self.tree.append(leaf_hash(encode_event(event)))
                self.receipts.append(
                    self.receipt(StoreEnd(shard=number, commits=live.commits, rows={number: live.rows.hexdigest()}))
                )
            done += count
            if number < len(shards):
                self.witness_seal(number)
        self.close()

    def receipt(self, end: StoreEnd) -> Receipt:
        return SIGNER.sign(
            Receipt(
                partition=3, cluster=CLUSTER, writer="w", node="n", store=self.store.store_id,
                ends={self.store.store_id: end}, origin=self.origin, trail=(), persisted=self.tree.size,
                duplicates=len(self.receipts) + 1, dead_lettered=0, root=self.tree.root().hex(), closed=b"",
                committed_ns=NOW_NS,
            )
        )  # fmt: skip

    def witness_seal(self, number: int) -> None:
        info = self.seal()
        self.resume = resume_after(self.resume, info.path)
        record = SIGNER.sign(record_of(info, self.resume))
        keep_record(info.path, record)
        self.seals.append(record)


def events_of(maker: PartitionMaker) -> tuple[list[list[Event]], list[int]]:
    commits, origins, origin = [], [], 0
    for count in (count for plan in PLAN for count in plan):
        commits.append([make_event(maker.rng, origin + at) for at in range(1, count + 1)])
        origin += count + 1
        origins.append(origin)
    return commits, origins


def take_over(store: Store, partition: int, place: Place, settings: Settings) -> None:
    """Gives the store the shard with which it takes the partition over."""
    prepare_begin(store, partition, place, settings, lambda: NOW_NS)
    begin_at(store, partition, place)
