"""Blocking calls that the end of the process does not wait for: a terminal nobody types at, a disk that hangs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def in_daemon_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """What `call` gives or raises, from a daemon thread of its own."""
    answer: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        # From now on it cannot be cancelled: who waits for it no more does not make the thread fail.
        if answer.set_running_or_notify_cancel():
            try:
                answer.set_result(call())
            except Exception as error:
                answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return asyncio.wrap_future(answer)
