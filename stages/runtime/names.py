"""Look-ups of servers' names. They take as long as they take: five seconds each while the first name server is down."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address

from contracts.budgets import CONNECT_ATTEMPT
from stages.runtime.tasks import end_tasks


class Names:
    """Of each name one look-up at a time, which goes on when nobody waits for it any more: the next try has it."""

    def __init__(self) -> None:
        self._lookups: dict[str, asyncio.Task[list[str]]] = {}
        self._known: dict[str, list[str]] = {}

    async def addresses(self, host: str) -> list[str]:
        """Those of `host`; the ones it had before where a look-up fails, or takes longer than `CONNECT_ATTEMPT`.

        Raises:
            OSError: none is known.
        """
        if is_ip(host):
            return [host]
        lookup = self._lookups.get(host)
        if lookup is None:
            lookup = self._lookups[host] = asyncio.create_task(_look_up(host), name=f"look up {host}")
        await asyncio.wait((lookup,), timeout=CONNECT_ATTEMPT.s)
        if not lookup.done():
            if host in self._known:
                return self._known[host]
            raise TimeoutError(f"{host}: its name is still being looked up")
        self._lookups.pop(host, None)
        try:
            self._known[host] = lookup.result()
        except OSError:
            if host not in self._known:
                raise
        return self._known[host]

    async def close(self) -> None:
        """Ends all look-ups."""
        await end_tasks(*self._lookups.values())
        self._lookups.clear()


async def _look_up(host: str) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_ip(host: str) -> bool:
    """True for an address, of either kind."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
