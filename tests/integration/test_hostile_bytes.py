"""Thousands of hostile messages, and garbage by hand where only stages write, thrown at one running pipeline.

The breaker is set not to open (`dead_share_max=1`): here nearly everything that one consultation sends is refused.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import pytest
import pytest_asyncio
from pipeline import Load, Pipeline, running, settings, under_load, until, workload

from contracts.events import MESSAGE_BYTES_MAX
from contracts.frames import Frame, encode_frame
from contracts.subjects import EVENTS, HOPS, publish_subject
from contracts.telemetry import (
    DEAD_INDEX,
    DEAD_ORIGIN,
    DEAD_REASON,
    DEAD_STAGE,
    HEADER_FIRST_SEEN,
    HEADER_TRACEPARENT,
)
from stages.ingest.core import IngestCore
from stages.runtime.messages import StoredMessage
from stages.runtime.writer import read_pub_answer
from tests.hostile.fuzz.corpus import files_of
from tests.hostile.fuzz.mutate import mutate
from tests.hostile.fuzz.readers import CONSULTATION, SITE
from tests.hostile.fuzz.targets import TARGETS

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

PARTITIONS = 4
MESSAGES = 3000
GROWTH_KIB_MAX = 200 * 1024
NESTED = 500
HEADERS = (
    {},
    {HEADER_TRACEPARENT: "00-" + "0" * 32 + "-" + "0" * 16 + "-00"},
    {HEADER_TRACEPARENT: "x" * 3000},
    {HEADER_FIRST_SEEN: "9" * 19 + "/1/0", "Status": "503"},
    {"Nats-Rollup-Hint": "sub", "Fi-Dead-Origin": "-1"},
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    chosen = settings(partitions=PARTITIONS, dedup_window_s=0.1, dead_share_max=1.0)
    async with running(tmp_path_factory.mktemp("hostile"), chosen) as started:
        yield started


class Sent(NamedTuple):
    """A hostile message, and what ingest's core says of it: (index, reason, bytes) of its letters, and its lines.

    A letter may be of several lines.
    """

    origin: int
    letters: list[tuple[int, str, bytes]]
    refused: int
    passed: int


def hostile_bodies(rng: random.Random) -> list[tuple[str, bytes]]:
    """(consultation, body): the corpus, and changes of it, spread over some consultations."""
    kept = [path.read_bytes() for path in files_of("ingest")]
    bodies = kept + [mutate(rng, rng.choice(kept), kept, TARGETS["ingest"].tokens) for _ in range(MESSAGES - len(kept))]
    names = [str(UUID(int=rng.getrandbits(128), version=4)) for _ in range(12)]
    spread = []
    for body in bodies:
        name = rng.choice(names)
        spread.append((name, body.replace(CONSULTATION.encode(), name.encode())))
    large = b'{"payload":{"a":"' + b"x" * (MESSAGE_BYTES_MAX - 100) + b'"}}'
    return [*spread, (names[0], large), (names[0], b"\n" * 100_000 + b"[" * 100_000)]


async def send(pipeline: Pipeline, bodies: list[tuple[str, bytes]]) -> list[Sent]:
    limit = asyncio.Semaphore(32)

    async def one(number: int, consultation: str, body: bytes) -> Sent:
        headers = HEADERS[number % len(HEADERS)]
        subject = publish_subject(SITE, consultation)
        async with limit:
            reply = await pipeline.client.request(subject, body, timeout=30, headers=dict(headers) or None)
        answer = read_pub_answer(reply.data, EVENTS, subject)
        assert answer.error is None, answer
        stored = StoredMessage(f"fi.raw.0.{SITE}.{consultation}", answer.seq, 1, body, dict(headers))
        step = IngestCore().step(stored, 0, 1)
        assert step is not None
        letters = [(row.index, row.error.reason, row.data or b"") for row in step.letters]
        return Sent(answer.seq, letters, sum(row.count for row in step.dead), len(step.events))

    return list(await asyncio.gather(*(one(number, *row) for number, row in enumerate(bodies))))


def pids(pipeline: Pipeline) -> dict[str, int | None]:
    return {process.name: process.pid for process in pipeline.supervisor.processes}


def resident_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


@pytest.mark.slow
async def test_thousands_of_hostile_messages_are_dead_lettered_and_every_good_one_is_stored(pipeline: Pipeline) -> None:
    rng = random.Random(20)
    warm = Load(workload(seed=20, events=400))
    await warm.publish(pipeline.client)
    await pipeline.assert_whole(warm)
    before, running_before = await pipeline.totals(), pids(pipeline)
    resident = {name: resident_kib(pid) for name, pid in running_before.items() if pid and not name.startswith("n")}

    load = Load(workload(seed=21, events=1500))
    async with under_load(load, pipeline.client, rate_per_s=400) as publishing:
        sent = await send(pipeline, hostile_bodies(rng))
        await publishing
    totals = await pipeline.settled()

    assert pids(pipeline) == running_before, await pipeline.logs()
    verdict = await pipeline.verdict(load)
    assert verdict.ok, str(verdict)
    assert verdict.acknowledged == verdict.stored == 1500

    expected = {(row.origin, index): (reason, raw) for row in sent for index, reason, raw in row.letters}
    found = {}
    later: Counter[str] = Counter()
    for letter in await pipeline.letters():
        place = (int(letter.headers[DEAD_ORIGIN]), int(letter.headers[DEAD_INDEX]))
        if letter.headers[DEAD_STAGE] == "ingest":
            assert place not in found
            found[place] = (letter.headers[DEAD_REASON], letter.data)
        else:
            later[letter.headers[DEAD_REASON]] += 1
    assert {place: data for place, (_, data) in found.items()} == {place: data for place, (_, data) in expected.items()}
    for place, (reason, data) in found.items():
        # How deep is too deep for the parser depends on its caller: something else may be wrong before or after that.
        assert reason == expected[place][0] or data.count(b"[") + data.count(b"{") > NESTED
    assert len(found) > MESSAGES // 2
    refused = sum(row.refused for row in sent)
    assert totals.dead_lettered - before.dead_lettered == refused + later.total() > len(found)
    assert sum(totals) - sum(before) == 1500 + refused + sum(row.passed for row in sent)

    grown = {name: resident_kib(running_before[name] or 0) - kib for name, kib in resident.items()}
    assert max(grown.values()) < GROWTH_KIB_MAX, grown


def garbage(rng: random.Random, partition: int) -> list[bytes]:
    """Messages that no stage writes: not one is a frame of this partition."""
    other = Frame(partition + 1, 0, 1, 9, (), "nobody", 1, b"", (), ())
    frame = encode_frame(Frame(partition, 0, 1, 2**62, (), "nobody", 1, b"", (), ()))
    return [b"", b"hello", rng.randbytes(300), encode_frame(other), frame.replace(b"nobody", b"nobo\xffy"), frame[:-1]]


async def test_garbage_on_the_hops_is_emptied_out_and_made_again_without_a_loss(pipeline: Pipeline) -> None:
    rng = random.Random(22)
    running_before = pids(pipeline)
    load = Load(workload(seed=22, events=1200))
    async with under_load(load, pipeline.client, rate_per_s=150):
        for number, hop in enumerate(HOPS):
            await load.reached(200 + 300 * number)
            for partition in range(PARTITIONS):
                for data in garbage(rng, partition):
                    await pipeline.client.jetstream(timeout=10).publish(
                        f"fi.{hop.removeprefix('FI_').lower()}.{partition}", data
                    )
    await pipeline.assert_whole(load)
    assert pids(pipeline) == running_before, await pipeline.logs()
    assert "does not belong there" in await pipeline.logs(10_000)


async def test_garbage_on_an_idle_hop_is_gone_before_the_next_event(pipeline: Pipeline) -> None:
    """Upstream sees it too, as the end of its own output; it is the next stage that empties its input."""
    for stage in ("segment", "hash", "persist"):
        await pipeline.client.jetstream(timeout=10).publish(f"fi.{stage}.0", b"\xff")

    async def clean() -> bool:
        last = [await pipeline.api.last_message(stream, f"fi.{stream[3:].lower()}.0") for stream in HOPS]
        return all(message is None or message.data != b"\xff" for message in last)

    await until(clean, "the garbage is gone")
    load = Load(workload(seed=23, events=40))
    await load.publish(pipeline.client)
    await pipeline.assert_whole(load)
