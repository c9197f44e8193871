"""Which servers a client knows, from what the one it is connected to names."""

from __future__ import annotations

import asyncio
from urllib.parse import urlparse

import pytest
from msgspec.structs import replace
from nats.aio.client import Client, Srv

from contracts.budgets import SERVER_USELESS
from stages.runtime import pool as pool_module
from stages.runtime.pool import PooledClient, decode_user, discover


def given(url: str) -> Srv:
    server = Srv(urlparse(url))
    decode_user(server)
    return server


def urls(pool: list[Srv]) -> list[str]:
    return [server.uri.geturl() for server in pool]


def test_what_is_found_has_the_user_and_scheme_of_the_one_that_named_it() -> None:
    current = given("tls://u:p@n1:4222")
    pool = [current]
    discover(pool, current, ["n1:4222", "n2:4222", "[::1]:4222"])
    assert urls(pool) == ["tls://u:p@n1:4222", "tls://u:p@n2:4222", "tls://u:p@[::1]:4222"]
    # An address is held against the name that the certificate has.
    assert [server.tls_name for server in pool] == [None, None, "n1"]
    discover(pool, pool[2], ["10.0.0.1:4222"])
    assert [server.tls_name for server in pool] == [None, "n1", "n1"]


def test_what_is_named_no_more_is_forgotten_but_for_what_was_given_and_what_is_connected_to() -> None:
    pool = [given("nats://n1:4222"), given("nats://n2:4222")]
    discover(pool, pool[0], ["n3:4222", "n4:4222"])
    discover(pool, pool[2], ["n5:4222"])
    assert urls(pool) == ["nats://n1:4222", "nats://n2:4222", "nats://n3:4222", "nats://n5:4222"]


@pytest.mark.parametrize("address", ["[::1", "n2", "n2:x", "n2:99999", ""])
def test_what_is_no_address_is_passed_over(address: str) -> None:
    pool = [given("nats://n1:4222")]
    discover(pool, pool[0], [address, "n2:4222"])
    assert urls(pool) == ["nats://n1:4222", "nats://n2:4222"]


async def test_a_password_may_be_encoded() -> None:
    uri = given("nats://us%20er:p%40s%2Fs%3A%23@n1:4222").uri
    assert (uri.username, uri.password, uri.hostname, uri.port) == ("us er", "p@s/s:#", "n1", 4222)
    client = PooledClient()
    client.options["dont_randomize"] = True
    client._setup_server_pool(["nats://n1:4222", "nats://u:p%2F@n2:4222"])
    assert urls(client._server_pool) == ["nats://n1:4222", "nats://u:p/@n2:4222"]


async def test_what_a_server_tells_when_it_likes_is_taken() -> None:
    client = PooledClient()
    client._server_pool = [given("nats://u:p@n1:4222")]
    client._current_server = client._server_pool[0]
    await client._process_info({"connect_urls": ["n1:4222", "n2:4222"], "max_payload": 4096})
    assert urls(client._server_pool) == ["nats://u:p@n1:4222", "nats://u:p@n2:4222"]
    assert client.max_payload == 4096
    await client._process_info({"ldm": True})
    assert urls(client._server_pool) == ["nats://u:p@n1:4222", "nats://u:p@n2:4222"]
    assert client.max_payload == 4096


class Dialled(PooledClient):
    """Its servers' name has three addresses, and `answering` says which of them answer. `tried`: where it connected."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answering: str) -> None:
        super().__init__()
        self.tried: list[str] = []

        async def addresses(host: str) -> list[str]:
            return ["10.0.0.1", "::1", "10.0.0.3"]

        async def connect(_: Client, server: Srv) -> None:
            self.tried.append(server.uri.netloc)
            if answering not in server.uri.netloc:
                raise TimeoutError if "::1" in server.uri.netloc else OSError("refused")

        monkeypatch.setattr(self._names, "addresses", addresses)
        monkeypatch.setattr(Client, "_connect_to_server", connect)


async def test_each_address_of_a_name_is_tried_until_one_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    server = given("tls://u:p@n1:4222")
    client = Dialled(monkeypatch, "::1")
    await client._connect_to_server(server)
    assert client.tried == ["10.0.0.1:4222", "[::1]:4222"]
    assert server.last_attempt is not None, "or it would be tried again without a pause"
    client = Dialled(monkeypatch, "10.0.0.3")
    await client._connect_to_server(server)
    assert client.tried == ["10.0.0.1:4222", "[::1]:4222", "10.0.0.3:4222"]
    client = Dialled(monkeypatch, "none")
    with pytest.raises(OSError, match="refused"):
        await client._connect_to_server(server)
    assert len(client.tried) == 3


@pytest.mark.parametrize("url", ["ws://n1:80", "wss://u:p@n1:443"])
async def test_who_needs_the_name_itself_is_given_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Dialled(monkeypatch, "n1")
    await client._connect_to_server(given(url))
    assert client.tried == [urlparse(url).netloc]


class Connected(PooledClient):
    """To the first of its servers."""

    is_connected = True  # type: ignore[assignment]

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *servers: str) -> None:
        super().__init__()
        self._server_pool = [given(url) for url in servers]
        self.left = 0
        monkeypatch.setattr(pool_module, "cut", self._leave)
        monkeypatch.setattr(pool_module, "SERVER_USELESS", replace(SERVER_USELESS, s=-1.0))

    def _leave(self, _: object) -> None:
        self.left += 1


async def test_a_server_through_which_no_stream_answers_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Connected(monkeypatch, "nats://n1:4222", "nats://n2:4222")
    for answers in (False, True, False):
        client.note_stream(answers=answers)
    assert client.left == 0
    client.note_stream(answers=False)
    assert client.left == 1
    client.note_stream(answers=False)
    assert client.left == 1, "the next one has its time too"


async def test_servers_that_are_all_of_no_use_are_left_more_and_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Connected(monkeypatch, "nats://n1:4222", "nats://n2:4222")
    monkeypatch.setattr(pool_module, "SERVER_USELESS", replace(SERVER_USELESS, s=1.0))
    loop, now_s = asyncio.get_running_loop(), 0.0
    monkeypatch.setattr(loop, "time", lambda: now_s)
    left_s = []
    for second in range(110):
        now_s, before = float(second), client.left
        client.note_stream(answers=False)
        left_s += [second] * (client.left - before)
    assert left_s == [2, 6, 12, 22, 40, 58, 76, 94]
    client.note_stream(answers=True)
    for second in (200.0, 201.5):
        now_s, before = second, client.left
        client.note_stream(answers=False)
    assert client.left == before + 1


async def test_a_server_that_is_alone_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Connected(monkeypatch, "nats://n1:4222")
    for _ in range(3):
        client.note_stream(answers=False)
    assert client.left == 0


async def test_a_server_is_not_left_for_what_failed_while_there_was_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = Connected(monkeypatch, "nats://n1:4222", "nats://n2:4222")
    for connected in (True, False, True):
        client.is_connected = connected  # type: ignore[assignment]
        client.note_stream(answers=False)
    assert client.left == 0
