"""One running pipeline of real processes: real events, hostile ones, readers beside it, and streams hurt by hand.

The servers' memory of message ids is shortened to a tenth of a second, so that everything rests on the pipeline itself.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, NamedTuple
from uuid import UUID, uuid5

import msgspec
import pytest
import pytest_asyncio
from pipeline import DATA, Load, Pipeline, Totals, running, settings, under_load, until, workload

from cluster.gateway import Gateway, RefusedError
from contracts.events import format_rfc3339
from contracts.settings import MIB
from contracts.subjects import EVENTS, HASH, HOPS, STREAMS, partition_of
from contracts.telemetry import DEAD_INDEX, DEAD_ORIGIN, DEAD_REASON, DEAD_STAGE, DEAD_SUBJECT, HEADER_TRACEPARENT
from stages.persist.store import EventStore
from stages.runtime.writer import read_pub_answer

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

PARTITIONS = 8
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    directory = tmp_path_factory.mktemp("pipeline")
    async with running(directory, settings(partitions=PARTITIONS, dedup_window_s=0.1)) as started:
        yield started


async def test_events_are_stored_once_and_a_second_publish_long_after_adds_nothing(pipeline: Pipeline) -> None:
    """Real ones, where they are at hand."""
    load = Load(DATA.read_bytes().splitlines() if DATA.exists() else workload(seed=11, events=1000))
    count = len(load.lines)
    report = await load.publish(pipeline.client)
    assert (report.accepted, report.refused_count) == (count, 0)
    assert await pipeline.assert_whole(load) == Totals(persisted=count, duplicates=0, dead_lettered=0)

    again = await load.publish(pipeline.client)
    assert (again.accepted, again.duplicates) == (count, 0)
    assert await pipeline.assert_whole(load) == Totals(persisted=count, duplicates=count, dead_lettered=0)


async def test_a_consultation_can_be_read_while_the_pipeline_writes(pipeline: Pipeline) -> None:
    load = Load(workload(seed=12, events=2000))
    sent: dict[str, list[str]] = {}
    for line in load.lines:
        event = json.loads(line)
        sent.setdefault(event["consultation_id"], []).append(event["event_id"])
    partial = 0
    async with under_load(load, pipeline.client, rate_per_s=800) as publishing:
        with EventStore(pipeline.shards) as store:
            while not publishing.done():
                for consultation, ids in sent.items():
                    rows = await asyncio.to_thread(store.consultation, UUID(consultation))
                    assert [str(UUID(bytes=row.event.event_id)) for row in rows] == ids[: len(rows)]
                    partial += 0 < len(rows) < len(ids)
    assert partial > 0
    await pipeline.assert_whole(load)


class Hostile(NamedTuple):
    """A message that breaks the contract: (index, reason, original bytes) of each letter it makes."""

    site: str
    consultation: str
    body: bytes
    letters: list[tuple[int, str, bytes]]
    stage: str = "ingest"
    good: int = 0


def event(consultation: str, number: int, **changes: Any) -> dict[str, Any]:
    """A valid event, but for `changes`."""
    return {
        "event_id": str(uuid5(UUID(consultation), str(number))),
        "consultation_id": consultation,
        "timestamp": format_rfc3339(1_767_600_000_000_000_000 + number * 1_000_000_000),
        "event_type": "MESSAGE_RECEIVED",
        "payload": {"message_content": f"number {number}", "message_role": "user"},
        "metadata": {"user_id": "u", "session_id": "s"},
        **changes,
    }


def deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


def hostile_messages(rng: random.Random) -> list[Hostile]:
    """Messages of several consultations; each is surrounded by good ones when published."""
    found: list[Hostile] = []

    def name() -> str:
        return str(UUID(int=rng.getrandbits(128), version=4))

    def whole(reason: str, body: bytes | dict[str, Any], consultation: str, site: str = "clinic-1") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        found.append(Hostile(site, consultation, data, [(0, reason, data)]))

    def with_payload(consultation: str, payload: bytes) -> bytes:
        return json.dumps(event(consultation, 50, payload="@")).encode().replace(b'"@"', payload)

    c = name()
    whole("json.malformed", b"this is not JSON", c)
    whole("json.empty", b"", c)
    whole("json.empty", b" \r\n\t", c)
    whole("event_type.unknown", event(c, 51, event_type="MESSAGE_EATEN"), c)
    whole("event_id.invalid", event(c, 52, event_id="17"), c)
    whole("consultation.mismatch", event(name(), 53), c)
    whole("consultation.invalid", event(c, 54, consultation_id="not-a-uuid"), "not-a-uuid")
    whole("site.invalid", event(c, 55), c, site="a%b")
    whole("site.mismatch", event(c, 56, metadata={"user_id": "u", "session_id": "s", "site_id": "elsewhere"}), c)
    whole("payload.number", with_payload(c, b'{"x": NaN}'), c)
    whole("payload.number", with_payload(c, b'{"x": -Infinity}'), c)
    whole("payload.number", with_payload(c, b'{"x": 1e999}'), c)
    whole("payload.too_large", with_payload(c, b'{"x":"' + b"y" * (3 * MIB // 2) + b'"}'), c)
    whole("payload.depth", with_payload(c, deep(1000)), c)
    whole("payload.utf8", with_payload(c, b'{"x":"\xff\xfe"}'), c)
    whole("timestamp.invalid", event(c, 57, timestamp="yesterday"), c)

    c = name()
    lines = [json.dumps(event(c, 60)).encode(), b'{"broken"', json.dumps(event(c, 61)).encode()]
    found.append(Hostile("clinic-2", c, b"\n".join(lines), [(1, "json.malformed", lines[1])], good=2))

    c = name()
    spaced = json.dumps(event(c, 71, payload={"message_content": "hi"}), indent=None, separators=(" , ", " : "))
    lines = [json.dumps(event(c, 70)).encode(), spaced.encode(), json.dumps(event(c, 72)).encode()]
    found.append(Hostile("clinic-3", c, b"\n\n".join(lines), [(1, "payload.value", lines[1])], "segment", 2))

    c = name()
    commit = json.dumps(event(c, 80, event_type="CONSULTATION_COMMITTED", payload={"soap_data": {}})).encode()
    late = json.dumps(event(c, 81)).encode()
    audit = json.dumps(event(c, 82, event_type="AUDIT_ENTRY_CREATED")).encode()
    reset = json.dumps(event(c, 83, event_type="CONSULTATION_RESET")).encode()
    lines = [commit, late, audit, reset, json.dumps(event(c, 84)).encode()]
    found.append(Hostile("clinic-4", c, b"\r\n".join(lines), [(1, "lifecycle.closed", late)], "segment", 4))
    return found


async def test_whatever_breaks_the_contract_is_dead_lettered_once_and_all_around_it_is_stored(
    pipeline: Pipeline,
) -> None:
    async def by_partition() -> dict[int, Totals]:
        receipts = await pipeline.receipts()
        return {r.partition: Totals(r.persisted, r.duplicates, r.dead_lettered) for r in receipts}

    before = await by_partition()
    known = len(await pipeline.letters())
    persisted: Counter[int] = Counter()
    dead: Counter[int] = Counter()
    expected: dict[tuple[int, int], tuple[Hostile, str, bytes, str]] = {}
    jetstream = pipeline.client.jetstream(timeout=30)
    for number, message in enumerate(hostile_messages(random.Random(7))):
        neighbour = str(UUID(int=number + 1, version=4))
        for place, body in enumerate([b"good", message.body, b"good"]):
            good = body == b"good"
            consultation = neighbour if good else message.consultation
            subject = f"fi.events.{message.site if not good else 'clinic-1'}.{consultation}"
            data = json.dumps(event(consultation, place)).encode() if good else body
            ack = await jetstream.publish(subject, data, headers={HEADER_TRACEPARENT: TRACE})
            _, _, site, _ = subject.split(".")
            partition = partition_of(site, consultation, PARTITIONS)
            persisted[partition] += 1 if good else message.good
            dead[partition] += 0 if good else len(message.letters)
            for index, reason, original in [] if good else message.letters:
                stored_as = f"fi.raw.{partition}.{site}.{consultation}"
                expected[ack.seq, index] = (message, reason, original, stored_as)
    await pipeline.settled()

    letters = (await pipeline.letters())[known:]
    found = {(int(letter.headers[DEAD_ORIGIN]), int(letter.headers[DEAD_INDEX])): letter for letter in letters}
    assert len(found) == len(letters)
    reasons = {key: letter.headers[DEAD_REASON] for key, letter in found.items()}
    assert reasons == {key: reason for key, (_, reason, _, _) in expected.items()}
    for key, (message, _, original, stored_as) in expected.items():
        letter = found[key]
        assert letter.data == original
        assert letter.headers[DEAD_STAGE] == message.stage
        assert letter.headers[DEAD_SUBJECT] == stored_as
        assert letter.headers[HEADER_TRACEPARENT] == TRACE
        assert letter.subject.startswith(f"fi.dlq.{message.stage}.")
    for partition, totals in (await by_partition()).items():
        assert totals.persisted - before[partition].persisted == persisted[partition]
        assert totals.dead_lettered - before[partition].dead_lettered == dead[partition]
        assert totals.duplicates == before[partition].duplicates


RAW = [
    ("a subject that is not UTF-8", b"a\xff", b"", "site.invalid"),
    ("a subject with a vertical tab", b"a\x0bb", b"", "site.invalid"),
    ("a status that is not UTF-8", b"clinic-1", b"NATS/1.0 \xff\xff\xff\r\n\r\n", ""),
    ("a site with a form feed", b"a\x0cb", b"NATS/1.0\r\nA: b\r\n\r\n", "site.invalid"),
    ("a site with a zero byte", b"a\x00b", b"", "site.invalid"),
    ("a header block of one byte", b"clinic-1", b"X", ""),
    ("a header block of noise", b"clinic-1", b"\xff" * 40, ""),
    ("headers that are not UTF-8", b"clinic-1", b"NATS/1.0\r\ntraceparent: \xff\r\n\xff: x\r\nfoo\r\n\r\n", ""),
    ("a forged heartbeat", b"clinic-1", b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 9\r\n\r\n", ""),
    ("a forged end of stream", b"clinic-1", b"NATS/1.0 409 Consumer Deleted\r\nStatus: 503\r\n\r\n", ""),
]


@pytest.mark.parametrize(("name", "site", "headers", "reason"), RAW, ids=[name for name, *_ in RAW])
async def test_no_bytes_a_publisher_can_send_stop_the_pipeline(
    pipeline: Pipeline, name: str, site: bytes, headers: bytes, reason: str
) -> None:
    consultation = str(UUID(int=len(name), version=4))
    body = json.dumps(event(consultation, 1)).encode()
    subject = b"fi.events." + site + b"." + consultation.encode()
    if headers:
        head = b"HPUB %s %d %d\r\n" % (subject, len(headers), len(headers) + len(body))
    else:
        head = b"PUB %s %d\r\n" % (subject, len(body))
    before, known = await pipeline.totals(), await pipeline.letters()
    await send_raw(pipeline.supervisor.urls[0], head + headers + body + b"\r\n")

    async def counted() -> bool:
        totals = await pipeline.totals()
        return sum(totals) == sum(before) + 1

    await until(counted, f"{name} is stored or dead-lettered", 30)
    letters = (await pipeline.letters())[len(known) :]
    assert [letter.headers[DEAD_REASON] for letter in letters] == ([reason] if reason else [])
    assert [letter.data for letter in letters] == ([body] if reason else [])


async def send_raw(url: str, data: bytes) -> None:
    """Speaks the wire protocol itself: no client library would send this."""
    host, _, port = url.removeprefix("nats://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        await reader.readline()
        writer.write(b'CONNECT {"verbose":false,"pedantic":false,"headers":true}\r\n' + data + b"PING\r\n")
        async with asyncio.timeout(10):
            assert await reader.readline() == b"PONG\r\n"
    finally:
        writer.close()
        await writer.wait_closed()


async def test_what_can_be_refused_at_once_is_refused_when_published(pipeline: Pipeline) -> None:
    last = (await pipeline.client.jetstream().stream_info(EVENTS)).state.last_seq
    consultation = str(UUID(int=99, version=4))
    wanted = {"site.invalid": {"user_id": "u", "session_id": "s", "site_id": "../../x"}}
    lines = [json.dumps(event(consultation, 1, metadata=metadata)).encode() for metadata in wanted.values()]
    lines.append(json.dumps(event(consultation, 2, payload={"x": "y" * (2 * MIB)})).encode())
    report = await Load(lines).publish(pipeline.client)
    assert [line.reason for line in report.refused] == ["site.invalid", "message.too_large"]

    large = json.dumps(event(consultation, 3, payload={"x": "y" * (2 * MIB)})).encode()
    with pytest.raises(RefusedError, match="too large"):
        await Gateway(pipeline.client).publish(large, "clinic-1", consultation, "x")
    subject = f"fi.events.clinic-1.{consultation}"
    answer = await pipeline.client.request(subject, large, timeout=30)
    refused = read_pub_answer(answer.data, EVENTS, subject).error
    assert refused is not None
    assert "exceeds" in refused.description
    assert (await pipeline.client.jetstream().stream_info(EVENTS)).state.last_seq == last


async def test_full_messages_of_the_smallest_events_with_the_longest_names_pass(pipeline: Pipeline) -> None:
    """What the stages add to each event must not make a frame that no server takes."""
    consultation, site = str(UUID(int=98, version=4)), "s" * 64
    small = f'{{"consultation_id":"{consultation}","event_type":"CONTEXT_UPDATED","payload":{{}},'
    line = f'{small}"metadata":{{"user_id":"u","session_id":"s"}}}}\n'.encode()
    count = (2 * MIB - 1024) // len(line)
    trace = f"01{TRACE[2:]}-{'x' * 200}"
    before = await pipeline.totals()
    jetstream = pipeline.client.jetstream(timeout=30)
    for _ in range(2):
        await jetstream.publish(f"fi.events.{site}.{consultation}", line * count, headers={HEADER_TRACEPARENT: trace})
    totals = await pipeline.settled()
    assert totals.persisted - before.persisted == 2 * count
    assert totals.dead_lettered == before.dead_lettered


async def test_streams_hurt_by_hand_under_load_lose_double_and_reorder_nothing(pipeline: Pipeline) -> None:
    rng = random.Random(5)
    load = Load(workload(seed=13, events=5000))
    client = pipeline.client
    async with under_load(load, client, rate_per_s=700):
        purges = [(stream, f"fi.{stream.removeprefix('FI_').lower()}.*") for stream in HOPS]
        for number, (stream, subjects) in enumerate(purges, 1):
            await load.reached(400 * number + rng.randrange(200))
            await pipeline.api.purge(stream, subjects)
        for number, stream in enumerate((EVENTS, *HOPS), 1):
            await load.reached(1600 + 300 * number + rng.randrange(100))
            assert await delete_consumers(pipeline, stream) >= PARTITIONS
        for number, stream in enumerate(STREAMS, 1):
            await load.reached(3100 + 200 * number + rng.randrange(100))
            await pipeline.api.request(stream, f"$JS.API.STREAM.LEADER.STEPDOWN.{stream}", b"")
    await pipeline.assert_whole(load)


async def test_frames_missing_before_the_last_are_noticed_and_made_again(pipeline: Pipeline) -> None:
    """The purge leaves each writer its last frame, so that only the reader can see that something is gone."""
    load = Load(workload(seed=14, events=1500))
    jetstream = pipeline.client.jetstream(timeout=30)
    async with under_load(load, pipeline.client, rate_per_s=1000):
        await load.reached(100)
        pipeline.supervisor.freeze("hash-0")
        try:

            async def waiting() -> bool:
                frames = (await jetstream.stream_info(HASH, subjects_filter="fi.hash.*")).state.subjects or {}
                return sum(count >= 3 for count in frames.values()) >= PARTITIONS // 2

            await until(waiting, "frames wait for hash in half of the partitions", 60)
            for partition in range(PARTITIONS):
                await pipeline.api.purge(HASH, f"fi.hash.{partition}", keep=1)
        finally:
            pipeline.supervisor.thaw("hash-0")
    await pipeline.assert_whole(load)


async def delete_consumers(pipeline: Pipeline, stream: str) -> int:
    """Deletes every consumer of a stream; how many there were."""
    answer = await pipeline.api.request(stream, f"$JS.API.CONSUMER.NAMES.{stream}", b"")
    names: list[str] = msgspec.json.decode(answer)["consumers"] or []
    for name in names:
        # It may have gone by itself: the reader that made it has a newer one.
        await pipeline.client.request(f"$JS.API.CONSUMER.DELETE.{stream}.{name}", b"", timeout=30)
    return len(names)
