"""One NATS connection for each process, with this project's time-outs and without tracebacks per attempt."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence

from nats.errors import Error as NatsError

from contracts.budgets import CONNECT_ATTEMPT, FIRST_CONNECTION, GREETING, PING_INTERVAL, RECONNECT_PAUSE
from contracts.errors import ClusterUnavailableError
from contracts.settings import hide_credentials
from stages.runtime.access import OPEN, Access
from stages.runtime.answers import words_of
from stages.runtime.client import GuardedClient
from stages.runtime.expiry import greet
from stages.runtime.tasks import end_tasks, side_by_side

log = logging.getLogger(__name__)

PENDING_BYTES_MAX = 32 * 1024 * 1024


async def connect(
    urls: Sequence[str],
    name: str,
    *,
    access: Access = OPEN,
    wait_s: float = FIRST_CONNECTION.s,
    in_order: bool = False,
    discover: bool = True,
    reconnected: Callable[[], None] | None = None,
) -> GuardedClient:
    """Connects to any of `urls` and then reconnects for ever.

    Args:
        urls: ``nats://host:port`` of one or more servers.
        name: shown by the servers as the client's name.
        access: files for TLS, and credentials.
        wait_s: how long the first connection may take.
        in_order: try `urls` in this order, not in a random one.
        discover: connect also to servers that these name.
        reconnected: called after each later connection.

    Raises:
        ClusterUnavailableError: no server took the connection within `wait_s`; says so where one refused it.
        SettingsError: a file of `access` is not what it should be.
    """
    met = _Met()

    async def on_error(error: Exception) -> None:
        if met.note(error):
            client.note_trouble(f"a server refuses: {met.refused}")
        elif client.reconnects:
            client.note_trouble(f"no connection: {met.last}")
        log.debug("connection error: %s", met.last)

    async def on_disconnect() -> None:
        if not client.is_closed:
            log.warning("disconnected from the cluster; reconnecting")

    async def on_reconnect() -> None:
        log.info("reconnected")
        client.forget_trouble()
        if reconnected is not None:
            reconnected()

    options = {
        "servers": list(urls),
        "name": name,
        "error_cb": on_error,
        "disconnected_cb": on_disconnect,
        "reconnected_cb": on_reconnect,
        "reconnect_time_wait": RECONNECT_PAUSE.s,
        "connect_timeout": CONNECT_ATTEMPT.s,
        "ping_interval": PING_INTERVAL.s,
        "max_outstanding_pings": 2,
        "pending_size": PENDING_BYTES_MAX,
        "dont_randomize": in_order,
    }
    client = GuardedClient(access)
    client.discovers = discover
    await client.read_papers()
    # While allow_reconnect holds, nats-py treats the first connection like any other: it keeps trying.
    connecting = asyncio.create_task(
        client.connect(**options, max_reconnect_attempts=-1),  # type: ignore[arg-type]
        name=f"connecting {name}",
    )
    try:
        async with asyncio.timeout(wait_s):
            await _unless_cancelled(connecting, client)
    except (NatsError, OSError) as error:
        raise ClusterUnavailableError(met.words(urls, wait_s)) from error
    return client


class _Met:
    """What the attempts of one connection met.

    Attributes:
        refused: what a server said itself; empty if none did.
        tls: what the handshake failed at.
        last: the last error.
    """

    def __init__(self) -> None:
        self.refused = self.tls = self.last = ""

    def note(self, error: Exception) -> bool:
        """Keeps an attempt's error. True when a server refuses."""
        self.last = repr(error)
        if isinstance(error, ssl.SSLError):
            self.tls = error.reason or self.last
        # What a server itself says has no class of its own.
        if type(error) is not NatsError:
            return False
        self.refused = words_of(str(error))
        return True

    def words(self, urls: Sequence[str], wait_s: float) -> str:
        """Why there is no connection to `urls` after `wait_s`, and the next step."""
        shown = ", ".join(map(hide_credentials, urls))
        if self.refused:
            return f"{shown} refused the connection: {self.refused}; see the URL, its user, or FI_NATS_CREDS_FILE"
        if self.tls:
            return (
                f"no TLS with {shown}: {self.tls}; FI_NATS_CA_FILE names who signs the servers' certificates, "
                "FI_NATS_CERT_FILE our own"
            )
        return f"no NATS server answers at {shown} within {wait_s:g} s ({self.last}); see `fictl cluster status`"


async def _unless_cancelled(connecting: asyncio.Task[None], client: GuardedClient) -> None:
    """Waits for `connecting`; cancelled, it leaves no connection, even if one was made at that very moment.

    (`asyncio.wait_for` of Python 3.11, which nats-py connects with, swallows a cancellation that comes together with
    an answer: a Ctrl-C would be lost.)
    """
    try:
        await asyncio.wait((connecting,))
    except asyncio.CancelledError:
        await end_tasks(connecting)
        await client.close()
        raise
    await connecting


async def connect_near(
    urls: Sequence[str],
    stream: str,
    name: str,
    *,
    access: Access = OPEN,
    reconnected: Callable[[], None] | None = None,
) -> GuardedClient:
    """As `connect`, but to the server that leads `stream` now, if that can be found out.

    What is published to the stream then does not cross the cluster's routes twice (durable p95 at 500 events/s: 58 ms
    without, 48 with, medians of six runs). Any other server serves as well: nothing is done when the leader moves.
    """
    client = await connect(urls, name, access=access, reconnected=reconnected)
    leader, urls_by_name = await _leader_and_names(client, urls, stream)
    near = urls_by_name.get(leader)
    return client if near is None else await _reconnect(client, near, urls, name, access, reconnected)


async def connect_beside(
    urls: Sequence[str],
    stream: str,
    name: str,
    *,
    access: Access = OPEN,
    wait_s: float = FIRST_CONNECTION.s,
) -> GuardedClient:
    """As `connect`, but to the first server by name that does not lead `stream` now, if that can be found out.

    For those who publish many small messages: this server hands them on to the leader many at a time. All of them
    choose the same one (ADR 29). Any other server serves as well: nothing is done when the leader moves.
    """
    client = await connect(urls, name, access=access, wait_s=wait_s)
    leader, urls_by_name = await _leader_and_names(client, urls, stream)
    others = urls_by_name.keys() - {leader}
    if not leader or not others:
        return client
    return await _reconnect(client, urls_by_name[min(others)], urls, name, access, None)


async def _leader_and_names(client: GuardedClient, urls: Sequence[str], stream: str) -> tuple[str, dict[str, str]]:
    """The server that leads `stream`, "" where that is not known, and the URLs of all that answer by their names.

    Cancelled, it closes the client, which nobody has yet.
    """
    try:
        info = await client.jetstream(timeout=GREETING.s).stream_info(stream)
        names = await side_by_side(*map(server_name, urls))
    except NatsError as error:
        log.debug("the leader of %s is not known: %r", stream, error)
        return "", {}
    except asyncio.CancelledError:
        await client.close()
        raise
    leader = info.cluster.leader if info.cluster is not None else None
    return leader or "", {found: url for url, found in zip(urls, names, strict=True) if found is not None}


async def _reconnect(
    client: GuardedClient,
    first: str,
    urls: Sequence[str],
    name: str,
    access: Access,
    reconnected: Callable[[], None] | None,
) -> GuardedClient:
    """In place of `client`, a connection to `first`; to another one of `urls` where that does not answer."""
    await client.close()
    others = [url for url in urls if url != first]
    return await connect([first, *others], name, access=access, in_order=True, reconnected=reconnected)


async def server_name(url: str) -> str | None:
    """The name that the server at `url` greets with; None when it does not answer in `GREETING`."""
    greeted = await greet(url)
    return None if greeted is None else greeted.name
