"""Keeps one process running: starts it again when it dies, later each time it dies soon."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Literal

import msgspec

from cluster.process import ManagedProcess, ProcessError, describe_exit
from contracts.budgets import RESTART_HEALTHY, RESTART_PAUSE_MAX, RESTART_PAUSE_MIN
from stages.runtime.tasks import end_tasks

log = logging.getLogger(__name__)


class ProcessEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something happened to a process.

    Attributes:
        name: the process.
        kind: what happened.
        detail: for ``died``, why: exit code or signal, and the last line of its log.
        pid: the process it happened to, when it is running.
        restart_in_s: for ``died``, when it will be started again.
    """

    name: str
    kind: Literal["started", "died", "stopped"]
    detail: str = ""
    pid: int | None = None
    restart_in_s: float | None = None


OnEvent = Callable[[ProcessEvent], None]


class Keeper:
    """Watches over one process from `start` to `stop`. Deaths in between are repaired, and told to `on_event`.

    Always true: whatever fails meanwhile, `on_event` included, is logged, and the watch goes on.
    """

    def __init__(self, process: ManagedProcess, on_event: OnEvent) -> None:
        self.process = process
        self._on_event = on_event
        self._task: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        """Two who start it at once would start two."""
        self._delay_s = RESTART_PAUSE_MIN.s

    async def start(self) -> None:
        """Starts the process, waits until it serves, and watches over it from then on.

        Raises:
            ProcessError: it did not come up. It is not watched then.
        """
        async with self._turn:
            if self._task is not None and not self._task.done():
                return
            await self.process.start()
            self._tell(ProcessEvent(name=self.process.name, kind="started", pid=self.process.pid))
            self._task = asyncio.create_task(self._watch(), name=f"keeper of {self.process.name}")

    async def stop(self, limit_s: float) -> None:
        """Stops watching and stops the process: SIGTERM, SIGKILL after `limit_s` (at once for 0)."""
        async with self._turn:
            await self._unwatch()
            was_running = self.process.running
            if limit_s > 0:
                in_time = await self.process.stop(limit_s)
            else:
                await self.process.kill()
                in_time = True
        if was_running:
            detail = "" if in_time else f"killed: it had not ended after {limit_s:g} s"
            self._tell(ProcessEvent(name=self.process.name, kind="stopped", detail=detail))

    async def _unwatch(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            await end_tasks(task)

    async def _watch(self) -> None:
        while True:
            try:
                since = time.monotonic()
                code = await self.process.wait()
                if time.monotonic() - since >= RESTART_HEALTHY.s:
                    self._delay_s = RESTART_PAUSE_MIN.s
                await self._restart(describe_exit(code))
            except Exception:
                # Nobody waits for this task: what ended it would end the watch unseen.
                log.exception("the watch over %s failed, and goes on", self.process.name)
                await asyncio.sleep(self._delay_s)

    async def _restart(self, reason: str) -> None:
        while True:
            delay, self._delay_s = self._delay_s, min(2 * self._delay_s, RESTART_PAUSE_MAX.s)
            detail = f"{reason}; its last words: {self.process.last_log_line() or 'none'}"
            self._tell(ProcessEvent(name=self.process.name, kind="died", detail=detail, restart_in_s=delay))
            await asyncio.sleep(delay)
            try:
                await self.process.start()
            except ProcessError as error:
                reason = str(error).partition(";")[0]
                continue
            self._tell(ProcessEvent(name=self.process.name, kind="started", pid=self.process.pid))
            return

    def _tell(self, event: ProcessEvent) -> None:
        level = logging.WARNING if event.kind == "died" else logging.INFO
        log.log(level, "process %s", event.kind, extra={"process_event": msgspec.to_builtins(event)})
        try:
            self._on_event(event)
        except Exception:
            log.exception("whoever is told of processes failed")
