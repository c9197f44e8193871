"""What is given up goes aside: once the disk can take it, at whatever moment that is interrupted, and never deleted."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from shard_maker import NOW_NS, PartitionMaker, new_store
from witnessed import Witnessed, events_of

from cluster.testing.disk import flip
from contracts.errors import ShardCorruptError, StoreFailedError
from contracts.receipts import Receipt, StoreEnd, decode_receipt
from contracts.settings import MIB, Settings
from stages.persist import files, seal
from stages.persist.aside import ASIDE, given_up, prepare_aside, set_aside
from stages.persist.header import read_live_header
from stages.persist.live import LiveReader, LiveShard
from stages.persist.moved import let_go
from stages.persist.names import ShardFile, list_shards, live_name
from stages.persist.partition import PartitionFiles
from stages.persist.rewind import Damage, last_good_place
from stages.persist.rows import ROW_BYTES
from stages.persist.store import EventStore
from stages.persist.storedir import disk_of

PARTITION = 3
SETTINGS = Settings(shard_bytes=MIB)


class Roomy(Witnessed):
    """Has room for more than is read at once."""

    def begin(self, capacity_bytes: int = 4 * MIB, rows: int = 256) -> Any:
        return super().begin(capacity_bytes, rows)


@pytest.fixture
def maker(tmp_path: Path) -> Witnessed:
    """Shards 1 and 2 are sealed, 3 is live with three commits."""
    maker = Witnessed(tmp_path / "store")
    maker.fill(*events_of(maker))
    return maker


def live_of(maker: Witnessed) -> Path:
    return maker.store.directory / live_name(PARTITION, 3)


class Back(NamedTuple):
    """Where a rebuild goes back to.

    Attributes:
        receipts: those in force once its takeover is accepted.
        end: of the store.
        damage: why.
    """

    receipts: list[Receipt]
    end: StoreEnd
    damage: Damage | None


def look(maker: Witnessed, receipts: list[Receipt]) -> Back:
    """What a rebuild finds."""
    place, damage = last_good_place(maker.store, PARTITION, receipts, maker.seals)
    end = StoreEnd(shard=place.shard, commits=place.commits)
    before = [receipt for receipt in receipts if receipt.origin <= place.origin]
    takeover = msgspec.structs.replace(
        receipts[-1], ends={maker.store.store_id: end}, origin=place.origin, persisted=place.tree.size,
        root=place.tree.root().hex(), takeover=True,
    )  # fmt: skip
    return Back([*before, takeover], end, damage)


def found(maker: Witnessed, back: Back) -> list[ShardFile]:
    return given_up(maker.store, PARTITION, back.end, maker.seals, unseen=back.damage is not None)


def rebuild(maker: Witnessed, receipts: list[Receipt], now_ns: int = NOW_NS) -> Back:
    """A rebuild from its beginning to its end, which must find something to do."""
    back = look(maker, receipts)
    files = found(maker, back)
    assert files or back.damage
    prepare_aside(maker.store, files, back.end)
    set_aside(maker.store, files, back.end, now_ns)
    assert found(maker, look(maker, back.receipts)) == []
    return back


def opened(maker: Witnessed, back: Back) -> PartitionFiles:
    """As persist opens the partition then."""
    return PartitionFiles.open(maker.store, PARTITION, back.receipts[-1], SETTINGS, lambda: NOW_NS)


def damage_row(maker: Witnessed) -> list[Receipt]:
    """The third commit's row is not whole."""
    flip(live_of(maker), read_live_header(live_of(maker)).index.offset + 2 * ROW_BYTES + 8)
    return maker.receipts


def forge(maker: Witnessed) -> list[Receipt]:
    """The third commit is whole, and not what was committed."""
    return [*maker.receipts[:-1], msgspec.structs.replace(maker.receipts[-1], root="00" * 32)]


@pytest.fixture
def bad_sector(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Makes a page of a file unreadable, as the kernel has it: a read that reaches it is short, one in it fails."""
    real = os.pread

    def plant(path: Path, at: int) -> None:
        inode, start = path.stat().st_ino, at - at % 4096

        def pread(fd: int, length: int, offset: int) -> bytes:
            if os.fstat(fd).st_ino == inode:
                if start <= offset < start + 4096:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                if offset < start < offset + length:
                    length = start - offset
            return real(fd, length, offset)

        monkeypatch.setattr(os, "pread", pread)

    return plant


def test_a_live_shard_whose_structure_lies_on_a_bad_sector_is_damaged(
    maker: Witnessed, bad_sector: Callable[[Path, int], None]
) -> None:
    bad_sector(live_of(maker), 8192)
    back = look(maker, maker.receipts)
    assert back.damage is not None
    assert str(live_of(maker)) in back.damage.why
    assert (back.end.shard, back.end.commits) == (3, 0)
    opened(maker, rebuild(maker, maker.receipts)).close()


def test_a_shard_that_the_system_keeps_from_us_is_not_called_damaged(
    maker: Witnessed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "pread", refuse)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        look(maker, maker.receipts)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        given_up(maker.store, PARTITION, StoreEnd(shard=3, commits=0))


def test_a_bad_sector_among_the_commits_is_never_read_again_once_they_are_given_up(
    tmp_path: Path, bad_sector: Callable[[Path, int], None]
) -> None:
    maker = Roomy(tmp_path / "store")
    commits, origins = events_of(maker)
    large = b'{"x":"' + b"y" * 300_000 + b'"}'
    commits[-2] = [msgspec.structs.replace(event, metadata=large) for event in commits[-2]]
    maker.fill(commits, origins)
    with LiveReader(live_of(maker)) as live:
        bad_sector(live.path, live.header.frames.offset + live.read_rows(0, 1)[0].end_bytes + 1_200_000)
    back = look(maker, maker.receipts)
    assert back.damage is not None
    assert back.end.commits == 1
    # Interrupted once the receipt is accepted: the next one finds the same.
    prepare_aside(maker.store, found(maker, back), back.end)
    opened(maker, rebuild(maker, back.receipts)).close()
    with EventStore(maker.store.directory) as store:
        assert store.count() == back.receipts[-1].persisted


def test_a_bad_sector_in_the_unused_part_is_mended_and_every_commit_stays(
    maker: Witnessed, bad_sector: Callable[[Path, int], None]
) -> None:
    header = read_live_header(live_of(maker))
    bad_sector(live_of(maker), header.frames.offset + header.frames.bytes - 1)
    back = rebuild(maker, maker.receipts)
    assert back.damage is not None
    assert (back.end.commits, back.receipts[-1].origin) == (3, maker.origin)
    opened(maker, back).close()


def test_where_the_medium_fails_the_next_step_is_named(maker: Witnessed) -> None:
    for number, is_named in ((errno.EIO, True), (errno.ENOSPC, False)):
        with pytest.raises(StoreFailedError) as raised, disk_of(maker.store):
            raise OSError(number, os.strerror(number))
        assert ("on a bad sector, run `fictl rebuild`" in str(raised.value)) is is_named


@pytest.mark.parametrize("harm", [damage_row, forge])
def test_a_rebuild_interrupted_after_its_receipt_is_found_again_and_persist_cuts_nothing_meanwhile(
    maker: Witnessed, harm: Callable[[Witnessed], list[Receipt]]
) -> None:
    back = look(maker, harm(maker))
    assert back.damage is not None
    before = live_of(maker).read_bytes()
    prepare_aside(maker.store, found(maker, back), back.end)
    with pytest.raises(ShardCorruptError, match="run `fictl rebuild` if one was interrupted"):
        opened(maker, back)
    assert live_of(maker).read_bytes() == before
    again = look(maker, back.receipts)
    assert (again.damage, again.end) == (None, back.end)
    assert [file.path for file in found(maker, again)] == [live_of(maker)]
    opened(maker, rebuild(maker, back.receipts)).close()
    (moved,) = (maker.store.directory / ASIDE).iterdir()
    assert moved.read_bytes() == before


def test_an_unaccepted_tail_is_no_interrupted_rebuild(maker: Witnessed) -> None:
    """An owner that was killed leaves one. It goes aside only where nobody knows whether it was accepted."""
    with closing(LiveShard(live_of(maker))) as live:
        live.set_watermark(2)
    end = StoreEnd(shard=3, commits=2)
    assert given_up(maker.store, PARTITION, end) == []
    assert [file.shard for file in given_up(maker.store, PARTITION, end, unseen=True)] == [3]


def test_what_stays_of_a_live_shard_is_as_it_was_and_shown(maker: Witnessed) -> None:
    with LiveReader(live_of(maker)) as live:
        before, header = list(live.blobs(2)), live.header
    rebuild(maker, damage_row(maker))
    with closing(LiveShard(live_of(maker))) as live:
        assert list(live.blobs()) == before
        assert (live.watermark(), live.torn) == (2, False)
        # HDF5 notes when it made the file.
        assert msgspec.structs.replace(live.header, structure_crc32=header.structure_crc32) == header


class Interrupted:
    """Refuses every write, sync and change of a name from the `first`-th on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
        self._left = first
        self.happened = False
        owners: list[tuple[Any, str]] = [(files, "_fdatasync")]
        owners += [(os, name) for name in ("pwrite", "fsync", "rename", "link", "unlink", "mkdir")]
        for owner, name in owners:
            monkeypatch.setattr(owner, name, self._refusing(getattr(owner, name)))

    def _refusing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self._left <= 0:
                self.happened = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._left -= 1
            return real(*arguments, **named)

        return call


def copied(maker: Witnessed, directory: Path) -> Witnessed:
    """The same partition in files of its own."""
    shutil.copytree(maker.store.directory, directory)
    twin = copy(maker)
    twin.store = replace(maker.store, directory=directory)
    return twin


@pytest.mark.parametrize("links", [True, False])
def test_whenever_it_is_interrupted_the_same_can_be_done_again_and_nothing_is_deleted(
    maker: Witnessed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    filled = maker
    begun_too_much = PartitionMaker(filled.store, PARTITION)
    begun_too_much.number = 3
    begun_too_much.begin()
    begun_too_much.close()
    first, happened, refused_before = 0, True, 0
    while happened:
        maker = copied(filled, tmp_path / str(first))
        receipts = damage_row(maker)
        old = live_of(maker).read_bytes()
        back = look(maker, receipts)
        moving = found(maker, back)
        assert [file.shard for file in moving] == [3, 4]
        with monkeypatch.context() as patch:
            disk = Interrupted(patch, first)
            prepared = False
            try:
                prepare_aside(maker.store, moving, back.end)
                prepared = True
                set_aside(maker.store, moving, back.end, NOW_NS)
            except (OSError, StoreFailedError):
                assert disk.happened
            happened = disk.happened
        if not prepared:
            refused_before += 1
            assert live_of(maker).read_bytes() == old, "without a receipt nothing is changed"
            assert (maker.store.directory / live_name(PARTITION, 4)).exists()
        if not links and not live_of(maker).exists():
            # It counts as missing, and all of it is made again.
            back = look(maker, back.receipts)
            assert back.end.commits == 0
        elif happened:
            assert live_of(maker).exists()
            again = look(maker, back.receipts if prepared else receipts)
            if files_left := found(maker, again):
                prepare_aside(maker.store, files_left, again.end)
                set_aside(maker.store, files_left, again.end, NOW_NS + 1)
            assert again.end == back.end
        opened(maker, back).close()
        assert old in [path.read_bytes() for path in (maker.store.directory / ASIDE).iterdir()]
        first += 1
    assert refused_before > 8
    assert first > refused_before + 4


def test_what_cannot_be_moved_is_told_before_anything_is_given_up(maker: Witnessed) -> None:
    (maker.store.directory / ASIDE).write_bytes(b"")
    back = look(maker, damage_row(maker))
    before = live_of(maker).read_bytes()
    with pytest.raises(StoreFailedError, match=f"cannot be moved to .*{ASIDE}.* a directory on the same disk"):
        prepare_aside(maker.store, found(maker, back), back.end)
    assert live_of(maker).read_bytes() == before


class Heard:
    """Notes what a writer is given."""

    def __init__(self) -> None:
        self.receipts: list[Receipt] = []

    async def publish(self, payload: bytes, _: str) -> None:
        self.receipts.append(decode_receipt(payload))


async def test_an_old_owner_says_nothing_while_it_cannot_move_its_files_aside(maker: Witnessed) -> None:
    ends = {maker.store.store_id: StoreEnd(shard=3, commits=0), "another": StoreEnd(shard=3, commits=1, first=3)}
    last = msgspec.structs.replace(maker.receipts[-1], store="another", ends=ends)
    heard: Any = Heard()
    arguments = (maker.store, last, heard, "nonce", None, lambda: NOW_NS)
    obstacle = maker.store.directory / ASIDE
    obstacle.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(StoreFailedError, match="cannot be moved"):
            await let_go(*arguments)
    assert heard.receipts == []
    obstacle.unlink()
    for _ in range(2):
        await let_go(*arguments)
    assert [(receipt.writer, receipt.takeover) for receipt in heard.receipts] == [("nonce", True)]
    assert not live_of(maker).exists()


def test_both_forms_of_a_shard_go_aside(maker: Witnessed) -> None:
    """Its owner died between sealing and removing the live form."""
    seal.seal(live_of(maker), commits=3, frontier=maker.frontier, sealed_ns=NOW_NS)
    end = StoreEnd(shard=2, commits=2)
    moving = given_up(maker.store, PARTITION, end)
    assert [(file.shard, file.sealed) for file in moving] == [(3, True), (3, False)]
    prepare_aside(maker.store, moving, end)
    set_aside(maker.store, moving, end, NOW_NS)
    assert [file.shard for file in list_shards(maker.store.directory)[PARTITION]] == [1, 2]


def test_a_shard_that_another_store_has_sealed_is_not_this_ones(maker: Witnessed) -> None:
    """The partition went away after shard 1 and came back after shard 3: its own shards 2 and 3 are void."""
    theirs = [msgspec.structs.replace(maker.seals[1], shard=shard, store="another") for shard in (2, 3)]
    end = StoreEnd(shard=4, commits=0, first=4)
    moving = given_up(maker.store, PARTITION, end, [maker.seals[0], *theirs])
    assert [file.shard for file in moving] == [2, 3]
    assert given_up(maker.store, PARTITION, end, maker.seals) == []


def test_a_shard_of_which_nothing_was_accepted_is_not_deleted_where_it_cannot_be_read(maker: Witnessed) -> None:
    path = maker.store.directory / live_name(PARTITION, 4)
    path.write_bytes(b"what may have been a shard")
    opened(maker, look(maker, maker.receipts)).close()
    (moved,) = (maker.store.directory / ASIDE).iterdir()
    assert (path.exists(), moved.read_bytes()) == (False, b"what may have been a shard")


def test_a_reader_that_stays_open_finds_what_is_made_again_in_place_of_what_was_given_up(tmp_path: Path) -> None:
    maker = PartitionMaker(new_store(tmp_path / "store"), PARTITION)
    live = maker.begin()
    for _ in range(4):
        maker.commit(2)
    with EventStore(maker.store.directory) as reader:
        assert reader.event(maker.events[-1].event_id) is not None
        maker.close()
        end = StoreEnd(shard=1, commits=2)
        files = given_up(maker.store, PARTITION, end)
        prepare_aside(maker.store, files, end)
        set_aside(maker.store, files, end, NOW_NS)
        maker.live = LiveShard(live.path)
        maker.origin = maker.live.last_origin or 0
        # As many commits as before are shown, or more, when the reader looks next.
        again = [event for _ in range(4) for event in maker.commit(1)]
        maker.close()
        assert [reader.event(event.event_id) is not None for event in again] == [True] * 4
        assert reader.event(maker.events[7].event_id) is None, "it was given up"
