"""Streams that somebody changed by hand under a running pipeline: it is told where an operator looks, until mended."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from nats.js.api import DiscardPolicy
from pipeline import Load, Pipeline, fictl, running, settings, until, workload

from cluster.health import get, read_health_files
from contracts.subjects import DLQ, EVENTS, HASH, MEMBERS, SEGMENT
from contracts.telemetry import READERS_OPENED

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

LIMIT_S = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    async with running(tmp_path_factory.mktemp("refusals"), settings(partitions=2, health_port=0)) as started:
        yield started


async def checks(pipeline: Pipeline, name: str) -> dict[str, str]:
    """What is not well at a process's `/readyz`, by check."""
    file = next((file for file in read_health_files(pipeline.supervisor.directory) if file.name == name), None)
    if file is None:
        return {}
    try:
        _, body = await get(f"http://{file.host}:{file.port}/readyz")
    except OSError:
        return {}
    return {check: found["why"] for check, found in json.loads(body)["checks"].items() if not found["ok"]}


async def says(pipeline: Pipeline, name: str, check: str, words: str) -> None:
    """Returns when the process says so."""

    async def said() -> bool:
        return words in (await checks(pipeline, name)).get(check, "")

    await until(said, f"{name} says {words!r}", LIMIT_S)


async def change(pipeline: Pipeline, stream: str, **fields: Any) -> None:
    """Changes a stream's configuration, as anybody may."""
    jetstream = pipeline.client.jetstream(timeout=30)
    found = (await jetstream.stream_info(stream)).config
    metadata = {key: text for key, text in (found.metadata or {}).items() if not key.startswith("_nats.")}
    await jetstream.update_stream(found.evolve(**fields | {"metadata": metadata}))


async def test_a_stream_that_takes_no_more_consumers_is_told_once_and_read_when_it_does(pipeline: Pipeline) -> None:
    await change(pipeline, SEGMENT, max_consumers=1)
    await pipeline.supervisor.kill("segment-0")
    await says(pipeline, "segment-0", "lanes", "maximum consumers limit reached")

    async def asked_often() -> bool:
        file = next(file for file in read_health_files(pipeline.supervisor.directory) if file.name == "segment-0")
        _, body = await get(f"http://{file.host}:{file.port}/metrics")
        values = re.findall(rf"^{READERS_OPENED.prometheus_name}{{.*}} (\S+)$", body.decode(), re.MULTILINE)
        return sum(map(float, values)) > 5 * pipeline.settings.partitions

    await until(asked_often, "its readers have tried again", LIMIT_S)
    log = (pipeline.supervisor.directory / "logs" / "segment-0.log").read_text()
    assert 1 <= log.count("refuses to be read") <= pipeline.settings.partitions
    await change(pipeline, SEGMENT, max_consumers=-1)
    load = Load(workload(seed=51, events=100))
    await load.publish(pipeline.client)
    await pipeline.assert_whole(load)


async def test_a_process_that_cannot_see_the_others_says_why(pipeline: Pipeline) -> None:
    await change(pipeline, MEMBERS, allow_direct=False)
    await says(pipeline, "hash-0", "members", "cannot be read now")
    assert "cannot be seen" in (pipeline.supervisor.directory / "logs" / "hash-0.log").read_text()
    await change(pipeline, MEMBERS, allow_direct=True)

    async def sees() -> bool:
        return not await checks(pipeline, "hash-0")

    await until(sees, "it sees them again", LIMIT_S)


async def test_a_stream_that_was_made_to_drop_messages_or_to_keep_them_all_is_told(pipeline: Pipeline) -> None:
    await change(pipeline, EVENTS, discard=DiscardPolicy.OLD)
    await says(pipeline, "ingest-0", "streams", f"{EVENTS}: drops messages to make room")
    await change(pipeline, EVENTS, discard=DiscardPolicy.NEW)
    await change(pipeline, DLQ, max_age=3600)
    await says(pipeline, "hash-0", "streams", f"{DLQ}: drops messages for their age")
    await change(pipeline, DLQ, max_age=0)
    await change(pipeline, SEGMENT, deny_purge=True)
    await says(pipeline, "segment-0", "streams", f"{SEGMENT}: cannot be emptied")
    load = Load(workload(seed=52, events=300))
    await load.publish(pipeline.client)
    await pipeline.assert_whole(load)
    # Nothing is trimmed any more, and the servers' words for it are there.
    await says(pipeline, "persist-0", "circuits", "purge not permitted")


async def test_what_no_server_takes_back_is_told_with_the_way_on_which_nothing_is_lost(pipeline: Pipeline) -> None:
    jetstream = pipeline.client.jetstream(timeout=30)
    await change(pipeline, EVENTS, allow_msg_ttl=True, max_age=600, subject_delete_marker_ttl=5)
    await change(pipeline, HASH, sealed=True)
    await says(pipeline, "ingest-0", "streams", f"{EVENTS}: drops messages for their age, lets a message drop")
    code, told, _ = await fictl(pipeline, "status")
    changed = [one["what"] for one in told["problems"] if one["kind"] == "stream_changed"]
    assert (code, [EVENTS in what for what in changed]) == (3, [True, False, False]), changed
    assert "lets messages vanish that bear a TTL" in changed[0]
    code, done, err = await fictl(pipeline, "cluster", "apply")
    assert (code, {change["stream"] for change in done["changes"]}) == (1, {EVENTS}), err
    assert [line.split(" is ")[0] for line in done["lasting"]] == [
        f"{SEGMENT}: deny_purge",
        f"{HASH}: sealed",
        f"{EVENTS}: allow_msg_ttl",
    ], done
    assert f"{EVENTS}: allow_msg_ttl is True, and the servers do not take that back. Stop the gateways" in err
    await jetstream.delete_stream(HASH)
    await jetstream.delete_stream(SEGMENT)
    assert (await fictl(pipeline, "cluster", "apply"))[0] == 1
    load = Load(workload(seed=53, events=100))
    await load.publish(pipeline.client)
    assert (await fictl(pipeline, "flush"))[0] == 0
    await jetstream.delete_stream(EVENTS)
    code, done, err = await fictl(pipeline, "cluster", "apply")
    assert (code, [change["stream"] for change in done["changes"]]) == (0, [EVENTS]), err
    after = Load(workload(seed=54, events=100))
    await after.publish(pipeline.client)
    await pipeline.assert_whole(load, after)
