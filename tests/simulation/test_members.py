"""The processes of a stage among themselves, on simulated servers: who runs what while they come, go and are not seen.

Fences keep two that work on one partition from doing harm. Here they need not: nobody fights over a partition, and
nothing moves for no reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from virtual import Ground, in_virtual_time

from cluster.testing.waiting import until
from contracts.errors import ClusterUnavailableError
from contracts.membership import Member, decode_member, encode_member
from contracts.subjects import MEMBERS, member_subject
from stages.runtime.lanes import LaneSet
from stages.runtime.membership import Membership
from stages.runtime.messages import StoredMessage
from stages.runtime.tasks import end_tasks

PARTITIONS = 8
TTL_S, RENEW_S = 5, 2.0
FAST = {"partitions": PARTITIONS, "member_ttl_s": TTL_S, "member_renew_s": RENEW_S}
LANE_ENDS_S = 0.3


class Lane:
    """Takes a while to end."""

    def __init__(self) -> None:
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        await self._stopping.wait()
        await asyncio.sleep(LANE_ENDS_S)

    def stop(self, *, handing_over: bool = False) -> None:
        self._stopping.set()

    def nudge(self) -> None:
        """Nothing to look at."""


class Process:
    """One process of hash: its membership, and lanes that do nothing.

    Attributes:
        me: as it announces itself at first.
        begun: every partition it began with, in order.
        clashes: those that another process ran at that moment.
    """

    def __init__(self, ground: Ground, name: str, others: list[Process], started_ns: int = 1) -> None:
        self.api = ground.connect(name)
        self.lanes = LaneSet(self._make, self._changed)
        self.begun: list[int] = []
        self.clashes: list[int] = []
        self._others = others
        others.append(self)
        nonce = f"{name}.{started_ns}"
        self.me = Member(stage="hash", node="n", name=name, nonce=nonce, pid=1, started_ns=started_ns)
        self.membership = Membership(self.api, self.me, PARTITIONS, self.lanes, lambda: None, lambda said: said)
        self._running = asyncio.create_task(self.membership.run())

    def _make(self, partition: int, on_open: object) -> Lane:
        self.begun.append(partition)
        self.clashes += [partition for one in self._others if one is not self and partition in one.lanes.held]
        return Lane()

    def _changed(self) -> None:
        self.membership.poke()

    async def holds(self, count: int, limit_s: float) -> None:
        await until(lambda: len(self.lanes.held) == count, f"it holds {count} partitions", limit_s)

    async def end(self) -> None:
        """As a process does when it is told to."""
        self.membership.leave()
        await self.lanes.drain(10.0, handing_over=True)
        await end_tasks(self._running)
        await self.membership.say_goodbye()

    async def die(self) -> None:
        """Without a word."""
        await end_tasks(self._running)
        await self.lanes.close()


async def quiet(seconds: float, *processes: Process) -> None:
    """Time passes, and no partition moves."""
    before = [(process.lanes.held, len(process.begun)) for process in processes]
    await asyncio.sleep(seconds)
    assert [(process.lanes.held, len(process.begun)) for process in processes] == before


def test_a_partition_is_begun_only_when_who_had_it_has_ended_with_it() -> None:
    async def job(ground: Ground) -> None:
        processes: list[Process] = []
        first = Process(ground, "a", processes)
        await first.holds(8, 2)
        second = Process(ground, "b", processes)
        await second.holds(4, 4)
        assert sorted(first.lanes.held + second.lanes.held) == list(range(PARTITIONS))
        third = Process(ground, "c", processes)
        await until(lambda: sorted(len(one.lanes.held) for one in processes) == [2, 3, 3], "it is shared by three", 4)
        await quiet(4 * TTL_S, *processes)
        await second.end()
        await until(lambda: len(first.lanes.held + third.lanes.held) == 8, "the second one's share is taken", 1)
        await third.die()
        await first.holds(8, TTL_S + RENEW_S)
        assert [process.clashes for process in processes] == [[], [], []]
        await first.end()
        assert not ground.broker.streams[MEMBERS].last_by_subject(member_subject("hash", "n", "a")).data  # type: ignore[union-attr]

    in_virtual_time(job, **FAST)


def test_who_ends_takes_nothing_on() -> None:
    async def job(ground: Ground) -> None:
        processes: list[Process] = []
        ending, other = Process(ground, "a", processes), Process(ground, "b", processes)
        await ending.holds(4, 4)
        await other.holds(4, 4)
        ending.membership.leave()
        await other.die()
        await quiet(3 * TTL_S, ending)

    in_virtual_time(job, **FAST)


def test_who_cannot_be_seen_keeps_what_it_has_and_the_others_take_it_over() -> None:
    async def job(ground: Ground) -> None:
        processes: list[Process] = []
        cut, other = Process(ground, "a", processes), Process(ground, "b", processes)
        await cut.holds(4, 4)
        await other.holds(4, 4)
        cut.api.client.lose()  # type: ignore[attr-defined]
        held = cut.lanes.held
        await other.holds(8, 2 * TTL_S)
        await quiet(4 * TTL_S, cut)
        # What it had sent before may arrive late, and make it one of them once more.
        await other.holds(8, 2 * TTL_S)
        assert cut.lanes.held == held
        cut.api.client.mend()  # type: ignore[attr-defined]
        await other.holds(4, 2 * TTL_S)
        assert sorted(cut.lanes.held + other.lanes.held) == list(range(PARTITIONS))

    in_virtual_time(job, **FAST)


def test_a_silence_of_the_servers_makes_nobody_dead() -> None:
    async def job(ground: Ground) -> None:
        processes: list[Process] = []
        for name in "abc":
            Process(ground, name, processes)
        await until(lambda: sum(len(one.lanes.held) for one in processes) == 8, "all is shared", 10)
        await asyncio.sleep(RENEW_S)
        ground.broker.headless_until_s[MEMBERS] = asyncio.get_running_loop().time() + 4 * TTL_S
        # One of them is heard of again later than the others.
        processes[0].api.client.lose()  # type: ignore[attr-defined]
        await quiet(4 * TTL_S, *processes)
        await quiet(TTL_S - RENEW_S, *processes)
        processes[0].api.client.mend()  # type: ignore[attr-defined]
        await quiet(4 * TTL_S, *processes)

    in_virtual_time(job, **FAST)


def test_of_two_with_one_name_the_later_works_and_the_other_ends_without_a_trace() -> None:
    async def job(ground: Ground) -> None:
        processes: list[Process] = []
        earlier = Process(ground, "a", processes)
        await earlier.holds(8, 2)
        later = Process(ground, "a", processes, started_ns=2)
        await later.holds(8, 2 * TTL_S)
        await earlier.holds(0, 1)
        await quiet(4 * TTL_S, *processes)
        # A renewal of the earlier one's arrives late.
        await ground.publish(member_subject("hash", "n", "a"), encode_member(earlier.me))
        await quiet(4 * TTL_S, later)
        assert earlier.lanes.held == ()
        await earlier.end()
        told = ground.broker.streams[MEMBERS].last_by_subject(member_subject("hash", "n", "a"))
        assert told is not None
        assert decode_member(told.data).nonce == "a.2"
        await quiet(4 * TTL_S, later)

    in_virtual_time(job, **FAST)


def test_a_paused_process_runs_nothing_until_the_pause_is_over() -> None:
    async def job(ground: Ground) -> None:
        process = Process(ground, "a", [])
        await process.holds(8, 2)
        await process.membership.pause(StoredMessage("", 1, 0, b"{}", {}))
        process.membership.poke()
        await process.holds(0, 2)
        await quiet(4 * TTL_S, process)
        await process.membership.pause(StoredMessage("", 2, 0, b"", {}))
        process.membership.poke()
        await process.holds(8, 2)

    in_virtual_time(job, **FAST)


def test_an_announcement_that_nobody_can_read_holds_nobody_up() -> None:
    async def job(ground: Ground) -> None:
        await ground.publish(member_subject("hash", "n", "z"), b"\xff not an announcement")
        process = Process(ground, "a", [])
        await process.holds(8, 2)

    in_virtual_time(job, **FAST)


def test_who_has_not_seen_the_others_yet_is_not_ready() -> None:
    async def unseen(stream: str, patterns: Sequence[str]) -> dict[str, StoredMessage]:
        raise ClusterUnavailableError(f"{stream} cannot be read now")

    async def job(ground: Ground) -> None:
        process = Process(ground, "a", [])
        with pytest.MonkeyPatch.context() as servers:
            servers.setattr(process.api, "last_messages", unseen)
            await asyncio.sleep(4 * TTL_S)
            assert (process.membership.planned, process.lanes.held) == (False, ())
        await process.holds(8, 2 * TTL_S)
        assert process.membership.planned

    in_virtual_time(job, **FAST)
