"""An event loop whose clock is virtual: when nothing is ready it jumps to the next timer. No sockets, no threads.

Always true: what runs, and when, follows from what was scheduled alone. Callbacks that are due run in the order in
which they became due; interleavings differ from run to run because every delay is drawn from the run's seed. What a
`Host` runs can be frozen, as SIGSTOP does: its callbacks are held back, and all of them run when it thaws.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

T = TypeVar("T")

STEPS_MAX = 3_000_000
"""Callbacks that one run may take; more means that something turns without waiting for anything."""


class StuckError(Exception):
    """Nothing is ready and nothing is scheduled, or a run takes no end."""


class Host:
    """Where some code runs: one simulated process.

    Attributes:
        name: for the trace.
        frozen: its callbacks wait.
        dead: it was killed. Nothing it still does has an effect outside of it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.frozen = False
        self.dead = False
        self.parked: list[asyncio.Handle] = []
        self.context: Context = copy_context()
        self.context.run(_HOST.set, self)


_HOST: ContextVar[Host | None] = ContextVar("host", default=None)


def current_host() -> Host | None:
    """Whose code is running; None for the servers and the run itself."""
    return _HOST.get()


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module's text.

    Args:
        thread_s: gives how long a thread takes to begin, and to tell that it has ended.
    """

    def __init__(self, thread_s: Callable[[], float]) -> None:
        super().__init__()
        self._now_s = 0.0
        self._thread_s = thread_s
        self._timers: list[tuple[float, int, Any]] = []
        self._timers_made = 0
        self.steps = 0

    def time(self) -> float:
        """Virtual seconds since the run began."""
        return self._now_s

    def thaw(self, host: Host) -> None:
        """What was held back runs now, in order."""
        host.frozen = False
        self._ready.extend(host.parked)  # type: ignore[attr-defined]
        host.parked.clear()

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Calls `func` here, a moment later, and tells of its end another moment later.

        A process may be killed or frozen before, between and after.
        """
        future: asyncio.Future[T] = self.create_future()
        host = current_host()

        def work() -> None:
            if host is not None and host.dead:
                future.cancel()
                return
            try:
                result = func(*args)
            except Exception as error:
                if host is not None and host.dead:
                    future.cancel()
                else:
                    self.call_later(self._thread_s(), _fail, future, error)
            else:
                self.call_later(self._thread_s(), _finish, future, result)

        self.call_later(self._thread_s(), work)
        return future

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """As asyncio's; of two timers for one moment, the one that was made first goes first."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._timers_made += 1
        heapq.heappush(self._timers, (when, self._timers_made, handle))
        return handle

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers  # type: ignore[attr-defined]
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            if not timers:
                raise StuckError("nothing is ready and nothing is scheduled")
            self._now_s = max(self._now_s, timers[0][0])
        while timers and timers[0][0] <= self._now_s:
            ready.append(heapq.heappop(timers)[2])
        self.steps += len(ready)
        if self.steps > STEPS_MAX:
            raise StuckError(f"more than {STEPS_MAX} callbacks at {self._now_s:.1f} s")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            host = handle._context.get(_HOST)
            if host is not None and host.frozen:
                host.parked.append(handle)
            else:
                handle._run()
        handle = None  # an exception's traceback would keep it

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """A cancelled timer stays until its time has come."""

    def _process_events(self, event_list: object) -> None:
        raise AssertionError("there are no file descriptors to watch")

    def _write_to_self(self) -> None:
        raise AssertionError("there are no threads to wake the loop")


def _finish(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
