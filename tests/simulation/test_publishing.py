"""What a gateway makes of each answer, and when it asks again; on a clock that costs no time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest
from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError, MaxPayloadError, NoRespondersError, OutboundBufferLimitError
from nats.errors import TimeoutError as NatsTimeoutError

from cluster.gateway import FULL_DOUBLINGS_MAX, Accepted, Gateway, RefusedError
from cluster.testing.sim.loop import VirtualLoop
from contracts.budgets import ACCEPT_PAUSE_MAX, ACCEPT_PAUSE_MIN
from contracts.errors import AccessDeniedError, ClusterUnavailableError, TopologyError
from contracts.subjects import EVENTS
from stages.runtime.answers import DeniedError

STORED = {"stream": EVENTS, "seq": 7}
DUPLICATE = {**STORED, "duplicate": True}


def refusal(err_code: int, code: int = 503) -> dict[str, Any]:
    return {"error": {"code": code, "err_code": err_code, "description": "it says no"}}


FULL = refusal(10077)


class Script:
    """A connection that gives these answers, the last one for ever. `asked_s`: when it was asked."""

    max_payload = 8 * 1024 * 1024
    is_closed = False
    is_connected = True
    loop = None

    def __init__(self, *answers: dict[str, Any] | Exception) -> None:
        self._answers = list(answers)
        self.asked_s: list[float] = []
        self.headers: list[dict[str, str]] = []

    def note_stream(self, *, answers: bool) -> None:
        """There is no other server."""

    async def request(self, subject: str, body: bytes, *, timeout: float, headers: dict[str, str]) -> Msg:
        self.asked_s.append(asyncio.get_running_loop().time())
        self.headers.append(dict(headers))
        headers.clear()
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return Msg(_client=None, data=json.dumps(answer).encode())  # type: ignore[arg-type]


def gateway_over(client: Script, **changes: Any) -> Gateway:
    return Gateway(client, **{"jitter": lambda: 0.0, **changes})  # type: ignore[arg-type]


async def published(gateway: Gateway, consultation: str = "c", body: bytes = b"{}") -> Accepted:
    return await gateway.publish(body, "a", consultation, "id", traceparent="t", first_seen="f")


def run(job: Callable[[], Awaitable[None]]) -> None:
    async def ended() -> None:
        async with asyncio.timeout(600):
            await job()

    loop = VirtualLoop(lambda: 0.001)
    try:
        loop.run_until_complete(ended())
    finally:
        loop.close()


@pytest.mark.parametrize(
    ("first", "duplicate"),
    [
        (NoRespondersError(), True),
        (FULL, True),
        (NatsTimeoutError(), False),
        (TimeoutError(), False),
        (OutboundBufferLimitError(), False),
        (refusal(10008), False),
        (refusal(10164), False),
    ],
    ids=["nobody there", "full", "no answer", "a deadline", "no connection", "no leader", "in process"],
)
def test_what_the_servers_know_already_is_no_duplicate_where_an_earlier_try_may_have_stored_it(
    first: dict[str, Any] | Exception, duplicate: bool
) -> None:
    async def job() -> None:
        client = Script(first, DUPLICATE)
        gateway = gateway_over(client)
        accepted = await published(gateway)
        assert (accepted.origin, accepted.duplicate, gateway.retries) == (7, duplicate, 1)
        headers = {"Nats-Msg-Id": "id", "Nats-Expected-Stream": EVENTS, "traceparent": "t"}
        assert client.headers[0] == client.headers[1]
        assert headers.items() < client.headers[0].items()

    run(job)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (refusal(10054, 400), RefusedError),
        (refusal(10097, 500), RefusedError),
        (refusal(10165, 400), RefusedError),
        (MaxPayloadError(), RefusedError),
        (refusal(10060, 400), TopologyError),
        (DeniedError("Permissions Violation"), AccessDeniedError),
        (ConnectionClosedError(), ClusterUnavailableError),
    ],
    ids=["too large", "headers too large", "a header it does not take", "payload", "other stream", "denied", "closed"],
)
def test_what_no_further_try_can_help_is_told_at_once(
    answer: dict[str, Any] | Exception, error: type[Exception]
) -> None:
    async def job() -> None:
        client = Script(answer)
        with pytest.raises(error):
            await published(gateway_over(client))
        assert len(client.asked_s) == 1

    run(job)


def test_a_full_stream_is_asked_less_and_less_often_and_one_that_does_not_answer_is_not() -> None:
    def pauses(client: Script) -> list[float]:
        return [round(after - before, 2) for before, after in pairwise(client.asked_s)]

    async def job() -> None:
        low_s, high_s = ACCEPT_PAUSE_MIN.s, ACCEPT_PAUSE_MAX.s
        client = Script(FULL, FULL, FULL, FULL, FULL, STORED)
        await published(gateway_over(client))
        assert pauses(client) == [low_s * 2 ** min(n, FULL_DOUBLINGS_MAX) for n in range(1, 6)]
        client = Script(*[NatsTimeoutError()] * 3, STORED)
        await published(gateway_over(client, jitter=lambda: 1.0))
        assert pauses(client) == [high_s] * 3

    run(job)


def test_nothing_is_asked_while_the_client_connects_again_and_no_more_at_once_than_allowed() -> None:
    async def job() -> None:
        client = Script(NoRespondersError(), STORED)
        client.is_connected = False
        call = asyncio.create_task(published(gateway_over(client)))
        await asyncio.sleep(30)
        assert len(client.asked_s) == 1
        client.is_connected = True
        await call
        assert len(client.asked_s) == 2
        client = Script(*[FULL] * 3, STORED)
        gateway, begun_s = gateway_over(client, in_flight=3), time.monotonic()
        calls = [asyncio.create_task(published(gateway, f"c{number}")) for number in range(5)]
        await asyncio.sleep(ACCEPT_PAUSE_MIN.s / 2)
        assert len(client.asked_s) == 3
        assert 0 < gateway.held_s < time.monotonic() - begun_s
        await asyncio.gather(*calls)
        assert len(client.asked_s) == 3 + 5
        held_s = gateway.held_s
        assert gateway.held_s == held_s, "nothing is held any more"

    run(job)


def test_what_is_larger_than_a_message_is_not_sent() -> None:
    async def job() -> None:
        client = Script(STORED)
        gateway = gateway_over(client)
        await published(gateway, body=b"x" * gateway.message_bytes_max)
        with pytest.raises(RefusedError, match="are too large for one message"):
            await published(gateway, body=b"x" * (gateway.message_bytes_max + 1))
        assert len(client.asked_s) == 1
        client.max_payload = 4096
        assert gateway.message_bytes_max < 4096

    run(job)
