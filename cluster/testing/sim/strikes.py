"""What a fault is, and what all of them use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from cluster.testing.sim.world import World
from contracts.subjects import Stage

T = TypeVar("T")


class Fault(NamedTuple):
    """One thing that goes wrong.

    Attributes:
        at_s: when.
        kind: key of `FAULTS`.
        seconds: how long, where that has a meaning.
        pick: what it happens to: a number in [0, 1) that chooses among what there is then.
    """

    at_s: float
    kind: str
    seconds: float
    pick: float

    def __str__(self) -> str:
        return f"{self.at_s:7.3f} s  {self.kind} ({self.seconds:.1f} s, {self.pick:.3f})"


def stand_still(world: World, stage: Stage) -> Callable[[], None]:
    """Freezes all processes of a stage; call what it gives to thaw them."""
    frozen = [(process, process.host) for process in world.processes if process.stage == stage]
    for process, _ in frozen:
        process.freeze()

    def thaw() -> None:
        for process, host in frozen:
            if process.host is host:
                process.thaw()

    return thaw


def choose(things: Sequence[T], pick: float) -> T:
    """The one of them that a `pick` stands for."""
    return things[int(pick * len(things))]
