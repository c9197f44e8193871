"""Makes small stores with believable events, for the tests of persist's files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from uuid import UUID

import msgspec

from contracts.events import Event, encode_event
from contracts.hashing import MerkleFrontier, audit_hash
from stages.persist.files import remove_file
from stages.persist.header import encode_header, read_sealed_header
from stages.persist.live import LiveShard
from stages.persist.names import live_name, sealed_name
from stages.persist.newlive import create_live
from stages.persist.seal import SealedInfo, seal
from stages.persist.storedir import Store, open_store

CLUSTER = "cluster-1"
NOW_NS = 1_700_000_000_000_000_000
SITES = ("hospital-norte", "clinic_7")
TYPES = ("MESSAGE_RECEIVED", "SOAP_SECTION_COMPLETED", "URGENCY_CLASSIFIED")


def make_event(rng: random.Random, origin: int, *, index: int = 0, consultation: bytes | None = None) -> Event:
    payload = {"message_content": "¿Cómo está? 你好 " + "x" * rng.randint(0, 300), "score": rng.random()}
    return Event(
        origin=origin,
        index=index,
        event_id=rng.randbytes(16),
        consultation_id=rng.randbytes(16) if consultation is None else consultation,
        site=rng.choice(SITES),
        event_type=rng.choice(TYPES),
        timestamp_ns=NOW_NS + origin * 1_000,
        stamped=True,
        payload=json.dumps(payload).encode(),
        metadata=b'{"user_id":"u","session_id":"s"}',
        accepted_ns=NOW_NS,
        group=0,
        criticality=0,
        policy_version=1,
        audit_hash=audit_hash(payload),
    )


class PartitionMaker:
    """Fills the shards of one partition the way persist does."""

    def __init__(self, store: Store, partition: int, seed: int = 1) -> None:
        self.store = store
        self.partition = partition
        self.rng = random.Random(f"{partition}/{seed}")
        self.consultations = [self.rng.randbytes(16) for _ in range(5)]
        self.events: list[Event] = []
        self.frontier = MerkleFrontier()
        self.number = 0
        self.origin = 0
        self.live: LiveShard | None = None

    def begin(self, capacity_bytes: int = 1 << 20, rows: int = 256) -> LiveShard:
        self.close()
        self.number += 1
        path = self.store.directory / live_name(self.partition, self.number)
        create_live(
            path,
            store=self.store,
            partition=self.partition,
            shard=self.number,
            capacity_bytes=capacity_bytes,
            rows=rows,
            created_ns=NOW_NS,
        )
        self.live = LiveShard(path)
        return self.live

    def commit(self, count: int, *, stride: int = 3) -> list[Event]:
        """Commits a group of `count` events and lets readers see it."""
        live = self.live
        assert live is not None
        events = []
        prev = self.origin
        for _ in range(count):
            self.origin += self.rng.randint(1, stride)
            events.append(make_event(self.rng, self.origin, consultation=self.rng.choice(self.consultations)))
        if not count:
            self.origin += 1
        live.append(
            [encode_event(event) for event in events],
            prev_origin=prev,
            origin=self.origin,
            duplicates=0,
            dead_lettered=0,
            committed_ns=NOW_NS,
        )
        live.sync()
        live.set_watermark(live.commits)
        self.events += events
        return events

    def seal(self) -> SealedInfo:
        """Seals the live shard and removes it."""
        live = self.live
        assert live is not None
        info = seal(live.path, commits=live.commits, frontier=self.frontier, sealed_ns=NOW_NS)
        self.frontier = info.frontier
        self.close()
        remove_file(live.path)
        return info

    def close(self) -> None:
        if self.live is not None:
            self.live.close()
            self.live = None


def new_store(directory: Path) -> Store:
    return open_store(directory, CLUSTER, now_ns=NOW_NS)


def filled_store(directory: Path) -> tuple[Store, PartitionMaker]:
    """One partition: three sealed shards and a live one."""
    store = new_store(directory)
    maker = PartitionMaker(store, 3)
    for _ in range(3):
        maker.begin()
        for count in (1, 7, 0, 20):
            maker.commit(count)
        maker.seal()
    maker.begin()
    for count in (2, 5):
        maker.commit(count)
    maker.close()
    return store, maker


def id_text(event: Event) -> str:
    return str(UUID(bytes=event.event_id))


def make_again(path: Path, **changed: int) -> Path:
    """The shard with other facts in its header, under the name that these give it."""
    header = msgspec.structs.replace(read_sealed_header(path), **changed)
    with path.open("r+b") as file:
        file.write(encode_header(header))
    return path.rename(
        path.with_name(sealed_name(header.partition, header.shard, header.first_origin, header.last_origin))
    )
