"""What the experiments share: pipelines of any make-up, and the measurement of one after the other in turns."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.experiments import launch
from benchmarks.experiments.costs import per_event, spent
from benchmarks.experiments.messages import sized_messages
from benchmarks.load import CONNECTIONS, Message, Pipeline, closed_loop, connected, open_loop
from benchmarks.report import Say
from cluster.nodes import EmbeddedCluster, Node, NodePorts
from cluster.stageprocess import StageCommand
from cluster.supervisor import Supervisor, run_command
from cluster.track import percentiles_ms
from contracts.settings import Settings, load_settings
from contracts.subjects import STAGES, Stage
from stages.persist.names import SHARDS, list_shards

PARTITIONS = 1
"""As many lanes as two cores can use; the settings of a case choose others."""
WARM_UP_MESSAGES = 2_000
QUICK_WARM_UP_MESSAGES = 100
PACED_S = 6
QUICK_PACED_S = 1
QUICK_SHARE = 40
"""A quick run offers one message of so many."""
QUICK_MESSAGES_MIN = 40
_BACKLOG_BATCH, _BACKLOG_STEP, _BACKLOG_BYTES = 64, 128_000, 600
_SEALED_S, _POLL_S = 600, 0.1

Row = dict[str, Any]

_SYNC = ", sync_interval: always"


class Bench(NamedTuple):
    """What an experiment is given.

    Attributes:
        scratch: an empty directory on the disk to be measured.
        quick: seconds instead of minutes; the figures mean nothing then.
        repetitions: times that all is measured.
        say: tells a person what is being done.
        kept: sections of other experiments, by name.
        seeds: one for each load; no two events of a pipeline may be the same.
    """

    scratch: Path
    quick: bool
    repetitions: int
    say: Say
    kept: Mapping[str, Any]
    seeds: Iterator[int]

    def count(self, messages: int) -> int:
        """How many messages to offer: so many, or far fewer in a quick run."""
        return max(QUICK_MESSAGES_MIN, messages // QUICK_SHARE) if self.quick else messages


class Setup(NamedTuple):
    """How a pipeline is run.

    Attributes:
        settings: names and values that differ from the defaults.
        processes: of each stage.
        servers: nats-server processes.
        switches: of `launch.SWITCHES`.
        lazy: servers sync every two minutes, as they do unless told otherwise.
    """

    settings: tuple[tuple[str, Any], ...] = ()
    processes: int = 1
    servers: int = 3
    switches: tuple[str, ...] = ()
    lazy: bool = False

    def load(self) -> Settings:
        """The settings; P is `PARTITIONS` unless they say otherwise. Raises `SettingsError`."""
        return load_settings({}, {"partitions": PARTITIONS, **dict(self.settings)})


Make = Callable[[int, int], list[Message]]
"""(seed, how many) → messages."""


class Case(NamedTuple):
    """One point of a curve, or one line of a table.

    Attributes:
        variant: its name.
        at: where it stands on the curve's axis; 0 where there is none.
        setup: the pipeline.
        make: its messages.
        messages: offered as fast as they are accepted; 0: this is not measured.
        rate_per_s: messages offered at fixed times; 0: this is not measured.
        backlog: events stored before, not measured.
    """

    variant: str
    at: float
    setup: Setup
    make: Make
    messages: int
    rate_per_s: float = 0.0
    backlog: int = 0


class _LazyCluster(EmbeddedCluster):
    """Servers that acknowledge what they have not synced: a power cut loses it. To see what syncing costs."""

    def _prepare(self, binary: Path, ports: list[NodePorts]) -> tuple[Node, ...]:
        nodes = super()._prepare(binary, ports)
        for config in self._home.glob("*.conf"):
            text = config.read_text(encoding="utf-8")
            if _SYNC not in text:
                raise RuntimeError(f"{config}: nothing there says when to sync")
            config.write_text(text.replace(_SYNC, ""), encoding="utf-8")
        return nodes


def switched(switches: Sequence[str], directory: Path) -> StageCommand:
    """The command of a stage in `directory`, with switches of `launch`."""
    plain = run_command(directory)

    def command(stage: Stage, name: str) -> list[str]:
        usual = plain(stage, name)
        return [usual[0], "-I", launch.__file__, *switches, "--", *usual[usual.index("run") :]]

    return command


@asynccontextmanager
async def running(directory: Path, setup: Setup, connections: int = CONNECTIONS) -> AsyncIterator[Pipeline]:
    """A pipeline of that make-up with load connections; all stopped at the end, and `directory` deleted."""
    settings = setup.load()
    command = switched(setup.switches, directory) if setup.switches else None
    supervisor = Supervisor(
        directory, settings, scale=dict.fromkeys(STAGES, setup.processes), servers=setup.servers, command=command
    )
    if setup.lazy:
        supervisor.cluster = _LazyCluster(supervisor.directory, setup.servers)
    try:
        async with supervisor, connected(supervisor, connections) as pipeline:
            yield pipeline
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


async def measure_cases(bench: Bench, cases: Sequence[Case]) -> list[Row]:
    """Every case `bench.repetitions` times, in turns; cases of one setup share a pipeline within a turn.

    The order changes from turn to turn, so that no case always comes after the same one.
    """
    setups = list(dict.fromkeys(case.setup for case in cases))
    rows = []
    for turn in range(bench.repetitions):
        for setup in _turned(setups, turn):
            same = [case for case in cases if case.setup == setup]
            grows = any(case.backlog for case in same)
            async with running(bench.scratch / "pipeline", setup) as pipeline:
                await warm_up(bench, pipeline, same[0].make)
                for case in same if grows else _turned(same, turn):
                    bench.say(f"turn {turn + 1} of {bench.repetitions}: {case.variant}")
                    rows.append({"turn": turn, **await measure_case(bench, pipeline, case)})
    return rows


def _turned(things: Sequence[Any], turn: int) -> list[Any]:
    at = turn % len(things)
    return [*things[at:], *things[:at]]


async def warm_up(bench: Bench, pipeline: Pipeline, make: Make) -> None:
    """Opens what is opened once, and lets the processes see some load."""
    count = QUICK_WARM_UP_MESSAGES if bench.quick else WARM_UP_MESSAGES
    async with pipeline.tracked() as tracker:
        await closed_loop(pipeline, tracker, make(next(bench.seeds), min(count, bench.count(count))))


async def measure_case(bench: Bench, pipeline: Pipeline, case: Case) -> Row:
    """``{"variant", "at", "paced", "full"}``: latency and costs at a rate, throughput and costs as fast as it goes."""
    row: Row = {"variant": case.variant, "at": case.at}
    await _fill(bench, pipeline, bench.count(case.backlog) if case.backlog else 0)
    if case.rate_per_s:
        count = max(QUICK_MESSAGES_MIN, int(case.rate_per_s * (QUICK_PACED_S if bench.quick else PACED_S)))
        messages = case.make(next(bench.seeds), count)
        row["paced"] = await paced(pipeline, messages, case.rate_per_s)
    if case.messages:
        row["full"] = await closed(pipeline, case.make(next(bench.seeds), bench.count(case.messages)))
    return row


async def _fill(bench: Bench, pipeline: Pipeline, events: int) -> None:
    """Stores so many events more, in large messages."""
    for start in range(0, events, _BACKLOG_STEP):
        count = -(-min(_BACKLOG_STEP, events - start) // _BACKLOG_BATCH)
        async with pipeline.tracked() as tracker:
            make = sized_messages(next(bench.seeds), count, _BACKLOG_BYTES, batch=_BACKLOG_BATCH)
            await closed_loop(pipeline, tracker, make)
    await _until_sealed(pipeline)


async def _until_sealed(pipeline: Pipeline) -> None:
    """Full shards are sealed in the background, each for a second or two of a core: not what comes after is about."""
    store = pipeline.supervisor.directory / SHARDS
    async with asyncio.timeout(_SEALED_S):
        while True:
            lanes = await asyncio.to_thread(list_shards, store)
            if all(sum(not shard.sealed for shard in lane) <= 1 for lane in lanes.values()):
                return
            await asyncio.sleep(_POLL_S)


async def paced(pipeline: Pipeline, messages: Sequence[Message], rate_per_s: float) -> Row:
    """Latency at a rate, from when a message was due, and what an event cost."""
    async with pipeline.tracked() as tracker:
        before = await spent(pipeline)
        accepted_ns = await open_loop(pipeline, tracker, messages, rate_per_s)
        costs = per_event(before, await spent(pipeline), sum(message.events for message in messages))
        return {
            "rate_per_s": rate_per_s,
            "accepted_ms": percentiles_ms(accepted_ns),
            "durable_ms": percentiles_ms(tracker.durable_ns()),
            **costs,
        }


async def closed(pipeline: Pipeline, messages: Sequence[Message]) -> Row:
    """Events a second, from the first send to the last receipt, and what an event cost.

    Raises:
        RuntimeError: not all that was accepted came out.
    """
    events = sum(message.events for message in messages)
    async with pipeline.tracked() as tracker:
        before = await spent(pipeline)
        await closed_loop(pipeline, tracker, messages)
        costs = per_event(before, await spent(pipeline), events)
        settled = tracker.totals().settled
        if settled != events:
            raise RuntimeError(f"{settled} of {events} events came out")
        return {"events": events, "events_per_s": round(settled / tracker.span_s(), 1), **costs}


def new_seeds() -> Iterator[int]:
    """Seeds that `make bench` does not use."""
    return itertools.count(100_000)
