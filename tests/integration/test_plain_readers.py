"""Any HDF5 program may open shards while persist writes them, and sees only what is committed, whole and in order."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from benchmarks.storage.lane import Lane
from benchmarks.storage.plain import Writer, WrongReadError, open_many, read_shard
from benchmarks.storage.samples import DATA_SET, Samples
from contracts.settings import Settings
from stages.persist.live import LiveReader
from stages.persist.names import list_shards

OPENS = 1000
SHARD_BYTES = 2 << 20


@pytest.fixture(scope="module")
def samples() -> Samples:
    return Samples(DATA_SET if DATA_SET.exists() else None)


@pytest.mark.slow
def test_plain_h5py_reads_only_whole_commits_at_every_moment(tmp_path: Path, samples: Samples) -> None:
    with Writer(tmp_path / "store", SHARD_BYTES, DATA_SET if DATA_SET.exists() else None) as writer:
        writer.wait_until(1)
        before = writer.committed()
        tally = open_many(writer, samples, OPENS)
        written = writer.finish()
    assert tally.wrong == []
    assert (tally.correct, tally.tries) == (OPENS, OPENS)
    assert tally.live > 0
    assert tally.sealed > 0
    assert tally.shards >= 2
    assert written["origin"] > before
    shown = [read_shard(shard.path) for shard in list_shards(tmp_path / "store")[0]]
    assert shown[-1].last_origin == written["origin"] == sum(shard.events for shard in shown)


@pytest.mark.parametrize("place", ["frames", "index", "watermark"])
def test_a_wrong_read_is_found(tmp_path: Path, samples: Samples, place: str) -> None:
    with Lane(tmp_path / "store", samples, Settings(shard_bytes=SHARD_BYTES)) as lane:
        lane.run(20, 5)
        path = list_shards(tmp_path / "store")[0][0].path
    assert read_shard(path, samples).events == 100
    with LiveReader(path) as live:
        area = getattr(live.header, place)
    with path.open("r+b") as file:
        file.seek(area.offset)
        file.write(struct.pack("<q", 21) if place == "watermark" else b"\xff")
    with pytest.raises(WrongReadError):
        read_shard(path, samples)
