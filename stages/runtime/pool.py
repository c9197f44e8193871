"""The servers that a client may connect to: those it was given, and those that the one it is connected to names."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import ParseResult, unquote, urlsplit

from nats.aio.client import Srv

log = logging.getLogger(__name__)


def discover(pool: list[Srv], current: Srv, addresses: Iterable[str]) -> None:
    """Brings `pool` up to date with the addresses that `current` names: those that are named no more are left out.

    A server so found is spoken to as `current` is: with the user, the scheme and the name for TLS of its URL.
    """
    named = {place: address for address in addresses if (place := _place(address)) is not None}
    pool[:] = [server for server in pool if not server.discovered or server is current or _place_of(server) in named]
    known = set(map(_place_of, pool))
    for place, address in named.items():
        if place in known:
            continue
        found = Srv(current.uri._replace(netloc=f"{_userinfo(current.uri)}{address}"), discovered=True)
        if _is_ip(place[0]):
            found.tls_name = current.tls_name or current.uri.hostname
        pool.append(found)


def decode_user(server: Srv) -> None:
    """A password in a URL may be percent-encoded, and must be where it holds ``/`` or ``#``; nats-py leaves it so."""
    user = _userinfo(server.uri)
    server.uri = server.uri._replace(netloc=unquote(user) + server.uri.netloc[len(user) :])


def _userinfo(uri: ParseResult) -> str:
    user, at, _ = uri.netloc.rpartition("@")
    return user + at


def _place(address: str) -> tuple[str, int] | None:
    try:
        uri = urlsplit(f"nats://{address}")
        if uri.hostname is not None and uri.port is not None:
            return uri.hostname, uri.port
    except ValueError:
        pass
    log.debug("a server names another one %r, which is no address", address)
    return None


def _place_of(server: Srv) -> tuple[str | None, int | None]:
    return server.uri.hostname, server.uri.port


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
