"""TCP connections between the processes of one cluster, held in a hand that can squeeze them.

One listener for each pair (who connects, to whom). Cut, a link passes no byte and closes nothing, like a cable that was
pulled: both ends find out by their own time-outs, and what was under way arrives late when it is plugged in again.
All of it lives in a thread and an event loop of its own, so that a test that is busy does not become a slow network.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from cluster.ports import LOOPBACK, HeldPorts
from stages.runtime.tasks import end_tasks

T = TypeVar("T")

HERE: Final = "here"
"""The test itself, as the one who connects."""

_CHUNK_BYTES: Final = 64 * 1024
_CHUNKS_MAX: Final = 64
_CALL_LIMIT_S: Final = 10.0
_TRIES: Final = 5


class _Link:
    """One listener and its connections."""

    def __init__(self, port: int, target: int) -> None:
        self.port = port
        self.target = target
        self.delay_s = 0.0
        self.passing = asyncio.Event()
        self.passing.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        """Raises `OSError` when somebody else has the port."""
        self._server = await asyncio.start_server(self._accepted, LOOPBACK, self.port)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        await end_tasks(*self._tasks)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._join(reader, writer)
        except OSError:
            # The target is down, or an end went away: to the other end that is a connection that closes.
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.passing.wait()
        far_reader, far_writer = await asyncio.open_connection(LOOPBACK, self.target)
        pumps = [
            asyncio.create_task(self._pump(reader, far_writer)),
            asyncio.create_task(self._pump(far_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end_tasks(*pumps)
            far_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Passes bytes on, each chunk `delay_s` after it came, until the end, which comes as late."""
        clock = asyncio.get_running_loop().time
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_CHUNKS_MAX)

        async def take() -> None:
            data = b"-"
            while data:
                try:
                    data = await reader.read(_CHUNK_BYTES)
                except OSError:
                    data = b""
                await under_way.put((clock() + self.delay_s, data))

        taking = asyncio.create_task(take())
        try:
            while True:
                due, data = await under_way.get()
                if (early_s := due - clock()) > 0:
                    await asyncio.sleep(early_s)
                await self.passing.wait()
                if not data or writer.is_closing():
                    return
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            # Nobody takes it any more; that the connection ended is for `_join` to pass on.
            return
        finally:
            await end_tasks(taking)


class Links:
    """All links of one cluster, by (who connects, to whom). Usable from any thread."""

    def __init__(self) -> None:
        self._links: dict[tuple[str, str], _Link] = {}
        self._held = HeldPorts()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fi-links", daemon=True)
        self._thread.start()

    def aim(self, source: str, target: str, port: int) -> int:
        """The port at which `source` reaches `target`, who listens on `port`. The same one every time."""
        return self._call(self._aim(source, target, port))

    def cut(self, name: str) -> None:
        """No byte passes on the links to and from `name`."""
        self._call(self._set(name, passing=False, delay_s=None))

    def part(self, one: str, other: str) -> None:
        """No byte passes on the links between the two."""
        self._call(self._part(one, other))

    def slow(self, name: str, latency_s: float) -> None:
        """Bytes on the links to and from `name` arrive so many seconds later, each way."""
        self._call(self._set(name, passing=None, delay_s=latency_s))

    def heal(self, name: str) -> None:
        """Ends `cut`, `part` and `slow`."""
        self._call(self._set(name, passing=True, delay_s=0.0))

    def close(self) -> None:
        """Closes every connection and ends the thread."""
        if self._loop.is_closed():
            return
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_LIMIT_S)
        self._loop.close()
        self._held.release()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_LIMIT_S)

    async def _aim(self, source: str, target: str, port: int) -> int:
        link = self._links.get((source, target))
        if link is not None:
            link.target = port
            return link.port
        for tries_left in reversed(range(_TRIES)):
            made = _Link(self._held.take(1)[0], port)
            try:
                await made.listen()
                break
            except OSError:
                if not tries_left:
                    raise
        self._links[source, target] = made
        return made.port

    async def _set(self, name: str, *, passing: bool | None, delay_s: float | None) -> None:
        for ends, link in self._links.items():
            if name not in ends:
                continue
            if delay_s is not None:
                link.delay_s = delay_s
            if passing is not None:
                (link.passing.set if passing else link.passing.clear)()

    async def _part(self, one: str, other: str) -> None:
        for ends, link in self._links.items():
            if set(ends) == {one, other}:
                link.passing.clear()

    async def _close(self) -> None:
        await asyncio.gather(*(link.close() for link in self._links.values()))
        # Transports report their end with the next turn of the loop.
        await asyncio.sleep(0)
