"""A small pipeline with a signing key: what it stored can be proved to a stranger, and no change to it goes unseen."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import pytest
import pytest_asyncio
from commands import run_fictl
from pipeline import Load, Pipeline, running, settings, until, workload

from cluster.audit import read_records
from stages.persist.keys import create_key
from stages.persist.store import EventStore, StoredEvent
from stages.persist.storedir import open_store
from stages.runtime.access import Servers

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

EVENTS = 600
SHARD_AGE_S = 3.0
"""Short, so that shards are sealed soon; long enough to stop persist while a fresh one is still live."""


class Signed(NamedTuple):
    """A pipeline that signs, with its events stored, and the public key."""

    pipeline: Pipeline
    key: str
    events: list[StoredEvent]

    @property
    def directory(self) -> str:
        return str(self.pipeline.supervisor.directory)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def signed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Signed]:
    directory = tmp_path_factory.mktemp("signed")
    key_file = directory / "signing.pem"
    key = create_key(key_file).public_key
    chosen = settings(partitions=2, signing_key_file=str(key_file), shard_age_s_max=SHARD_AGE_S, probe_s=0.5)
    async with running(directory, chosen) as pipeline:
        load = Load(workload(seed=5, events=EVENTS))
        await load.publish(pipeline.client)
        await pipeline.assert_whole(load)

        async def sealed() -> bool:
            return all(list(pipeline.shards.glob(f"p00{partition}-*.h5.seal.json")) for partition in (0, 1))

        await until(sealed, "a sealed shard in each partition", 30)
        # However fast all that was, there are commits after it.
        await Load(workload(seed=6, events=60)).publish(pipeline.client)
        await pipeline.settled()
        with EventStore(pipeline.shards) as store:
            yield Signed(pipeline, key, list(store.iterate()))


@asynccontextmanager
async def persist_killed(pipeline: Pipeline) -> AsyncIterator[None]:
    """While it is, nothing is sealed."""
    await pipeline.supervisor.hold_down("persist-0")
    try:
        yield
    finally:
        await pipeline.supervisor.bring_back("persist-0")


async def copy_store(pipeline: Pipeline, to: Path) -> None:
    async with persist_killed(pipeline):
        shutil.copytree(pipeline.shards, to)


def event_id(stored: StoredEvent) -> str:
    text = stored.event.event_id.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


async def test_an_event_is_proved_with_the_file_and_the_key_alone(signed: Signed, tmp_path: Path) -> None:
    for name, stored in (("first.json", signed.events[0]), ("last.json", signed.events[-1])):
        file = tmp_path / name
        code, out, err = await run_fictl("prove", event_id(stored), "--dir", signed.directory, "--output", file)
        assert (code, out, err) == (0, "", "")
        code, out, err = await run_fictl("check-proof", file, "--public-key", signed.key)
        assert (code, err) == (0, "")
        assert event_id(stored) in out

    proof = json.loads((tmp_path / "first.json").read_bytes())
    assert proof["head"]["statement"]["v"] == "seal-statement.1"
    proof["path"][0] = "00" * 32
    (tmp_path / "forged.json").write_text(json.dumps(proof))
    code, out, err = await run_fictl("check-proof", tmp_path / "forged.json", "--public-key", signed.key)
    assert (code, out) == (4, "")
    assert "the event, its number or the path was changed" in err
    code, _, err = await run_fictl("check-proof", tmp_path / "first.json", "--public-key", "ab" * 32)
    assert code == 4
    assert "not the one given" in err


async def test_a_sealed_event_is_proved_from_the_store_alone(signed: Signed, tmp_path: Path) -> None:
    store = tmp_path / "shards"
    await copy_store(signed.pipeline, store)
    file = tmp_path / "proof.json"
    assert (await run_fictl("prove", event_id(signed.events[0]), "--store", store, "--output", file))[0] == 0
    assert (await run_fictl("check-proof", file, "--public-key", signed.key))[0] == 0


async def test_two_receipts_of_a_running_pipeline_are_shown_to_be_consistent(signed: Signed, tmp_path: Path) -> None:
    records = await read_records(Servers(signed.pipeline.supervisor.urls))
    sizes = sorted({receipt.persisted for receipt in records.receipts[0]})
    first, last = sizes[len(sizes) // 3], sizes[-1]
    file = tmp_path / "consistency.json"
    code, _, err = await run_fictl(
        "consistency", "0", "--from", str(first), "--to", str(last), "--dir", signed.directory, "--output", file
    )
    assert (code, err) == (0, "")
    code, out, _ = await run_fictl("check-proof", file, "--public-key", signed.key)
    assert (code, f"the first {first} events" in out) == (0, True)


async def verified(signed: Signed, store: Path | str, *more: str) -> tuple[int, dict[str, Any]]:
    code, out, err = await run_fictl(
        *("verify", store, "--receipts", "--dir", signed.directory, "--public-key", signed.key, "--json", *more)
    )
    assert out, err
    return code, json.loads(out)


async def test_the_store_agrees_with_every_signed_receipt_and_seal(signed: Signed) -> None:
    code, report = await verified(signed, signed.directory)
    assert (code, report["store"]["problems"]) == (0, [])
    assert report["seals"] >= 2
    assert report["signed"] == report["receipts"] + report["seals"]
    code, out, err = await run_fictl("verify", signed.directory, "--public-key", signed.key)
    assert (code, ", 0 of them signed" in out, " of them signed; --receipts finds what that cannot" in out) == (
        *(0, False, True),
    ), err
    code, out, _ = await run_fictl("verify", signed.directory, "--public-key", "ab" * 32)
    assert (code, f"no record is signed by a key given, but by {signed.key}" in out) == (4, True)


async def test_a_lowered_watermark_and_a_changed_file_are_found_and_named(signed: Signed, tmp_path: Path) -> None:
    store = tmp_path / "shards"
    pipeline = signed.pipeline
    await Load(workload(seed=7, events=40)).publish(pipeline.client)
    await pipeline.settled()
    # Sealed meanwhile, the shards whose watermarks were lowered would be missed as sealed ones.
    async with persist_killed(pipeline):
        shutil.copytree(pipeline.shards, store)
        lowered = [_lower(path) for path in store.glob("*.live.h5")]
        assert any(lowered)
        assert (await run_fictl("verify", store))[0] == 0
        sealed = min(store.glob("p000-00000001-*.h5"))
        data = bytearray(sealed.read_bytes())
        data[len(data) // 2] ^= 1
        sealed.write_bytes(data)
        code, report = await verified(signed, store)
    told = "\n".join(f"{one['shard']}: {one['where']}: {one['what']}" for one in report["store"]["problems"])
    assert code == 4
    assert sealed.name in told
    # One commit alone is as a kill leaves it that comes before the commit is shown.
    assert "its live shard holds, and does not show, " in told or report["unshown"]


def _lower(live: Path) -> bool:
    with h5py.File(live, "r+") as file:
        lowered = int(file["watermark"][0]) > 0
        file["watermark"][0] = 0
    return lowered


async def test_a_store_without_its_last_shards_is_told_what_is_missing(signed: Signed, tmp_path: Path) -> None:
    store = tmp_path / "shards"
    await copy_store(signed.pipeline, store)
    for path in store.glob("p001-*.h5"):
        if "-00000001-" not in path.name:
            path.unlink()
    assert (await run_fictl("verify", store))[0] == 0
    code, report = await verified(signed, store)
    assert code == 4
    assert any("commits were removed from the end" in one["what"] for one in report["store"]["problems"])


async def test_where_no_cluster_runs_verify_receipts_says_so(tmp_path: Path) -> None:
    code, out, err = await run_fictl("verify", tmp_path, "--receipts")
    assert (code, out) == (3, "")
    assert "fictl up --dir" in err


async def test_a_store_that_the_cluster_knows_nothing_of_is_told_so(signed: Signed, tmp_path: Path) -> None:
    cluster_id = json.loads((signed.pipeline.shards / "store.json").read_text())["cluster_id"]
    stranger = open_store(tmp_path / "stranger", cluster_id, now_ns=1)
    code, report = await verified(signed, stranger.directory)
    assert (code, report["store"]["shards"], report["receipts"], report["seals"], report["signed"]) == (0, 0, 0, 0, 0)
    owner = json.loads((signed.pipeline.shards / "store.json").read_text())["store_id"]
    assert [text.split(" on ")[0] for text in report["elsewhere"].values()] == [f"store {owner}"] * 2
    code, out, _ = await run_fictl("verify", stranger.directory, "--receipts", "--dir", signed.directory)
    assert code == 0
    assert f"partition 1 belongs to store {owner} on " in out
    assert (await verified(signed, signed.directory))[1]["elsewhere"] == {}
