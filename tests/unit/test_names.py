"""Names of servers that are looked up slowly, in vain, or to several addresses."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cluster.testing.sim.loop import VirtualLoop
from contracts.budgets import CONNECT_ATTEMPT
from stages.runtime.names import Names

HOST = "nats.hospital"


class NameServer:
    """Answers `addresses` after `takes_s`; refuses while there are none."""

    def __init__(self, takes_s: float, *addresses: str) -> None:
        self.takes_s = takes_s
        self.addresses = list(addresses)
        self.asked = 0

    async def getaddrinfo(self, host: str, port: None, **_: Any) -> list[tuple[Any, ...]]:
        self.asked += 1
        await asyncio.sleep(self.takes_s)
        if not self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in self.addresses]


def with_names(server: NameServer, job: Callable[[Names], Awaitable[None]]) -> None:
    """Runs it in virtual time, where `server` answers."""

    async def run() -> None:
        names = Names()
        await job(names)
        await names.close()

    with contextlib.closing(VirtualLoop(lambda: 0.0)) as loop:
        loop.getaddrinfo = server.getaddrinfo  # type: ignore[assignment, method-assign]
        loop.run_until_complete(run())


def test_a_look_up_that_takes_longer_than_a_try_serves_a_later_one() -> None:
    server = NameServer(5 * CONNECT_ATTEMPT.s, "10.0.0.1")

    async def job(names: Names) -> None:
        for _ in range(4):
            with pytest.raises(TimeoutError, match=HOST):
                await names.addresses(HOST)
        await asyncio.sleep(CONNECT_ATTEMPT.s)
        assert await names.addresses(HOST) == ["10.0.0.1"]
        assert server.asked == 1

    with_names(server, job)


@pytest.mark.parametrize("takes_s", [0.0, 60.0])
def test_while_names_cannot_be_looked_up_what_was_known_serves(takes_s: float) -> None:
    server = NameServer(0.0, "10.0.0.1", "10.0.0.2", "10.0.0.1")

    async def job(names: Names) -> None:
        assert await names.addresses(HOST) == ["10.0.0.1", "10.0.0.2"]
        server.takes_s, server.addresses = takes_s, []
        assert await names.addresses(HOST) == ["10.0.0.1", "10.0.0.2"]

    with_names(server, job)


def test_a_name_that_never_was_known_is_refused_and_looked_up_again() -> None:
    server = NameServer(0.0)

    async def job(names: Names) -> None:
        with pytest.raises(socket.gaierror):
            await names.addresses(HOST)
        server.addresses = ["10.0.0.9"]
        assert await names.addresses(HOST) == ["10.0.0.9"]

    with_names(server, job)


@pytest.mark.parametrize("address", ["10.0.0.1", "::1"])
def test_an_address_is_not_looked_up(address: str) -> None:
    server = NameServer(0.0)

    async def job(names: Names) -> None:
        assert await names.addresses(address) == [address]
        assert server.asked == 0

    with_names(server, job)
