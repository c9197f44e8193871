"""More that goes wrong: servers that hang, forget and have wrong clocks, and what people do with stores and verbs."""

from __future__ import annotations

from typing import Final

from cluster.testing.sim.strikes import Fault, choose, stand_still
from cluster.testing.sim.world import DAMAGED, SERVERS, World
from contracts.subjects import DLQ, EVENTS, HOPS, RECEIPTS

CONNECTED: Final = 0.4
"""The share of clients that are connected to one server, and of streams that one leads."""


def hang(world: World, fault: Fault) -> None:
    """A server is frozen: its clients hear nothing, what it leads gets other leaders, and it does not know it."""
    broker, rng = world.broker, world.rng
    hung_s = 1.0 + fault.seconds
    broker.hang(choose(SERVERS, fault.pick), hung_s)
    for client in list(world.network.clients):
        if rng.random() < CONNECTED:
            client.lose()
            broker.later(hung_s, client.mend)
    for name in list(broker.streams):
        if rng.random() < CONNECTED:
            broker.go_stale(name, hung_s + 2.0, from_s=hung_s)
            broker.step_down(name, min(hung_s, rng.uniform(0.5, 2.0)))


def damage_beside_one_that_hangs(world: World, fault: Fault) -> None:
    """Ingest stands still while events come in. One server then cannot read some of them, and another one hangs."""
    thaw = stand_still(world, "ingest")

    def strike() -> None:
        world.damage(0.1 + 0.4 * fault.pick)
        world.broker.hang(choose([server for server in SERVERS if server != DAMAGED], fault.pick), 3.0 + fault.seconds)
        thaw()

    world.broker.later(min(fault.seconds, 2.0), strike)


def forget_ids(world: World, fault: Fault) -> None:
    """A stream's servers no longer know which messages they took, as after its window."""
    stream = world.broker.streams.get(choose((EVENTS, EVENTS, *HOPS, DLQ, RECEIPTS), fault.pick))
    if stream is not None:
        stream.forget_ids()


def step_clocks(world: World, fault: Fault) -> None:
    """The servers' clock goes back by some seconds, or on by minutes: beyond all windows and times to live."""
    world.broker.step_clock(-40.0 * fault.pick if fault.pick < 0.5 else 600.0 * (fault.pick - 0.5))


def empty_a_stream(world: World, fault: Fault) -> None:
    """Too many of a stream's servers restarted, one soon after the other: what it had in memory is gone."""
    world.broker.lose_memory(choose(HOPS, fault.pick), min(fault.seconds, 3.0))


def put_store_back(world: World, fault: Fault) -> None:
    """A backed-up store is put back as it was some time ago, and then the copies of what was sealed since."""
    disks = [disk for disk in world.disks if disk.backed_up]
    if not disks or world.must_not_lose:
        return
    disk = choose(disks, fault.pick)
    before = disk.snapshot()

    def put_back() -> None:
        if world.is_healed or world.must_not_lose:
            return
        world.kill_persist(disk)
        disk.put_back(before)
        world.people.needed = True

    world.broker.later(fault.seconds, put_back)


def roll_back_receipts(world: World, fault: Fault) -> None:
    """`FI_RECEIPTS` is put back to what it is now. People then delete it, and have the stores tell how far they are."""
    if RECEIPTS not in world.broker.streams or world.must_not_lose:
        return
    backup = world.broker.streams[RECEIPTS].backup()

    def put_back() -> None:
        if RECEIPTS in world.broker.streams and not (world.is_healed or world.must_not_lose):
            world.broker.delete(RECEIPTS)
            world.broker.create(backup)
            world.broker.say(f"{RECEIPTS} is rolled back to {backup.last_seq}")
            world.people.needed = world.people.receipts_are_old = True

    world.broker.later(fault.seconds, put_back)


def run_a_copied_store(world: World, fault: Fault) -> None:
    """A store's disk is copied to another machine, with its identity, and persist runs on both."""
    if not (world.people.needed or world.must_not_lose):
        world.run_copy(choose(world.disks, fault.pick))


def type_twice(world: World, fault: Fault) -> None:
    """Persist is killed, and two people type the same verb, which nobody needs."""
    if world.is_copied:
        return
    disk = choose(world.disks, fault.pick)
    world.kill_persist(disk)
    partition = int(fault.pick * 1000) % world.settings.partitions
    world.people.type_twice(disk, choose(("rebuild", "restore"), 1 - fault.pick), partition)
    world.people.needed = True


def type_flush(world: World, fault: Fault) -> None:
    """All that is committed is to be sealed."""
    world.people.flush()
