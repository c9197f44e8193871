"""What `fictl status` prints equals what servers and shards say to others; and it answers whatever is down."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h5py
import nats
import pytest
from commands import run_fictl
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, DeliverPolicy
from pipeline import Load, Pipeline, running, settings, until, workload

from cluster.apply import apply
from cluster.overview import Looker
from cluster.ports import HeldPorts
from cluster.summary import summarize
from contracts.budgets import MEMBERS_SHOWN
from contracts.subjects import EVENTS, STAGES, STREAMS, publish_subject
from stages.runtime.access import Servers

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

PARTITIONS = 4
ANSWERS_WITHIN_S = 20.0
"""It takes about five seconds; the machine may be slow."""


async def status(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of `fictl status`."""
    begun_s = time.monotonic()
    code, out, err = await run_fictl("status", *arguments, "--json")
    assert time.monotonic() - begun_s < ANSWERS_WITHIN_S
    assert out, err
    return code, json.loads(out)


def kinds(told: dict[str, Any]) -> list[str]:
    return [problem["kind"] for problem in told["problems"]]


@asynccontextmanager
async def outsider(pipeline: Pipeline) -> AsyncIterator[JetStreamContext]:
    """A connection made with nothing of ours."""
    client = await nats.connect(list(pipeline.supervisor.urls))
    try:
        yield client.jetstream(timeout=10)
    finally:
        await client.close()


async def read_all(jetstream: JetStreamContext, stream: str, subject: str) -> list[Any]:
    """Every message of a subject, read one after the other."""
    config = ConsumerConfig(deliver_policy=DeliverPolicy.ALL, filter_subject=subject)
    subscription = await jetstream.subscribe(subject, stream=stream, ordered_consumer=True, config=config)
    left = (await jetstream.stream_info(stream, subjects_filter=subject)).state.subjects or {}
    messages = [await subscription.next_msg(timeout=30) for _ in range(sum(left.values()))]
    await subscription.unsubscribe()
    return messages


def rows_in_shards(shards: Path) -> dict[str, Any]:
    """Files, events and bytes by plain h5py, as the README tells readers."""
    found: dict[str, Any] = {"live": 0, "sealed": 0, "events": 0, "sealed_events": 0, "bytes": 0}
    for path in shards.glob("p[0-9]*.h5"):
        if path.name.endswith(".next.h5"):
            continue
        kind = "live" if path.name.endswith(".live.h5") else "sealed"
        with h5py.File(path, "r", locking=False) as file:
            if kind == "sealed":
                events = file["event_id"].shape[0]
                found["sealed_events"] += events
            else:
                events = 0
                rows = int(file["watermark"][0])
                end = int(file["index"][rows - 1, 1]) if rows else 0
                data, at = file["frames"][:end].tobytes(), 0
                while at < end:
                    at += 4 + int.from_bytes(data[at : at + 4], "little")
                    events += 1
        found[kind] += 1
        found["events"] += events
        found["bytes"] += path.stat().st_size
    return found


async def publish_raw(client: Client, lines: list[bytes]) -> None:
    """Without message ids, so that the servers' own deduplication sees nothing."""
    jetstream = client.jetstream(timeout=10)
    for line in lines:
        event = json.loads(line)
        site = event["metadata"].get("site_id", "clinic-1")
        await jetstream.publish(publish_subject(site, event["consultation_id"]), line)


async def test_every_count_equals_what_servers_and_shards_say_to_others(tmp_path: Path) -> None:
    chosen = settings(health_port=0, shard_events_max=40, partitions=PARTITIONS)
    async with running(tmp_path, chosen) as pipeline, outsider(pipeline) as jetstream:
        load = Load(workload(seed=401, events=500))
        await load.publish(pipeline.client)
        await publish_raw(pipeline.client, load.lines[:30])
        for number in range(12):
            await jetstream.publish(publish_subject("clinic-1", "not-a-uuid"), b"bad %d" % number)
        totals = await pipeline.settled()
        assert totals == (500, 30, 12)

        async def quiet() -> bool:
            live = [path.name[:4] for path in pipeline.shards.glob("*.live.h5")]
            return len(live) == len(set(live)) and not list(pipeline.shards.glob("*.tmp"))

        await until(quiet, "all full shards are sealed", 60)
        code, told = await status("--dir", str(tmp_path))
        rows = rows_in_shards(pipeline.shards)
        streams = {name: await jetstream.stream_info(name) for name in STREAMS}
        letters = await read_all(jetstream, "FI_DLQ", "fi.dlq.*.*")
        members = await (await jetstream.key_value("FI_MEMBERS")).keys()

        assert (code, told["well"], kinds(told)) == (3, False, ["dead_letters"]), told["problems"]
        assert rows["sealed"] > 0
        assert told["totals"] == {
            "persisted": rows["events"],
            "duplicates": 30,
            "dead_lettered": 12,
            "live_shards": rows["live"],
            "sealed_shards": rows["sealed"],
            "sealed_events": rows["sealed_events"],
        }
        assert sum(one["persisted"] for one in told["partitions"]) == rows["events"] == 500
        disk = told["disk"]
        assert sum(disk["live"].values()) == rows["live"]
        assert sum(disk["sealed"].values()) == rows["sealed"]
        assert sum(disk["size_bytes"].values()) == rows["bytes"]
        shown = {one["status"]["name"]: one["status"] for one in told["streams"]}
        for name, info in streams.items():
            if not name.startswith("KV_"):
                state = (info.state.messages, info.state.bytes, info.state.first_seq, info.state.last_seq)
                assert tuple(shown[name][key] for key in ("messages", "bytes", "first_seq", "last_seq")) == state, name
            assert info.cluster is not None
            assert shown[name]["leader"] == info.cluster.leader
        assert told["letters"] == {"by_stage": {"ingest": len(letters)}, "recent": len(letters)}
        assert len(letters) == 12
        assert len(told["members"]["members"]) == len(members) == len(STAGES)
        assert told["waiting"] == 0
        assert [stage["waiting"] for stage in told["stages"]] == [0] * 4
        assert {p["health"]["name"] for p in told["processes"] if p["metered"]} == {f"{stage}-0" for stage in STAGES}

        # A letter that was dropped leaves a message in the stream that is none.
        assert (await run_fictl("dlq", "drop", "--all", "--yes", "--dir", str(tmp_path))).code == 0
        assert (await jetstream.stream_info("FI_DLQ")).state.messages > 0
        _, told = await status("--dir", str(tmp_path))
        assert told["letters"]["by_stage"] == {}


@pytest.mark.slow
async def test_with_persist_paused_the_lag_is_what_can_be_counted_from_outside(tmp_path: Path) -> None:
    async with running(tmp_path, settings(health_port=0, partitions=PARTITIONS, disk_floor_bytes=1 << 60)) as pipeline:
        before = Load(workload(seed=402, events=60))
        await before.publish(pipeline.client, batch=1)
        await pipeline.settled()
        committed = {receipt.partition: receipt.origin for receipt in await pipeline.receipts()}
        assert (await run_fictl("pause", "persist", "--dir", str(tmp_path))).code == 0
        load = Load(workload(seed=403, events=150))
        await load.publish(pipeline.client, batch=1)
        urls = [part for url in pipeline.supervisor.urls for part in ("--nats", url)]

        async def reached() -> Any:
            _, told = await status(*urls)
            waits = {stage["stage"]: stage["waiting"] for stage in told["stages"]}
            return told if waits == {"ingest": 0, "segment": 0, "hash": 0, "persist": 150} else None

        told = await until(reached, "all of it waits for persist", 60)
        waiting: Counter[int] = Counter()
        async with outsider(pipeline) as jetstream:
            for message in await read_all(jetstream, EVENTS, "fi.raw.>"):
                partition = int(message.subject.split(".")[2])
                if message.metadata.sequence.stream > committed.get(partition, 0):
                    waiting[partition] += 1
        assert waiting.total() == 150
        for one in told["partitions"]:
            assert one["waiting"]["persist"]["messages"] == waiting[one["partition"]]
            assert one["waiting"]["persist"]["origin"] == committed.get(one["partition"], 0)
        assert kinds(told)[0] == "paused"
        assert "150 messages wait" in told["problems"][0]["what"]
        assert told["processes"] is None
        assert told["durable"] is None
        assert (await run_fictl("resume", "persist", "--dir", str(tmp_path))).code == 0
        await pipeline.assert_whole(load)
        _, told = await status("--dir", str(tmp_path))
        assert (told["waiting"], kinds(told)) == (0, ["disk_low"])


async def test_rates_over_a_window_are_what_was_published_in_it(tmp_path: Path) -> None:
    async with running(tmp_path, settings(health_port=0, partitions=PARTITIONS)) as pipeline:
        await Load(workload(seed=404, events=40)).publish(pipeline.client)
        await pipeline.settled()
        looker = Looker(Servers(pipeline.supervisor.urls), tmp_path)
        try:
            first = await looker.look()
            load = Load(workload(seed=405, events=240))
            report = await load.publish(pipeline.client, batch=4)
            await pipeline.settled()
            last = await looker.look()
        finally:
            await looker.close()
        summary = summarize((first, last))
        assert report.accepted == 240
        async with outsider(pipeline) as jetstream:
            messages = (await jetstream.stream_info(EVENTS)).state.last_seq - first.streams[0].last_seq
        assert summary.window_s is not None
        assert summary.accepted_per_s is not None
        assert summary.persisted_per_s is not None
        assert summary.accepted_per_s * summary.window_s == pytest.approx(messages)
        assert summary.persisted_per_s * (last.receipts_s - first.receipts_s) == pytest.approx(240)
        assert summary.durable is not None
        assert summary.durable.count == 240
        assert all(stage.latency is not None and stage.latency.count == 240 for stage in summary.stages)
        assert 0 < summary.durable.p50_s <= summary.durable.p95_s <= summary.durable.p99_s


@pytest.mark.slow
async def test_without_a_quorum_and_with_frozen_servers_it_answers_and_names_them(tmp_path: Path) -> None:
    async with running(tmp_path, settings(health_port=0)) as pipeline:
        code, told = await status("--dir", str(tmp_path))
        assert (code, told["well"], told["problems"]) == (0, True, [])
        await pipeline.client.close()
        await pipeline.supervisor.hold_down("n2")
        await pipeline.supervisor.hold_down("n3")

        async def leaderless() -> Any:
            code, told = await status("--dir", str(tmp_path))
            # Until leaders notice that they are alone, it is the servers that tell.
            assert (code, kinds(told)[0] in ("server_down", "no_leader")) == (3, True), told["problems"]
            return told if told["problems"][0]["what"].startswith("all streams: has no leader") else None

        told = await until(leaderless, "every leader has noticed", 90)
        assert told["waiting"] is None
        assert told["totals"] is None
        assert "server_down" in kinds(told)
        pipeline.supervisor.freeze("n1")
        try:
            code, told = await status("--dir", str(tmp_path))
            assert (code, kinds(told)[0], told["connected"]) == (3, "no_server", False), told["problems"]
        finally:
            pipeline.supervisor.thaw("n1")
            await pipeline.supervisor.bring_back("n2")
            await pipeline.supervisor.bring_back("n3")


async def test_an_empty_cluster_and_one_without_processes_are_told_apart(
    client: Client, cluster_urls: tuple[str, ...]
) -> None:
    urls = [part for url in cluster_urls for part in ("--nats", url)]
    code, told = await status(*urls)
    assert (code, kinds(told)) == (3, ["no_leader"])
    assert "fictl cluster apply" in told["problems"][0]["next"]
    await apply(client, settings(partitions=2))

    async def led() -> Any:
        _, told = await status(*urls)
        return told if "unheld" in kinds(told) and "no_leader" not in kinds(told) else None

    told = await until(led, "all streams have leaders", 60)
    unheld = [problem["what"] for problem in told["problems"] if problem["kind"] == "unheld"]
    assert unheld == [
        f"no member holds partitions 0-1 of {stage}: no process of {stage} announces itself" for stage in STAGES
    ]
    assert told["totals"]["persisted"] == 0
    # They may all have been forgotten in an election, and say so anew within a second.
    begun_s = time.monotonic()
    code, out, err = await run_fictl("members", *urls, "--json")
    assert (code, json.loads(out)["members"]) == (3, []), err
    assert time.monotonic() - begun_s >= MEMBERS_SHOWN.s


async def test_a_password_in_a_url_is_not_shown() -> None:
    with HeldPorts() as ports:
        (port,) = ports.take(1)
        url = f"nats://eve:hidden-word@127.0.0.1:{port}"
        code, told = await status("--nats", url)
    assert (code, kinds(told)) == (3, ["no_server"])
    assert "hidden-word" not in json.dumps(told)
