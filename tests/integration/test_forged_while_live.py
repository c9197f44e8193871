"""A live shard that somebody changes under its persister, checksums and all: nobody vouches for that."""

from __future__ import annotations

from pathlib import Path

import pytest
from lanes import going
from nats.aio.client import Client
from pipeline import until
from test_persist_lane import new_store, ready, stored

from cluster.rewind import Rewinder
from stages.persist.live import LiveReader
from stages.persist.names import FIRST_SHARD, live_name
from stages.persist.rows import encode_row, row_crc32

pytestmark = pytest.mark.cluster


def forge(path: Path) -> None:
    """Changes the last byte of the first event's record, its audit hash, and the row's checksum with it."""
    with LiveReader(path) as reader:
        (row,) = reader.read_rows(0, 1)
        blob, header = bytearray(reader.read_blobs(0, row.end_bytes)), reader.header
    blob[-1] ^= 1
    row = row._replace(crc32=row_crc32(row, bytes(blob)))
    with path.open("r+b") as file:
        for data, offset in ((bytes(blob), header.frames.offset), (encode_row(row), header.index.offset)):
            file.seek(offset)
            file.write(data)


async def test_what_was_forged_under_a_persister_gets_no_seal_record_and_is_made_again(
    client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")

    def is_stopped() -> bool:
        return any("was changed since" in getattr(record, "reason", "") for record in caplog.records)

    async with cluster.upstream():
        async with going(cluster.persist(store, shard_events_max=20)):
            await cluster.publish(20)
            forge(store.directory / live_name(0, FIRST_SHARD))
            await cluster.publish(20)
            await until(is_stopped, "the partition stops", 60)
        assert await cluster.records() == []
        assert (await Rewinder(cluster.api, store).rebuild(0)) is not None
        async with going(cluster.persist(store)):
            await cluster.publish(1)
    assert [seal.shard for seal in await cluster.seals()] == [1]
    assert stored(store) == set(cluster.accepted)
