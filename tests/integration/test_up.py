"""`fictl up` that is told to stop before it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
from tiny_stages import is_gone

from cluster.lock import DirectoryLock
from cluster.testing.waiting import until

HUNG_SERVER = """#!/bin/sh
trap '' TERM
echo $$ >> "$NOTED"
while :; do sleep 1; done
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_up_that_is_told_to_stop_while_its_servers_hang_stops_at_once(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nats-server").write_text(HUNG_SERVER)
    (tmp_path / "bin" / "nats-server").chmod(0o755)
    noted = tmp_path / "noted"
    up = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster", "up", "--dir", str(tmp_path / "run")),
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "NOTED": str(noted)},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        await until(lambda: noted.exists() and len(noted.read_text().split()) == 3, "three servers were started")
        up.send_signal(number)
        async with asyncio.timeout(10):
            _, err = await up.communicate()
    finally:
        if up.returncode is None:
            up.kill()
            await up.communicate()
    assert (up.returncode, b"stopped what was starting" in err) == (0, True), err.decode()
    assert all(is_gone(int(pid)) for pid in noted.read_text().split())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which files a process has open")
async def test_up_that_waits_for_its_directory_stops_when_told(tmp_path: Path) -> None:
    other = DirectoryLock(tmp_path / "lock")
    await other.acquire(1)
    up = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster", "up", "--dir", str(tmp_path)), stderr=asyncio.subprocess.PIPE
    )

    def waits() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return any(os.readlink(fd) == str(tmp_path / "lock") for fd in Path(f"/proc/{up.pid}/fd").iterdir())
        return False

    try:
        await until(waits, "it waits for the directory")
        up.terminate()
        async with asyncio.timeout(10):
            await up.communicate()
    finally:
        other.release()
        if up.returncode is None:
            up.kill()
            await up.communicate()
    assert up.returncode == 0
    assert not (tmp_path / "cluster.json").exists()
