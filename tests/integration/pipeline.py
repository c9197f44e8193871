"""Helpers for tests on real processes: a load that remembers what was acknowledged, and the waiting and judging after.

Nothing here waits for time to pass: every wait is for a condition of the streams, under a generous limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from nats.aio.client import Client

from cluster.feed import Line
from cluster.gateway import Accepted, Gateway
from cluster.publish import LinePublisher, PublishReport
from cluster.stageprocess import settings_environment
from cluster.supervisor import Supervisor
from cluster.testing.checker import Attempt, Verdict, check, defined_hash
from cluster.workload import consultations
from contracts.events import Event
from contracts.receipts import Receipt
from contracts.settings import MIB, Settings
from contracts.subjects import DLQ, EVENTS, RECEIPTS, Stage, raw_filter, receipt_subject
from stages.persist.store import EventStore
from stages.persist.verify import verify_store
from stages.runtime.api import Api, StoredMessage
from stages.runtime.checkpoint import last_receipt
from stages.runtime.connection import connect

DATA = Path(__file__).parents[3] / "shared" / "data" / "primock57.ndjson"
SETTLED_LIMIT_S = 120.0
POLL_S = 0.05


def settings(**changes: Any) -> Settings:
    """Small shards, few partitions, and quick checks of idle lanes: what a short test needs."""
    return Settings(**{"partitions": 4, "shard_bytes": 16 * MIB, "trim_s": 0.2, "probe_s": 1.0, **changes})


def workload(seed: int, events: int, padding_bytes: int = 0) -> list[bytes]:
    """Lines of believable consultations; `padding_bytes` more in each payload."""
    lines = []
    for event in consultations(seed, events):
        if padding_bytes:
            # Text that does not compress away.
            event["payload"]["attachment"] = os.urandom(padding_bytes // 2).hex()
        lines.append(msgspec.json.encode(event))
    return lines


async def until(condition: Callable[[], Any], what: str, limit_s: float = SETTLED_LIMIT_S) -> Any:
    """Polls an async condition until it is true; gives what it gave. Fails after `limit_s`, saying what was awaited."""
    try:
        async with asyncio.timeout(limit_s):
            while True:
                if value := await condition():
                    return value
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"not within {limit_s:.0f} s: {what}") from None


class Load:
    """Events being published, and what was acknowledged of them."""

    def __init__(self, lines: Sequence[bytes]) -> None:
        self.lines = list(lines)
        self._sent: dict[bytes, tuple[bytes, int, bytes]] = {}
        self._acknowledged: set[bytes] = set()
        self.gateway: Gateway | None = None
        self._news = asyncio.Event()
        places: Counter[str] = Counter()
        for line in self.lines:
            event = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
            event_id, consultation = (msgspec.json.decode(event[key]) for key in ("event_id", "consultation_id"))
            key = UUID(event_id).bytes
            self._sent[key] = (UUID(consultation).bytes, places[consultation], defined_hash(bytes(event["payload"])))
            places[consultation] += 1

    @property
    def accepted(self) -> int:
        """How many events were acknowledged so far."""
        return len(self._acknowledged)

    @property
    def attempts(self) -> list[Attempt]:
        """For the checker."""
        return [Attempt(key, *sent, acknowledged=key in self._acknowledged) for key, sent in self._sent.items()]

    async def reached(self, accepted: int) -> None:
        """Returns when so many events were acknowledged."""
        async with asyncio.timeout(SETTLED_LIMIT_S):
            while self.accepted < accepted:
                self._news.clear()
                await self._news.wait()

    async def publish(self, client: Client, *, rate_per_s: float | None = None, batch: int = 4) -> PublishReport:
        """Publishes all lines, as a gateway does."""

        def note(_: Accepted, lines: Sequence[Line]) -> None:
            self._acknowledged.update(UUID(line.event_id).bytes for line in lines)
            self._news.set()

        self.gateway = Gateway(client, in_flight=64)
        publisher = LinePublisher(self.gateway, rate_per_s=rate_per_s, batch=batch, on_accepted=note)
        return await publisher.run(_stream(self.lines))


@contextlib.asynccontextmanager
async def under_load(load: Load, client: Client, rate_per_s: float | None = None) -> AsyncIterator[asyncio.Task[Any]]:
    """Publishes `load` beside the block, and ends with it: awaited to the end, or cancelled when the block failed."""
    task = asyncio.create_task(load.publish(client, rate_per_s=rate_per_s))
    try:
        yield task
        async with asyncio.timeout(SETTLED_LIMIT_S):
            await task
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def _stream(lines: Iterable[bytes]) -> AsyncIterator[bytes]:
    for line in lines:
        yield line


class Totals(NamedTuple):
    """Running totals of the receipts, over all partitions."""

    persisted: int
    duplicates: int
    dead_lettered: int


class Pipeline:
    """A running pipeline and a client's connection to it."""

    def __init__(self, supervisor: Supervisor, client: Client) -> None:
        self.supervisor = supervisor
        self.client = client
        self.api = Api(client, supervisor.settings)
        self.shards = supervisor.directory / "shards"

    @contextlib.asynccontextmanager
    async def disconnected(self) -> AsyncIterator[None]:
        """Without our connection: nats-py leaks a socket for every attempt that a frozen server leaves unanswered."""
        await self.client.close()
        yield
        self.client = await connect(self.supervisor.urls, "test", wait_s=30)
        self.api = Api(self.client, self.supervisor.settings)

    async def receipts(self) -> list[Receipt]:
        """The last receipt of every partition that has one."""
        found = [await last_receipt(self.api, p) for p in range(self.supervisor.settings.partitions)]
        return [receipt for receipt, _ in found if receipt is not None]

    async def totals(self) -> Totals:
        """Totals of the last receipts."""
        receipts = await self.receipts()
        return Totals(
            sum(r.persisted for r in receipts),
            sum(r.duplicates for r in receipts),
            sum(r.dead_lettered for r in receipts),
        )

    async def unsettled(self) -> dict[int, tuple[int, int]]:
        """Partition → (origin committed, origin stored), where they differ."""
        open_: dict[int, tuple[int, int]] = {}
        for partition in range(self.supervisor.settings.partitions):
            last = await self.api.last_message(EVENTS, raw_filter(partition))
            receipt, _ = await last_receipt(self.api, partition)
            reached = receipt.origin if receipt is not None else 0
            if last is not None and reached < last.seq:
                open_[partition] = (reached, last.seq)
        return open_

    async def settled(self, limit_s: float = SETTLED_LIMIT_S) -> Totals:
        """Waits until the receipts reach everything that `FI_EVENTS` holds, and until readers may see it."""
        seen: dict[int, tuple[int, int]] = {}

        async def done() -> bool:
            seen.clear()
            seen.update(await self.unsettled())
            return not seen

        try:
            await until(done, "receipts reach every stored origin", limit_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; (committed, stored) by partition: {seen}\n{self.logs()}") from None
        totals = await self.totals()

        async def visible() -> bool:
            return await asyncio.to_thread(self.count) == totals.persisted

        await until(visible, f"{totals.persisted} events visible in the store", 30)
        return totals

    def count(self) -> int:
        """Events that readers may see."""
        with EventStore(self.shards) as store:
            return store.count()

    def stored(self) -> list[Event]:
        """Everything in the store, in order."""
        with EventStore(self.shards) as store:
            return [row.event for row in store.iterate()]

    async def verdict(self, load: Load, dead: Iterable[bytes] = ()) -> Verdict:
        """The checker's word on `load` and all that is stored of its consultations, after `settled`."""
        attempts = load.attempts
        ours = {attempt.consultation_id for attempt in attempts} | {attempt.event_id for attempt in attempts}
        events = await asyncio.to_thread(self.stored)
        return check(attempts, [e for e in events if not ours.isdisjoint((e.consultation_id, e.event_id))], dead)

    async def assert_whole(self, load: Load) -> Totals:
        """Settles; then nothing may be lost, doubled, reordered or altered, and every byte of the store must hold."""
        totals = await self.settled()
        verdict = await self.verdict(load)
        assert verdict.ok, f"{verdict}\n{self.logs()}"
        assert verdict.acknowledged == verdict.attempted == verdict.stored, str(verdict)
        report = await asyncio.to_thread(verify_store, self.shards)
        assert report.ok, report.problems
        assert report.events == totals.persisted
        ends = {end.partition: end for end in report.partitions}
        for receipt in await self.receipts():
            assert ends[receipt.partition].root == receipt.root
        return totals

    async def letters(self) -> list[StoredMessage]:
        """Every dead letter, oldest first."""
        letters: list[StoredMessage] = []
        info = await self.client.jetstream(timeout=5).stream_info(DLQ)
        for seq in range(max(1, info.state.first_seq), info.state.last_seq + 1):
            message = await self.api.message_at(DLQ, seq)
            if message is not None:
                letters.append(message)
        return letters

    async def receipt_seq(self, partition: int) -> int:
        """Stream sequence of the partition's last receipt."""
        last = await self.api.last_message(RECEIPTS, receipt_subject(partition))
        return 0 if last is None else last.seq

    def logs(self, lines: int = 12) -> str:
        """The end of every stage's log, for a failed test."""
        texts = []
        for path in sorted((self.supervisor.directory / "logs").glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            texts.append("\n".join([f"--- {path.name}", *(line[:400] for line in tail)]))
        return "\n".join(texts)


@contextlib.asynccontextmanager
async def running(
    directory: Path, chosen: Settings, scale: Mapping[Stage, int] | None = None
) -> AsyncIterator[Pipeline]:
    """A pipeline of real processes; all of them are gone when the block ends, however it ends."""
    async with Supervisor(directory, chosen, scale) as supervisor:
        pipeline = Pipeline(supervisor, await connect(supervisor.urls, "test", wait_s=30))
        try:
            yield pipeline
        finally:
            await pipeline.client.close()


ALL = "all"


class Extra:
    """A stage process that no supervisor looks after, told which partitions to hold: None for its share."""

    def __init__(self, pipeline: Pipeline, stage: Stage, name: str, shards: Path, partitions: str | None) -> None:
        supervisor = pipeline.supervisor
        urls = [part for url in supervisor.urls for part in ("--nats", url)]
        self._command = [sys.executable, "-m", "cluster", "run", stage, *urls, "--name", name, "--shards", str(shards)]
        if partitions is not None:
            every = ",".join(map(str, range(supervisor.settings.partitions)))
            self._command += ["--partitions", every if partitions == ALL else partitions]
        self._environment = os.environ | settings_environment(supervisor.settings)
        self._log = supervisor.directory / f"{name}.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Starts it; returns once it says that it has tried to open all its partitions."""
        with self._log.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdout=asyncio.subprocess.PIPE, stderr=output, env=self._environment
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            assert (await self._process.stdout.readline()).strip() == b"READY", self.log_text()[-2000:]

    def log_text(self) -> str:
        """Everything it wrote to its log."""
        return self._log.read_text(errors="replace")

    async def kill(self) -> None:
        """SIGKILL, if it was started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.communicate()


@contextlib.asynccontextmanager
async def extra_stage(
    pipeline: Pipeline,
    stage: Stage,
    name: str,
    *,
    shards: Path | None = None,
    frozen: str = "",
    partitions: str | None = ALL,
) -> AsyncIterator[Extra]:
    """One more process of `stage`, to be started within the block and killed when it ends.

    A supervised process named `frozen` is thawed then, whatever happened.
    """
    extra = Extra(pipeline, stage, name, shards or pipeline.shards, partitions)
    try:
        yield extra
    finally:
        await extra.kill()
        if frozen:
            pipeline.supervisor.thaw(frozen)


def stage_names(pipeline: Pipeline) -> Iterator[str]:
    """Names of the supervised stage processes, in flow order."""
    return (process.name for process in pipeline.supervisor.processes if process.kind != "server")


def flip(path: Path, offset: int) -> None:
    """Changes one bit of a file, as a bad disk does."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
