"""Real processes, ended by SIGKILL at random moments of every step, recovery and seals among them.

The parent owns the witness file: what a child managed to append to it is accepted, whether or not the child lived to
know. After each kill the files are judged as the dead process left them; the next child recovers them and goes on.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from contracts.receipts import Receipt, SealRecord, decode_receipt, decode_seal, encode_receipt
from stages.persist.seal import SealedInfo
from stages.persist.storedir import lock_partition, open_store

from .checks import recover, verify
from .lane import CLUSTER, PARTITION, STEPS, Lane
from .reader import Verdict, judge
from .source import NOW_NS, Source

KILLS_A_STORE = 25
_DEADLINE_S = 5.0
"""A child that has not come to its step by then is killed where it is."""

_SPANS_S = {
    "takeover": 0.001,
    "recover": 0.015,
    "append": 0.0006,
    "receipt": 0.0004,
    "watermark": 0.0002,
    "prepare": 0.004,
    "roll": 0.004,
    "seal": 0.02,
    "record": 0.001,
    "finish": 0.001,
}
"""About how long each step takes: the kill comes at a random moment of that span."""

_OCCURRENCES = {
    "append": 60,
    "receipt": 60,
    "watermark": 60,
    "prepare": 3,
    "roll": 3,
    "seal": 3,
    "record": 3,
    "finish": 3,
}
"""The step is hit in one of its first so many occurrences; in its first where not listed."""


class WitnessFile:
    """A `Witness` in a file of one JSON message a line, fsynced before it counts."""

    def __init__(self, path: Path) -> None:
        """Reads what is there; an unfinished last line was never accepted and is removed."""
        self.receipt: Receipt | None = None
        self.seals: list[SealRecord] = []
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        os.ftruncate(self._fd, whole)
        for line in data[:whole].splitlines():
            if b'"seal.1"' in line:
                self.seals.append(decode_seal(line))
            else:
                self.receipt = decode_receipt(line)

    @property
    def sealed_shard(self) -> int:
        return self.seals[-1].shard if self.seals else 0

    def accept(self, message: Receipt | SealRecord) -> None:
        os.write(self._fd, encode_receipt(message) + b"\n")
        os.fsync(self._fd)
        if isinstance(message, Receipt):
            self.receipt = message
        else:
            self.seals.append(message)

    def close(self) -> None:
        os.close(self._fd)


class KillPlan(NamedTuple):
    """When to kill: so long after the `occurrence`-th beginning of `step`."""

    step: str
    occurrence: int
    after_s: float


def draw_plan(rng: random.Random) -> KillPlan:
    """A moment; every step is as likely as any other."""
    step = rng.choice(STEPS)
    return KillPlan(step, rng.randint(1, _OCCURRENCES.get(step, 1)), rng.uniform(0, _SPANS_S[step]))


def work(directory: Path, witness_path: Path, seed: str, source: Source, on_step: Callable[[str], None]) -> None:
    """The child: recovers, then appends, rolls, prepares and (in a thread, beside commits) seals. Never returns."""
    rng = random.Random(seed)
    store = open_store(directory, CLUSTER, now_ns=NOW_NS)
    lock_partition(store, PARTITION)
    lane = Lane(store, source, WitnessFile(witness_path), on_step)
    lane.open()
    lane.record_seals()
    sealing: Future[SealedInfo] | None = None
    with ThreadPoolExecutor(1) as pool:
        while True:
            jobs = lane.files.to_seal
            if sealing is not None and (sealing.done() or len(jobs) > 2):
                lane.finish_seal(jobs[0], sealing.result())
                sealing = None
            elif sealing is None and jobs:
                sealing = pool.submit(lane.seal, jobs[0])
            if lane.files.wants_next() and rng.random() < 0.5:
                lane.prepare()
            if lane.has_commits and rng.random() < 0.02:
                lane.roll()
            lane.commit(rng.choice((1, 1, 2, 3, 8)))


def run_kills(
    runs: int, seed: int, scratch: Path, verify_every: int = KILLS_A_STORE
) -> Iterator[tuple[str, int, Verdict]]:
    """Kills `runs` children.

    Args:
        runs: how many.
        seed: draws sources, groups and moments (a moment's exact instruction is the machine's).
        scratch: stores are made here; those with something wrong stay.
        verify_every: after so many kills of a store, the whole store is also recovered here and verified.

    Yields:
        for each kill: the step it fell in, the events committed since the kill before, and what is wrong.
    """
    done = 0
    while done < runs:
        count = min(KILLS_A_STORE, runs - done)
        directory = Path(tempfile.mkdtemp(prefix=f"kills-{seed}-{done}-", dir=scratch))
        yield from _one_store(directory, f"{seed}/{done}", count, verify_every)
        done += count


def _one_store(directory: Path, seed: str, kills: int, verify_every: int) -> Iterator[tuple[str, int, Verdict]]:
    rng = random.Random(seed)
    source = Source(seed)
    shards, witness_path = directory / "shards", directory / "witness.jsonl"
    events = 0
    wrong = False
    for kill in range(1, kills + 1):
        step, verdict = _kill_one(shards, witness_path, f"{seed}/{kill}", source, draw_plan(rng))
        with contextlib.closing(WitnessFile(witness_path)) as witness:
            verdict.add(judge(shards, witness.receipt, witness.seals, source))
            if kill % verify_every == 0 or kill == kills:
                verdict.add(recover(shards, source, witness))
                verdict.add(verify(shards, source, witness))
        committed = witness.receipt.persisted if witness.receipt else 0
        verdict.notes = [f"{directory} after kill {kill} in {step}: {note}" for note in verdict.notes]
        wrong = wrong or not verdict.ok
        yield step, committed - events, verdict
        events = committed
    if not wrong:
        shutil.rmtree(directory)


def _kill_one(shards: Path, witness_path: Path, seed: str, source: Source, plan: KillPlan) -> tuple[str, Verdict]:
    """Starts a child, kills it by plan; gives the step it was in, and its own complaint when it ended by itself."""
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:
        _child(shards, witness_path, seed, source, write_fd, read_fd)
    os.close(write_fd)
    steps = _watch(read_fd, child, plan)
    os.close(read_fd)
    _, status = os.waitpid(child, 0)
    step = plan.step if steps.count(plan.step) >= plan.occurrence else steps[-1] if steps else "start"
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return step, Verdict()
    return step, Verdict(unreadable=1, notes=[f"the child ended by itself (status {status}); its trace is on stderr"])


def _child(shards: Path, witness_path: Path, seed: str, source: Source, write_fd: int, read_fd: int) -> None:
    """Never returns."""

    def tell(step: str) -> None:
        os.write(write_fd, step.encode() + b"\n")

    try:
        os.close(read_fd)
        work(shards, witness_path, seed, source, tell)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _watch(read_fd: int, child: int, plan: KillPlan) -> list[str]:
    """Follows the child's steps, kills it at the planned moment, and gives all steps it told."""
    told = b""
    deadline = time.monotonic() + _DEADLINE_S
    needle = plan.step.encode() + b"\n"
    while told.count(needle) < plan.occurrence and (left_s := deadline - time.monotonic()) > 0:
        if not select.select([read_fd], [], [], left_s)[0]:
            break
        piece = os.read(read_fd, 65536)
        if not piece:
            break
        told += piece
    select.select([], [], [], plan.after_s)
    os.kill(child, signal.SIGKILL)
    while piece := os.read(read_fd, 65536):
        told += piece
    return told.decode().split("\n")[:-1]
