"""When a live shard has to end: by its age, by what `FI_EVENTS` keeps for it, and by a flush."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from shard_maker import NOW_NS, make_event, new_store

from contracts.events import encode_event
from contracts.receipts import first_receipt
from contracts.settings import MIB, Settings
from stages.persist.core import Group
from stages.persist.header import read_live_header
from stages.persist.names import live_name
from stages.persist.newlive import create_shard
from stages.persist.partition import PartitionFiles
from stages.persist.storedir import Store

PARTITION = 3
SETTINGS = Settings(partitions=4, shard_bytes=MIB, shard_age_s_max=3600.0, sealed_kept=1, events_bytes_max=12 * MIB)
AGE_NS = 3600 * 10**9
SHARE_BYTES = MIB
"""Of `FI_EVENTS`, for what is in a shard that is not sealed: of one partition in four, beside two sealed ones."""


class Owner:
    """The partition's files, at a time that the test sets."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.now_ns = NOW_NS
        self.origin = 0
        self._rng = random.Random(5)
        self.files = self._open()

    def _open(self) -> PartitionFiles:
        receipt = first_receipt(PARTITION, self.store.cluster_id, self.store.store_id, "w")
        if self.origin:
            tree, ends = self.files.frontier, {self.store.store_id: self.files.end}
            told = {"ends": ends, "origin": self.origin, "persisted": tree.size, "root": tree.root().hex()}
            receipt = msgspec.structs.replace(receipt, **told)
        return PartitionFiles.open(self.store, PARTITION, receipt, SETTINGS, lambda: self.now_ns)

    def reopen(self) -> None:
        self.files.close()
        self.files = self._open()

    def group(self, events: int, dropped_bytes: int = 0) -> Group:
        made = [make_event(self._rng, self.origin + 1) for _ in range(events)]
        records, ids = [encode_event(event) for event in made], [event.event_id for event in made]
        return Group(self.origin, self.origin + 1, records, ids, 0, 0, (1, 1, 1), b"", dropped_bytes)

    def commit(self, events: int = 1, dropped_bytes: int = 0) -> None:
        self.files.commit(self.group(events, dropped_bytes))
        self.files.accepted()
        self.origin += 1


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    owner = Owner(new_store(tmp_path))
    yield owner
    owner.files.close()


def test_a_shard_is_old_so_long_after_its_first_commit_however_many_follow(owner: Owner) -> None:
    """Or one that events never cease to come to would hold back `FI_EVENTS` until it is full."""
    for _ in range(2):
        begun_ns = owner.now_ns
        for share in (0.0, 0.5, 0.9):
            owner.now_ns = begun_ns + int(share * AGE_NS)
            owner.commit()
            assert not owner.files.is_old()
        owner.now_ns = begun_ns + AGE_NS
        assert owner.files.is_old()
        owner.files.roll()
        assert not owner.files.is_old(), "the next one begins anew"
        owner.now_ns += AGE_NS
        assert not owner.files.is_old(), "nothing is in it yet"


def test_a_shard_ends_when_the_stream_keeps_its_share_of_what_came_with_it_repeats_too(owner: Owner) -> None:
    for _ in range(2):
        assert owner.files.fits(owner.group(1, SHARE_BYTES)), "nothing is gained by ending an empty one"
        owner.commit(1, SHARE_BYTES // 2)
        owner.commit(1, SHARE_BYTES // 4)
        assert owner.files.fits(owner.group(1, SHARE_BYTES // 8))
        assert not owner.files.fits(owner.group(1, SHARE_BYTES // 4))
        owner.files.roll()
    owner.commit()
    assert owner.files.fits(owner.group(1, SHARE_BYTES // 2)), "the repeats were of the shard before"


def test_the_next_shard_is_prepared_where_the_stream_ends_this_one_before_it_is_full(owner: Owner) -> None:
    """Or it is made when the commit waits for it: its room is written all through."""
    assert not owner.files.wants_next()
    owner.commit(1, SHARE_BYTES // 4)
    assert not owner.files.wants_next()
    owner.commit(1, SHARE_BYTES // 4)
    assert owner.files.wants_next()
    owner.files.prepare_next()
    assert not owner.files.wants_next()


def test_the_next_shard_is_prepared_before_this_one_ends_by_its_age_or_has_no_row_left(owner: Owner) -> None:
    owner.now_ns += AGE_NS
    assert not owner.files.wants_next(), "nothing is in this one yet"
    owner.commit()
    owner.now_ns += int(0.85 * AGE_NS)
    assert not owner.files.wants_next()
    owner.now_ns += int(0.1 * AGE_NS)
    assert owner.files.wants_next()
    owner.files.prepare_next()
    assert not owner.files.wants_next()
    owner.files.roll()
    rows_max = owner.files._live.rows_max
    for commits in range(1, rows_max // 2 + 1):
        assert not owner.files.wants_next()
        owner.commit()
        assert owner.files._live.commits == commits
    assert owner.files.wants_next()


@pytest.mark.parametrize(("partitions", "mib"), [(8, 64), (64, 4096 / 192), (1024, 16)])
def test_a_live_shard_takes_no_more_of_the_disk_than_it_can_come_to_hold(
    tmp_path: Path, partitions: int, mib: float
) -> None:
    path = tmp_path / live_name(PARTITION, 1)
    create_shard(path, new_store(tmp_path), PARTITION, 1, Settings(partitions=partitions), NOW_NS)
    assert read_live_header(path).frames.bytes == int(mib * MIB)


@pytest.mark.parametrize("reopened", [False, True])
def test_a_flush_is_done_when_no_event_up_to_its_target_is_in_the_live_shard(owner: Owner, reopened: bool) -> None:
    def is_flushed(target: int) -> bool:
        if reopened:
            owner.reopen()
        return owner.files.is_flushed(target)

    assert is_flushed(1)
    owner.commit()
    owner.commit()
    assert not is_flushed(1)
    assert not is_flushed(2)
    owner.files.roll()
    owner.commit(0)
    assert is_flushed(3), "no event is in it"
    owner.commit()
    assert is_flushed(2), "what is in it came later"
    assert not is_flushed(3)
    owner.commit(0)
    assert not is_flushed(3), "events are in it, whatever came last"
