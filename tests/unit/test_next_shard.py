"""The next live shard is made ready once, when the live one is half full, and not looked after at every commit."""

from __future__ import annotations

from pathlib import Path

from benchmarks.storage.lane import Lane
from benchmarks.storage.samples import Samples
from contracts.settings import Settings
from stages.persist.names import list_leftovers, next_name
from stages.persist.partition import PREPARE_AT

PARTITION = 0
SHARD_BYTES = 256 * 1024


def test_the_next_shard_is_wanted_once_for_each(tmp_path: Path) -> None:
    wanted_at: dict[int, list[int]] = {}
    with Lane(tmp_path / "store", Samples(None), Settings(shard_bytes=SHARD_BYTES)) as lane:
        while (shard := lane.files.end.shard) < 4:
            lane.commit(lane.next_message(20))
            if lane.files.wants_next():
                wanted_at.setdefault(lane.files.end.shard, []).append(lane.files._live.end_bytes)
                lane.files.prepare_next()
                ready = lane.store.directory / next_name(PARTITION, lane.files.end.shard + 1)
                assert list_leftovers(lane.store.directory, PARTITION) == [ready]
        assert shard == 4
    assert {shard: len(at) for shard, at in wanted_at.items()} == {1: 1, 2: 1, 3: 1}
    assert all(at >= PREPARE_AT * SHARD_BYTES for [at] in wanted_at.values())
