"""How long a request waits for a stream that is gone, and what a leader says that cannot read what it has."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
import pytest
from nats.errors import TimeoutError as NatsTimeoutError

from cluster.backlog import count_messages
from cluster.testing.sim.loop import VirtualLoop
from contracts.budgets import STREAM_REMADE
from contracts.errors import ClusterUnavailableError, UnreadableError
from contracts.settings import Settings
from contracts.subjects import DLQ, EVENTS, RECEIPTS, SEGMENT
from stages.persist.lost import receipts_lost
from stages.runtime.api import Api, RequestRefusedError
from stages.runtime.messages import StoredMessage
from stages.segment.policies import list_versions

THERE = {"type": "io.nats.jetstream.api.v1.stream_msg_get_response"}
GONE = {"error": {"code": 404, "err_code": 10059, "description": "stream not found"}}
NOTHING = {"error": {"code": 404, "err_code": 10037, "description": "no message found"}}
NO_ACCOUNT = {"error": {"code": 503, "err_code": 10039, "description": "JetStream not enabled for account"}}
STARTING = {"error": {"code": 503, "err_code": 10076, "description": "JetStream not enabled"}}


class Answer(NamedTuple):
    data: bytes


class Client:
    """A cluster of which nobody answers for `silent_s`, and that says `wrong` until `back_s`."""

    def __init__(self, silent_s: float, back_s: float, wrong: dict[str, Any] = GONE) -> None:
        self._silent_s, self._back_s, self._wrong = silent_s, back_s, wrong

    def note_stream(self, *, answers: bool) -> None:
        """There is no other server."""

    async def request(self, subject: str, body: bytes, timeout: float) -> Answer:
        now_s = asyncio.get_running_loop().time()
        if now_s < self._silent_s:
            try:
                async with asyncio.timeout(timeout):
                    await asyncio.Event().wait()
            except TimeoutError:
                raise NatsTimeoutError from None
        return Answer(msgspec.json.encode(THERE if now_s >= self._back_s else self._wrong))


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


def test_what_is_not_of_the_kind_that_was_asked_for_is_no_answer() -> None:
    """It has the type of one: then it was taken for JetStream's, and ended who asked with an error nobody caught."""
    client = Client(0.0, 100.0, THERE | {"state": 1})

    async def job() -> None:
        api = Api(client, Settings(), jitter=lambda: 0.5, give_up_s=5.0)  # type: ignore[arg-type]
        for ask in (receipts_lost(api), list_versions(api), count_messages(api, EVENTS, "fi.>", {})):
            with pytest.raises(ClusterUnavailableError, match="Something else than JetStream answers there"):
                await ask

    assert 15 <= in_virtual_time(job) < 18


def test_a_stream_on_disk_that_is_gone_is_refused_at_once() -> None:
    assert in_virtual_time(asked(EVENTS, 0.0, back_s=1e9)) < 1


@pytest.mark.parametrize(
    ("wrong", "give_up_s", "took_s"),
    [
        # A command may be run again; a stage has nothing else to do, and accounts are changed while it runs.
        (NO_ACCOUNT, 100.0, 0), (NO_ACCOUNT, None, 1000),
        # Its JetStream may still start.
        (STARTING, 100.0, 100), (STARTING, None, 1000),
    ],
)  # fmt: skip
def test_a_command_does_not_wait_for_an_account_to_have_jetstream(
    wrong: dict[str, Any], give_up_s: float | None, took_s: float
) -> None:
    client = Client(0.0, 1000.0, wrong)

    async def job() -> None:
        api = Api(client, Settings(), jitter=lambda: 0.5, give_up_s=give_up_s)  # type: ignore[arg-type]
        if give_up_s is None:
            await api.request(EVENTS, "$JS.API.STREAM.MSG.GET.X", b"")
            return
        with pytest.raises(ClusterUnavailableError, match=r"JetStream not enabled.*; enable JetStream for the account"):
            await api.request(EVENTS, "$JS.API.STREAM.MSG.GET.X", b"")

    assert took_s <= in_virtual_time(job) < took_s + 3


class Leader:
    """Leads a stream with `kept` messages under each subject, and finds none before it was asked `found_at` times."""

    def __init__(self, kept: int, found_at: int) -> None:
        self._kept, self._found_at, self.asked = kept, found_at, 0

    def note_stream(self, *, answers: bool) -> None:
        """It is left for nothing here."""

    async def request(self, subject: str, body: bytes, timeout: float) -> Answer:
        if "STREAM.INFO" in subject:
            state = {"subjects": {msgspec.json.decode(body)["subjects_filter"]: self._kept} if self._kept else {}}
            return Answer(msgspec.json.encode({**THERE, "state": state, "cluster": {"leader": "n2"}}))
        self.asked += 1
        message = {"subject": "fi.receipts.0", "seq": 7, "time": "2026-01-01T00:00:00Z", "data": "e30="}
        return Answer(msgspec.json.encode({**THERE, "message": message} if self.asked >= self._found_at else NOTHING))


@pytest.mark.parametrize("stream", [RECEIPTS, DLQ])
def test_what_a_leader_counts_and_cannot_read_is_not_taken_for_nothing(stream: str) -> None:
    async def read(leader: Leader, stream: str = stream) -> StoredMessage | None:
        api = Api(leader, Settings(), jitter=lambda: 0.5)  # type: ignore[arg-type]
        return await api.last_message(stream, "fi.receipts.0")

    async def job() -> None:
        assert await read(Leader(kept=0, found_at=9)) is None
        # What it counts came just now, or a stale leader was asked before.
        assert await read(Leader(kept=1, found_at=2)) is not None
        with pytest.raises(UnreadableError, match=r"n2 cannot read the last message of fi\.receipts\.0"):
            await read(Leader(kept=1, found_at=9))
        # Nothing is written there on the strength of a read.
        assert await read(Leader(kept=1, found_at=9), SEGMENT) is None

    in_virtual_time(job)
