"""One look at a whole pipeline: what servers, streams, processes and the local disk say, and what could not be read.

Always true: a look ends within its limit whatever is down, and names what it could not read. It changes nothing. It
costs the servers one request for each stream and one for their account, two for the buckets, and five small reads for
each partition (not repeated while its streams did not change), and where something waits, a count and a read for each
stage.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
from nats.errors import Error as NatsError

from cluster.backlog import PartitionLook, count_messages, look_at_partition
from cluster.health import ProcessHealth, get
from cluster.health import look as look_at_health
from cluster.members import MembersReport, read_buckets, report
from cluster.scrape import Metered, parse_metrics
from cluster.state import NotRunningError, read_state
from cluster.status import Allowance, ServerStatus, StreamStatus, look_at_account, look_at_servers, look_at_streams
from cluster.threads import in_daemon_thread
from contracts.budgets import STATUS_CONNECT, STATUS_LOOK
from contracts.errors import ClusterUnavailableError, FiError
from contracts.letters import read_letter
from contracts.settings import Settings, hide_credentials
from contracts.subjects import BUCKETS, DLQ, EVENTS, HOPS, RECEIPTS
from contracts.wire import UNREADABLE
from stages.persist.names import SHARDS, list_shards
from stages.runtime.access import Servers
from stages.runtime.api import Api
from stages.runtime.client import GuardedClient
from stages.runtime.connection import connect
from stages.runtime.facts import ClusterFacts
from stages.runtime.tasks import end_tasks, side_by_side

READS_AT_ONCE: Final = 16
RECENT_S: Final = 60


class Letters(msgspec.Struct, frozen=True, kw_only=True):
    """The dead letters that wait in `FI_DLQ`.

    Attributes:
        by_stage: how many, by the stage that refused them.
        recent: how many messages the stream took within the last `RECENT_S`.
    """

    by_stage: dict[str, int]
    recent: int


class DiskLook(msgspec.Struct, frozen=True, kw_only=True):
    """The store of a run on this machine.

    Attributes:
        path: the shards directory.
        free_bytes: free where it lies.
        floor_bytes: persist is not ready with less.
        live, sealed: partition → how many files.
        size_bytes: partition → bytes of its shards.
    """

    path: str
    free_bytes: int
    floor_bytes: int
    live: dict[int, int]
    sealed: dict[int, int]
    size_bytes: dict[int, int]


class ProcessLook(msgspec.Struct, frozen=True, kw_only=True):
    """A process of a run on this machine. `metered` is None, and `problem` says why, when it shows no metrics."""

    health: ProcessHealth
    metered: Metered | None = None
    problem: str = ""


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """One look. What is None or missing could not be read; `unread` says why.

    Attributes:
        at_ns: when it ended, since the epoch.
        streams_s, receipts_s, metrics_s: when streams, partitions and metrics were read, of a clock that never steps.
        servers: those whose URL was given.
        connected: a server took the connection.
        no_connection: why none did, and the next step; "" where that is not known.
        streams: every stream.
        allowances: of the account that they are in.
        facts: of the cluster.
        partitions: those that could be read.
        letters, members, disk: see there.
        processes: of the run on this machine; None when none was named.
        unread: what could not be read, and why.
    """

    at_ns: int
    streams_s: float = 0.0
    receipts_s: float = 0.0
    metrics_s: float = 0.0
    servers: tuple[ServerStatus, ...] = ()
    connected: bool = False
    no_connection: str = ""
    streams: tuple[StreamStatus, ...] = ()
    allowances: tuple[Allowance, ...] = ()
    facts: ClusterFacts | None = None
    partitions: tuple[PartitionLook, ...] = ()
    letters: Letters | None = None
    members: MembersReport | None = None
    processes: tuple[ProcessLook, ...] | None = None
    disk: DiskLook | None = None
    unread: tuple[str, ...] = ()


class Looker:
    """Looks at a pipeline again and again over one connection, which it makes when it can.

    Args:
        servers: of the cluster.
        directory: of a run on this machine, whose processes and disk are looked at too; None for none.
    """

    def __init__(self, servers: Servers, directory: Path | None) -> None:
        self._servers = servers
        self._directory = directory
        self._client: GuardedClient | None = None
        self._no_connection = ""
        self._seen: dict[object, tuple[object, Any]] = {}

    async def close(self) -> None:
        """Ends the connection."""
        if self._client is not None:
            await self._client.close()

    async def look(self, limit_s: float = STATUS_LOOK.s) -> Overview:
        """Looks once, for `limit_s` at most and a little. Never raises for what is down."""
        unread: list[str] = []
        jobs: dict[str, Awaitable[Any]] = {
            "servers": look_at_servers(self._servers),
            "cluster": self._cluster(limit_s * 0.95, unread),
        }
        if self._directory is not None:
            jobs["processes"] = self._processes(self._directory, limit_s * 0.8, unread)
            jobs["disk"] = in_daemon_thread(partial(_look_at_disk, self._directory))
        found = await _in_time(jobs, limit_s, unread)
        processes = found.get("processes")
        return Overview(
            at_ns=time.time_ns(),
            servers=found.get("servers")
            or tuple(ServerStatus(url=hide_credentials(url), reachable=False) for url in self._servers.urls),
            metrics_s=0.0 if processes is None else processes[0],
            processes=None if processes is None else processes[1],
            disk=found.get("disk"),
            unread=tuple(unread),
            **found.get("cluster", {}),
        )

    async def _connected(self) -> GuardedClient | None:
        if self._client is None:
            urls, access = self._servers
            try:
                self._client = await connect(urls, "fi-status", access=access, wait_s=STATUS_CONNECT.s)
            except ClusterUnavailableError as error:
                self._no_connection = str(error)
                return None
        self._no_connection = self._client.trouble
        return self._client if self._client.is_connected else None

    async def _cluster(self, limit_s: float, unread: list[str]) -> dict[str, Any]:
        """What the streams hold, as fields of `Overview`."""
        deadline_s = time.monotonic() + limit_s
        client = await self._connected()
        if client is None:
            return {"no_connection": self._no_connection}
        (streams, facts, problem), allowances = await asyncio.gather(look_at_streams(client), look_at_account(client))
        fields: dict[str, Any] = {
            "connected": True,
            "streams": streams,
            "streams_s": time.monotonic(),
            "allowances": allowances,
            "facts": facts,
        }
        if facts is None:
            unread.append(problem)
            return fields
        api = Api(client, Settings(), give_up_s=limit_s)
        unreadable = {stream.name for stream in streams if stream.problem or not _has_leader(stream)}
        keys = {stream.name: _state_key(stream) for stream in streams}
        limit = asyncio.Semaphore(READS_AT_ONCE)

        async def partition(number: int) -> Any:
            names = (EVENTS, *HOPS, RECEIPTS)
            key = None if unreadable.intersection(names) else tuple(keys[name] for name in names)
            async with limit:
                found = await self._unless_seen(("partition", number), key, look_at_partition, api, number, unreadable)
            return msgspec.structs.replace(found, at_ns=time.time_ns())

        jobs: dict[str, Awaitable[Any]] = {f"partition {n}": partition(n) for n in range(facts.partitions)}
        if not unreadable.intersection(BUCKETS):
            jobs["members"] = read_buckets(api)
        if DLQ not in unreadable:
            jobs["dead letters"] = self._letters(api, keys[DLQ])
        missing: list[str] = []
        found = await _in_time(jobs, max(0.2, deadline_s - time.monotonic()), missing)
        unread += _summed(missing)
        partitions = tuple(found[name] for name in jobs if name.startswith("partition ") and name in found)
        fields |= {"partitions": partitions, "receipts_s": time.monotonic(), "letters": found.get("dead letters")}
        if "members" in found:
            receipts = {look.partition: look.receipt for look in partitions if look.receipt is not None}
            announced, control = found["members"]
            try:
                fields["members"] = report(announced, control, receipts, facts.partitions, time.time_ns())
            except UNREADABLE as error:
                unread.append(f"members: {error}; was it written by another version?")
        unread += [f"partition {look.partition}: {look.problem}" for look in partitions if look.problem]
        return fields

    async def _unless_seen(self, name: object, key: object, read: Any, *arguments: Any) -> Any:
        """What `read` gives, or gave before if `key` is the same as then; None is never the same."""
        before = self._seen.get(name)
        if key is not None and before is not None and before[0] == key:
            return before[1]
        value = await read(*arguments)
        self._seen[name] = (key, value)
        return value

    async def _letters(self, api: Api, key: object) -> Letters:
        by_stage = await self._unless_seen("letters", key, _count_letters, api)
        begin = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - RECENT_S))
        since = {"deliver_policy": "by_start_time", "opt_start_time": begin}
        recent = await count_messages(api, DLQ, "fi.dlq.*.*", since) if by_stage else 0
        return Letters(by_stage=by_stage, recent=recent)

    async def _processes(
        self, directory: Path, limit_s: float, unread: list[str]
    ) -> tuple[float, tuple[ProcessLook, ...]] | None:
        deadline_s = time.monotonic() + limit_s
        try:
            found = await look_at_health(directory, limit_s)
        except NotRunningError as error:
            unread.append(str(error))
            return None

        async def metered(health: ProcessHealth) -> ProcessLook:
            if health.kind == "server":
                return ProcessLook(health=health)
            if not health.checks:
                return ProcessLook(health=health, problem=health.why)
            try:
                _, body = await get(f"{health.url}/metrics", max(0.2, deadline_s - time.monotonic()))
                return ProcessLook(health=health, metered=parse_metrics(body.decode()))
            except TimeoutError:
                return ProcessLook(health=health, problem="does not show its metrics in time")
            except (OSError, ValueError) as error:
                return ProcessLook(health=health, problem=f"shows no metrics: {error}")

        looks = await side_by_side(*map(metered, found))
        return time.monotonic(), tuple(looks)


async def _in_time(jobs: dict[str, Awaitable[Any]], limit_s: float, unread: list[str]) -> dict[str, Any]:
    """Runs `jobs` side by side for `limit_s`: name → what it gave, of those that ended in time."""
    tasks = {name: asyncio.ensure_future(job) for name, job in jobs.items()}
    try:
        done, _ = await asyncio.wait(tasks.values(), timeout=limit_s)
    finally:
        await end_tasks(*(task for task in tasks.values() if isinstance(task, asyncio.Task)))
        for task in tasks.values():
            task.cancel()
    found = {}
    for name, task in tasks.items():
        if task not in done:
            unread.append(f"{name}: no answer in time")
        elif (error := task.exception()) is None:
            found[name] = task.result()
        elif isinstance(error, (FiError, NatsError, OSError, *UNREADABLE)):
            unread.append(f"{name}: {error}")
        else:
            raise error
    return found


def _summed(missing: list[str]) -> list[str]:
    """One line for all partitions that say the same."""
    reasons: dict[str, list[str]] = {}
    for line in missing:
        name, _, reason = line.partition(": ")
        reasons.setdefault(reason, []).append(name)
    lines = []
    for reason, names in reasons.items():
        numbers = [name.removeprefix("partition ") for name in names if name.startswith("partition ")]
        others = [name for name in names if not name.startswith("partition ")]
        of_partitions = [f"partitions {', '.join(numbers)}"] if numbers else []
        lines.append(f"{', '.join(of_partitions + others)}: {reason}")
    return lines


def _has_leader(stream: StreamStatus) -> bool:
    return bool(stream.leader) or not stream.replicas


def _state_key(stream: StreamStatus) -> tuple[object, ...]:
    """Differs when something was written, removed or lost."""
    return stream.leader, stream.messages, stream.first_seq, stream.last_seq


async def _count_letters(api: Api) -> dict[str, int]:
    """Stage → its letters. The newest message of a subject may be a mark, which is none (see `cluster.dlq`)."""
    body = msgspec.json.encode({"subjects_filter": "fi.dlq.*.*"})
    answer = await api.ask(DLQ, f"$JS.API.STREAM.INFO.{DLQ}", body, _Counted)
    counts: dict[str, int] = {}
    for subject, count in (answer.state.subjects or {}).items():
        last = await api.last_message(DLQ, subject)
        if last is not None and read_letter(subject, last.seq, last.time_ns, last.data, last.headers).handled:
            count -= 1
        if count:
            stage = subject.split(".")[2]
            counts[stage] = counts.get(stage, 0) + count
    return counts


class _State(msgspec.Struct):
    subjects: dict[str, int] | None = None


class _Counted(msgspec.Struct):
    state: _State


def _look_at_disk(directory: Path) -> DiskLook | None:
    """The store of the run in `directory`; None while it has none, or when nothing runs there."""
    shards = directory / SHARDS
    try:
        floor_bytes = read_state(directory).settings.disk_floor_bytes
        found = list_shards(shards)
    except (NotRunningError, FileNotFoundError):
        return None
    size_bytes = dict.fromkeys(found, 0)
    for partition, files in found.items():
        for file in files:
            try:
                size_bytes[partition] += file.path.stat().st_size
            except FileNotFoundError:
                # It was sealed meanwhile.
                continue
    return DiskLook(
        path=str(shards),
        free_bytes=shutil.disk_usage(shards).free,
        floor_bytes=floor_bytes,
        live={partition: sum(not file.sealed for file in files) for partition, files in found.items()},
        sealed={partition: sum(file.sealed for file in files) for partition, files in found.items()},
        size_bytes=size_bytes,
    )
