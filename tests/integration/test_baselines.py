"""Every alternative that is measured beside ours carries a handful of events to its record: all of them come out."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from uuid import UUID

import h5py
import msgspec
import pytest

from benchmarks.baselines.designs import DESIGNS, Ground
from benchmarks.baselines.measure import visit
from benchmarks.load import make_messages

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]
WAIT_S = 60.0


def stored(path: Path) -> set[bytes]:
    with h5py.File(path, "r") as file:
        lines = chain.from_iterable(group["events"][()] for group in file["consultations"].values())
        return {UUID(msgspec.json.decode(line)["event_id"]).bytes for line in lines}


@pytest.mark.parametrize("name", DESIGNS)
async def test_everything_that_an_alternative_accepts_comes_out_and_is_stored(
    name: str, tmp_path: Path, cluster_urls: tuple[str, ...]
) -> None:
    messages = make_messages(31, 20, 1)
    sent = {UUID(message.message_id).bytes for message in messages}
    async with DESIGNS[name].open(Ground(tmp_path, cluster_urls, 3)) as rig:
        for message in messages:
            await rig.send(message)
        assert await rig.arrivals.reach(len(messages), WAIT_S)
        assert set(rig.arrivals.seen_ns) == sent
    assert stored(tmp_path / "classic.h5") == sent


async def test_a_visit_gives_a_rate_and_a_latency_or_says_that_it_falls_behind(
    tmp_path: Path, cluster_urls: tuple[str, ...]
) -> None:
    row = await visit(
        "one-process",
        Ground(tmp_path, cluster_urls, 3),
        make_messages(32, 300, 1),
        rates=(20,),
        seconds=1.0,
        say=lambda text: None,
    )
    assert row["events_per_s"] > 0
    (latency,) = row["latency"]
    assert latency["falls_behind"] == (latency["durable_ms"] is None)


async def test_a_design_that_cannot_run_here_says_why(
    tmp_path: Path, cluster_urls: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.baselines.redisstream.find_redis_server", lambda: None)
    row = await visit("redis", Ground(tmp_path, cluster_urls, 3), [], rates=(), seconds=1.0, say=lambda text: None)
    assert "no redis-server" in row["failed"]
