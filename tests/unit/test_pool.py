"""Which servers a client knows, from what the one it is connected to names."""

from __future__ import annotations

from urllib.parse import urlparse

import pytest
from nats.aio.client import Srv

from stages.runtime.pool import decode_user, discover


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


def test_a_password_may_be_encoded() -> None:
    uri = given("nats://us%20er:p%40s%2Fs%3A%23@n1:4222").uri
    assert (uri.username, uri.password, uri.hostname, uri.port) == ("us er", "p@s/s:#", "n1", 4222)
