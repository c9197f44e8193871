"""`FI_EVENTS` gives sequences a second time, as after a roll-back: what it takes is not passed over or deleted."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import uuid4

import pytest
from commands import run_fictl
from pipeline import Load, Pipeline, running, settings, until, workload

from cluster.health import get, read_health_files
from contracts.subjects import EVENTS, SEGMENT, publish_subject

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

PARTITIONS = 1
"""So every message is of the partition, and that tells nothing."""
LIMIT_S = 60.0


async def make_by_hand(pipeline: Pipeline) -> None:
    """The same stream to look at; but it begins to count at 1."""
    jetstream = pipeline.client.jetstream(timeout=30)
    found = (await jetstream.stream_info(EVENTS)).config
    metadata = {key: text for key, text in (found.metadata or {}).items() if not key.startswith("_nats.")}
    await jetstream.delete_stream(EVENTS)
    await jetstream.add_stream(found.evolve(metadata=metadata, first_seq=None))


async def unread(pipeline: Pipeline) -> str:
    """What ingest says at `/readyz` of its lanes; empty if all is well there."""
    file = next((file for file in read_health_files(pipeline.supervisor.directory) if file.name == "ingest-0"), None)
    if file is None:
        return ""
    try:
        _, body = await get(f"http://{file.host}:{file.port}/readyz")
    except OSError:
        return ""
    found = json.loads(body)["checks"].get("lanes", {"ok": True})
    return "" if found["ok"] else str(found["why"])


async def says(pipeline: Pipeline, words: str) -> None:
    async def said() -> bool:
        why = await unread(pipeline)
        return "partitions [0] are refused their input" in why and words in why

    await until(said, f"ingest says {words!r}", LIMIT_S)


@pytest.mark.parametrize("forgets", ["its process", "its output", "both"])
async def test_a_stream_that_counts_anew_is_neither_read_nor_trimmed_until_it_is_made_again(
    tmp_path: Path, forgets: str
) -> None:
    async with running(tmp_path, settings(partitions=PARTITIONS, sealed_kept=0, health_port=0)) as pipeline:
        jetstream = pipeline.client.jetstream(timeout=30)
        settled = Load(workload(seed=81, events=400))
        await settled.publish(pipeline.client, batch=1)
        # Of a refused message no event tells when it was stored.
        await jetstream.publish(publish_subject("clinic-1", str(uuid4())), b"no event", timeout=30)
        await pipeline.settled()
        await pipeline.supervisor.stop_stage("persist")
        await pipeline.supervisor.start_stage("persist")
        before = [receipt.origin for receipt in await pipeline.receipts()]
        pipeline.supervisor.freeze("ingest-0")
        await make_by_hand(pipeline)
        pipeline.supervisor.thaw("ingest-0")
        early, late = Load(workload(seed=82, events=60)), Load(workload(seed=83, events=600))
        await early.publish(pipeline.client, batch=1)
        await says(pipeline, "it has not come so far")
        # What is sealed is trimmed when a persister begins.
        await pipeline.supervisor.stop_stage("persist")
        await pipeline.supervisor.start_stage("persist")
        log = pipeline.supervisor.directory / "logs" / "persist-0.log"
        told = f"partition 0 is not trimmed now: {EVENTS} was rolled back"
        await until(lambda: told in log.read_text(), told, LIMIT_S)
        # Past what is settled it is another message that has that sequence.
        await late.publish(pipeline.client, batch=1)
        await says(pipeline, "that message is one of")
        heard = log.read_text().count(told)
        await pipeline.supervisor.stop_stage("persist")
        await pipeline.supervisor.start_stage("persist")
        await until(lambda: log.read_text().count(told) > heard, "a persister that begins then sees it too", LIMIT_S)
        if forgets == "both":
            pipeline.supervisor.freeze("ingest-0")
            await pipeline.api.purge(SEGMENT, "fi.segment.*")
        if forgets != "its output":
            await pipeline.supervisor.kill("ingest-0")
        else:
            ingest_log = pipeline.supervisor.directory / "logs" / "ingest-0.log"
            before_purge = len(ingest_log.read_text())
            await pipeline.api.purge(SEGMENT, "fi.segment.*")
            await until(
                lambda: "EVENT_WORKER_STARTED" in ingest_log.read_text()[before_purge:], "its lane begins anew", LIMIT_S
            )
        await says(pipeline, "that message is one of")
        state = (await jetstream.stream_info(EVENTS)).state
        assert (state.first_seq, state.messages) == (1, 660)
        assert [receipt.origin for receipt in await pipeline.receipts()] == before
        await jetstream.delete_stream(EVENTS)
        code, _, err = await run_fictl("cluster", "apply", "--dir", pipeline.supervisor.directory)
        assert code == 0, err
        for load in (settled, early, late):
            await load.publish(pipeline.client)
        await pipeline.assert_whole(settled, early, late)
