"""What makes the simulation honest: one script of requests, answered by the model and by real servers, compared."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import NoRespondersError

from cluster.apply import apply
from cluster.testing.sim.broker import Broker
from cluster.testing.sim.loop import Host, VirtualLoop
from cluster.testing.sim.network import Network
from cluster.testing.waiting import until
from cluster.topology import streams
from contracts.settings import Settings
from stages.runtime.facts import read_cluster
from stages.runtime.headers import parse_headers

pytestmark = pytest.mark.cluster

HOP, RAW = "fi.segment.0", "fi.events.clinic-1.c1"
SETTINGS = Settings(partitions=2, hop_bytes_max=8192)
SECOND_NS = 1_000_000_000
STATUS_HEADERS = ("Status", "Description", "Nats-Last-Consumer", "Nats-Last-Stream", "Nats-Pending-Messages")


class Script:
    """Asks a cluster, and notes what it is answered, without what is never the same twice."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.notes: list[Any] = []
        self.unheard: set[str] = set()
        """Consumers that were made and have answered nothing yet."""

    async def publish(self, subject: str, data: bytes, **headers: str) -> None:
        named = {f"Nats-{name.replace('_', '-')}": value for name, value in headers.items()}
        try:
            reply = await self.client.request(subject, data, timeout=5, headers=named)
        except NoRespondersError:
            self.notes.append((subject, "nobody listens"))
        else:
            answer = msgspec.json.decode(reply.data)
            answer.pop("val", None)
            self.notes.append((subject, headers, answer))

    async def ask(self, what: str, **body: Any) -> None:
        reply = await self.client.request(f"$JS.API.{what}", msgspec.json.encode(body) if body else b"", timeout=5)
        answer = msgspec.json.decode(reply.data)
        noted = {key: answer[key] for key in ("error", "success", "purged", "num_pending", "name") if key in answer}
        if "message" in answer:
            message = msgspec.json.decode(reply.data, type=Got).message
            noted["message"] = (message.subject, message.seq, message.data, parse_headers(message.hdrs))
        if "state" in answer:
            noted["state"] = {key: answer["state"][key] for key in ("messages", "first_seq", "last_seq")}
        self.notes.append((what, body, noted))

    async def holds(self, stream: str, subject: str) -> bool:
        """True while the last message of `subject` has data: an expired key leaves a marker, or nothing. Not noted."""
        body = msgspec.json.encode({"last_by_subj": subject})
        reply = await self.client.request(f"$JS.API.STREAM.MSG.GET.{stream}", body, timeout=5)
        return bool(msgspec.json.decode(reply.data).get("message", {}).get("data"))

    async def consumer(self, name: str, start: int, subject: str = HOP, stream: str = "FI_SEGMENT") -> None:
        config = {
            "name": name,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": start,
            "ack_policy": "none",
            "filter_subject": subject,
            "num_replicas": 1,
            "mem_storage": True,
            "inactive_threshold": 20 * SECOND_NS,
        }
        await self.ask(f"CONSUMER.CREATE.{stream}.{name}.{subject}", stream_name=stream, config=config, action="create")
        self.unheard.add(name)

    async def pull(
        self,
        name: str,
        until: int,
        *,
        during: Any = None,
        after: int = 0,
        stream: str = "FI_SEGMENT",
        beats: bool = True,
        **request: int,
    ) -> None:
        """Pulls, and notes the first `until` messages and statuses. `during`: awaited once `after` of them have come.

        Without `beats` heartbeats are passed over: how many come before a time is over depends on the machine.
        """
        arrived: asyncio.Queue[Msg] = asyncio.Queue()
        inbox = self.client.new_inbox()
        subscription = await self.client.subscribe(inbox, cb=arrived.put)
        asking = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}", msgspec.json.encode(request), inbox
        await self.client.publish(*asking)
        came = 0
        async with asyncio.timeout(30):
            while came < until:
                if during is not None and came == after:
                    await during
                    during = None
                message = await arrived.get()
                headers = message.headers or {}
                status = headers.get("Status")
                if not beats and status == "100":
                    continue
                if status == "503" and name in self.unheard:
                    # Our server has not heard of the new consumer yet.
                    await self.client.publish(*asking)
                    continue
                self.unheard.discard(name)
                came += 1
                if message.subject == inbox:
                    # nats-py takes the header after a bare status for its description.
                    kept = STATUS_HEADERS[:1] if status == "503" else STATUS_HEADERS
                    self.notes.append((name, {key: headers[key] for key in kept if key in headers}))
                else:
                    tokens = message.reply.split(".")
                    self.notes.append((name, message.subject, message.data, [*tokens[2:7], tokens[8]]))
        await subscription.unsubscribe()

    async def last_of_each(self, stream: str, *patterns: str) -> None:
        arrived: asyncio.Queue[Msg] = asyncio.Queue()
        inbox = self.client.new_inbox()
        subscription = await self.client.subscribe(inbox, cb=arrived.put)
        await self.client.publish(
            f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode({"multi_last": patterns}), reply=inbox
        )
        while True:
            async with asyncio.timeout(10):
                message = await arrived.get()
            headers = message.headers or {}
            kept = ("Status", "Description", "Nats-Stream", "Nats-Subject", "Nats-Sequence", "Nats-TTL")
            self.notes.append((stream, message.data, {key: headers[key] for key in kept if key in headers}))
            if "Status" in headers:
                break
        await subscription.unsubscribe()


class GotMessage(msgspec.Struct):
    subject: str
    seq: int
    data: bytes = b""
    hdrs: bytes = b""


class Got(msgspec.Struct):
    message: GotMessage


async def publishing(ask: Script) -> None:
    await ask.publish(RAW, b"one", Msg_Id="a", Expected_Stream="FI_EVENTS")
    await ask.publish(RAW, b"one", Msg_Id="a")
    await ask.publish(RAW, b"two", Expected_Stream="FI_HASH")
    await ask.publish("fi.events.too.many.tokens", b"x")
    await ask.publish("fi.nobody", b"x")
    await ask.publish(RAW, bytes(2 * 1024 * 1024 + 1))
    for seq in (1, 2, 99):
        await ask.ask("STREAM.MSG.GET.FI_EVENTS", seq=seq)
    await ask.ask("STREAM.MSG.GET.FI_EVENTS", last_by_subj="fi.raw.*.clinic-1.>")
    await ask.publish("fi.segment.1", bytes(5000))
    await ask.publish("fi.segment.1", bytes(5000))
    await ask.ask("STREAM.PURGE.FI_SEGMENT")
    await ask.ask("STREAM.INFO.FI_SEGMENT")


async def fencing(ask: Script) -> None:
    await ask.ask("STREAM.MSG.GET.FI_SEGMENT", last_by_subj=HOP)
    await ask.publish(HOP, b"1", Msg_Id="w:0", Expected_Last_Subject_Sequence="0")
    await ask.publish(HOP, b"1", Msg_Id="w:0", Expected_Last_Subject_Sequence="0")
    await ask.publish(HOP, b"x", Msg_Id="v:0", Expected_Last_Subject_Sequence="0")
    await ask.publish(HOP, b"x", Msg_Id="v:9", Expected_Last_Subject_Sequence="9")
    await ask.publish("fi.segment.1", b"other", Expected_Last_Subject_Sequence="0")
    await ask.publish("fi.segment.1", b"other", Msg_Id="w:0", Expected_Last_Subject_Sequence="7")
    await ask.publish(HOP, b"2", Msg_Id="w:2", Expected_Last_Subject_Sequence="2")
    await ask.publish(HOP, b"3", Msg_Id="w:4", Expected_Last_Subject_Sequence="2")
    await ask.ask("STREAM.MSG.GET.FI_SEGMENT", last_by_subj=HOP)
    await ask.ask("STREAM.MSG.GET.FI_SEGMENT", seq=1, next_by_subj="fi.segment.1")
    await ask.ask("STREAM.MSG.GET.FI_SEGMENT", seq=9, next_by_subj=HOP)
    await ask.ask("STREAM.MSG.GET.FI_NOTHING", last_by_subj=HOP)
    await ask.ask("STREAM.INFO.FI_NOTHING")


async def reading(ask: Script) -> None:
    for number in range(4):
        await ask.publish(HOP, b"%d" % number)
    await ask.consumer("r1", 2)
    await ask.consumer("r1", 2)
    await ask.pull("r1", 2, batch=2, expires=5 * SECOND_NS)
    await ask.pull("r1", 2, batch=5, expires=SECOND_NS, idle_heartbeat=SECOND_NS // 2 - 1_000_000, beats=False)
    await ask.ask("CONSUMER.INFO.FI_SEGMENT.r1")
    await ask.consumer("beyond", 1000)
    await ask.pull(
        "beyond",
        1,
        during=ask.publish(HOP, b"not delivered"),
        batch=5,
        expires=5 * SECOND_NS,
        idle_heartbeat=SECOND_NS // 2,
    )
    await ask.pull(
        "r1",
        2,
        during=ask.ask("CONSUMER.DELETE.FI_SEGMENT.r1"),
        after=1,
        batch=5,
        expires=5 * SECOND_NS,
        idle_heartbeat=SECOND_NS,
    )
    await ask.pull("r1", 1, batch=1, expires=SECOND_NS)
    await ask.ask("CONSUMER.INFO.FI_SEGMENT.r1")
    await ask.consumer("lost", 1, stream="FI_NOTHING")
    await ask.publish(RAW, bytes(3000))
    await ask.consumer("small", 1, "fi.raw.1.>", "FI_EVENTS")
    await ask.consumer("small-0", 1, "fi.raw.0.>", "FI_EVENTS")
    for name in ("small", "small-0"):
        await ask.pull(name, 1, stream="FI_EVENTS", batch=3, expires=SECOND_NS, max_bytes=1000)


async def purging(ask: Script) -> None:
    for number in range(4):
        await ask.publish(HOP, b"%d" % number, Msg_Id=f"p{number}")
    await ask.publish("fi.segment.1", b"other")
    await ask.ask("STREAM.PURGE.FI_SEGMENT", filter=HOP, seq=2, keep=1)
    await ask.ask("STREAM.PURGE.FI_SEGMENT", filter=HOP, seq=3)
    await ask.ask("STREAM.INFO.FI_SEGMENT")
    await ask.ask("STREAM.PURGE.FI_SEGMENT", filter=HOP, keep=1)
    await ask.ask("STREAM.PURGE.FI_SEGMENT", filter=HOP, seq=1000)
    await ask.ask("STREAM.MSG.GET.FI_SEGMENT", last_by_subj=HOP)
    await ask.publish(HOP, b"again", Msg_Id="p3", Expected_Last_Subject_Sequence="0")
    await ask.publish(HOP, b"anew", Msg_Id="q", Expected_Last_Subject_Sequence="4")
    await ask.publish(HOP, b"anew", Msg_Id="q", Expected_Last_Subject_Sequence="0")
    await ask.ask("STREAM.PURGE.FI_SEGMENT")
    await ask.publish(HOP, b"last", Expected_Last_Subject_Sequence="0")
    await ask.ask("STREAM.INFO.FI_SEGMENT")
    await ask.ask("STREAM.MSG.DELETE.FI_SEGMENT", seq=7)
    await ask.ask("STREAM.PURGE.FI_NOTHING")


async def keeping(ask: Script) -> None:
    key = "$KV.FI_MEMBERS.member.ingest.n.a"
    await ask.last_of_each("KV_FI_MEMBERS", "$KV.FI_MEMBERS.member.ingest.*.*")
    await ask.publish(key, b"1", TTL="60s", Expected_Stream="KV_FI_MEMBERS")
    await ask.publish(key, b"2", TTL="60s")
    await ask.publish(key.replace(".a", ".b"), b"3", TTL="1s")
    await ask.last_of_each("KV_FI_MEMBERS", "$KV.FI_MEMBERS.member.ingest.*.*", "$KV.FI_MEMBERS.other")

    async def expired() -> bool:
        return not await ask.holds("KV_FI_MEMBERS", key.replace(".a", ".b"))

    await until(expired, "the key with a time to live expires", 30)
    await ask.last_of_each("KV_FI_MEMBERS", "$KV.FI_MEMBERS.member.ingest.*.*")


PARTS = (publishing, fencing, reading, purging, keeping)


def modelled(part: Any) -> list[Any]:
    """What the model answers."""
    rng = random.Random(1)
    loop = VirtualLoop(lambda: 0.001)
    broker = Broker(loop, rng, streams(SETTINGS, "c" * 32))
    host = Host("test")

    async def run() -> list[Any]:
        client = Network(broker, rng).connect("test", host)
        facts = await read_cluster(client)
        assert facts.partitions == SETTINGS.partitions
        script = Script(client)
        await part(script)
        return script.notes

    try:
        return loop.run_until_complete(loop.create_task(run(), context=host.context))
    finally:
        loop.close()


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
async def test_the_model_answers_as_real_servers_do(client: Client, part: Any) -> None:
    await apply(client, SETTINGS)
    script = Script(client)
    await part(script)
    answers = await asyncio.to_thread(modelled, part)
    for real, model in zip(script.notes, answers, strict=True):
        assert model == real
