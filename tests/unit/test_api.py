"""How long a request waits for a stream in memory that is gone: as long since that is known, however long it asked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
import pytest
from nats.errors import TimeoutError as NatsTimeoutError

from cluster.testing.sim.loop import VirtualLoop
from contracts.budgets import STREAM_REMADE
from contracts.settings import Settings
from contracts.subjects import EVENTS, SEGMENT
from stages.runtime.api import Api, RequestRefusedError

GONE = {"error": {"code": 404, "err_code": 10059, "description": "stream not found"}}


class Answer(NamedTuple):
    data: bytes


class Client:
    """A cluster of which nobody answers for `silent_s`, and that knows no stream until `back_s`."""

    def __init__(self, silent_s: float, back_s: float) -> None:
        self._silent_s, self._back_s = silent_s, back_s

    async def request(self, subject: str, body: bytes, timeout: float) -> Answer:
        now_s = asyncio.get_running_loop().time()
        if now_s < self._silent_s:
            try:
                async with asyncio.timeout(timeout):
                    await asyncio.Event().wait()
            except TimeoutError:
                raise NatsTimeoutError from None
        return Answer(msgspec.json.encode({} if now_s >= self._back_s else GONE))


def in_virtual_time(job: Callable[[], Awaitable[Any]]) -> float:
    """Runs it; gives the virtual seconds it took, also if it was refused."""
    with contextlib.closing(VirtualLoop(lambda: 0.0)) as loop:
        with contextlib.suppress(RequestRefusedError):
            loop.run_until_complete(job())
        return loop.time()


def asked(stream: str, silent_s: float, back_s: float) -> Callable[[], Awaitable[bytes]]:
    async def job() -> bytes:
        api = Api(Client(silent_s, back_s), Settings(), jitter=lambda: 0.5)  # type: ignore[arg-type]
        return await api.request(stream, "$JS.API.STREAM.MSG.GET.X", b"")

    return job


@pytest.mark.parametrize("silent_s", [0.0, 60.0])
def test_a_stream_in_memory_that_is_gone_is_waited_for_since_that_is_known(silent_s: float) -> None:
    took_s = in_virtual_time(asked(SEGMENT, silent_s, back_s=1e9))
    assert silent_s + STREAM_REMADE.s <= took_s < silent_s + STREAM_REMADE.s + 3
    back_s = silent_s + STREAM_REMADE.s - 3
    assert back_s <= in_virtual_time(asked(SEGMENT, silent_s, back_s)) < silent_s + STREAM_REMADE.s


def test_a_stream_on_disk_that_is_gone_is_refused_at_once() -> None:
    assert in_virtual_time(asked(EVENTS, 0.0, back_s=1e9)) < 1
