"""The servers that a client may connect to: those it was given, and those that the one it is connected to names."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from time import monotonic
from typing import Any
from urllib.parse import ParseResult, unquote, urlsplit

from nats.aio.client import Client, Srv

from contracts.budgets import SERVER_USELESS
from stages.runtime.names import Names, is_ip
from stages.runtime.sockets import cut

log = logging.getLogger(__name__)

_DOUBLINGS_MAX = 4
_SERVERS_MIN = 2
"""One alone is not left: there is no other."""
_WEB = frozenset({"ws", "wss"})
"""Schemes of those who need the name itself to connect."""


class PooledClient(Client):
    """nats-py's client, with a pool that is kept up to date, and names that are looked up however long that takes.

    It leaves a server through which no stream answers: one that lost its routes to the others, or that cannot keep
    what they keep, goes on answering pings.

    Attributes:
        discovers: connects also to servers that others name; False: only to those that it was given.
        loop: the event loop that it was connected in, and serves alone; None before.
    """

    discovers = True
    loop: asyncio.AbstractEventLoop | None = None

    def __init__(self) -> None:
        super().__init__()
        self._names = Names()
        self._useless_since_s: float | None = None
        self._servers_left = 0
        """Servers that were left since a stream answered last."""

    def note_stream(self, *, answers: bool) -> None:
        """A request to a stream was answered, or it was not, or only that nobody can answer now."""
        self._servers_left = 0 if answers else self._servers_left
        if answers or not self.is_connected or len(self._server_pool) < _SERVERS_MIN:
            self._useless_since_s = None
            return
        now_s = asyncio.get_running_loop().time()
        # Where no server is of use, it is the streams that wait for something.
        limit_s = SERVER_USELESS.s * 2 ** min(self._servers_left, _DOUBLINGS_MAX)
        if self._useless_since_s is None:
            self._useless_since_s = now_s
        elif now_s - self._useless_since_s > limit_s:
            self._useless_since_s = None
            self._servers_left += 1
            url = self.connected_url
            place = f"{url.hostname}:{url.port}" if url is not None else "this server"
            log.warning("no stream answers through %s, for %g s: trying another server", place, limit_s)
            cut(self._transport)

    def _setup_server_pool(self, connect_url: list[str]) -> None:
        self.loop = asyncio.get_running_loop()
        super()._setup_server_pool(connect_url)
        for server in self._server_pool:
            decode_user(server)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        self._max_payload = info.get("max_payload", self._max_payload)
        if self._current_server is not None and (addresses := info.pop("connect_urls", None)) and self.discovers:
            discover(self._server_pool, self._current_server, addresses)
        await super()._process_info(info, initial_connection)

    async def _connect_to_server(self, s: Srv) -> None:
        """Tries each address of the server's name in turn, and gives each the whole time."""
        if s.uri.hostname is None or s.uri.scheme in _WEB:
            await super()._connect_to_server(s)
            return
        s.last_attempt = monotonic()
        *others, last = await self._names.addresses(s.uri.hostname)
        for address in others:
            try:
                await super()._connect_to_server(_at(s, address))
            except OSError as error:
                log.debug("%s at %s: %r", s.uri.hostname, address, error)
            else:
                return
        await super()._connect_to_server(_at(s, last))


def _at(server: Srv, address: str) -> Srv:
    """As `nats://address:port`: only for the connection's socket."""
    host = f"[{address}]" if ":" in address else address
    return Srv(server.uri._replace(netloc=f"{host}:{server.uri.port}"))


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
        if is_ip(place[0]):
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
