"""The supervisor's ear: a Unix socket that other commands reach it by, and that answers with what came of it.

One request a connection, one JSON line each way. Requests are carried out one after the other, to their end, also when
whoever asked has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from cluster.state import NotRunningError
from contracts.budgets import CONTROL_REQUEST
from contracts.errors import DefiniteError, FiError, SettingsError
from contracts.subjects import Stage
from contracts.wire import UNREADABLE
from stages.runtime.tasks import end_tasks

log = logging.getLogger(__name__)

SOCKET_FILE: Final = "control.sock"
_PATH_BYTES_MAX: Final = 100
"""Systems take socket paths of 104 to 108 bytes."""


class ScaleRequest(msgspec.Struct, frozen=True, tag_field="v", tag="scale.1"):
    """Run so many processes of these stages."""

    counts: dict[Stage, int]


class RestartRequest(msgspec.Struct, frozen=True, tag_field="v", tag="restart.1"):
    """Replace every process of these stages, one at a time."""

    stages: tuple[Stage, ...]


class ScaleAnswer(msgspec.Struct, frozen=True):
    """What came of it.

    Attributes:
        before, after: processes of every stage.
        error: why it was not done, or not to the end; empty when it was.
        usage: the request itself was wrong.
    """

    before: dict[Stage, int]
    after: dict[Stage, int]
    error: str = ""
    usage: bool = False


class RestartAnswer(msgspec.Struct, frozen=True):
    """What came of it.

    Attributes:
        replaced: stage → how many of its processes were.
        error: why it was not done to the end; empty when it was.
        usage: the request itself was wrong.
    """

    replaced: dict[Stage, int]
    error: str = ""
    usage: bool = False


Scale = Callable[[dict[Stage, int]], Awaitable[ScaleAnswer]]
Restart = Callable[[tuple[Stage, ...]], Awaitable[RestartAnswer]]
Answer = TypeVar("Answer", ScaleAnswer, RestartAnswer)


def socket_path(directory: Path) -> Path:
    """Where the run in `directory` listens: there, or among temporary files when that path is too long."""
    path = directory / SOCKET_FILE
    if len(os.fsencode(path)) <= _PATH_BYTES_MAX:
        return path
    return Path(tempfile.gettempdir()) / f"fi-{secrets.token_hex(8)}.sock"


class ControlServer:
    """Listens until closed.

    Args:
        path: of the socket; whoever calls has made sure that nobody else listens there.
        scale, restart: carry a request out.
    """

    def __init__(self, path: Path, scale: Scale, restart: Restart) -> None:
        self.path = path
        self._scale = scale
        self._restart = restart
        self._server: asyncio.Server | None = None
        self._busy = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begins to listen. Only this user may connect."""
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)
        try:
            listener.bind(str(self.path))
        finally:
            os.umask(mask)
        self._server = await asyncio.start_unix_server(self._connected, sock=listener)

    async def close(self) -> None:
        """Stops listening; what is being carried out is broken off."""
        if self._server is not None:
            self._server.close()
            self._server = None
            await end_tasks(*self._tasks)
            # A disk that takes no change any more must not keep the rest from being stopped in order.
            with contextlib.suppress(OSError):
                self.path.unlink()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            answer = await self._carry_out(reader)
            async with asyncio.timeout(CONTROL_REQUEST.s):
                writer.write(msgspec.json.encode(answer) + b"\n")
                await writer.drain()
        except OSError as error:
            log.info("whoever asked has gone: %r", error)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _carry_out(self, reader: asyncio.StreamReader) -> ScaleAnswer | RestartAnswer:
        try:
            async with asyncio.timeout(CONTROL_REQUEST.s):
                request = msgspec.json.decode(await reader.readline(), type=ScaleRequest | RestartRequest)
        except (TimeoutError, ValueError, *UNREADABLE) as error:
            return ScaleAnswer({}, {}, f"not a request that this version knows: {error}", usage=True)
        async with self._busy:
            if isinstance(request, RestartRequest):
                return await self._restart(request.stages)
            return await self._scale(request.counts)


async def ask_scale(path: str, counts: dict[Stage, int], limit_s: float) -> ScaleAnswer:
    """Asks the supervisor that listens at `path` to scale, and waits until it has.

    Raises:
        NotRunningError: nobody listens there.
        DefiniteError: it is another user's run.
        SettingsError: the counts are not possible.
        FiError: it was not done, or not within `limit_s`.
    """
    answer = await _ask(path, ScaleRequest(counts), ScaleAnswer, limit_s)
    if answer.error:
        raise (SettingsError if answer.usage else FiError)(answer.error)
    return answer


async def ask_restart(path: str, stages: tuple[Stage, ...], limit_s: float) -> RestartAnswer:
    """Asks the supervisor that listens at `path` to replace the processes of `stages`, and waits until it has.

    Raises:
        NotRunningError: nobody listens there.
        DefiniteError: it is another user's run.
        FiError: no answer, or not within `limit_s`. What was not done is in the answer.
    """
    answer = await _ask(path, RestartRequest(stages), RestartAnswer, limit_s)
    if answer.usage:
        raise FiError(answer.error)
    return answer


async def _ask(path: str, request: ScaleRequest | RestartRequest, kind: type[Answer], limit_s: float) -> Answer:
    """One request and its answer. Raises as `ask_restart`."""
    try:
        async with asyncio.timeout(limit_s):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                writer.write(msgspec.json.encode(request) + b"\n")
                line = await reader.readline()
            finally:
                writer.close()
    except TimeoutError:
        raise FiError(f"not done after {limit_s:.0f} s; it goes on, see `fictl members`") from None
    except PermissionError:
        raise DefiniteError(f"{path} is another user's, whose run it is: ask as that user") from None
    except OSError as error:
        raise NotRunningError(f"nobody listens at {path} ({error.strerror}); is `fictl up` still starting?") from error
    try:
        return msgspec.json.decode(line, type=kind)
    except UNREADABLE as error:
        raise FiError(f"the supervisor did not answer ({error}); see its log") from error
