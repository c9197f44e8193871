"""Which fault comes when, out of a seed alone. Pure: the same seed gives the same schedule, however long the run.

Kinds come from a shuffled bag that is refilled when it is empty, so that every kind has come once before any comes
twice; every third step is a pair of two kinds that overlap.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from contracts.subjects import DLQ, EVENTS, HOPS, MEMBERS, PERSIST, RECEIPTS, STAGES

SERVERS: Final = ("n1", "n2", "n3")
PROCESSES: Final = tuple(f"{stage}-{number}" for stage in STAGES for number in range(2))
PERSISTERS: Final = ("persist-0", "persist-1")
GATEWAYS: Final = ("gateway-0", "gateway-1", "gateway-2")
LED: Final = (EVENTS, *HOPS, RECEIPTS, DLQ, MEMBERS)
"""Streams whose leader is worth hurting."""
PAIR_EVERY: Final = 3
QUIET_S: Final = (0.5, 3.0)
OVERLAP: Final = (0.0, 0.8)
"""Where within the first fault of a pair the second begins, as a part of its hold."""


class Kind(msgspec.Struct, frozen=True):
    """A kind of fault.

    Attributes:
        targets: what it may hit; one is drawn.
        hold_s: shortest and longest time from the fault to its healing. (0, 0): it heals by itself, and is measured
            from when it was done.
        needs_small_disk: passed over where the shards lie on the machine's own disk.
    """

    targets: tuple[str, ...]
    hold_s: tuple[float, float] = (0.0, 0.0)
    needs_small_disk: bool = False


KINDS: Final[Mapping[str, Kind]] = {
    "kill a stage": Kind(PROCESSES),
    "restart a stage": Kind(PROCESSES, (0.5, 4)),
    "freeze a stage": Kind(PROCESSES, (1, 15)),
    "cut off a stage": Kind(PROCESSES, (2, 12)),
    "cut off a persister": Kind(PERSISTERS, (4, 12)),
    "shift a stage's clock": Kind(PROCESSES, (4, 10)),
    "second owner": Kind(STAGES, (3, 10)),
    "kill a server": Kind(SERVERS),
    "server down": Kind(SERVERS, (2, 8)),
    "freeze a server": Kind(SERVERS, (2, 12)),
    "freeze a leader": Kind(LED, (2, 8)),
    "kill all servers": Kind(("all",), (0.1, 2)),
    "rolling server restart": Kind(("all",)),
    "cut off a server": Kind(SERVERS, (3, 12)),
    "cut off a leader": Kind(LED, (3, 10)),
    "server without routes": Kind(SERVERS, (4, 25)),
    "slow network": Kind(("20 ms", "60 ms", "150 ms"), (4, 10)),
    "leader step-down": Kind(LED),
    "step-down storm": Kind(("all",), (4, 10)),
    "purge a hop": Kind(HOPS),
    "delete a hop": Kind(HOPS, (0.1, 4)),
    "delete consumers": Kind((EVENTS, *HOPS)),
    "delete the members": Kind((MEMBERS,), (0.1, 6)),
    "delete the receipts": Kind((RECEIPTS,), (0.1, 6)),
    "disk full": Kind(("store",), (3, 10), needs_small_disk=True),
    "failing fsync": Kind(PERSISTERS, (1, 6)),
    "kill a gateway": Kind(GATEWAYS),
    "gateway repeats": Kind(GATEWAYS),
    "backlog": Kind((PERSIST,), (4, 10)),
}
"""Every kind there is. `cluster.testing.chaos.faults` knows how each is done and healed."""


class Planned(msgspec.Struct, frozen=True):
    """One fault of the schedule. `after_s`: how long after the step's beginning."""

    kind: str
    target: str
    hold_s: float
    after_s: float = 0.0

    def __str__(self) -> str:
        held = f" for {self.hold_s:.1f} s" if self.hold_s else ""
        return f"{self.kind} ({self.target}){held}"


class Step(msgspec.Struct, frozen=True):
    """Faults that overlap, and the quiet before them."""

    number: int
    quiet_s: float
    faults: tuple[Planned, ...]


def schedule(seed: int) -> Iterator[Step]:
    """Steps without end. `seed` decides everything."""
    rng = random.Random(seed)
    bag: list[str] = []
    number = 0
    while True:
        number += 1
        first = _planned(rng, bag, "")
        faults = [first]
        if number % PAIR_EVERY == 0:
            second = _planned(rng, bag, first.kind)
            after_s = round(first.hold_s * rng.uniform(*OVERLAP), 2)
            faults.append(msgspec.structs.replace(second, after_s=after_s))
        yield Step(number, round(rng.uniform(*QUIET_S), 2), tuple(faults))


def _planned(rng: random.Random, bag: list[str], other: str) -> Planned:
    """The next fault out of the bag, of another kind than `other`."""
    if not bag or bag == [other]:
        bag[:] = sorted(KINDS)
        rng.shuffle(bag)
    name = bag.pop(0 if bag[0] != other else 1)
    kind = KINDS[name]
    return Planned(name, rng.choice(kind.targets), round(rng.uniform(*kind.hold_s), 2))
