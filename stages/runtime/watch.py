"""What others can see of a process: its telemetry, its health port, and the file that says where that port is.

Always true: `/livez` speaks of the event loop alone and never asks the broker or the disk; `/readyz` names every check
and says why; looking costs the broker one request for each stream, at most once a second, however many ask.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from nats.errors import Error as NatsError

from contracts.backups import BACKUP_FILE, decode_last_backup
from contracts.budgets import HEALTH_ASK, HEALTH_BEAT, HEALTH_DISK, HEALTH_FRESH, HEALTH_LOOK, HEALTH_STUCK, PAPERS_LOOK
from contracts.errors import WireFormatError
from contracts.settings import Settings
from contracts.subjects import DLQ, INPUT_STREAM, OUTPUT_STREAM, Stage
from contracts.telemetry import LOOP_LAG, RECONNECTS
from contracts.wire import UNREADABLE
from stages.runtime.access import Servers
from stages.runtime.api import Api, ApiError
from stages.runtime.control import Control
from stages.runtime.expiry import papers_of
from stages.runtime.health import PROMETHEUS, Answer, Check, HealthServer, Report, report_answer
from stages.runtime.instruments import Counter, Histogram
from stages.runtime.keeping import StreamRules, keeping_problem
from stages.runtime.observing import Observed
from stages.runtime.pids import process_started
from stages.runtime.tasks import end_tasks
from stages.runtime.telemetry import OFF, StreamFacts, Telemetry, otlp_endpoint

if TYPE_CHECKING:
    from stages.runtime.membership import Membership
    from stages.runtime.meters import Meters

log = logging.getLogger(__name__)

HEALTH_DIRECTORY: Final = "health"


class HealthFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="v", tag="health.1"):
    """Where a process of a run answers: ``<run directory>/health/<name>.json``.

    Attributes:
        name, stage, pid: of the process.
        host, port: of its health port.
        started: clock ticks between boot and its start, as `stages.runtime.pids`; None where nobody said.
    """

    name: str
    stage: str
    pid: int
    host: str
    port: int
    started: int | None = None


class _Told(msgspec.Struct):
    """The parts of a stream's description that are looked at."""

    class State(msgspec.Struct):
        messages: int
        bytes: int

    class Cluster(msgspec.Struct):
        leader: str = ""

    error: ApiError | None = None
    state: State | None = None
    config: StreamRules | None = None
    cluster: Cluster | None = None


_decode_told = msgspec.json.Decoder(_Told).decode


class Watch:
    """Watches one stage process from the block's begin to its end.

    Args:
        stage, name: which process.
        settings: the process's; without `otlp_endpoint` and `health_port` nothing is watched.
        env: the environment, for OpenTelemetry's own variables.
        directory: of the run, where the health file goes; None for no file.
        store: where the shards lie; None when the stage has none.

    Attributes:
        telemetry: to record with.
    """

    def __init__(
        self,
        stage: Stage,
        name: str,
        settings: Settings,
        env: Mapping[str, str],
        *,
        directory: Path | None = None,
        store: Path | None = None,
    ) -> None:
        self.telemetry: Telemetry = OFF
        self._stage: Stage = stage
        self._name = name
        self._settings = settings
        self._store = store
        self._file = None if directory is None else directory / HEALTH_DIRECTORY / f"{name}.json"
        self._endpoint = otlp_endpoint(settings, env)
        self._observed: Observed | None = None
        self._server: HealthServer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._api: Api | None = None
        self._servers = Servers(())
        self._control: Control | None = None
        self._membership: Membership | None = None
        self._draining = False
        self._beat_s = time.monotonic()
        self._loop_lag_s = 0.0
        self._reconnects = Counter()
        self._connected = asyncio.Event()
        self._planned = False
        self._looking = asyncio.Lock()
        self._looked_s = 0.0
        self._streams: dict[str, str] = {}
        self._disk = Check(False, "not looked at yet")
        self._disk_look: asyncio.Future[Check] | None = None
        # Its own two: lanes whose disk hangs have taken all others, and that must be seen.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="watch")

    async def __aenter__(self) -> Watch:
        """Begins to watch. Raises `SettingsError`: no health port can be had, or as `Observed`."""
        if not self._endpoint and self._settings.health_port < 0:
            return self
        self._observed = Observed(self._settings, f"fi-{self._stage}", self._name, self._endpoint)
        meters = self._observed.meters
        self.telemetry = meters
        self._reconnects = meters.counter(RECONNECTS, {})
        try:
            if self._settings.health_port >= 0:
                await self._serve(self._observed)
        except BaseException:
            await self._observed.close()
            raise
        jobs = {
            "loop lag": self._beat(meters.histogram(LOOP_LAG, {})),
            "looks": self._keep_looking(meters),
            "papers": self._look_at_papers(meters),
        }
        for title, job in jobs.items():
            task = asyncio.create_task(job, name=title)
            task.add_done_callback(_report_failure)
            self._tasks.append(task)
        return self

    async def __aexit__(self, *_: object) -> None:
        await end_tasks(*self._tasks)
        if self._server is not None:
            if self._file is not None:
                self._file.unlink(missing_ok=True)
            await self._server.close()
        if self._observed is not None:
            await self._observed.close()
        self._threads.shutdown(wait=False)

    def connected(self, api: Api, control: Control, servers: Servers) -> None:
        """The process is connected to one of `servers`."""
        self._api, self._control, self._servers = api, control, servers
        self._connected.set()

    def takes_part(self, membership: Membership) -> None:
        """The process announces itself and looks at the others."""
        self._membership = membership

    def planned(self) -> None:
        """The lanes of its first share were made."""
        self._planned = True

    def reconnected(self) -> None:
        """The connection was lost and is back."""
        self._reconnects.add()

    def drain(self) -> None:
        """The process was told to stop: it is not ready from now on."""
        self._draining = True

    async def _serve(self, observed: Observed) -> None:
        from stages.runtime.exposition import prometheus_text

        async def livez() -> Answer:
            return report_answer(self.live())

        async def readyz() -> Answer:
            return report_answer(await self.ready())

        async def metrics() -> Answer:
            loop = asyncio.get_running_loop()
            text = await loop.run_in_executor(
                self._threads, lambda: prometheus_text(observed.meters.collect(), observed.resource.attributes)
            )
            return Answer(200, PROMETHEUS, text)

        host, port = self._settings.health_host, self._settings.health_port
        self._server = HealthServer(host, port, {"/livez": livez, "/readyz": readyz, "/metrics": metrics})
        await self._server.start()
        log.info("health port", extra={"host": host, "port": self._server.port})
        if self._file is not None:
            pid = os.getpid()
            where = HealthFile(
                name=self._name,
                stage=self._stage,
                pid=pid,
                host=host,
                port=self._server.port,
                started=process_started(pid),
            )
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._file.with_suffix(".tmp")
            temporary.write_bytes(msgspec.json.encode(where) + b"\n")
            temporary.replace(self._file)

    async def _beat(self, lag: Histogram) -> None:
        while True:
            due_s = time.monotonic() + HEALTH_BEAT.s
            await asyncio.sleep(HEALTH_BEAT.s)
            self._beat_s = time.monotonic()
            self._loop_lag_s = max(0.0, self._beat_s - due_s)
            lag.record(self._loop_lag_s)

    async def _keep_looking(self, meters: Meters) -> None:
        await self._connected.wait()
        while True:
            await self._look(meters)
            for lane in tuple(meters.lanes.values()):
                if lane.feed is not None:
                    await lane.feed.reader.count_pending()
            await asyncio.sleep(HEALTH_LOOK.s)

    async def _look_at_papers(self, meters: Meters) -> None:
        await self._connected.wait()
        while True:
            meters.papers = await papers_of(self._servers)
            await asyncio.sleep(PAPERS_LOOK.s)

    async def _look(self, meters: Meters) -> None:
        """Asks for the streams and looks at the disk, unless that was just done."""
        async with self._looking:
            if time.monotonic() - self._looked_s < HEALTH_FRESH.s:
                return
            names = dict.fromkeys((INPUT_STREAM[self._stage], OUTPUT_STREAM[self._stage], DLQ))
            problems = await asyncio.gather(*(self._ask(name, meters) for name in names), self._look_at_disk(meters))
            self._streams = dict(zip(names, problems[:-1], strict=True))
            self._looked_s = time.monotonic()

    async def _ask(self, stream: str, meters: Meters) -> str:
        """What is wrong with a stream; empty if nothing is."""
        if self._api is None or not self._api.client.is_connected:
            return "not connected"
        try:
            answer = await self._api.client.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=HEALTH_ASK.s)
            told = _decode_told(answer.data)
        except (NatsError, OSError, *UNREADABLE) as error:
            return f"no answer within {HEALTH_ASK.s:g} s ({type(error).__name__})"
        if told.error is not None:
            return told.error.description
        if told.state is not None and told.config is not None:
            limit = max(0, told.config.max_bytes)
            meters.streams[stream] = StreamFacts(told.state.messages, told.state.bytes, limit)
        if told.cluster is not None and not told.cluster.leader:
            return "has no leader"
        problem = "" if told.config is None else keeping_problem(told.config)
        if problem and problem != self._streams.get(stream):
            log.error("%s %s", stream, problem)
        return problem

    async def _look_at_disk(self, meters: Meters) -> str:
        if self._store is None:
            return ""
        # One look at a time: a disk that hangs must not take every thread there is.
        if self._disk_look is None or self._disk_look.done():
            loop = asyncio.get_running_loop()
            self._disk_look = loop.run_in_executor(
                self._threads, _check_disk, self._store, self._settings.disk_floor_bytes, meters
            )
        done, _ = await asyncio.wait((self._disk_look,), timeout=HEALTH_ASK.s)
        self._disk = self._disk_look.result() if done else Check(False, f"{self._store} does not answer")
        return ""

    def live(self) -> Report:
        """Whether the event loop turns."""
        age_s = time.monotonic() - self._beat_s
        why = f"the loop ran a timer {age_s:.2f} s ago, {self._loop_lag_s * 1e3:.1f} ms late"
        return self._report({"loop": Check(age_s < HEALTH_STUCK.s, why)})

    async def ready(self) -> Report:
        """Whether the process does its work."""
        assert self._observed is not None
        meters = self._observed.meters
        await self._look(meters)
        bad = [f"{name}: {problem}" for name, problem in self._streams.items() if problem]
        led = f"{', '.join(self._streams)} have leaders"
        checks = {
            "connected": self._connection(),
            "streams": Check(not bad, "; ".join([*(bad or [led]), *meters.damaged()])),
            "lanes": self._lanes(meters),
            "circuits": _circuits(meters),
            "control": Check(False, "not listening yet") if self._control is None else self._control.check(),
            "members": Check(False, "not taking part yet") if self._membership is None else self._membership.check(),
            "running": Check(not self._draining, "draining" if self._draining else "not draining"),
        }
        if self._store is not None:
            checks["disk"] = self._disk
        return self._report(checks)

    def _lanes(self, meters: Meters) -> Check:
        lanes = tuple(meters.lanes.values())
        opening = [lane.partition for lane in lanes if lane.state == "opening" and not lane.is_leaving]
        stopped = {lane.partition: lane.why for lane in lanes if lane.state == "stopped"}
        late_s = time.perf_counter() - HEALTH_DISK.s
        hanging = [lane.partition for lane in lanes if lane.busy_since_s is not None and lane.busy_since_s < late_s]
        refused = {lane.partition: lane.feed.reader.refused for lane in lanes if lane.feed and lane.feed.reader.refused}
        if not self._planned:
            return Check(False, "not made yet")
        if stopped:
            why = next(iter(stopped.values()))
            return Check(False, f"partitions {list(stopped)} have stopped, and the log says why each: {why}")
        if hanging and self._store is not None:
            why = f"for more than {HEALTH_DISK.s:g} s: does the disk of {self._store} hang?"
            return Check(False, f"partitions {hanging} have waited to be on disk {why} They go on by themselves")
        if opening:
            return Check(False, f"partitions {opening} have not found their place")
        if refused:
            why = "; ".join(sorted(set(refused.values())))
            return Check(False, f"partitions {sorted(refused)} are refused their input: {why}")
        standby = sum(lane.state == "standby" for lane in lanes)
        return Check(True, f"{len(lanes) - standby} read, {standby} stand by")

    def _connection(self) -> Check:
        client = None if self._api is None else self._api.client
        url = client.connected_url if client is not None and client.is_connected else None
        place = f"{url.hostname}:{url.port}" if url else "not connected; trying again"
        trouble = "" if client is None else client.trouble
        return Check(url is not None and not trouble, f"{place}; {trouble}" if trouble else place)

    def _report(self, checks: dict[str, Check]) -> Report:
        return Report(all(check.ok for check in checks.values()), self._name, self._stage, checks)


def _circuits(meters: Meters) -> Check:
    """Not well while it is known that a target does not answer; the one who tries does not know better yet."""
    silent = meters.silent()
    states = {target: state for target, state in meters.circuits().items() if state != "closed"}
    words = [
        f"{target} {state}{f' ({silent[target]})' if silent.get(target) else ''}" for target, state in states.items()
    ]
    is_ok = not silent and "open" not in states.values()
    return Check(is_ok, "; ".join(words) or "closed")


def _check_disk(store: Path, floor_bytes: int, meters: Meters) -> Check:
    place = store
    try:
        # Before the first start there is no store yet, and maybe no directory that it is to lie in.
        place = next((path for path in (store, *store.absolute().parents) if path.exists()), store)
        found = os.statvfs(place)
    except OSError as error:
        return Check(False, f"{place}: {error.strerror}")
    free = meters.storage_free_bytes = found.f_bavail * found.f_frsize
    meters.storage_size_bytes = found.f_blocks * found.f_frsize
    meters.backed_up_ns = _backed_up_ns(store)
    if not os.access(place, os.W_OK):
        return Check(False, f"{place} cannot be written")
    words = f"{free / 1e9:.2f} GB free at {place}, floor {floor_bytes / 1e9:.2f} GB"
    return Check(free >= floor_bytes, words)


def _backed_up_ns(store: Path) -> int | None:
    try:
        return decode_last_backup((store / BACKUP_FILE).read_bytes()).at_ns
    except (OSError, WireFormatError):
        return None


def _report_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("%s ended", task.get_name(), exc_info=task.exception())
