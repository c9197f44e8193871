"""The server that leads a stream cannot read the last message of a subject: it answers that there is none.

And it accepts what expects none: in `FI_RECEIPTS` nothing may be written there as the first. In the control bucket what
operators said is not taken for unsaid.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import pytest
from nats.errors import Error as NatsError
from pipeline import Load, Pipeline, extra_stage, fictl, flip, running, settings, until, workload

from contracts.subjects import CONTROL, RECEIPTS, policy_subject, receipt_subject, seal_subject
from stages.runtime.checkpoint import last_receipt
from stages.runtime.tasks import end_tasks

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SENT = 60
INTO = 40
"""Of a message, behind its subject: it is longer."""
REFUSAL = "cannot read the last message of"


async def leader(pipeline: Pipeline, stream: str = RECEIPTS) -> str:
    """Of a stream; empty while one of the others is behind."""
    with contextlib.suppress(NatsError):
        found = (await pipeline.client.jetstream(timeout=5).stream_info(stream)).cluster
        if found is not None and len(found.replicas or []) == 2 and all(peer.current for peer in found.replicas or []):
            return str(found.leader or "")
    return ""


async def lead(pipeline: Pipeline, server: str, stream: str = RECEIPTS) -> None:
    """Makes `server` the leader."""
    wish = json.dumps({"placement": {"preferred": server}}).encode()

    async def leads() -> bool:
        if await leader(pipeline, stream) == server:
            return True
        with contextlib.suppress(NatsError):
            await pipeline.client.request(f"$JS.API.STREAM.LEADER.STEPDOWN.{stream}", wish, timeout=5)
        return False

    await until(leads, f"{server} leads")


async def damage_leader(pipeline: Pipeline, subject: str, stream: str = RECEIPTS) -> str:
    """Flips a bit of a follower's last message under `subject`, and makes it the leader; gives another server."""
    leads = await until(lambda: leader(pipeline, stream), "all have it")
    damaged, other = (name for name in pipeline.servers if name != leads)
    await pipeline.stop(damaged)
    (block,) = (pipeline.directory / "nats" / damaged).glob(f"jetstream/*/streams/{stream}/msgs/*.blk")
    flip(block, block.read_bytes().rindex(subject.encode()) + INTO)
    await pipeline.start(damaged)
    await lead(pipeline, damaged, stream)
    return other


async def test_no_other_store_begins_a_partition_whose_last_receipt_the_leader_cannot_read(tmp_path: Path) -> None:
    async with running(tmp_path, settings(partitions=1)) as pipeline:
        load = Load(workload(seed=92, events=SENT))
        await load.publish(pipeline.client)
        await pipeline.assert_whole(load)
        await pipeline.kill("persist-0")
        before, _ = await last_receipt(pipeline.api, 0)
        assert before is not None
        other = await damage_leader(pipeline, receipt_subject(0))
        async with extra_stage(pipeline, "persist", "stranger", shards=tmp_path / "elsewhere") as stranger:
            starting = asyncio.create_task(stranger.start())
            await until(lambda: (tmp_path / "stranger.log").exists(), "it starts")
            await until(lambda: f"{REFUSAL} {receipt_subject(0)}" in stranger.log_text(), "it says why it waits")
            await lead(pipeline, other)
            await until(lambda: f"belongs to store {before.store}" in stranger.log_text(), "it goes on")
            await end_tasks(starting)
        receipt, _ = await last_receipt(pipeline.api, 0)
        assert receipt is not None
        assert receipt.store == before.store


async def test_sealed_shards_get_no_second_record_where_the_leader_cannot_read_the_last_one(tmp_path: Path) -> None:
    async with running(tmp_path, settings(partitions=1)) as pipeline:
        jetstream = pipeline.client.jetstream(timeout=10)

        async def records() -> int:
            info = await jetstream.stream_info(RECEIPTS, subjects_filter=seal_subject(0))
            return (info.state.subjects or {}).get(seal_subject(0), 0)

        load = Load(workload(seed=93, events=SENT))
        await load.publish(pipeline.client)
        await pipeline.assert_whole(load)
        # It seals what it has.
        await pipeline.stop("persist-0")
        assert await records() == 1
        other = await damage_leader(pipeline, seal_subject(0))
        await pipeline.start("persist-0")
        written = tmp_path / "logs" / "persist-0.log"
        await until(lambda: f"{REFUSAL} {seal_subject(0)}" in written.read_text(), "it says why it waits")
        assert await records() == 1
        await lead(pipeline, other)
        await Load(workload(seed=94, events=SENT)).publish(pipeline.client)
        await pipeline.settled()
        assert await records() == 1


async def test_no_event_is_judged_by_an_older_policy_because_the_leader_cannot_read_the_newest(tmp_path: Path) -> None:
    async with running(tmp_path, settings(partitions=1)) as pipeline:
        code, _, err = await fictl(pipeline, "policy", "set", "refused_types=MESSAGE_RECEIVED")
        assert code == 0, err
        await pipeline.kill("segment-0")
        other = await damage_leader(pipeline, policy_subject(2), CONTROL)
        written = tmp_path / "logs" / "segment-0.log"
        before = len(written.read_text())
        starting = asyncio.create_task(pipeline.start("segment-0"))
        await until(lambda: f"{REFUSAL} $KV.FI_CONTROL.policy." in written.read_text()[before:], "it says why it waits")
        refused = Load(workload(seed=95, events=SENT))
        await refused.publish(pipeline.client)
        await lead(pipeline, other, CONTROL)
        await starting
        await pipeline.settled()
        held = [letter.policy for letter in await pipeline.dead_letters()]
        assert held
        assert {*held} == {2}
