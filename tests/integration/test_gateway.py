"""A gateway against real servers: order, duplicates, lost answers, back-pressure, refused lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import TimeoutError
from nats.js import JetStreamContext
from nats.js.api import StorageType, StreamConfig

from cluster.gateway import Accepted, Gateway, RefusedError, batch_id
from cluster.nodes import EmbeddedCluster
from cluster.publish import LinePublisher, PublishReport
from cluster.testing.waiting import until
from cluster.workload import consultations
from contracts.errors import ClusterUnavailableError, TopologyError
from contracts.events import BODY_BYTES_MAX, MESSAGE_BYTES_MAX
from contracts.letters import FirstSeen
from contracts.subjects import EVENTS
from stages.runtime.client import GuardedClient
from stages.runtime.connection import connect

pytestmark = pytest.mark.cluster


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedCluster]:
    async with EmbeddedCluster(tmp_path, servers=1) as cluster:
        yield cluster


@pytest_asyncio.fixture
async def client(server: EmbeddedCluster) -> AsyncIterator[GuardedClient]:
    connection = await connect(server.urls, "test")
    yield connection
    await connection.close()


async def make_stream(client: Client, **changes: Any) -> JetStreamContext:
    jetstream = client.jetstream()
    config = StreamConfig(name=EVENTS, subjects=["fi.events.*.*"], storage=StorageType.FILE, discard="new")  # type: ignore[arg-type]
    await jetstream.add_stream(config.evolve(**changes))
    return jetstream


async def stored(jetstream: JetStreamContext) -> list[dict[str, Any]]:
    state = (await jetstream.stream_info(EVENTS)).state
    events = []
    for seq in range(state.first_seq, state.last_seq + 1):
        message = await jetstream.get_msg(EVENTS, seq)
        events += [json.loads(line) for line in (message.data or b"").splitlines()]
    return events


async def lines_of(events: list[dict[str, Any]] | list[bytes]) -> AsyncIterator[bytes]:
    for event in events:
        yield event if isinstance(event, bytes) else json.dumps(event, ensure_ascii=False).encode()


def by_consultation(events: list[dict[str, Any]]) -> dict[str, list[str]]:
    lanes: dict[str, list[str]] = {}
    for event in events:
        lanes.setdefault(event["consultation_id"], []).append(event["event_id"])
    return lanes


def made_up(count: int, seed: int = 1) -> list[dict[str, Any]]:
    return list(islice(consultations(seed, count), count))


@pytest.mark.parametrize("batch", [1, 20])
async def test_every_event_is_stored_once_in_the_order_of_its_consultation(client: Client, batch: int) -> None:
    jetstream = await make_stream(client)
    events = made_up(600)
    report = await LinePublisher(Gateway(client, in_flight=8), batch=batch).run(lines_of(events))
    found = await stored(jetstream)
    assert by_consultation(found) == by_consultation(events)
    assert (report.lines, report.published, report.accepted, report.duplicates) == (600, 600, 600, 0)
    messages = (await jetstream.stream_info(EVENTS)).state.messages
    assert len(report.latencies_ns) == messages
    assert messages == 600 if batch == 1 else messages < 600


async def test_calls_for_one_consultation_take_effect_in_call_order(client: Client) -> None:
    jetstream = await make_stream(client)
    gateway = Gateway(client)
    consultation = str(UUID(int=1))
    bodies = [b'{"event_id":"%d","consultation_id":"c"}' % i for i in range(200)]
    accepted = await asyncio.gather(
        *(gateway.publish(body, "clinic-1", consultation, f"id-{i}") for i, body in enumerate(bodies))
    )
    assert [answer.origin for answer in accepted] == list(range(1, 201))
    assert all(answer.latency_ns > 0 for answer in accepted)
    assert [event["event_id"] for event in await stored(jetstream)] == [str(i) for i in range(200)]


async def test_order_holds_when_a_call_gives_up_with_others_behind_it(client: Client) -> None:
    jetstream = await make_stream(client, max_bytes=2000)
    gateway = Gateway(client)
    await gateway.publish(b"{}" + b" " * 1200, "a", str(UUID(int=9)), "filler")

    def publish(number: int) -> Coroutine[Any, Any, Accepted]:
        return gateway.publish(b"%d" % number + b" " * 600, "a", str(UUID(int=1)), f"id-{number}", deadline_s=0.5)

    calls = [asyncio.create_task(publish(number)) for number in (1, 2, 3)]
    with pytest.raises(ClusterUnavailableError, match="publish it again"):
        await calls[0]
    await jetstream.update_stream((await jetstream.stream_info(EVENTS)).config.evolve(max_bytes=10**6))
    for number in (1, 2, 3):
        await publish(number)
    for call, number in zip(calls[1:], (2, 3), strict=True):
        with pytest.raises(ClusterUnavailableError, match=f"message id-{number} was not tried, because id-1 before it"):
            await call
    assert (await stored(jetstream))[1:] == [1, 2, 3]
    assert not gateway._lanes


async def test_a_gateway_that_sent_nothing_yet_serves_the_loop_of_its_connection_alone(client: Client) -> None:
    """After a fork too: the parent would get the answers of the child, and take them for those of its own messages."""
    await make_stream(client)
    gateway = Gateway(client)
    call = gateway.publish(b"1", "clinic-1", str(UUID(int=1)), "id-1", deadline_s=0)
    with pytest.raises(RuntimeError, match="another event loop or process"):
        await asyncio.to_thread(asyncio.run, call)
    assert (await gateway.publish(b"2", "clinic-1", str(UUID(int=1)), "id-2")).origin == 1


async def test_the_same_file_twice_adds_nothing_also_where_events_have_no_ids(client: Client) -> None:
    jetstream = await make_stream(client)
    events = made_up(200)
    for event in events[::2]:
        del event["event_id"]
    events.append(dict(events[0]))
    events[4]["event_id"] = None
    first = await LinePublisher(Gateway(client)).run(lines_of(events))
    second = await LinePublisher(Gateway(client)).run(lines_of(events))
    assert (first.accepted, first.duplicates) == (201, 0)
    assert (second.accepted, second.duplicates) == (201, 201)
    found = await stored(jetstream)
    assert len({event["event_id"] for event in found}) == len(found) == 201


async def test_an_answer_lost_with_the_server_makes_a_retry_not_a_second_event(
    server: EmbeddedCluster, client: Client
) -> None:
    jetstream = await make_stream(client)
    events = made_up(3000)
    gateway = Gateway(client, in_flight=32, timeout_s=0.5)
    publisher = LinePublisher(gateway, rate_per_s=1500)
    running = asyncio.create_task(publisher.run(lines_of(events)))
    for count in (400, 1200):
        await until(lambda target=count: publisher.report.accepted >= target, "so many messages are accepted")
        await server.nodes[0].kill()
        await server.nodes[0].start()
    report = await running
    assert (report.accepted, report.duplicates) == (3000, 0)
    assert report.retries > 0
    found = await stored(jetstream)
    assert len(found) == 3000
    assert by_consultation(found) == by_consultation(events)


class ForgetfulClient:
    """A connection that loses the first answers: what was asked for has happened all the same."""

    is_connected = True
    loop = None

    def __init__(self, client: Client, losses: int) -> None:
        self.max_payload = client.max_payload
        self._client = client
        self._losses = losses

    def note_stream(self, *, answers: bool) -> None:
        """There is no other server."""

    async def request(self, *args: Any, **kwargs: Any) -> Msg:
        reply = await self._client.request(*args, **kwargs)
        if self._losses:
            self._losses -= 1
            raise TimeoutError
        return reply


async def test_a_lost_answer_is_no_second_event_and_no_duplicate(client: Client) -> None:
    jetstream = await make_stream(client)
    gateway = Gateway(ForgetfulClient(client, losses=2))  # type: ignore[arg-type]
    accepted = await gateway.publish(a_line(), "clinic-1", str(UUID(int=1)), "id-1")
    assert (accepted.origin, accepted.duplicate, gateway.retries) == (1, False, 2)
    assert len(await stored(jetstream)) == 1
    again = await Gateway(client).publish(a_line(), "clinic-1", str(UUID(int=1)), "id-1")
    assert (again.origin, again.duplicate) == (1, True)


async def test_a_full_stream_holds_the_gateway_until_there_is_room(client: Client) -> None:
    jetstream = await make_stream(client, max_bytes=64 * 1024)
    events = made_up(300)
    gateway = Gateway(client, in_flight=4)
    publisher = LinePublisher(gateway)
    running = asyncio.create_task(publisher.run(lines_of(events)))
    await until(lambda: gateway.held_s > 0, "the gateway holds a message")
    held_at = publisher.report.accepted
    assert held_at < 300
    early = await stored(jetstream)
    await jetstream.update_stream((await jetstream.stream_info(EVENTS)).config.evolve(max_bytes=64 * 1024 * 1024))
    report = await running
    assert report.accepted == 300
    assert report.held_s > 0
    assert report.refused_count == 0
    found = await stored(jetstream)
    assert found[: len(early)] == early
    assert by_consultation(found) == by_consultation(events)


def a_line(**changes: Any) -> bytes:
    return json.dumps({**made_up(1)[0], **changes}).encode()


async def test_bad_lines_are_refused_with_number_field_and_reason_and_the_rest_is_published(client: Client) -> None:
    await make_stream(client)
    metadata = made_up(1)[0]["metadata"]
    deep = a_line(payload="@").replace(b'"@"', b'{"a":' * 1000 + b"1" + b"}" * 1000)
    lines: list[tuple[bytes, str, str]] = [
        (a_line(), "", ""),
        (b"not json", "json.malformed", ""),
        (b"", "", ""),
        (a_line(event_type="NO_SUCH"), "event_type.unknown", "event_type"),
        (a_line(event_id="7"), "event_id.invalid", "event_id"),
        (a_line(consultation_id="7"), "consultation.invalid", "consultation_id"),
        (a_line(metadata={**metadata, "site_id": "../../x"}), "site.invalid", "site"),
        (a_line(metadata={**metadata, "site_id": None}), "site.missing", "metadata.site_id"),
        (a_line(payload={"a": float("nan")}), "payload.number", "payload.a"),
        (a_line(payload={"a": "x" * 1_100_000}), "payload.too_large", "payload"),
        (a_line(payload={"a": "x" * 2_200_000}), "message.too_large", ""),
        (deep, "payload.depth", "payload"),
        (a_line(payload="@").replace(b'"@"', b'{"a":"\xff"}'), "payload.utf8", "payload"),
        (a_line(event_id=str(UUID(int=5))), "", ""),
    ]
    report = await LinePublisher(Gateway(client)).run(lines_of([line for line, _, _ in lines]))
    assert [(refused.line, refused.reason, refused.field) for refused in report.refused] == [
        (number, reason, field) for number, (_, reason, field) in enumerate(lines, 1) if reason
    ]
    assert (report.accepted, report.refused_count, report.lines) == (2, 11, 13)


async def test_what_the_cluster_will_never_take_is_refused_and_the_rest_goes_on(client: Client) -> None:
    await make_stream(client, max_msg_size=4096)
    events = made_up(20)
    events[7]["payload"] = {"message_content": "x" * 5000, "message_role": "user"}
    report = await LinePublisher(Gateway(client)).run(lines_of(events))
    assert report.accepted == 19
    assert [(refused.line, refused.reason) for refused in report.refused] == [(8, "message.refused")]
    with pytest.raises(RefusedError, match="too large"):
        await Gateway(client).publish(b"x" * 9_000_000, "a", str(UUID(int=1)), "id")


async def test_the_largest_message_is_taken_with_all_of_its_headers(client: Client) -> None:
    jetstream = await make_stream(client, max_msg_size=MESSAGE_BYTES_MAX)
    gateway = Gateway(client)
    assert gateway.message_bytes_max == BODY_BYTES_MAX
    await gateway.publish(
        b"x" * BODY_BYTES_MAX,
        "clinic-1",
        str(UUID(int=1)),
        # As `dlq replay` makes it.
        f"replay:{UUID(int=1).hex}:{2**63 - 1}:{2**63 - 1}:{UUID(int=2).hex}",
        traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        first_seen=str(FirstSeen(2**63 - 1, 2**63 - 1, 32 * 1024)),
    )
    assert (await jetstream.stream_info(EVENTS)).state.messages == 1


async def test_without_a_stream_a_gateway_tries_until_its_deadline(client: Client) -> None:
    with pytest.raises(ClusterUnavailableError, match="nothing will be doubled"):
        await Gateway(client).publish(b"{}", "a", str(UUID(int=1)), "id", deadline_s=0.3)
    with pytest.raises(ClusterUnavailableError):
        await LinePublisher(Gateway(client), deadline_s=0.3).run(lines_of(made_up(50)))


async def test_a_deadline_holds_while_no_server_is_there(server: EmbeddedCluster, client: Client) -> None:
    await make_stream(client)
    gateway = Gateway(client, timeout_s=0.2)
    await gateway.publish(b"{}", "a", str(UUID(int=1)), "id-0")
    await server.nodes[0].kill()
    async with asyncio.timeout(20):
        with pytest.raises(ClusterUnavailableError, match="nothing will be doubled"):
            await gateway.publish(b"{}", "a", str(UUID(int=1)), "id-1", deadline_s=1.0)


async def test_a_subject_that_another_stream_stores_is_told(client: Client) -> None:
    await client.jetstream().add_stream(name="OTHER", subjects=["fi.events.>"])
    with pytest.raises(TopologyError, match="fictl cluster plan"):
        await Gateway(client).publish(b"{}", "a", str(UUID(int=1)), "id")


@pytest.mark.parametrize(
    "answer",
    [b'{"ok":true}', b'{"stream":"FI_EVENTS"}', b'{"stream":"OTHER","seq":1}', b'{"stream":"\xff"}', b"yes"],
    ids=["no acknowledgement", "no sequence", "another stream", "no text", "no JSON"],
)
async def test_an_answer_that_is_not_the_streams_is_no_acceptance(
    server: EmbeddedCluster, client: Client, answer: bytes
) -> None:
    async def respond(message: Msg) -> None:
        await message.respond(answer)

    other = await connect(server.urls, "other")
    await other.subscribe("fi.events.>", cb=respond)
    await other.flush()
    with pytest.raises(TopologyError, match="something else than FI_EVENTS answers"):
        await Gateway(client).publish(b"{}", "a", str(UUID(int=1)), "id", deadline_s=10)
    await other.close()


async def test_a_rate_is_kept(client: Client) -> None:
    await make_stream(client)
    report: PublishReport = await LinePublisher(Gateway(client), rate_per_s=200).run(lines_of(made_up(100)))
    assert report.elapsed_s >= 0.49


async def test_each_acceptance_is_told_with_its_lines(client: Client) -> None:
    await make_stream(client)
    told: list[tuple[int, list[str]]] = []
    publisher = LinePublisher(
        Gateway(client),
        batch=10,
        on_accepted=lambda accepted, lines: told.append((accepted.origin, [line.event_id for line in lines])),
    )
    events = made_up(100)
    await publisher.run(lines_of(events))
    assert sorted(origin for origin, _ in told) == list(range(1, len(told) + 1))
    assert sorted(event_id for _, ids in told for event_id in ids) == sorted(event["event_id"] for event in events)


async def test_nothing_is_remembered_of_finished_consultations(client: Client) -> None:
    await make_stream(client)
    gateway = Gateway(client)
    await LinePublisher(gateway).run(lines_of(made_up(200)))
    assert not gateway._lanes


def test_the_id_of_a_batch_is_that_of_its_events_in_order() -> None:
    assert batch_id(["a"]) == "a"
    assert batch_id(["a", "b"]) == batch_id(["a", "b"])
    assert len({batch_id(["a", "b"]), batch_id(["b", "a"]), batch_id(["a", "b", "c"]), batch_id(["a/b"])}) == 4
