"""What somebody with the disk changes: persist does not vouch for it, and takes nothing from the stream for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
from lanes import going
from nats.aio.client import Client
from pipeline import until
from test_persist_lane import new_store, ready, stored

from cluster.rewind import Rewinder
from stages.persist import actor
from stages.persist.live import LiveReader
from stages.persist.names import FIRST_SHARD, list_shards, live_name, sealed_name
from stages.persist.rows import encode_row, row_crc32
from stages.persist.trim import Trimmer

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


def forge_time(path: Path) -> None:
    """The first commit came an hour earlier, under the row's own checksum."""
    with LiveReader(path) as reader:
        (row,) = reader.read_rows(0, 1)
        blob, header = reader.read_blobs(0, row.end_bytes), reader.header
    row = row._replace(committed_ns=row.committed_ns - 3600 * 10**9)
    with path.open("r+b") as file:
        file.seek(header.index.offset)
        file.write(encode_row(row._replace(crc32=row_crc32(row, blob))))


@pytest.mark.parametrize("forge", [forge, forge_time])
async def test_what_was_forged_under_a_persister_gets_no_seal_record_and_is_made_again(
    client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture, forge: Callable[[Path], None]
) -> None:
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")

    def is_stopped() -> bool:
        return any("was changed since" in getattr(record, "reason", "") for record in caplog.records)

    async with cluster.upstream():
        async with going(cluster.persist(store, shard_events_max=20)):
            await cluster.publish(20)
            forge(store.directory / live_name(0, FIRST_SHARD))
            # It may stop before it has committed these.
            for _ in range(20):
                await cluster.send(uuid4())
            await until(is_stopped, "the partition stops", 60)
        assert await cluster.records() == []
        assert (await Rewinder(cluster.api, store).rebuild(0)) is not None
        async with going(cluster.persist(store)):
            await cluster.publish(1)
    assert [seal.shard for seal in await cluster.seals()] == [1]
    assert stored(store) == set(cluster.accepted)


async def test_a_sealed_shard_under_the_name_of_later_origins_takes_nothing_from_the_stream(
    client: Client, tmp_path: Path
) -> None:
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")
    async with cluster.upstream():
        for _ in range(2):
            async with going(cluster.persist(store)):
                await cluster.publish(10)
    newest = [file for file in list_shards(store.directory)[0] if file.sealed][-1]
    newest.path.rename(store.directory / sealed_name(0, newest.shard, 1_000_000, 1_000_001))
    for _ in range(5):
        await cluster.send(uuid4())
    trims = []

    class Watched(Trimmer):
        async def _trim(self) -> None:
            await super()._trim()
            trims.append(self._claimed_origin)

    async def has_trimmed() -> bool:
        return any(trims)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actor, "Trimmer", Watched)
        async with going(cluster.persist(store)):
            await until(has_trimmed, "what is sealed leaves the stream", 60)
    assert await cluster.first_kept() <= 21
    async with cluster.upstream(), going(cluster.persist(store)):
        await cluster.publish(1)
    assert (await cluster.receipt()).persisted == 26
