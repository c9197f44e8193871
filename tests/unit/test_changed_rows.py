"""When a commit came and where it ended is under no root: the receipts tell of who changes it in a live shard."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import h5py
import msgspec
import pytest
from shard_maker import NOW_NS, make_event, new_store
from verifying import verify_here
from witnessed import SIGNER, Witnessed, events_of

from contracts.errors import ShardCorruptError, StoreFailedError
from contracts.events import encode_event
from contracts.receipts import Receipt, StoreEnd, decode_receipt, encode_receipt, first_receipt
from contracts.settings import MIB, Settings
from stages.persist.aside import given_up, prepare_aside, set_aside
from stages.persist.audit import Witnesses, audit_partition
from stages.persist.core import Group
from stages.persist.files import write_all_at
from stages.persist.header import HEADER_BYTES, decode_header, encode_header
from stages.persist.live import LiveReader, LiveShard
from stages.persist.lost import last_place
from stages.persist.names import list_shards
from stages.persist.partition import PartitionFiles
from stages.persist.rewind import last_good_place
from stages.persist.rows import ROW_BYTES, CommitRow, encode_row, pack_blob, row_crc32, split_blob
from stages.persist.seal import events_of_sealed
from stages.persist.storedir import Store
from stages.persist.verify import ShardContents

PARTITION = 3
SETTINGS = Settings(shard_bytes=MIB)
CHANGED = "the rows that say when each of its commits came and where it ended are not those that were committed"


class Owner:
    """A persister's files, and the receipts that it got."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.receipts = [first_receipt(PARTITION, store.cluster_id, store.store_id, "w")]
        self.rng = random.Random(5)
        self.files: PartitionFiles
        self.open()

    def open(self) -> None:
        self.files = PartitionFiles.open(self.store, PARTITION, self.receipts[-1], SETTINGS, lambda: NOW_NS)

    def commit(self, *, accepted: bool = True) -> None:
        """Of two events."""
        origin = self.receipts[-1].origin
        events = [make_event(self.rng, origin + 1), make_event(self.rng, origin + 2)]
        ids, records = [event.event_id for event in events], [encode_event(event) for event in events]
        self.files.commit(Group(origin, origin + 2, records, ids, 0, 0, (1, 1, 1), b""))
        if accepted:
            self.files.accepted()
            self.accept(self.files.end, origin + 2)

    def accept(self, end: StoreEnd, origin: int) -> None:
        size, root = self.files.frontier.size, self.files.frontier.root().hex()
        ends = {self.store.store_id: end}
        receipt = msgspec.structs.replace(self.receipts[-1], ends=ends, origin=origin, persisted=size, root=root)
        self.receipts.append(decode_receipt(encode_receipt(receipt)))

    def restart(self) -> None:
        self.files.close()
        self.open()

    def shard(self, number: int) -> Path:
        return next(file.path for file in list_shards(self.store.directory)[PARTITION] if file.shard == number)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    """With three commits of two events each in its first shard."""
    owner = Owner(new_store(tmp_path))
    for _ in range(3):
        owner.commit()
    yield owner
    owner.files.close()


def write_rows(path: Path, rows: Sequence[CommitRow], blobs: Sequence[bytes]) -> None:
    """Lays rows down anew, each with its blob's checksum."""
    with LiveReader(path) as reader:
        header = reader.header
    with path.open("r+b") as file:
        for number, (row, blob) in enumerate(zip(rows, blobs, strict=True)):
            row = row._replace(crc32=row_crc32(row, blob))
            write_all_at(file.fileno(), encode_row(row), header.index.offset + number * ROW_BYTES)


def change_time(path: Path) -> None:
    """The second commit came an hour earlier."""
    with LiveReader(path) as reader:
        rows, blobs = map(list, zip(*reader.blobs(), strict=True))
    rows[1] = rows[1]._replace(committed_ns=rows[1].committed_ns - 3600 * 10**9)
    write_rows(path, rows, blobs)


def change_boundary(path: Path) -> None:
    """The second commit ends an event, and its origin, sooner."""
    with LiveReader(path) as reader:
        rows, blobs = map(list, zip(*reader.blobs(), strict=True))
    first, second = split_blob(blobs[1])
    blobs[1], blobs[2] = pack_blob([first]), pack_blob([second]) + blobs[2]
    rows[1] = rows[1]._replace(origin=3, events=1, end_bytes=rows[1].end_bytes - len(pack_blob([second])))
    rows[2] = rows[2]._replace(prev_origin=3, events=3)
    write_rows(path, rows, blobs)


CHANGES = [change_time, change_boundary]


def found_damage(owner: Owner, receipts: Sequence[Receipt]) -> tuple[Path, int, int]:
    """Which file rebuild finds changed, and the shard and commits that it goes back to."""
    place, damage = last_good_place(owner.store, PARTITION, receipts, [])
    assert damage is not None
    return damage.file, place.shard, place.commits


@pytest.mark.parametrize("change", CHANGES)
def test_rows_that_were_changed_while_their_shard_was_live_are_not_sealed(
    owner: Owner, change: Callable[[Path], None]
) -> None:
    change(owner.shard(1))
    owner.files.roll()
    with pytest.raises(ShardCorruptError, match=CHANGED):
        owner.files.seal(owner.files.to_seal[0])
    assert [file.sealed for file in list_shards(owner.store.directory)[PARTITION]] == [False, False]


@pytest.mark.parametrize("change", CHANGES)
def test_rows_that_were_changed_while_nobody_had_the_shard_are_refused_and_go_back(
    owner: Owner, change: Callable[[Path], None]
) -> None:
    live = owner.shard(1)
    change(live)
    with pytest.raises(ShardCorruptError, match=CHANGED):
        owner.restart()
    place, damage = last_good_place(owner.store, PARTITION, owner.receipts[1:], [])
    assert damage is not None
    assert (damage.file, place.shard, place.commits, place.origin) == (live, 1, 1, 2)

    end = StoreEnd(shard=place.shard, commits=place.commits, rows=place.rows)
    aside = given_up(owner.store, PARTITION, end, unseen=True)
    prepare_aside(owner.store, aside, end)
    set_aside(owner.store, aside, end, NOW_NS)
    back = msgspec.structs.replace(
        owner.receipts[1], ends={owner.store.store_id: end}, persisted=place.tree.size, root=place.tree.root().hex()
    )
    assert end.rows == owner.receipts[1].end_of(owner.store.store_id).rows
    owner.receipts.append(back)
    owner.restart()
    owner.commit()
    owner.restart()
    change_time(live)
    with pytest.raises(ShardCorruptError, match=CHANGED):
        owner.restart()


def test_what_a_builds_receipt_from_before_does_not_tell_is_not_asked(owner: Owner) -> None:
    untold = StoreEnd(shard=1, commits=3)
    owner.accept(untold, 6)
    change_time(owner.shard(1))
    owner.restart()
    assert last_good_place(owner.store, PARTITION, owner.receipts[1:], [])[1] is None
    # From now on it does.
    owner.commit()
    assert set(owner.receipts[-1].end_of(owner.store.store_id).rows) == {1}
    owner.restart()
    change_time(owner.shard(1))
    with pytest.raises(ShardCorruptError, match=CHANGED):
        owner.restart()
    # No receipt tells of rows before the changed one: then all of the shard is made again.
    place, damage = last_good_place(owner.store, PARTITION, [owner.receipts[0], *owner.receipts[-2:]], [])
    assert damage is not None
    assert (place.shard, place.commits) == (1, 0)


def test_a_commit_that_no_receipt_accepted_is_cut_and_the_rows_before_it_are_those_told_of(owner: Owner) -> None:
    owner.commit(accepted=False)
    owner.restart()
    assert owner.files.cut_commits
    assert owner.files.end == owner.receipts[-1].end_of(owner.store.store_id)
    owner.commit()
    owner.restart()


def test_a_full_shard_is_told_of_until_it_is_sealed(owner: Owner) -> None:
    owner.files.roll()
    owner.commit()
    told = owner.receipts[-1].end_of(owner.store.store_id)
    assert set(told.rows) == {1, 2}
    owner.restart()
    (job,) = owner.files.to_seal
    assert {job.shard: job.rows} == {1: told.rows[1]}
    change_time(job.path)
    with pytest.raises(ShardCorruptError, match=CHANGED):
        owner.files.seal(job)
    with pytest.raises(ShardCorruptError, match=CHANGED):
        owner.restart()
    assert found_damage(owner, owner.receipts[1:]) == (job.path, 1, 1)
    # Also where only the last receipt is left.
    assert found_damage(owner, owner.receipts[-1:]) == (job.path, 1, 0)

    change_back = {1: 3600 * 10**9}
    with LiveReader(job.path) as reader:
        rows, blobs = map(list, zip(*reader.blobs(), strict=True))
    write_rows(
        job.path, [row._replace(committed_ns=row.committed_ns + change_back.get(at, 0)) for at, row in enumerate(rows)],
        blobs,
    )  # fmt: skip
    owner.open()
    (job,) = owner.files.to_seal
    owner.files.finish_seal(job, owner.files.seal(job))
    owner.commit()
    assert set(owner.receipts[-1].end_of(owner.store.store_id).rows) == {2}
    owner.restart()


def test_a_sealed_shard_whose_rows_were_changed_before_it_got_its_record_gets_none(owner: Owner) -> None:
    owner.files.roll()
    (job,) = owner.files.to_seal
    sealed = owner.files.seal(job).path
    with h5py.File(sealed, "r+") as file:
        file["commits"][1, -1] -= 3600 * 10**9
    data = sealed.read_bytes()
    header = decode_header(data[:HEADER_BYTES], sealed)
    digest = hashlib.sha256(data[HEADER_BYTES:]).hexdigest()
    with sealed.open("r+b") as file:
        file.write(encode_header(msgspec.structs.replace(header, body_sha256=digest, file_bytes=len(data))))
    assert events_of_sealed(sealed).header.root == owner.receipts[-1].root
    with pytest.raises(ShardCorruptError, match=CHANGED):
        owner.files.seal(job)
    with pytest.raises(ShardCorruptError, match=CHANGED):
        owner.restart()
    assert found_damage(owner, owner.receipts[1:]) == (sealed, 1, 0)


def test_what_the_stores_tell_of_lost_receipts_has_the_rows_too(owner: Owner) -> None:
    owner.files.roll()
    owner.commit()
    place, damage = last_place(list_shards(owner.store.directory)[PARTITION])
    assert damage is None
    assert place.rows == owner.receipts[-1].end_of(owner.store.store_id).rows


def test_what_is_wrong_with_a_commit_that_could_not_be_written_is_never_told(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(shard: LiveShard) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LiveShard, "sync", fail)
        with pytest.raises(StoreFailedError):
            owner.commit()
    owner.restart()
    assert owner.files.end == owner.receipts[-1].end_of(owner.store.store_id)


def audited(maker: Witnessed, receipts: Sequence[Receipt], newer: Sequence[Receipt] = ()) -> list[tuple[str, str]]:
    shards: list[ShardContents] = []
    assert verify_here(maker.store.directory, on_shard=shards.append).ok
    found = audit_partition(3, shards, Witnesses(receipts, newer, maker.seals), maker.store)
    return [(problem.where, problem.what) for problem in found.problems]


def test_an_auditor_is_told_which_commits_came_at_another_time(tmp_path: Path) -> None:
    maker = Witnessed(tmp_path / "store")
    maker.fill(*events_of(maker))
    assert audited(maker, maker.receipts) == []
    # What came after the shards were read says nothing of them.
    last = maker.receipts[-1]
    end = msgspec.structs.replace(last.end_of(maker.store.store_id), commits=4, rows={3: "ab" * 32})
    newer = SIGNER.sign(msgspec.structs.replace(last, ends={maker.store.store_id: end}, origin=last.origin + 1))
    assert audited(maker, maker.receipts, [newer]) == []
    # Nor does one of an earlier build.
    untold = msgspec.structs.replace(last.end_of(maker.store.store_id), rows={})
    older = SIGNER.sign(msgspec.structs.replace(last, ends={maker.store.store_id: untold}))
    assert audited(maker, [*maker.receipts[:-1], older]) == []
    live = list_shards(maker.store.directory)[3][-1].path
    change_time(live)
    where, why = f"{live.name}, commits 2 to 2", f"the receipt at origin {maker.receipts[-2].origin} has another digest"
    ((found, what),) = audited(maker, maker.receipts)
    assert (found, why in what) == (where, True)
    ((found, _),) = audited(maker, maker.receipts[-1:])
    assert found == f"{live.name}, commits 1 to 3"
