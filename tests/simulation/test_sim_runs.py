"""Whole clusters out of seeds, in virtual time: nothing is lost, and a seed is always the same run."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from cluster.testing.sim.broker import Broker
from cluster.testing.sim.faults import FAULTS
from cluster.testing.sim.loop import Host, StuckError, VirtualLoop
from cluster.testing.sim.network import Network
from cluster.testing.sim.run import simulate
from cluster.testing.sim.world import CLUSTER
from cluster.topology import streams
from contracts.errors import InvalidEventError
from contracts.settings import Settings
from contracts.subjects import DLQ, EVENTS, publish_subject
from stages.runtime.api import Api
from stages.runtime.graveyard import Graveyard
from stages.runtime.work import DeadLetter

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 60
SEEDS_OF_A_KIND = 2
FOUND = [(1500407, ()), (2001928, ()), (1510020, ("store put back",))]
"""Old copies of a store that had gone back meanwhile: `rebuild` took them for whole, or never got past one. And
2001928, where `restore` asks for commits that were not shown."""
SEEDS_SLOW = 1500


def convicted(seeds: range) -> dict[int, list[str]]:
    outcomes = map(simulate, seeds)
    return {outcome.seed: outcome.problems for outcome in outcomes if not outcome.ok}


def test_clusters_that_all_kinds_of_things_happen_to_keep_every_event_once_and_drain() -> None:
    assert convicted(range(1, SEEDS + 1)) == {}


def test_each_kind_of_thing_that_happens_keeps_every_event_once_and_drains() -> None:
    outcomes = [simulate(seed, among=(kind,)) for kind in FAULTS for seed in range(1, SEEDS_OF_A_KIND + 1)]
    assert {outcome.among: outcome.problems for outcome in outcomes if not outcome.ok} == {}
    assert {fault.kind for outcome in outcomes for fault in outcome.faults} == set(FAULTS)


@pytest.mark.parametrize(("seed", "among"), FOUND)
def test_what_was_convicted_once_is_not_any_more(seed: int, among: tuple[str, ...]) -> None:
    assert simulate(seed, among=among).problems == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_more_clusters_keep_every_event_once_and_drain() -> None:
    assert convicted(range(SEEDS + 1, SEEDS_SLOW + 1)) == {}


def run_cli(*arguments: str, hash_seed: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.testing.sim", *arguments],
        cwd=ROOT,
        env={"PYTHONHASHSEED": str(hash_seed), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_seed_is_the_same_run_to_the_byte_in_another_interpreter_with_another_hash_seed() -> None:
    for seed in (3, 11):
        lines: list[str] = []
        here = simulate(seed, trace=lines)
        assert here.ok
        assert len(lines) > 100
        for hash_seed in (1, 2):
            there = run_cli("--seed", str(seed), "--trace", hash_seed=hash_seed)
            assert there.returncode == 0, there.stderr
            assert there.stdout.splitlines() == "\n".join(lines).splitlines()
            assert here.fingerprint in there.stderr


def test_looking_changes_nothing() -> None:
    seen, unseen = simulate(5, trace=[]), simulate(5)
    assert (seen.verdict, seen.virtual_s, seen.drained_s) == (unseen.verdict, unseen.virtual_s, unseen.drained_s)


def test_a_run_of_many_seeds_says_what_it_did() -> None:
    done = run_cli("--seeds", "3", "--start", "7", "--json", hash_seed=0)
    assert done.returncode == 0, done.stderr
    summary = msgspec.json.decode(done.stdout)
    assert (summary["runs"], summary["convicted"]) == (3, [])
    assert run_cli("--trace", hash_seed=0).returncode == 2
    assert run_cli("--seeds", "1", "--among", "no such fault", hash_seed=0).returncode == 2


def test_a_frozen_process_stands_still_and_then_does_all_it_has_missed_in_order() -> None:
    loop = VirtualLoop(lambda: 0.001)
    host = Host("frozen")
    done: list[float] = []

    async def tick() -> None:
        for _ in range(3):
            await asyncio.sleep(1)
            done.append(loop.time())

    async def run() -> None:
        task = loop.create_task(tick(), context=host.context)
        await asyncio.sleep(1.5)
        host.frozen = True
        await asyncio.sleep(8.5)
        assert done == [1.0]
        loop.thaw(host)
        await task

    loop.run_until_complete(run())
    loop.close()
    assert done == [1.0, 10.0, 11.0]


def test_waiting_for_what_never_comes_is_an_error_and_no_hang() -> None:
    loop = VirtualLoop(lambda: 0.001)
    with pytest.raises(StuckError):
        loop.run_until_complete(loop.create_future())
    loop.close()


def test_a_dead_letter_holds_its_event_though_a_stale_leader_does_not_know_it_yet() -> None:
    rng = random.Random(4)
    loop = VirtualLoop(lambda: 0.001)
    broker = Broker(loop, rng, streams(Settings(partitions=1), CLUSTER))
    host = Host("segment")
    refused: list[int] = []

    def note(text: str) -> None:
        if "stale leader" in text:
            refused.append(1)

    broker.trace = note

    async def run() -> None:
        client = Network(broker, rng).connect("segment", host)
        api = Api(client, Settings(partitions=1), rng.random)
        for number in range(8):
            broker.go_stale(EVENTS, 5.0)
            await client.request(publish_subject("clinic", "c"), b"event %d" % number, timeout=5)
            letter = DeadLetter(number + 1, 0, InvalidEventError("reason", "field", "detail"), None)
            await Graveyard(api, "segment", 0, f"nonce-{number}").bury([letter])

    loop.run_until_complete(loop.create_task(run(), context=host.context))
    loop.close()
    assert refused, "no read met the stale leader: the test shows nothing"
    assert [message.data for message in broker.streams[DLQ].messages.values()] == [b"event %d" % n for n in range(8)]
