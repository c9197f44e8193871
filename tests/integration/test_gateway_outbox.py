"""README's outbox as it stands, in a process that is killed again and again: nothing is lost, doubled or reordered."""

from __future__ import annotations

import asyncio
import json
import random
import re
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest

from cluster.testing.ficluster import FiCluster
from cluster.testing.load import Load, workload
from cluster.testing.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

README = Path(__file__).resolve().parents[2] / "README.md"
EVENTS, KILLS = 240, 16
SERVERS = ("n1", "n2", "n3")
DOWN_AT, BACK_AT = EVENTS // 2, EVENTS * 3 // 4

MAIN = """
import sys

async def main():
    sending = asyncio.create_task(send(sys.argv[1:]))
    while line := await asyncio.to_thread(sys.stdin.readline):
        event = json.loads(line)
        keep(event["metadata"]["site_id"], event)
        print(event["event_id"], flush=True)
        assert not sending.done()

asyncio.run(main())
"""


def outbox_example() -> str:
    (text,) = (
        text
        for text in re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
        if "def keep(" in text
    )
    return text


class Killed:
    """The example as a process; takes lines and is killed."""

    def __init__(self, urls: tuple[str, ...], directory: Path) -> None:
        self._command = [sys.executable, "-c", outbox_example() + MAIN, *urls]
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None

    async def keep(self, line: bytes, *, killed: bool) -> bool:
        """Gives it a line. False where it was killed before it said that it has it."""
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                cwd=self._directory,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line + b"\n")
        await process.stdin.drain()
        if killed:
            await self.kill()
            return False
        said = await process.stdout.readline()
        assert said.decode().strip() == json.loads(line)["event_id"]
        return True

    async def kill(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            await process.wait()


@pytest.mark.fi_cluster(partitions=2)
async def test_what_the_outbox_has_taken_is_stored_once_and_in_order_though_it_is_killed_while_it_takes_and_sends(
    fi_cluster: FiCluster, tmp_path: Path
) -> None:
    load, rng = Load(workload(seed=3, events=EVENTS)), random.Random(3)
    outbox = Killed(fi_cluster.urls, tmp_path)
    # Before it answered, so that a kept line is given again; and after, in the middle of what it sends.
    during, after = (set(rng.sample(range(EVENTS - 1), KILLS // 2)) for _ in range(2))

    async def sent() -> bool:
        with closing(sqlite3.connect(tmp_path / "outbox.db")) as kept:
            return kept.execute("select count(*) from event").fetchone() == (0,)

    try:
        for number, line in enumerate(load.lines):
            if number in during:
                assert not await outbox.keep(line, killed=True)
            assert await outbox.keep(line, killed=False)
            load.acknowledge([UUID(json.loads(line)["event_id"]).bytes])
            if number == DOWN_AT:
                for server in SERVERS:
                    await fi_cluster.kill(server)
            # What it was about to send to nobody is not sent yet.
            if number in after or number == DOWN_AT + 20:
                await outbox.kill()
            if number == BACK_AT:
                for server in SERVERS:
                    await fi_cluster.start(server)
        await until(sent, "all that was kept is sent", 60)
    finally:
        await outbox.kill()
    await fi_cluster.assert_whole(load)
