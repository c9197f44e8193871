"""What a `FiCluster` stands on: something that runs servers and stages, and can hurt them one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from contracts.settings import Settings
from contracts.subjects import Stage
from stages.persist.names import SHARDS


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run.

    Attributes:
        directory: absolute; stores, shards and logs lie there.
        nodes: how many nats-servers, ``n1`` …
        scale: processes of each stage, ``ingest-0`` …
        settings: for the topology and every stage.
        links: connections go where they can be cut and slowed.
        clocks: stages get wall clocks that can be moved.
    """

    directory: Path
    nodes: int
    scale: Mapping[Stage, int]
    settings: Settings
    links: bool
    clocks: bool

    @property
    def shards(self) -> Path:
        """The store's directory."""
        return self.directory / SHARDS

    def servers(self) -> tuple[str, ...]:
        """Names of the servers."""
        return tuple(f"n{number}" for number in range(1, self.nodes + 1))

    def stages(self) -> dict[str, Stage]:
        """Name of each stage process → its stage, in flow order."""
        return {f"{stage}-{index}": stage for stage, count in self.scale.items() for index in range(count)}

    def command(self, python: str, stage: Stage, name: str, urls: Iterable[str]) -> list[str]:
        """How a stage process is run that reaches the servers at `urls`."""
        module = ["cluster.testing.stage", str(self.clock(name))] if self.clocks else ["cluster"]
        servers = [part for url in urls for part in ("--nats", url)]
        shards = ["--shards", str(self.shards)] if stage == "persist" else []
        return [python, "-P", "-m", *module, "run", stage, *servers, "--name", name, *shards]

    def clock(self, name: str) -> Path:
        """The file that says how far off a stage process's wall clock is (`cluster.testing.clock`)."""
        return self.directory / "clocks" / name


class Backend(ABC):
    """Runs a `Plan`. Every verb takes the name of a server or stage process, and returns once it is done.

    A verb does nothing where there is nothing to do: `start` to what runs, `kill` or `freeze` to what is down.

    Always true: after `close`, and after `open` failed or was cancelled, nothing of it runs.
    """

    plan: Plan

    @property
    @abstractmethod
    def urls(self) -> tuple[str, ...]:
        """Client URLs of all servers, as this process reaches them."""

    @abstractmethod
    async def open(self) -> None:
        """Starts servers, applies the topology, starts stages; returns once all of them are ready. Raises `FiError`."""

    @abstractmethod
    async def close(self) -> None:
        """Ends everything, whatever state it is in. Does nothing when nothing runs."""

    @abstractmethod
    async def start(self, name: str) -> None:
        """Starts a process that was stopped or killed, and waits until it is ready."""

    @abstractmethod
    async def stop(self, name: str) -> None:
        """SIGTERM; the process stays down until `start`."""

    @abstractmethod
    async def kill(self, name: str) -> None:
        """SIGKILL; the process stays down until `start`."""

    @abstractmethod
    async def freeze(self, name: str) -> None:
        """Halts a process where it is, until `thaw`."""

    @abstractmethod
    async def thaw(self, name: str) -> None:
        """Lets a frozen process go on."""

    @abstractmethod
    async def cut(self, name: str) -> None:
        """No byte passes between the process and anything else, until `heal`."""

    @abstractmethod
    async def heal(self, name: str) -> None:
        """Ends `cut` and `slow`."""

    @abstractmethod
    async def slow(self, name: str, latency_s: float) -> None:
        """Every byte to and from the process arrives so much later, until `heal`."""

    @abstractmethod
    def logs(self) -> dict[str, str]:
        """Process → all it has logged, here or in an earlier life. Reads files or asks the engine: not for the loop."""
