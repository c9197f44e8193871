"""A cluster of processes on this machine, under the supervisor that `fictl up` uses."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cluster.nodes import NodePorts, Wiring, direct
from cluster.ports import LOOPBACK
from cluster.supervisor import Supervisor
from cluster.testing.backend import Backend, Plan
from cluster.testing.errors import NotSupportedError
from cluster.testing.links import HERE, Links
from contracts.budgets import SERVER_STOP
from contracts.subjects import Stage

_NOWHERE = "127.0.0.1:1"
"""What servers tell each other of themselves when they are to use their links only: nobody listens there."""


class EmbeddedBackend(Backend):
    """Servers and stages as processes.

    Attributes:
        supervisor: keeps them running.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._links: Links | None = None
        self.supervisor = Supervisor(
            plan.directory,
            plan.settings,
            plan.scale,
            plan.nodes,
            command=self._command if plan.links or plan.clocks else None,
            wire=self._wire if plan.links else direct,
        )

    @property
    def urls(self) -> tuple[str, ...]:
        """See `Backend.urls`."""
        return self._urls(HERE)

    async def open(self) -> None:
        """See `Backend.open`."""
        if self.plan.links:
            self._links = Links()
        try:
            await self.supervisor.start()
        except BaseException:
            self._close_links()
            raise

    async def close(self) -> None:
        """See `Backend.close`."""
        if self._links is not None:
            # Stages drain over their links.
            for name in (*self.plan.servers(), *self.plan.stages()):
                self._links.heal(name)
        try:
            await self.supervisor.stop()
        finally:
            self._close_links()

    async def start(self, name: str) -> None:
        """See `Backend.start`."""
        await self.supervisor.bring_back(name)

    async def stop(self, name: str) -> None:
        """See `Backend.stop`."""
        limit_s = SERVER_STOP.s if name in self.plan.servers() else self.plan.settings.drain_s
        await self.supervisor.hold_down(name, limit_s)

    async def kill(self, name: str) -> None:
        """See `Backend.kill`."""
        await self.supervisor.hold_down(name)

    async def freeze(self, name: str) -> None:
        """See `Backend.freeze`. SIGSTOP."""
        self.supervisor.freeze(name)

    async def thaw(self, name: str) -> None:
        """See `Backend.thaw`."""
        self.supervisor.thaw(name)

    async def cut(self, name: str) -> None:
        """See `Backend.cut`. Connections stay open and silent."""
        self._need_links("cut").cut(name)

    def part(self, server: str) -> None:
        """Cuts a server off from the others, until `heal`: its clients still reach it."""
        links = self._need_links("part")
        for other in set(self.plan.servers()) - {server}:
            links.part(server, other)

    async def heal(self, name: str) -> None:
        """See `Backend.heal`."""
        self._need_links("heal").heal(name)

    async def slow(self, name: str, latency_s: float) -> None:
        """See `Backend.slow`."""
        self._need_links("slow").slow(name, latency_s)

    def logs(self) -> dict[str, str]:
        """See `Backend.logs`."""
        paths = [*self.plan.directory.glob("nats/*.log"), *self.plan.directory.glob("logs/*.log")]
        return {path.stem: path.read_text(errors="replace") for path in sorted(paths)}

    def _need_links(self, verb: str) -> Links:
        if self._links is None:
            raise NotSupportedError(f"embedded processes are connected directly: give links=True to {verb} them")
        return self._links

    def _close_links(self) -> None:
        links, self._links = self._links, None
        if links is not None:
            links.close()

    def _urls(self, source: str) -> tuple[str, ...]:
        nodes = self.supervisor.cluster.nodes
        if self._links is None:
            return tuple(node.client_url for node in nodes)
        return tuple(f"nats://{LOOPBACK}:{self._links.aim(source, node.name, node.ports.client)}" for node in nodes)

    def _command(self, stage: Stage, name: str) -> list[str]:
        return self.plan.command(sys.executable, stage, name, self._urls(name))

    def _wire(self, ports: Sequence[NodePorts]) -> list[Wiring]:
        """A link for each pair of servers; what servers learn from each other must not lead around it."""
        assert self._links is not None
        names = self.plan.servers()
        return [
            Wiring(
                [
                    f"{LOOPBACK}:{self._links.aim(own, other, there.route)}"
                    for other, there in zip(names, ports, strict=True)
                    if other != own
                ],
                advertise=_NOWHERE,
            )
            for own in names
        ]
