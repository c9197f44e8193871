"""Metrics and traces of real processes, as a real OTLP collector receives them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from otlp_receiver import OtlpReceiver
from pipeline import Load, Pipeline, running, settings, until, workload

from cluster.gateway import Gateway
from cluster.workload import consultations
from contracts.frames import decode_frame_head
from contracts.settings import MIB, Settings
from contracts.subjects import SEGMENT, STAGES, output_subject
from contracts.telemetry import CATALOGUE
from stages.runtime.observing import observing
from stages.runtime.telemetry import OFF, Telemetry

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

NOT_HERE = {"fi.persist.errors", "fi.lane.restarts", "fi.backup.age", "fi.messages.unreadable", "fi.paper.due"}
"""Only when something failed, was backed up or expires: see test_instruments.py, test_health_port.py and
test_secured_servers.py."""


def watched(receiver: OtlpReceiver, **changes: object) -> Settings:
    return settings(**{"otlp_endpoint": receiver.url, "otlp_interval_s": 0.3, **changes})


async def publish(
    pipeline: Pipeline, seed: int, events: int, traceparents: Sequence[str] = (), telemetry: Telemetry = OFF
) -> list[dict[str, Any]]:
    """One event a message, each with the next of `traceparents` while there are any."""
    gateway = Gateway(pipeline.client, in_flight=32, telemetry=telemetry)
    sent = list(consultations(seed, events))

    async def one(number: int) -> None:
        event = sent[number]
        await gateway.publish(
            json.dumps(event).encode(),
            event["metadata"]["site_id"],
            event["consultation_id"],
            event["event_id"],
            traceparent=traceparents[number] if number < len(traceparents) else "",
        )

    await asyncio.gather(*(one(number) for number in range(events)))
    return sent


def make_traceparent(sampled: bool) -> str:
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-{'01' if sampled else '00'}"


async def test_metrics_say_what_the_pipeline_did_and_a_trace_leads_from_the_gateway_to_the_commit(
    tmp_path: Path,
) -> None:
    async with OtlpReceiver() as receiver, running(tmp_path, watched(receiver)) as pipeline:
        sampled = [make_traceparent(True) for _ in range(12)]
        unsampled = [make_traceparent(False) for _ in range(60)]
        async with observing(pipeline.supervisor.settings, "fi-gateway", "test", {}) as telemetry:
            sent = await publish(pipeline, 1, 240, sampled + unsampled, telemetry)
        assert receiver.total("fi.accepted.latency") == 240
        gateway = Gateway(pipeline.client)
        bad = dict(sent[0], event_type="NO_SUCH_TYPE", event_id="00000000-0000-4000-8000-000000000001")
        refused = make_traceparent(True)
        site = sent[0]["metadata"]["site_id"]
        await gateway.publish(json.dumps(bad).encode(), site, sent[0]["consultation_id"], "bad", traceparent=refused)
        # The same event under another message id: the servers cannot know it, the sink does.
        await gateway.publish(json.dumps(sent[0]).encode(), site, sent[0]["consultation_id"], "again")
        totals = await pipeline.settled()
        assert totals == (240, 1, 1)
        receipts = {receipt.partition: receipt.origin for receipt in await pipeline.receipts() if receipt.origin}

        def reached(stage: str) -> dict[int, float]:
            return {p: receiver.total("fi.origin.reached", stage=stage, partition=str(p)) for p in receipts}

        async def told() -> bool:
            open_lanes = receiver.total("fi.lanes", state="open") == len(STAGES) * 4
            worked_off = receiver.total("fi.consumer.lag") == 0 and all(reached(stage) == receipts for stage in STAGES)
            return open_lanes and worked_off and receiver.total("fi.events.appended") == 240

        await until(told, "what happened is told while the stages run", 60)
        assert receiver.total("fi.queue.limit", stream="FI_EVENTS") == pipeline.supervisor.settings.events_bytes_max
        # What is recorded in the last moment is exported too.
        for stage in STAGES:
            await pipeline.supervisor.stop_stage(stage)

        assert receiver.total("fi.events.appended") == 240
        assert receiver.total("fi.events.duplicates") == 1
        assert receiver.total("fi.events.failed") == 1
        assert receiver.total("fi.events.failed", stage="ingest", error_type="event_type.unknown") == 1
        # A reader that was opened anew has been given messages again.
        again = receiver.total("fi.reader.opened") > 4 * len(STAGES)
        consumed = receiver.total("messaging.client.consumed.messages", **{TEMPLATE: "fi.raw.{partition}.>"})
        assert consumed == 242 or (again and consumed > 242)
        assert receiver.total("fi.seal.duration") > 0
        for stage, hop in (("ingest", "segment"), ("segment", "hash"), ("hash", "persist")):
            frames = receiver.of("fi.frame.events", stage=stage)
            assert sum(sample.sum for sample in frames) == 241
            sent_frames = receiver.of("messaging.client.sent.messages", **{TEMPLATE: f"fi.{hop}.{{partition}}"})
            assert sum(sample.value for sample in frames) == sum(sample.value for sample in sent_frames)
            read = receiver.total("messaging.client.consumed.messages", **{TEMPLATE: f"fi.{hop}.{{partition}}"})
            published = sum(sample.value for sample in frames)
            assert read == published or (again and read > published)
        assert sum(sample.sum for sample in receiver.of("fi.commit.events")) == 240
        for stage in STAGES:
            latencies = receiver.of(f"fi.{stage}.latency")
            # Every event that the stage took in and passed on, persist's duplicate among them.
            assert sum(sample.value for sample in latencies) == 241
            assert all(0 <= sample.sum < 60 * sample.value for sample in latencies if sample.value)
            assert reached(stage) == receipts
        check_catalogue(receiver)

        for text in sampled:
            check_trace(receiver, text)
        kept = {text.split("-")[1] for text in (*sampled, refused)}
        assert {traced.span.trace_id.hex() for traced in receiver.spans} == kept


@pytest.mark.slow
async def test_a_full_hop_shows_which_one_since_when_and_how_much_waits(tmp_path: Path) -> None:
    """Hops keep what is not committed, so the first of them fills, and ingest waits with what it has read."""
    small = {"partitions": 1, "hop_bytes_max": 2 * MIB, "frame_bytes_max": 64 * 1024}
    async with OtlpReceiver() as receiver, running(tmp_path, watched(receiver, **small)) as pipeline:
        await pipeline.supervisor.stop_stage("persist")
        load = Load(workload(41, 800, padding_bytes=8192))
        await load.publish(pipeline.client, batch=1)

        async def held() -> bool:
            refused = receiver.total("messaging.client.sent.messages", error__type="stream_full")
            return refused > 0 and receiver.total("fi.backpressure.age", stream="FI_SEGMENT") > 1

        await until(held, "a full hop is told", 60)
        assert receiver.total("fi.backpressure.duration") == 0
        last = await pipeline.api.last_message(SEGMENT, output_subject("ingest", 0))
        assert last is not None
        # One event a message, one partition: sequences count what waits.
        waiting = 800 - decode_frame_head(last.data).last

        async def counted() -> bool:
            return receiver.total("fi.consumer.lag", stage="ingest", partition="0") == waiting

        # More than a reader buffers: the server must have been asked for the rest.
        assert waiting > pipeline.supervisor.settings.pull_batch
        await until(counted, f"{waiting} messages wait for ingest", 60)
        await pipeline.supervisor.start_stage("persist")
        await pipeline.assert_whole(load)

        async def released() -> bool:
            return (
                receiver.total("fi.backpressure.age") == 0
                and receiver.total("fi.backpressure.duration", stream="FI_SEGMENT") > 1
                and receiver.total("fi.consumer.lag") == 0
            )

        await until(released, "room is told", 60)


TEMPLATE = "messaging__destination__template"


def check_trace(receiver: OtlpReceiver, traceparent: str) -> None:
    """Gateway → ingest → segment → hash → persist: each span the child of the one before."""
    _, trace_id, parent, _ = traceparent.split("-")
    spans = {traced.service: traced.span for traced in receiver.trace(trace_id)}
    assert set(spans) == {f"fi-{stage}" for stage in STAGES}
    for stage in STAGES:
        span = spans[f"fi-{stage}"]
        assert span.parent_span_id.hex() == parent
        assert span.kind == 5
        assert span.status.code == 0
        attributes = {pair.key: pair.value for pair in span.attributes}
        assert attributes["messaging.system"].string_value == "nats"
        assert attributes["messaging.operation.type"].string_value == "process"
        assert attributes["fi.first_origin"].int_value <= attributes["fi.last_origin"].int_value
        parent = span.span_id.hex()
    assert [event.name for event in spans["fi-persist"].events] == ["durable"]


def check_catalogue(receiver: OtlpReceiver) -> None:
    """What came is what the catalogue says: names, kinds, units, meanings, attributes, buckets."""
    assert receiver.names() - set(CATALOGUE) == set()
    assert set(CATALOGUE) - receiver.names() == NOT_HERE
    for series, sample in receiver.samples.items():
        what, metric = CATALOGUE[series.name], sample.metric
        given = {key for key, _ in series.attributes}
        assert set(what.attributes) <= given <= {*what.attributes, *what.optional}
        assert (metric.unit, metric.description) == (what.unit, what.meaning)
        kinds = {"counter": "sum", "gauge": "gauge", "histogram": "histogram"}
        assert metric.WhichOneof("data") == kinds[what.kind]
        if what.kind == "histogram":
            assert {tuple(point.explicit_bounds) for point in metric.histogram.data_points} == {what.buckets}


@pytest.mark.slow
async def test_a_dead_collector_changes_nothing_and_is_told_of_once(tmp_path: Path) -> None:
    async with OtlpReceiver() as receiver:
        receiver.status = 503
        async with running(tmp_path, watched(receiver, otlp_interval_s=0.1)) as pipeline:
            load = Load(workload(11, 400))
            await load.publish(pipeline.client)
            await pipeline.assert_whole(load)

            async def tried() -> bool:
                return receiver.requests >= 3 * len(STAGES)

            await until(tried, "every stage has tried to export more than once", 60)
            log = (tmp_path / "logs" / "ingest-0.log").read_text()
            assert log.count("does not take telemetry") == 1
            assert "Traceback" not in log
            receiver.status = 200

            async def caught_up() -> bool:
                return receiver.total("fi.events.appended") == 400

            await until(caught_up, "the sums are told once the collector is back", 60)
            await pipeline.supervisor.stop_stage("ingest")
            assert (tmp_path / "logs" / "ingest-0.log").read_text().count("takes telemetry again") == 1


@pytest.mark.slow
async def test_a_collector_that_hangs_does_not_keep_a_stage_from_ending(tmp_path: Path) -> None:
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass
        writer.close()

    hanging = await asyncio.start_server(never, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{hanging.sockets[0].getsockname()[1]}"
    async with hanging, running(tmp_path, settings(otlp_endpoint=url, otlp_interval_s=0.1, drain_s=60.0)) as pipeline:
        load = Load(workload(12, 400))
        await load.publish(pipeline.client)
        await pipeline.assert_whole(load)
        begun_s = time.monotonic()
        await pipeline.supervisor.stop_stage("hash")
        # The last export has 4 s; at the drain limit it would have been killed.
        assert time.monotonic() - begun_s < pipeline.supervisor.settings.drain_s


@pytest.mark.slow
async def test_ingest_starts_a_trace_for_a_share_of_what_comes_without_one(tmp_path: Path) -> None:
    async with OtlpReceiver() as receiver, running(tmp_path, watched(receiver, trace_share=0.25)) as pipeline:
        await publish(pipeline, 5, 400, [make_traceparent(False)] * 100)
        await pipeline.settled()
        for stage in STAGES:
            await pipeline.supervisor.stop_stage(stage)
        by_trace: dict[str, set[str]] = {}
        for traced in receiver.spans:
            by_trace.setdefault(traced.span.trace_id.hex(), set()).add(traced.service)
        # 300 messages at a quarter: fewer than 20 or more than 150 does not happen in the life of the universe.
        assert 20 < len(by_trace) < 150
        assert all(services == {f"fi-{stage}" for stage in STAGES} for services in by_trace.values())


async def test_the_log_lines_of_a_sampled_frame_name_its_trace(tmp_path: Path) -> None:
    async with OtlpReceiver() as receiver, running(tmp_path, watched(receiver)) as pipeline:
        gateway = Gateway(pipeline.client)
        good = next(consultations(21, 1))
        bad = dict(good, event_type="NO_SUCH_TYPE", event_id="00000000-0000-4000-8000-000000000002")
        traceparent = make_traceparent(True)
        site = good["metadata"]["site_id"]
        await gateway.publish(json.dumps(bad).encode(), site, good["consultation_id"], "bad", traceparent=traceparent)
        await gateway.publish(json.dumps(dict(bad, event_id=None)).encode(), site, good["consultation_id"], "worse")
        await pipeline.settled()
        lines = [json.loads(line) for line in (tmp_path / "logs" / "ingest-0.log").read_text().splitlines()]
        letters = [line for line in lines if line["event"].startswith("dead letter")]
        assert len(letters) == 2
        assert letters[0]["trace_id"] == traceparent.split("-")[1]
        await pipeline.supervisor.stop_stage("ingest")
        assert letters[0]["span_id"] in {traced.span.span_id.hex() for traced in receiver.spans}


async def test_without_a_collector_opentelemetry_is_not_loaded() -> None:
    """The modules a stage process of each kind loads, without any setting and with a health port."""
    script = (
        "import sys; from stages.runtime.watch import Watch; from stages.actors import actor; "
        "from pathlib import Path; actor('persist', Path('x')); import stages.persist.actor, stages.persist.flush; "
        "from contracts.settings import Settings; Watch('hash', 'hash', Settings(), {}); import asyncio\n"
        "async def listening():\n"
        "    async with Watch('hash', 'hash', Settings(health_port=0), {}): pass\n"
        "asyncio.run(listening())\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert (process.returncode, out.strip()) == (0, b"[]")
