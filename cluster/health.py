"""How every process of a run is: what each says of itself on its health port, and what its silence means."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cluster.state import ProcessState, State, read_state
from contracts.budgets import HEALTH_ANSWER
from contracts.wire import UNREADABLE
from stages.runtime.connection import server_name
from stages.runtime.health import Check, Report
from stages.runtime.pids import process_lives
from stages.runtime.tasks import side_by_side
from stages.runtime.watch import HEALTH_DIRECTORY, HealthFile

ANSWER_BYTES_MAX = 1024 * 1024


class ProcessHealth(msgspec.Struct, frozen=True, kw_only=True):
    """One process.

    Attributes:
        name, kind, pid: as `cluster.state.ProcessState`.
        ready: it does its work.
        why: in one line, what keeps it from that; empty when nothing does.
        url: of its health port; empty when it has none.
        checks: what it looked at, by name.
    """

    name: str
    kind: str
    pid: int | None
    ready: bool
    why: str = ""
    url: str = ""
    checks: dict[str, Check] = {}


async def look(directory: Path, limit_s: float = HEALTH_ANSWER.s) -> list[ProcessHealth]:
    """Asks every process of the run in `directory`, side by side; each may take `limit_s`.

    Raises:
        NotRunningError: nothing runs there.
    """
    state = read_state(directory)
    files = {file.name: file for file in read_health_files(directory)}
    servers = dict(zip([p.name for p in state.processes if p.kind == "server"], state.urls, strict=False))
    asked = [
        _server(process, servers.get(process.name, ""))
        if process.kind == "server"
        else _stage(process, files.get(process.name), state, limit_s)
        for process in state.processes
    ]
    known = {process.name for process in state.processes}
    # Those that joined the run by themselves, with `fictl run --dir`.
    asked += [
        _stage(ProcessState(name=file.name, kind=file.stage, pid=file.pid), file, state, limit_s)
        for file in files.values()
        if file.name not in known
    ]
    return await side_by_side(*asked)


def read_health_files(directory: Path) -> list[HealthFile]:
    """Where the processes of a run say that they answer. A file whose process was killed says nothing any more."""
    return [file for _, file in _health_files(directory) if process_lives(file.pid, file.started)]


def clear_stale(directory: Path) -> None:
    """Removes the files that killed processes have left, as far as that can be done: nobody needs it to be."""
    for path, file in _health_files(directory):
        if not process_lives(file.pid, file.started):
            with contextlib.suppress(OSError):
                path.unlink()


def _health_files(directory: Path) -> Iterator[tuple[Path, HealthFile]]:
    for path in sorted((directory / HEALTH_DIRECTORY).glob("*.json")):
        try:
            file = msgspec.json.decode(path.read_bytes(), type=HealthFile)
        except (OSError, *UNREADABLE):
            continue
        yield path, file


async def get(url: str, limit_s: float = HEALTH_ANSWER.s) -> tuple[int, bytes]:
    """Status and body of one GET.

    Raises:
        OSError: nobody listens.
        TimeoutError: no answer within `limit_s`.
        ValueError: not an HTTP answer.
    """
    authority, _, path = url.removeprefix("http://").partition("/")
    host, _, port = authority.rpartition(":")
    async with asyncio.timeout(limit_s):
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        try:
            writer.write(f"GET /{path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while part := await reader.read(65536):
                answer += part
                if len(answer) > ANSWER_BYTES_MAX:
                    raise ValueError(f"{url} answers more than {ANSWER_BYTES_MAX} bytes")
        finally:
            writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if not words[0].startswith(b"HTTP/") or len(words) < 2:
        raise ValueError(f"{url} does not answer in HTTP")
    return int(words[1]), body


async def _server(process: ProcessState, url: str) -> ProcessHealth:
    greets = process.pid is not None and url != "" and await server_name(url) is not None
    why = "" if greets else "is down" if process.pid is None else "does not greet"
    return ProcessHealth(name=process.name, kind=process.kind, pid=process.pid, ready=greets, why=why, url=url)


async def _stage(process: ProcessState, file: HealthFile | None, state: State, limit_s: float) -> ProcessHealth:
    if process.pid is None:
        return _not_ready(process, "is down", "")
    if file is None or file.pid != process.pid:
        off = state.settings.health_port < 0
        return _not_ready(process, "has no health port: FI_HEALTH_PORT=0 gives it one" if off else "is starting", "")
    host = f"[{file.host}]" if ":" in file.host else file.host
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{file.port}"
    try:
        _, body = await get(f"{url}/readyz", limit_s)
        report = msgspec.json.decode(body, type=Report)
    except TimeoutError:
        return _not_ready(process, f"does not answer within {limit_s:g} s: frozen, or its event loop is stuck", url)
    except OSError as error:
        return _not_ready(process, f"does not answer ({errno.errorcode.get(error.errno or 0, error)})", url)
    except (ValueError, *UNREADABLE) as error:
        return _not_ready(process, f"answers something else ({error})", url)
    why = "; ".join(f"{name}: {check.why}" for name, check in report.checks.items() if not check.ok)
    return ProcessHealth(
        name=process.name,
        kind=process.kind,
        pid=process.pid,
        ready=report.ok,
        why=why,
        url=url,
        checks=report.checks,
    )


def _not_ready(process: ProcessState, why: str, url: str) -> ProcessHealth:
    return ProcessHealth(name=process.name, kind=process.kind, pid=process.pid, ready=False, why=why, url=url)
