"""The health port: a small HTTP/1.1 server for probes, people and Prometheus.

It takes GET and HEAD without a body, of at most `HEAD_BYTES_MAX`, from at most `CONNECTIONS_MAX` at once, one request a
connection, and gives each `HEALTH_REQUEST`. It runs in the event loop that the lanes run in: when that is stuck, nobody
answers, which is what a liveness probe must see.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple

import msgspec

from contracts.budgets import HEALTH_REQUEST
from contracts.errors import SettingsError
from stages.runtime.tasks import end_tasks

log = logging.getLogger(__name__)

HEAD_BYTES_MAX: Final = 8192
CONNECTIONS_MAX: Final = 16

JSON: Final = "application/json"
PROMETHEUS: Final = "text/plain; version=0.0.4; charset=utf-8"

_PHRASES: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at: whether it is as it should be, and in words why or why not."""

    ok: bool
    why: str


class Report(msgspec.Struct, frozen=True):
    """The body of `/livez` and `/readyz`.

    Attributes:
        ok: all checks hold.
        process, stage: who answers.
        checks: by name.
    """

    ok: bool
    process: str
    stage: str
    checks: dict[str, Check]


class Answer(NamedTuple):
    """What a path answers."""

    status: int
    content_type: str
    body: bytes


def report_answer(report: Report) -> Answer:
    """200 when all is well, else 503, with the report as JSON."""
    return Answer(200 if report.ok else 503, JSON, msgspec.json.encode(report) + b"\n")


class HealthServer:
    """Serves `paths`. Its port is known once `start` has returned.

    Args:
        host, port: where; port 0 chooses a free one.
        paths: path → what gives the answer, at each request.
    """

    def __init__(self, host: str, port: int, paths: Mapping[str, Callable[[], Awaitable[Answer]]]) -> None:
        self._host = host
        self.port = port
        self._paths = paths
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begins to listen.

        Raises:
            SettingsError: the port, or the address, cannot be had.
        """
        try:
            self._server = await asyncio.start_server(self._accept, self._host, self.port, limit=HEAD_BYTES_MAX)
        # UnicodeError: what no name of a host can be.
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise SettingsError(
                f"health_port = {self.port} on health_host = {self._host!r}: {why}; choose another port, 0 for a "
                "free one, or an address of this machine"
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stops listening and ends what is being answered."""
        if self._server is not None:
            self._server.close()
            await end_tasks(*self._tasks)
            await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._serve(reader, writer), name="health request")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HEALTH_REQUEST.s):
                method, answer = await self._respond(reader)
                head = (
                    f"HTTP/1.1 {answer.status} {_PHRASES[answer.status]}\r\n"
                    f"Content-Type: {answer.content_type}\r\nContent-Length: {len(answer.body)}\r\n"
                    "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
                )
                writer.write(head.encode() + (b"" if method == "HEAD" else answer.body))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            writer.transport.abort()

    async def _respond(self, reader: asyncio.StreamReader) -> tuple[str, Answer]:
        """The request's method and the answer."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return "", _plain(431, f"at most {HEAD_BYTES_MAX} bytes")
        words = head.partition(b"\r\n")[0].decode("latin-1").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return "", _plain(400, "not an HTTP/1.1 request")
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return method, _plain(405, "only GET")
        path = self._paths.get(target.partition("?")[0])
        if path is None:
            return method, _plain(404, f"there are {', '.join(self._paths)}")
        try:
            return method, await path()
        except Exception:
            # A check that fails must not look like a dead process.
            log.exception("the answer to %s failed", target)
            return method, _plain(500, "the check itself failed; see the log")


def _plain(status: int, text: str) -> Answer:
    return Answer(status, "text/plain; charset=utf-8", f"{text}\n".encode())
