"""What came out of a design, and when: a sink reports the ids of the events that it has stored, over loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from cluster.ports import LOOPBACK
from stages.runtime.tasks import end_tasks

ID_BYTES = 16
_READ_BYTES = 1 << 16


class Arrivals:
    """Events that came out.

    Attributes:
        seen_ns: event id (16 bytes) → wall clock when it was first reported.
        repeated: reports of an event that had come out before.
        port: where sinks connect to.
    """

    def __init__(self) -> None:
        self.seen_ns: dict[bytes, int] = {}
        self.repeated = 0
        self.port = 0
        self._news = asyncio.Event()
        self._readers: set[asyncio.Task[None]] = set()

    def note(self, event_ids: Iterable[bytes]) -> None:
        """These events are stored."""
        now_ns = time.time_ns()
        for event_id in event_ids:
            if event_id in self.seen_ns:
                self.repeated += 1
            else:
                self.seen_ns[event_id] = now_ns
        self._news.set()

    async def reach(self, count: int, limit_s: float) -> bool:
        """Waits until `count` events came out; False when that takes longer than `limit_s`."""
        try:
            async with asyncio.timeout(limit_s):
                while len(self.seen_ns) < count:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Ends the connections."""
        await end_tasks(*self._readers)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._readers.add(asyncio.create_task(self._take(reader, writer), name="reports of a sink"))

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rest = b""
        try:
            while data := await reader.read(_READ_BYTES):
                data = rest + data
                whole = len(data) // ID_BYTES * ID_BYTES
                rest = data[whole:]
                self.note(data[at : at + ID_BYTES] for at in range(0, whole, ID_BYTES))
        except ConnectionError:
            return  # its process was ended
        finally:
            writer.close()


@asynccontextmanager
async def listening() -> AsyncIterator[Arrivals]:
    """Arrivals that a sink in another process can report to."""
    arrivals = Arrivals()
    server = await asyncio.start_server(arrivals._connected, LOOPBACK, 0)
    try:
        arrivals.port = server.sockets[0].getsockname()[1]
        yield arrivals
    finally:
        server.close()
        await arrivals.close()


class Reporter:
    """The sink's end: tells of stored events."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    @classmethod
    async def connect(cls, port: int) -> Reporter:
        """Connects to `Arrivals.port`."""
        _, writer = await asyncio.open_connection(LOOPBACK, port)
        return cls(writer)

    def stored(self, event_ids: Iterable[bytes]) -> None:
        """These events are stored."""
        self._writer.write(b"".join(event_ids))
