"""A store as a test wants it: filled, closed, then hurt by hand, then opened again."""

from __future__ import annotations

import shutil
from pathlib import Path

from stages.persist.names import list_shards
from stages.persist.storedir import Store, open_store

from .checks import recover, verify
from .cuts import MemoryWitness
from .lane import CLUSTER, PARTITION, Lane
from .reader import Verdict, judge
from .source import NOW_NS, Source


class Stand:
    """One partition's store with what was sent to it and what was accepted.

    Attributes:
        directory: the store.
        source, witness: what was sent, what was accepted.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source = Source("stand")
        self.witness = MemoryWitness()

    @property
    def store(self) -> Store:
        """The store, made when it is not there."""
        return open_store(self.directory, CLUSTER, now_ns=NOW_NS)

    def lane(self) -> Lane:
        """A new owner, not opened yet."""
        return Lane(self.store, self.source, self.witness, lambda _: None)

    def fill(self, *, sealed: int = 0, full: int = 0, commits: int = 4) -> None:
        """Adds so many sealed shards, then so many full ones that wait to be sealed, then a live one with `commits`."""
        lane = self.lane()
        lane.open()
        for number in range(sealed + full):
            for _ in range(4):
                lane.commit(3)
            lane.roll()
            if number < sealed:
                lane.seal_all()
        for _ in range(commits):
            lane.commit(3)
        lane.close()

    def copy(self, directory: Path) -> Stand:
        """One like it, which goes its own way. To fill one takes far longer."""
        copy = Stand(directory)
        shutil.copytree(self.directory, directory)
        copy.source, copy.witness = self.source, self.witness.copy()
        return copy

    def path(self, shard: int) -> Path:
        """The file of a shard: its sealed form, if it is there."""
        return next(file.path for file in list_shards(self.directory)[PARTITION] if file.shard == shard)

    def judge(self) -> Verdict:
        """What is wrong with the files as they lie there."""
        return judge(self.directory, self.witness.receipt, self.witness.seals, self.source)

    def recover(self) -> Verdict:
        """Recovers the store, goes on for a few commits, seals everything, and gives what is wrong."""
        return recover(self.directory, self.source, self.witness, commits=3)

    def verify(self) -> Verdict:
        """What persist's own verification and reader find wrong. Takes most of a second."""
        return verify(self.directory, self.source, self.witness)
