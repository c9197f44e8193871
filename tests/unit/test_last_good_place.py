"""How far a damaged store can be trusted, and what becomes of the files after that."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from msgspec import UNSET
from shard_maker import NOW_NS, make_event, new_store
from witnessed import PLAN, Witnessed, events_of, take_over

from cluster.testing.disk import flip
from contracts.events import encode_event
from contracts.hashing import MerkleFrontier
from contracts.lifecycle import ClosedConsultations
from contracts.receipts import Receipt, SealRecord, StoreEnd
from contracts.settings import MIB, Settings
from stages.persist import seal
from stages.persist.aside import ASIDE, given_up, prepare_aside, set_aside
from stages.persist.audit import in_force
from stages.persist.core import Group
from stages.persist.header import HEADER_BYTES, read_live_header
from stages.persist.live import LiveShard
from stages.persist.names import list_shards, live_name
from stages.persist.partition import PartitionFiles
from stages.persist.rewind import Place, last_good_place, place_after_seals
from stages.persist.rows import ROW_BYTES
from stages.persist.seal import SealedInfo
from stages.persist.store import EventStore
from stages.persist.storedir import Store
from stages.persist.verify import verify_store

PARTITION = 3
SETTINGS = Settings(shard_bytes=MIB)
EVENTS = [sum(shard) for shard in PLAN]


@pytest.fixture
def maker(tmp_path: Path) -> Witnessed:
    """Shards 1 and 2 are sealed, 3 is live with three commits."""
    maker = Witnessed(tmp_path / "store")
    maker.fill(*events_of(maker))
    return maker


def path_of(maker: Witnessed, shard: int) -> Path:
    return next(file.path for file in list_shards(maker.store.directory)[PARTITION] if file.shard == shard)


def place_of(maker: Witnessed) -> tuple[Place, str]:
    place, damage = last_good_place(maker.store, PARTITION, maker.receipts, maker.seals)
    return place, "" if damage is None else damage.why


def test_a_whole_store_is_good_to_its_end(maker: Witnessed) -> None:
    place, why = place_of(maker)
    assert why == ""
    assert (place.origin, place.shard, place.commits) == (maker.origin, 3, 3)
    assert place.tree.root().hex() == maker.receipts[-1].root


def damage_row(maker: Witnessed) -> None:
    path = path_of(maker, 3)
    flip(path, read_live_header(path).index.offset + 2 * ROW_BYTES + 8)


def damage_structure(maker: Witnessed) -> None:
    flip(path_of(maker, 3), HEADER_BYTES + 40)


def delete_live(maker: Witnessed) -> None:
    path_of(maker, 3).unlink()


def damage_sealed(maker: Witnessed) -> None:
    path = path_of(maker, 2)
    flip(path, path.stat().st_size - 100)


def delete_sealed(maker: Witnessed) -> None:
    path_of(maker, 1).unlink()


@pytest.mark.parametrize(
    ("harm", "shard", "commits", "events"),
    [
        (damage_row, 3, 2, EVENTS[0] + EVENTS[1] + PLAN[2][0] + PLAN[2][1]),
        (damage_structure, 3, 0, EVENTS[0] + EVENTS[1]),
        (delete_live, 3, 0, EVENTS[0] + EVENTS[1]),
        (damage_sealed, 2, 0, EVENTS[0]),
        (delete_sealed, 1, 0, 0),
    ],
)
def test_a_damaged_store_is_good_to_the_last_place_that_a_record_vouches_for(
    maker: Witnessed, harm: Callable[[Witnessed], None], shard: int, commits: int, events: int
) -> None:
    harm(maker)
    place, why = place_of(maker)
    assert (place.shard, place.commits, place.tree.size) == (shard, commits, events)
    assert why != ""
    receipt = next((one for one in maker.receipts if one.origin == place.origin), None)
    assert (place.duplicates, place.tree.root()) == (
        (receipt.duplicates, bytes.fromhex(receipt.root)) if receipt else (0, MerkleFrontier().root())
    )


def test_a_commit_that_was_replaced_with_care_is_not_trusted(maker: Witnessed) -> None:
    other_root = msgspec.structs.replace(maker.receipts[-1], root="00" * 32)
    place, damage = last_good_place(maker.store, PARTITION, [*maker.receipts[:-1], other_root], maker.seals)
    assert damage is not None
    assert "are not those that were committed" in damage.why
    assert place.origin == maker.receipts[-2].origin


def test_a_sealed_shard_that_is_not_the_recorded_one_ends_what_is_good_though_it_is_whole(maker: Witnessed) -> None:
    """Its receipts may be gone long since: the cluster keeps the last of them, and every seal record."""
    other = msgspec.structs.replace(maker.seals[1], sha256="11" * 32)
    place, damage = last_good_place(maker.store, PARTITION, maker.receipts[-1:], [maker.seals[0], other])
    assert damage is not None
    assert damage.file == path_of(maker, 2)
    assert (place.shard, place.commits, place.origin) == (2, 0, maker.seals[0].last_origin)


def test_of_a_shard_without_a_receipt_in_it_all_is_given_up_and_the_records_tell_the_totals(maker: Witnessed) -> None:
    damage_row(maker)
    place, damage = last_good_place(maker.store, PARTITION, maker.receipts[-1:], maker.seals)
    assert damage is not None
    assert (place.shard, place.commits, place.tree.size) == (3, 0, EVENTS[0] + EVENTS[1])
    # One in each commit.
    assert (place.origin, place.duplicates) == (maker.seals[1].last_origin, len(PLAN[0]) + len(PLAN[1]))


def rewound(maker: Witnessed, place: Place, store: Store, first: int = 1) -> Receipt:
    """The takeover with which `store` goes back to `place`."""
    end = StoreEnd(shard=place.shard, commits=place.commits, first=first)
    return msgspec.structs.replace(
        maker.receipts[-1],
        ends={**maker.receipts[-1].ends, store.store_id: end},
        origin=place.origin,
        persisted=place.tree.size,
        root=place.tree.root().hex(),
        takeover=True,
    )


def take_back(store: Store, end: StoreEnd, now_ns: int = NOW_NS) -> list[Path]:
    """What `fictl rebuild` does with the files of a damaged partition."""
    files = given_up(store, PARTITION, end, unseen=True)
    prepare_aside(store, files, end)
    return set_aside(store, files, end, now_ns)


@pytest.mark.parametrize("harm", [damage_row, damage_structure, delete_live, damage_sealed, delete_sealed])
def test_what_is_given_up_is_moved_aside_and_the_rest_opens(
    maker: Witnessed, harm: Callable[[Witnessed], None]
) -> None:
    harm(maker)
    before = {path.name for path in maker.store.directory.glob("*.h5")}
    place, _ = place_of(maker)
    receipt = rewound(maker, place, maker.store)
    end = receipt.ends[maker.store.store_id]
    moved = take_back(maker.store, end)
    assert given_up(maker.store, PARTITION, end, unseen=True) == []
    kept = {path.name for path in maker.store.directory.glob("*.h5")}
    assert {path.name.removesuffix(f".{NOW_NS}") for path in moved} | kept == before
    assert all(path.exists() and path.parent.name == ASIDE for path in moved)
    files = PartitionFiles.open(maker.store, PARTITION, receipt, Settings(shard_bytes=MIB), lambda: NOW_NS)
    assert files.frontier.root() == place.tree.root()
    files.close()
    assert verify_store(maker.store.directory).ok


def test_a_damaged_sealed_form_beside_its_live_one_takes_nothing_from_what_is_good(maker: Witnessed) -> None:
    info = seal.seal(path_of(maker, 3), commits=3, frontier=maker.frontier, sealed_ns=NOW_NS)
    flip(info.path, info.bytes - 100)
    place, why = place_of(maker)
    assert (why, place.shard, place.commits) == ("", 3, 3)


def test_a_place_tells_when_its_last_message_was_stored_as_its_record_or_receipt_does(maker: Witnessed) -> None:
    *seals, last = maker.seals
    assert last.resume is not UNSET
    told = msgspec.structs.replace(last, resume=msgspec.structs.replace(last.resume, stored_ns=8))
    assert place_after_seals(maker.receipts[-1], [*seals, told]).stored_ns == 8
    receipt = msgspec.structs.replace(maker.receipts[-1], origin=last.last_origin, stored_ns=9)
    assert place_after_seals(receipt, [*seals, told]).stored_ns == 9
    assert place_after_seals(msgspec.structs.replace(receipt, stored_ns=UNSET), [*seals, told]).stored_ns == 0


def test_another_store_begins_where_the_records_end(maker: Witnessed, tmp_path: Path) -> None:
    place = place_after_seals(maker.receipts[-1], maker.seals)
    assert (place.shard, place.tree.size) == (3, EVENTS[0] + EVENTS[1])
    heir = Witnessed(tmp_path / "heir")
    settings = Settings(shard_bytes=MIB)
    receipt = rewound(maker, place, heir.store, first=place.shard)
    take_over(heir.store, PARTITION, place, settings)
    before = {2: (maker.seals[1].tree_size, maker.seals[1].root)}
    for _ in range(2):
        files = PartitionFiles.open(heir.store, PARTITION, receipt, settings, lambda: NOW_NS)
        assert files.frontier.size == place.tree.size
        assert files.end == receipt.ends[heir.store.store_id]
        assert files.trees == before, "by which it knows the record of the shard before its own as in force"
        files.close()
    with LiveShard(heir.store.directory / "p003-00000003.live.h5") as live:
        assert live.header.begins
    report = verify_store(heir.store.directory)
    assert report.ok, report.problems
    with EventStore(heir.store.directory) as store:
        assert store.ends()[0].root == place.tree.root().hex()


def test_the_shard_that_another_store_begins_with_says_so_when_it_is_sealed_too(
    maker: Witnessed, tmp_path: Path
) -> None:
    place = place_after_seals(maker.receipts[-1], maker.seals)
    heir = new_store(tmp_path / "heir")
    receipt = rewound(maker, place, heir, first=place.shard)
    take_over(heir, PARTITION, place, SETTINGS)
    for _ in range(2):
        with closing(PartitionFiles.open(heir, PARTITION, receipt, SETTINGS, lambda: NOW_NS)) as files:
            if not files.sealed:
                origin = place.origin + 1
                event = make_event(maker.rng, origin)
                files.commit(Group(place.origin, origin, [encode_event(event)], [event.event_id], 0, 0, (), b""))
                files.roll()
                (job,) = files.to_seal
                files.finish_seal(job, files.seal(job))
                receipt = msgspec.structs.replace(
                    receipt, ends={heir.store_id: files.end}, origin=origin, persisted=files.frontier.size,
                    root=files.frontier.root().hex(),
                )  # fmt: skip
    assert list(files.sealed) == [place.shard]


def test_another_store_whose_first_shard_is_gone_is_good_to_where_it_began(maker: Witnessed, tmp_path: Path) -> None:
    """Though nothing was committed to it yet: without it nobody can go on there."""
    place = place_after_seals(maker.receipts[-1], maker.seals)
    heir = new_store(tmp_path / "heir")
    receipt = rewound(maker, place, heir, first=place.shard)
    found, damage = last_good_place(heir, PARTITION, [receipt], maker.seals)
    assert damage is not None
    assert (damage.shard, found.shard, found.commits, found.origin) == (3, 3, 0, place.origin)


def test_a_store_that_has_the_partition_again_still_knows_the_ids_of_its_former_time(maker: Witnessed) -> None:
    place = place_after_seals(maker.receipts[-1], maker.seals)
    receipt = rewound(maker, place, maker.store, first=place.shard)
    settings = Settings(shard_bytes=MIB)
    take_back(maker.store, StoreEnd(shard=place.shard, commits=0))
    take_over(maker.store, PARTITION, place, settings)
    with EventStore(maker.store.directory) as store:
        former = [stored.event.event_id for stored in store.iterate()]
    assert len(former) == EVENTS[0] + EVENTS[1]
    files = PartitionFiles.open(maker.store, PARTITION, receipt, settings, lambda: NOW_NS)
    assert files.seen.seen([*former, bytes(16)]) == [True] * len(former) + [False]
    files.close()


def test_what_is_settled_leaves_out_the_newest_sealed_shards_that_the_stream_keeps(maker: Witnessed) -> None:
    settings = Settings(shard_bytes=MIB)
    files = PartitionFiles.open(maker.store, PARTITION, maker.receipts[-1], settings, lambda: NOW_NS)
    first, second = (seal.last_origin for seal in maker.seals)
    assert [files.settled_origin(kept, None) for kept in range(4)] == [second, first, 0, 0]
    assert [files.settled_origin(0, copied) for copied in range(4)] == [0, first, second, second]
    assert files.settled_origin(1, 2) == first
    files.close()


def test_records_of_what_was_given_up_are_void(maker: Witnessed) -> None:
    first = next(at for at, receipt in enumerate(maker.receipts) if receipt.origin == maker.seals[0].last_origin)
    place = Place(maker.receipts[first].origin, 2, 0, MerkleFrontier(), 0, 0, b"")
    back = msgspec.structs.replace(maker.receipts[-1], origin=place.origin, takeover=True)
    again = msgspec.structs.replace(maker.seals[1], sha256="11" * 32)
    records: list[Receipt | SealRecord] = [*maker.receipts, *maker.seals]
    assert in_force(records) == (maker.receipts, maker.seals, [])
    receipts, seals, rewinds = in_force([*records, back, again])
    assert receipts == [*maker.receipts[: first + 1], back]
    assert seals == [maker.seals[0], again]
    assert rewinds == [back]


def test_the_memory_of_commits_follows_from_the_stored_events(tmp_path: Path) -> None:
    maker = Witnessed(tmp_path / "store")
    commits, origins = events_of(maker)
    commits[1][0] = msgspec.structs.replace(commits[1][0], event_type="CONSULTATION_COMMITTED")
    commits[3][-1] = msgspec.structs.replace(commits[3][-1], event_type="CONSULTATION_COMMITTED")
    maker.fill(commits, origins)
    closed = ClosedConsultations(b"", 64)
    last = maker.seals[-1]
    with EventStore(maker.store.directory) as store:
        for stored in store.iterate():
            if stored.event.origin <= last.last_origin:
                closed.note(stored.event)
    assert last.resume is not msgspec.UNSET
    assert last.resume.closed == closed.packed != b""


@pytest.fixture
def unreadable_sealed_form(maker: Witnessed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of shard 3, beside its live form."""
    info = seal.seal(path_of(maker, 3), commits=3, frontier=maker.frontier, sealed_ns=NOW_NS)
    inode, real = info.path.stat().st_ino, seal.sealed_info

    def sealed_info(path: Path) -> SealedInfo:
        if path.stat().st_ino == inode:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(seal, "sealed_info", sealed_info)
    # No other file shall have its inode.
    os.link(info.path, tmp_path / "held")
    return info.path


def test_a_sealed_form_on_a_bad_sector_gives_way_to_the_live_one_and_is_sealed_again(
    maker: Witnessed, unreadable_sealed_form: Path
) -> None:
    settings = Settings(shard_bytes=MIB)
    with closing(PartitionFiles.open(maker.store, PARTITION, maker.receipts[-1], settings, lambda: NOW_NS)) as files:
        (job,) = files.to_seal
        files.finish_seal(job, files.seal(job))
    assert seal.sealed_info(unreadable_sealed_form).header.commits == 3


def test_sealing_writes_again_what_lies_on_a_bad_sector(maker: Witnessed, unreadable_sealed_form: Path) -> None:
    info = seal.seal(
        unreadable_sealed_form.with_name(live_name(PARTITION, 3)), commits=3, frontier=maker.frontier, sealed_ns=NOW_NS
    )
    assert info.path == unreadable_sealed_form
    assert seal.sealed_info(info.path).header.commits == 3
