"""Streams that a test has just made by hand."""

from __future__ import annotations

from nats.aio.client import Client
from nats.errors import NoRespondersError

from cluster.testing.waiting import until


async def publish_first(client: Client, subject: str, data: bytes = b"") -> None:
    """Publishes until it is taken: that a stream is there spreads from its leader to other servers a moment later."""

    async def taken() -> bool:
        try:
            await client.request(subject, data, timeout=10)
        except NoRespondersError:
            return False
        return True

    await until(taken, f"a stream takes {subject}")
