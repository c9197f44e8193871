"""`fictl top`: looks again and again, and shows it until somebody quits.

Always true: however it ends (a key, Ctrl-C, SIGTERM, an error), the terminal is as it was before; a look that hangs
does not keep keys from working; and the screen says how old what it shows is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from cluster.overview import Looker, Overview
from cluster.problem import Problem
from cluster.screen import Page, Trends, render
from cluster.summary import LATENCY_S, Summary, summarize
from cluster.verdict import judge
from contracts.budgets import TOP_REDRAW
from stages.runtime.tasks import end_tasks

KEYS: Final = "q quit   p partitions   space freeze"
TRENDS_MAX: Final = 60
LOOKS_MAX: Final = 120
STALE_S: Final = 2.0
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Top:
    """The live screen.

    Args:
        looker: looks.
        interval_s: from the begin of one look to that of the next.
        title: which pipeline.
        screen: a terminal.
    """

    def __init__(self, looker: Looker, interval_s: float, title: str, screen: Console) -> None:
        self._looker = looker
        self._interval_s = interval_s
        self._title = title
        self._screen = screen
        self._looks: deque[Overview] = deque(maxlen=LOOKS_MAX)
        self._trends: deque[tuple[float | None, ...]] = deque(maxlen=TRENDS_MAX)
        self._now: tuple[Summary, tuple[Problem, ...]] | None = None
        self._shown: tuple[Summary, tuple[Problem, ...], Trends] | None = None
        self._by_partition = False
        self._frozen = False
        self._ended = False
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Shows it until `q`, Ctrl-C or SIGTERM."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGWINCH, self._news.set)
        looking = asyncio.create_task(self._keep_looking(), name="looks")
        looking.add_done_callback(lambda _: self._news.set())
        try:
            with (
                _quiet(),
                _keys(),
                Live(console=self._screen, screen=True, auto_refresh=False, redirect_stdout=False) as live,
            ):
                loop.add_reader(sys.stdin.fileno(), self._read_keys)
                try:
                    while not self._ended and not looking.done():
                        live.update(Group(*self._lines()), refresh=True)
                        await self._wait()
                finally:
                    loop.remove_reader(sys.stdin.fileno())
        finally:
            failure = looking.exception() if looking.done() and not looking.cancelled() else None
            await end_tasks(looking)
            for number in (*_SIGNALS, signal.SIGWINCH):
                loop.remove_signal_handler(number)
        if failure is not None:
            raise failure

    async def _wait(self) -> None:
        """Until there is something new to show; a second at most, for the age of what is shown."""
        try:
            async with asyncio.timeout(TOP_REDRAW.s):
                await self._news.wait()
        except TimeoutError:
            return
        self._news.clear()

    async def _keep_looking(self) -> None:
        while True:
            begun_s = time.monotonic()
            self._looks.append(await self._looker.look())
            # Enough for the longest window, and one before it.
            while len(self._looks) > 2 and self._looks[-1].at_ns - self._looks[1].at_ns > LATENCY_S * 1e9:
                self._looks.popleft()
            summary = summarize(tuple(self._looks))
            durable = summary.durable
            waiting, p95_s = summary.waiting, None if durable is None else durable.p95_s
            self._trends.append((summary.accepted_per_s, summary.persisted_per_s, waiting, p95_s))
            self._now = summary, judge(summary)
            self._news.set()
            await asyncio.sleep(max(0.0, begun_s + self._interval_s - time.monotonic()))

    def _lines(self) -> list[Text]:
        width, height = self._screen.size
        if self._now is not None and not (self._frozen and self._shown is not None):
            accepted, persisted, waiting, p95 = zip(*self._trends, strict=True)
            trends = Trends(accepted_per_s=accepted, persisted_per_s=persisted, waiting=waiting, durable_p95_s=p95)
            self._shown = *self._now, trends
        if self._shown is None:
            return [Text("looking …", no_wrap=True)]
        summary, problems, trends = self._shown
        age_s = (time.time_ns() - summary.at_ns) / 1e9
        stale = f"{age_s:.0f} s old" if age_s > self._interval_s + STALE_S else ""
        return render(
            summary,
            problems,
            Page(
                width=width,
                height=height,
                title=self._title,
                by_partition=self._by_partition,
                trends=trends,
                note="FROZEN" if self._frozen else stale,
                footer=KEYS,
            ),
        )

    def _read_keys(self) -> None:
        keys = os.read(sys.stdin.fileno(), 64)
        if not keys or b"q" in keys or b"Q" in keys:
            self._end()
        self._by_partition ^= keys.count(b"p") % 2 == 1
        self._frozen ^= keys.count(b" ") % 2 == 1
        self._news.set()

    def _end(self) -> None:
        self._ended = True
        self._news.set()


@contextmanager
def _keys() -> Iterator[None]:
    """Keys come one by one and are not echoed; Ctrl-C stays a signal."""
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """No log line may land on the screen, which says what is wrong anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
