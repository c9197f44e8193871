"""What goes wrong in a run, and when: drawn from the seed before the run begins, so that it can be told."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

from cluster.testing.sim import mishaps
from cluster.testing.sim.disk import MemoryDisk
from cluster.testing.sim.strikes import Fault, choose, stand_still
from cluster.testing.sim.world import World
from contracts.subjects import DLQ, EVENTS, HOPS, MEMBERS, RECEIPTS, STAGES, input_filter, receipt_subject

ROLL_BACK_LOOK_S: Final = 0.02
KINDS_MAX: Final = 4
"""Kinds of faults in one run."""


def make_schedule(rng: random.Random, until_s: float, count: int, among: Sequence[str] = ()) -> list[Fault]:
    """`count` faults before `until_s`, in order of time; of few kinds, so that these meet each other often.

    `among`: these kinds, and at times one other.
    """
    others = rng.randint(0, 1) if among else rng.randint(1, KINDS_MAX)
    kinds = [*among, *rng.sample(tuple(FAULTS), others)]
    drawn = [
        Fault(rng.uniform(0.3, until_s), rng.choice(kinds), min(8.0, rng.expovariate(0.6)), rng.random())
        for _ in range(count)
    ]
    return sorted(drawn)


def _kill(world: World, fault: Fault) -> None:
    choose(world.processes, fault.pick).kill()


def _kill_after_publish(world: World, fault: Fault) -> None:
    """Who publishes next to some stream is killed once that is stored, before or just after it is told so. Thrice."""
    chosen = choose((*HOPS, DLQ, DLQ, RECEIPTS), fault.pick)

    def struck(stream: str, writer: str) -> bool:
        process = next((process for process in world.processes if process.name == writer), None)
        if stream != chosen or process is None:
            return False
        host = process.host
        world.broker.later(world.rng.uniform(0.0, 0.006), lambda: process.kill() if process.host is host else None)
        return True

    world.traps += [struck] * 3


def _frames_vanish(world: World, fault: Fault) -> None:
    """A stage stands still, and most of what waits for it is purged by hand."""
    place = int(fault.pick * 1000)
    stage, name = STAGES[1 + place % 3], HOPS[place % 3]
    thaw = stand_still(world, stage)

    def purge() -> None:
        stream = world.broker.streams[name]
        stream.purge(">", below_seq=stream.last_seq - place % 2)

    world.broker.later(0.9 * fault.seconds, purge)
    world.broker.later(fault.seconds, thaw)


def _emptied_twice(world: World, fault: Fault) -> None:
    """A stage stands still while its hop is emptied, made again, and emptied again: the same frames come thrice."""
    place = int(fault.pick * 1000)
    stage, name = STAGES[1 + place % 3], HOPS[place % 3]
    thaw = stand_still(world, stage)

    def purge() -> None:
        world.broker.streams[name].purge(">")

    for at_s, what in ((0.3, purge), (2.0 + fault.pick, purge), (5.0, thaw)):
        world.broker.later(at_s, what)


def _kill_in_commit(world: World, fault: Fault) -> None:
    """The next commit of any persister ends between its append and its fdatasync."""
    disk = choose(world.disks, fault.pick)

    def die(host: object) -> bool:
        for process in world.processes:
            if process.host is host:
                disk.kill_in_commit = lambda host: False
                process.kill()
                if fault.pick < 0.5:
                    _cut_power(world, fault)
                return True
        return False

    disk.kill_in_commit = die


def _cut_power(world: World, fault: Fault) -> None:
    disk = choose(world.disks, fault.pick)
    for process in world.processes:
        if process.stage == "persist" and process.disk is disk:
            process.kill()
    disk.cut_power()


def _freeze(world: World, fault: Fault) -> None:
    process = choose(world.processes, fault.pick)
    host = process.host
    process.freeze()
    world.broker.later(fault.seconds, lambda: process.thaw() if process.host is host else None)


def _cut(world: World, fault: Fault) -> None:
    clients = list(world.network.clients)
    if clients:
        client = choose(clients, fault.pick)
        client.lose()
        world.broker.later(fault.seconds, client.mend)


def _drop(world: World, fault: Fault) -> None:
    """A server dies: the clients that were connected to it connect to others."""
    for client in list(world.network.clients):
        if world.rng.random() < 0.4:
            client.drop()


def _lossy(world: World, fault: Fault) -> None:
    weather = world.network.weather
    weather.lost_out, weather.lost_in = 0.4 * fault.pick, 0.4 * (1 - fault.pick)
    world.broker.later(fault.seconds, _calm, world)


def _calm(world: World) -> None:
    weather = world.network.weather
    weather.lost_out = weather.lost_in = weather.lingers = 0.0


def _linger(world: World, fault: Fault) -> None:
    world.network.weather.lingers = 0.3 * fault.pick
    world.broker.later(fault.seconds, _calm, world)


def _step_down(world: World, fault: Fault) -> None:
    world.broker.step_down(choose(tuple(world.broker.streams), fault.pick), min(fault.seconds, 3.0))


def _stale(world: World, fault: Fault) -> None:
    """A leader is frozen: the others elect one; the old one then thaws, and answers reads for a while."""
    name = choose((*HOPS, RECEIPTS, RECEIPTS, DLQ, EVENTS, EVENTS, MEMBERS), fault.pick)
    world.broker.go_stale(name, 2.0 + fault.seconds)
    world.broker.step_down(name, 0.2)


def _stale_after_kill(world: World, fault: Fault) -> None:
    """What a stale leader is worst for: somebody who has to find his place while it answers."""
    world.broker.go_stale(choose((RECEIPTS, RECEIPTS, *HOPS, DLQ), fault.pick), 3.0 + fault.seconds)
    stage = choose(STAGES, 1 - fault.pick)

    def kill() -> None:
        for process in world.processes:
            if process.stage == stage or process.stage == "persist":
                process.kill()

    world.broker.later(0.5, kill)


def _restart_servers(world: World, fault: Fault) -> None:
    world.network.restart_servers(min(fault.seconds, 3.0))


def _restart_servers_on_backlog(world: World, fault: Fault) -> None:
    """Ingest stands still for a while; just when it works off what waits, all servers restart.

    It makes large frames then, and others after the restart than before: they overlap what is committed meanwhile.
    """
    thaw = stand_still(world, "ingest")

    stand_s = min(fault.seconds, 2.0)
    world.broker.later(stand_s, thaw)
    world.broker.later(stand_s + 0.1 * fault.pick, world.network.restart_servers, 0.3)


def _deliveries_lost(world: World, fault: Fault) -> None:
    """The route between a consumer's server and its client's loses messages, and nothing else."""
    world.broker.lost_deliveries = 0.4

    def end() -> None:
        world.broker.lost_deliveries = 0.0

    world.broker.later(fault.seconds, end)


def _purge(world: World, fault: Fault) -> None:
    """Somebody empties a hop by hand, all of it or one partition of it."""
    place = int(fault.pick * 1000)
    stage = STAGES[1 + place % 3]
    pattern = ">" if place % 2 else input_filter(stage, place % world.settings.partitions)
    stream = world.broker.streams[HOPS[place % 3]]
    gone = stream.purge(pattern, keep=0)
    world.broker.say(f"{stream.name} is purged of {gone} by hand")


def _purge_head(world: World, fault: Fault) -> None:
    """Frames in the middle of what is waiting vanish: only their successors are left."""
    stream = world.broker.streams[choose(HOPS, fault.pick)]
    stream.purge(">", below_seq=stream.last_seq)


def _delete_consumers(world: World, fault: Fault) -> None:
    world.broker.lose_consumers(0.5, told=fault.pick < 0.5)


def _mute_consumers(world: World, fault: Fault) -> None:
    """The server some consumers are on is frozen."""
    muted = [consumer for consumer in world.broker.consumers.values() if world.rng.random() < 0.5]
    for consumer in muted:
        consumer.muted = True

    def end() -> None:
        for consumer in muted:
            consumer.muted = False
            consumer.pump()

    world.broker.later(fault.seconds, end)


def _full(world: World, fault: Fault) -> None:
    stream = world.broker.streams.get(choose((EVENTS, *HOPS), fault.pick))
    if stream is None:
        return
    stream.bytes_max = stream.bytes + 200

    def end() -> None:
        stream.bytes_max = stream.config.max_bytes or -1

    world.broker.later(fault.seconds, end)


def _disk_fails(world: World, fault: Fault) -> None:
    disk = choose(world.disks, fault.pick)
    disk.failing = True
    world.broker.later(fault.seconds, _disk_mends, disk)


def _disk_mends(disk: MemoryDisk) -> None:
    disk.failing = False


def _clock_jumps(world: World, fault: Fault) -> None:
    process = choose(world.processes, fault.pick)
    process.clock_skew_ns += int((fault.pick - 0.5) * 7200e9)


def _gateway_dies(world: World, fault: Fault) -> None:
    world.restart_gateway(int(fault.pick * 1000))


def _purge_receipts(world: World, fault: Fault) -> None:
    """Somebody purges the receipts, all of them with the seal records or those of one partition."""
    stream = world.broker.streams.get(RECEIPTS)
    if stream is not None and not world.must_not_lose:
        partition = int(fault.pick * 1000) % world.settings.partitions
        gone = stream.purge(">" if fault.pick < 0.5 else receipt_subject(partition))
        world.broker.say(f"{RECEIPTS} is purged of {gone} by hand")
        world.people.needed = True


def _delete_receipts(world: World, fault: Fault) -> None:
    """Somebody deletes `FI_RECEIPTS`, and applies the topology again."""
    if RECEIPTS in world.broker.streams and not world.must_not_lose:
        world.broker.delete(RECEIPTS)
        world.broker.later(min(fault.seconds, 3.0), world.make_receipts_again)
        world.people.needed = True


def _lose_store(world: World, fault: Fault) -> None:
    """A disk that is backed up is lost, and its copies are put in its place."""
    disks = [disk for disk in world.disks if disk.backed_up]
    if disks and not world.must_not_lose:
        disk = choose(disks, fault.pick)
        for process in world.processes:
            if process.stage == "persist" and process.disk is disk:
                process.kill()
        disk.lose()
        world.people.needed = True


def _lose_store_behind_restart(world: World, fault: Fault) -> None:
    """A store is lost when all hops were emptied just before: none of their writers is refused then."""
    world.network.restart_servers(0.3)

    def lose() -> None:
        if not world.people.is_careful:
            _lose_store(world, fault)

    world.broker.later(1.5 + fault.pick, lose)


def _roll_back_events(world: World, fault: Fault) -> None:
    """`FI_EVENTS` is put back to what it is now, as soon as events were committed after that, and nothing waits."""
    backup = world.broker.streams[EVENTS].backup() if EVENTS in world.broker.streams else None

    def put_back() -> None:
        if not (world.is_healed or backup is None or world.is_rolled_back or world.roll_back(backup)):
            world.broker.later(ROLL_BACK_LOOK_S, put_back)

    put_back()


def _damage_server(world: World, fault: Fault) -> None:
    """A server can no longer read some of what it stored of `FI_EVENTS`, which consumers there pass over."""
    world.damage(0.5 * fault.pick)


FAULTS: dict[str, Callable[[World, Fault], None]] = {
    "kill": _kill,
    "kill after a publish": _kill_after_publish,
    "kill in a commit": _kill_in_commit,
    "power cut": _cut_power,
    "freeze": _freeze,
    "cut off": _cut,
    "server dies": _drop,
    "lossy network": _lossy,
    "lingering requests": _linger,
    "leader steps down": _step_down,
    "stale leader": _stale,
    "stale leader while others find their place": _stale_after_kill,
    "all servers restart": _restart_servers,
    "all servers restart on a backlog": _restart_servers_on_backlog,
    "deliveries lost": _deliveries_lost,
    "hop emptied twice": _emptied_twice,
    "hop purged by hand": _purge,
    "frames purged by hand": _purge_head,
    "frames purged while nobody reads": _frames_vanish,
    "consumers deleted": _delete_consumers,
    "consumers mute": _mute_consumers,
    "stream full": _full,
    "disk fails": _disk_fails,
    "clock jumps": _clock_jumps,
    "gateway dies": _gateway_dies,
    "receipts purged": _purge_receipts,
    "receipts deleted": _delete_receipts,
    "a server's disk is damaged": _damage_server,
    "a server's disk is damaged beside one that hangs": mishaps.damage_beside_one_that_hangs,
    "FI_EVENTS rolled back": _roll_back_events,
    "store lost": _lose_store,
    "store lost after all servers restarted": _lose_store_behind_restart,
    "server hangs": mishaps.hang,
    "message ids forgotten": mishaps.forget_ids,
    "servers' clocks step": mishaps.step_clocks,
    "a stream in memory is empty": mishaps.empty_a_stream,
    "FI_RECEIPTS rolled back": mishaps.roll_back_receipts,
    "store put back": mishaps.put_store_back,
    "store copied, and both run": mishaps.run_a_copied_store,
    "verbs typed twice": mishaps.type_twice,
    "flush typed": mishaps.type_flush,
}
