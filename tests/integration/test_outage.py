"""What ends while no server is there: stage processes on SIGTERM, a publish at its deadline or on Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path

import pytest
import pytest_asyncio
from commands import ENDS_WITHIN_S, at_servers

from cluster.apply import apply
from cluster.nodes import EmbeddedCluster
from cluster.testing.waiting import until
from cluster.workload import consultations
from contracts.settings import Settings
from contracts.subjects import EVENTS
from stages.runtime.connection import connect

pytestmark = pytest.mark.cluster

SMALL = {f"{kind}_bytes_max": 10_000_000 for kind in ("events", "hop", "receipts", "dlq")}


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedCluster]:
    async with EmbeddedCluster(tmp_path / "servers", servers=1) as cluster:
        client = await connect(cluster.urls, "test")
        await apply(client, Settings(replicas=1, partitions=1, **SMALL))
        await client.close()
        yield cluster


class Running:
    """A `fictl` that runs; `words` is what it said on stderr so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.words = ""

    async def says(self, text: str) -> None:
        """Waits until it said so on stderr."""
        while text not in self.words:
            line = await self._line(self.process.stderr)
            assert line, f"it ended without {text!r}: {self.words}"
            self.words += line

    async def ready(self) -> None:
        """Waits for a stage's word on stdout."""
        assert await self._line(self.process.stdout) == "READY\n"

    async def ended(self) -> int:
        """Its exit code."""
        async with asyncio.timeout(ENDS_WITHIN_S):
            _, rest = await self.process.communicate()
        self.words += rest.decode()
        assert "Traceback" not in self.words, self.words
        assert self.process.returncode is not None
        return self.process.returncode

    async def _line(self, pipe: asyncio.StreamReader | None) -> str:
        assert pipe is not None
        async with asyncio.timeout(ENDS_WITHIN_S):
            return (await pipe.readline()).decode()


@asynccontextmanager
async def fictl(server: EmbeddedCluster, *arguments: str | Path) -> AsyncIterator[Running]:
    command = (sys.executable, "-m", "cluster", *map(str, arguments), *at_servers(server.urls))
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(*command, **pipes)  # type: ignore[arg-type]
    try:
        yield Running(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def has_events(server: EmbeddedCluster) -> bool:
    client = await connect(server.urls, "test")
    try:
        return (await client.jetstream().stream_info(EVENTS)).state.messages > 0
    finally:
        await client.close()


@pytest.mark.parametrize("stage", ["ingest", "persist"])
async def test_a_stage_that_is_told_to_end_without_servers_ends_well(
    server: EmbeddedCluster, stage: str, tmp_path: Path
) -> None:
    async with fictl(server, "run", stage, "--name", "x", "--shards", tmp_path / "shards") as running:
        await running.ready()
        await server.nodes[0].kill()
        await running.says("no connection")
        # It says goodbye then, which stays unsent.
        running.process.send_signal(signal.SIGTERM)
        assert await running.ended() == 0


@pytest.mark.parametrize("how", ["deadline", "Ctrl-C"])
async def test_a_publish_without_servers_says_what_to_do_next(
    server: EmbeddedCluster, how: str, tmp_path: Path
) -> None:
    lines = tmp_path / "events.ndjson"
    lines.write_text("\n".join(json.dumps(event) for event in islice(consultations(1, 20_000), 20_000)))
    deadline = ("--deadline", "3") if how == "deadline" else ()
    async with fictl(server, "publish", lines, "--rate", "500", *deadline) as running:
        await until(lambda: has_events(server), "it publishes")
        await server.nodes[0].kill()
        await running.says("no connection")
        if how == "deadline":
            assert await running.ended() == 3
            assert "publish it again, nothing will be doubled" in running.words
        else:
            running.process.send_signal(signal.SIGINT)
            assert await running.ended() == 130
            assert "publish the same file again" in running.words
