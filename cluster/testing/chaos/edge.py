"""An edge gateway as a process of its own, for chaos to kill: ``python -m cluster.testing.chaos.edge FD NAME URL …``.

FD is a socket to whoever makes the events (`cluster.testing.chaos.fleet`): he says what to publish and is told what was
accepted, one JSON value a line. Exits with 0 once nothing more comes and everything is accepted. It keeps no notes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec

from cluster.gateway import Gateway, batch_id
from stages.runtime.connection import connect

BATCH_MAX: Final = 8
CONNECT_S: Final = 60.0
_IN_FLIGHT: Final = 64
_CLOSE_S: Final = 10.0


class Order(msgspec.Struct, frozen=True):
    """One event to be published. `again`: as a message of its own, whatever was published before."""

    event_id: str
    site: str
    consultation: str
    data: bytes
    again: bool = False


class Told(msgspec.Struct, frozen=True):
    """One message that was accepted, and the events in it."""

    origin: int
    site: str
    consultation: str
    event_ids: tuple[str, ...]
    again: bool


class Edge:
    """Publishes orders, those of a consultation in turn, and tells what was accepted."""

    def __init__(self, gateway: Gateway, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._gateway = gateway
        self._reader = reader
        self._writer = writer
        self._lanes: dict[str, deque[Order]] = {}

    async def run(self) -> None:
        """Returns when nothing more comes and all is accepted. Raises as `Gateway.publish`."""
        async with asyncio.TaskGroup() as tasks:
            while line := await self._reader.readline():
                order = msgspec.json.decode(line, type=Order)
                key = "" if order.again else order.consultation
                lane = self._lanes.get(key)
                if lane is None:
                    lane = self._lanes[key] = deque()
                    tasks.create_task(self._drain(key, 1 if order.again else BATCH_MAX))
                lane.append(order)

    async def _drain(self, key: str, batch_max: int) -> None:
        lane = self._lanes[key]
        while lane:
            await self._publish([lane.popleft() for _ in range(min(batch_max, len(lane)))])
        del self._lanes[key]

    async def _publish(self, group: Sequence[Order]) -> None:
        first, event_ids = group[0], tuple(order.event_id for order in group)
        body = b"\n".join(order.data for order in group)
        accepted = await self._gateway.publish(body, first.site, first.consultation, batch_id(event_ids))
        told = Told(accepted.origin, first.site, first.consultation, event_ids, first.again)
        self._writer.write(msgspec.json.encode(told) + b"\n")
        await self._writer.drain()


async def main(descriptor: int, name: str, urls: Sequence[str]) -> None:
    """Runs until there is nothing left to do."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=descriptor))
    client = await connect(urls, name, wait_s=CONNECT_S)
    try:
        await Edge(Gateway(client, in_flight=_IN_FLIGHT), reader, writer).run()
    finally:
        writer.close()
        # A server that is frozen answers no farewell.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await client.close()
        await writer.wait_closed()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
