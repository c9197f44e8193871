"""Power cuts: recorded sessions of persist's files, cut at random operations, and recovered from what the disk kept.

Recoveries are recorded like everything else, and a cut disk is where the next session begins: so cuts fall into
recoveries from cuts.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from contracts.receipts import Receipt, SealRecord
from stages.persist import files
from stages.persist.storedir import open_store

from .checks import recover, verify
from .disk import Image, Log, after_power_cut
from .lane import CLUSTER, Lane
from .reader import Verdict, judge
from .recorder import Recorder, write_image
from .source import NOW_NS, Source

CUTS_A_SESSION = 10
SESSIONS_A_STORE = 5
_VERIFY_EVERY = 25


class MemoryWitness:
    """A `Witness` in memory, which notes after how many disk operations it accepted each message."""

    def __init__(self, receipt: Receipt | None = None, seals: list[SealRecord] | None = None) -> None:
        self.receipt = receipt
        self.seals = list(seals or ())
        self.accepted: list[tuple[int, Receipt | SealRecord]] = []
        self.log = Log({})

    def copy(self) -> MemoryWitness:
        """One that accepted the same and goes its own way."""
        return MemoryWitness(self.receipt, self.seals)

    @property
    def sealed_shard(self) -> int:
        return self.seals[-1].shard if self.seals else 0

    def accept(self, message: Receipt | SealRecord) -> None:
        self.accepted.append((len(self.log.operations), message))
        if isinstance(message, Receipt):
            self.receipt = message
        else:
            self.seals.append(message)


class _KilledError(Exception):
    """The owner was killed between a change of names and its sync."""


@contextlib.contextmanager
def _killed_at(sync: int) -> Iterator[None]:
    """Kills who syncs the directory for the `sync`th time, just before: nothing it did is lost, and nothing synced."""
    left = [sync]

    def sync_or_die(path: Path) -> None:
        left[0] -= 1
        if not left[0]:
            raise _KilledError
        files_sync_dir(path)

    files_sync_dir = files.sync_dir
    with contextlib.suppress(_KilledError), mock.patch.object(files, "sync_dir", sync_or_die):
        yield


class Session:
    """One recorded run over a store by two owners, one after the other. The first dies, at the latest with a tail."""

    def __init__(self, before: MemoryWitness, source: Source, rng: random.Random) -> None:
        self._before = before
        self._source = source
        self._rng = rng
        self._starts: list[tuple[int, str]] = []
        self.log = Log({})
        self.witness = before.copy()

    def run(self, image: Image, scratch: Path) -> None:
        """Begins with the files of `image`; leaves nothing behind but its log."""
        parent = Path(tempfile.mkdtemp(prefix="session-", dir=scratch))
        write_image(parent / "shards", image)
        self._record(parent / "shards")
        shutil.rmtree(parent)

    def _record(self, directory: Path) -> None:
        recorder = Recorder(directory)
        self.log = self.witness.log = recorder.log
        recorder.start()
        try:
            self._on_step("create")
            store = open_store(directory, CLUSTER, now_ns=NOW_NS)
            for tail in (True, False):
                lane = Lane(store, self._source, self.witness, self._on_step)
                try:
                    with _killed_at(self._rng.choice((0, 0, 1, 2, 3, 5)) if tail else 0):
                        lane.open()
                        self._own(lane)
                        if tail:
                            lane.append(self._rng.randint(1, 5))
                finally:
                    lane.close()
        finally:
            recorder.stop()

    def _own(self, lane: Lane) -> None:
        rng = self._rng
        lane.record_seals()
        for _ in range(rng.randint(2, 4)):
            for _ in range(rng.randint(1, 12)):
                lane.commit(rng.choice((1, 2, 3, 8)))
            if rng.random() < 0.4:
                lane.prepare()
            if rng.random() < 0.6:
                lane.roll()
            if rng.random() < 0.7:
                lane.seal_all()

    def _on_step(self, step: str) -> None:
        self._starts.append((len(self.log.operations), step))

    def draw_cut(self) -> tuple[str, int]:
        """A step and an operation in it; every step is as likely as any other, however many operations it has."""
        moments: dict[str, list[int]] = defaultdict(list)
        ends = [start for start, _ in self._starts[1:]] + [len(self.log.operations)]
        for (start, step), end in zip(self._starts, ends, strict=True):
            moments[step] += range(start, end + 1)
        step = self._rng.choice(sorted(moments))
        return step, self._rng.choice(moments[step])

    def witness_at(self, cut: int) -> MemoryWitness:
        """What was accepted before operation number `cut`; what came just before it may or may not have been."""
        witness = self._before.copy()
        for at, message in self.witness.accepted:
            if at < cut or (at == cut and self._rng.random() < 0.5):
                witness.accept(message)
        return witness


def run_cuts(runs: int, seed: int, scratch: Path) -> Iterator[tuple[str, int, Verdict]]:
    """Simulates `runs` power cuts.

    Args:
        runs: how many.
        seed: draws everything; the same seed gives the same cuts.
        scratch: stores are made here; those with something wrong stay.

    Yields:
        for each cut: the step it fell in, the events committed by the session it ends, and what is wrong.
    """
    done = 0
    while done < runs:
        rng = random.Random(f"{seed}/{done}")
        source = Source(f"{seed}/{done}")
        image: Image = {}
        witness = MemoryWitness()
        ok = True
        for _ in range(SESSIONS_A_STORE):
            session = Session(witness, source, rng)
            session.run(image, scratch)
            committed = _persisted(session.witness) - _persisted(witness)
            for _ in range(min(CUTS_A_SESSION, runs - done)):
                step, cut = session.draw_cut()
                witness = session.witness_at(cut)
                image = after_power_cut(session.log, cut, rng)
                done += 1
                verdict = _after_cut(image, witness.copy(), source, scratch, f"cut {done} in {step}", done)
                ok = ok and verdict.ok
                yield step, committed, verdict
                committed = 0
            if not ok:
                break


def _after_cut(image: Image, witness: MemoryWitness, source: Source, scratch: Path, label: str, number: int) -> Verdict:
    """Judges what the cut left, recovers it, goes on, and judges again. Changes `witness`."""
    directory = Path(tempfile.mkdtemp(prefix=f"{label.replace(' ', '-')}-", dir=scratch))
    shards = directory / "shards"
    write_image(shards, image)
    verdict = judge(shards, witness.receipt, witness.seals, source)
    verdict.add(recover(shards, source, witness, commits=3))
    if number % _VERIFY_EVERY == 0:
        verdict.add(verify(shards, source, witness))
    if verdict.ok:
        shutil.rmtree(directory)
    verdict.notes = [f"{directory}, {label}: {note}" for note in verdict.notes]
    return verdict


def _persisted(witness: MemoryWitness) -> int:
    return witness.receipt.persisted if witness.receipt else 0
