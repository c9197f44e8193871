"""What the files of a partition must be for their owner to go on: else it stops, and each file stays as it is."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
from shard_maker import NOW_NS, PartitionMaker, new_store
from witnessed import Witnessed, events_of, take_over

from contracts.errors import ShardCorruptError, ShardError
from contracts.hashing import MerkleFrontier
from contracts.receipts import Receipt, StoreEnd
from contracts.settings import MIB, Settings
from stages.persist.header import HEADER_BYTES, LiveHeader, SealedHeader, decode_header, encode_header
from stages.persist.live import LiveReader
from stages.persist.names import list_shards
from stages.persist.opening import check_shown
from stages.persist.partition import PartitionFiles
from stages.persist.rewind import place_after_seals
from stages.persist.storedir import Store

PARTITION = 3
SETTINGS = Settings(shard_bytes=MIB)


@pytest.fixture
def maker(tmp_path: Path) -> Witnessed:
    """Shards 1 and 2 are sealed, 3 is live with three commits."""
    maker = Witnessed(tmp_path / "store")
    maker.fill(*events_of(maker))
    return maker


@contextlib.contextmanager
def nothing_changes(store: Store) -> Iterator[None]:
    """What was there is there after it, to the last byte."""
    before = {path: sha256(path.read_bytes()).digest() for path in store.directory.glob("*.h5")}
    yield
    assert before.items() <= {path: sha256(path.read_bytes()).digest() for path in store.directory.glob("*.h5")}.items()


def open_files(store: Store, receipt: Receipt) -> PartitionFiles:
    return PartitionFiles.open(store, PARTITION, receipt, SETTINGS, lambda: NOW_NS)


def path_of(store: Store, shard: int) -> Path:
    return next(file.path for file in list_shards(store.directory)[PARTITION] if file.shard == shard)


def change_header(path: Path, **changed: object) -> None:
    with path.open("r+b") as file:
        header = decode_header(file.read(HEADER_BYTES), path)
        assert isinstance(header, LiveHeader | SealedHeader)
        file.seek(0)
        file.write(encode_header(msgspec.structs.replace(header, **changed)))


@pytest.mark.parametrize("form", ["sealed", "full", "live"])
@pytest.mark.parametrize(
    "other", [{"store": "ff" * 16}, {"cluster": "other"}, {"partition": 4}, {"shard": 9}], ids=lambda other: min(other)
)
def test_a_shard_that_is_not_what_its_name_and_place_say_is_not_gone_on_with(
    maker: Witnessed, form: str, other: dict[str, object]
) -> None:
    """Whatever events it has: a directory that was copied has the same ones as the other store."""
    receipt = maker.receipts[-1]
    if form == "full":
        with contextlib.closing(open_files(maker.store, receipt)) as files:
            files.roll()
            receipt = msgspec.structs.replace(receipt, ends={maker.store.store_id: files.end})
    path = path_of(maker.store, 2 if form == "sealed" else 3)
    change_header(path, **other)
    with nothing_changes(maker.store), pytest.raises(ShardError, match=f"{path}: is shard .*not what its name"):
        open_files(maker.store, receipt)


@pytest.mark.parametrize("commits", range(4))
def test_sealed_shards_of_which_the_receipts_do_not_know_are_never_given_up(maker: Witnessed, commits: int) -> None:
    """Receipts that were put back from a copy are older than the files, and agree with their beginning."""
    with nothing_changes(maker.store), pytest.raises(ShardCorruptError, match="sealed, but no receipt speaks of it"):
        open_files(maker.store, maker.receipts[commits])


@pytest.mark.parametrize("commits", [4, 5])
def test_live_commits_that_readers_were_shown_are_never_cut(tmp_path: Path, commits: int) -> None:
    """To the last place that there is in the shard."""
    maker = PartitionMaker(new_store(tmp_path), PARTITION)
    maker.begin(rows=5)
    for _ in range(commits):
        maker.commit(1)
    maker.close()
    with contextlib.closing(LiveReader(path_of(maker.store, 1))) as live:
        check_shown(live, commits)
        for accepted in range(commits):
            with pytest.raises(ShardCorruptError, match=f"were shown {commits} commits, but its last .* {accepted};"):
                check_shown(live, accepted)


@pytest.mark.parametrize("first", ["missing", "not the first"])
def test_a_store_whose_first_shard_does_not_say_what_was_before_it_stops(
    maker: Witnessed, tmp_path: Path, first: str
) -> None:
    place = place_after_seals(maker.receipts[-1], maker.seals)
    heir = new_store(tmp_path / "heir")
    end = StoreEnd(shard=place.shard, commits=0, first=place.shard)
    receipt = msgspec.structs.replace(
        maker.receipts[-1], ends={heir.store_id: end}, origin=place.origin, persisted=place.tree.size,
        root=place.tree.root().hex(), takeover=True,
    )  # fmt: skip
    words = f"{heir.directory}: shard 3 of partition 3, with which the store took it over, is missing"
    if first != "missing":
        take_over(heir, PARTITION, place, SETTINGS)
        open_files(heir, receipt).close()
        path = path_of(heir, 3)
        change_header(path, begins=False, tree_size_before=0, frontier_before=MerkleFrontier().to_bytes())
        words = f"{path}: is not the shard with which the store took the partition over"
    with pytest.raises(ShardCorruptError, match=re.escape(words)):
        open_files(heir, receipt)
