"""Running `fictl` as its users do: in a process of its own, with no settings from this one's environment."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import NamedTuple

ENDS_WITHIN_S = 120.0


class Ran(NamedTuple):
    """Exit code, and what was printed."""

    code: int
    out: str
    err: str


async def run_fictl(*arguments: str | Path, **environment: str) -> Ran:
    """Runs it to its end, which must not be a traceback; `environment` comes on top of ours."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster", *map(str, arguments)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if not name.startswith("FI_")} | environment,
    )
    async with asyncio.timeout(ENDS_WITHIN_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    assert b"Traceback" not in err, err.decode()
    return Ran(process.returncode, out.decode(), err.decode())


async def stop_stage_once_it_says(text: str, *arguments: str) -> Ran:
    """Runs ``fictl run`` until its log says `text`, and then tells it to stop."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster", "run", *arguments, "--log-level", "DEBUG"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    said = b""
    try:
        async with asyncio.timeout(ENDS_WITHIN_S):
            while text.encode() not in said and (line := await process.stderr.readline()):
                said += line
            process.terminate()
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert b"Traceback" not in said + err, (said + err).decode()
    return Ran(process.returncode or 0, out.decode(), (said + err).decode())


async def fictl_at(urls: tuple[str, ...], *arguments: str) -> Ran:
    """Runs a verb on the servers at `urls`."""
    return await run_fictl(*arguments, *at_servers(urls))


def at_servers(urls: tuple[str, ...]) -> list[str]:
    """The options that name servers."""
    return [part for url in urls for part in ("--nats", url)]
