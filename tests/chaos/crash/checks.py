"""Recovery and verification of a store after a crash, as verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from contracts.errors import FiError
from contracts.events import encode_event
from contracts.receipts import SealRecord
from stages.persist.store import EventStore
from stages.persist.storedir import open_store
from stages.persist.verify import verify_store

from .lane import CLUSTER, PARTITION, Lane, Witness
from .reader import Verdict, judge
from .source import NOW_NS, Source


class SealWitness(Witness, Protocol):
    """A witness that also shows its seal records."""

    seals: list[SealRecord]


def recover(shards: Path, source: Source, witness: SealWitness, *, commits: int = 0) -> Verdict:
    """Takes the store over, judges what readers see then, commits `commits` groups, and seals what waits."""
    try:
        lane = Lane(open_store(shards, CLUSTER, now_ns=NOW_NS), source, witness, lambda _: None)
        try:
            lane.open()
            verdict = judge(shards, witness.receipt, witness.seals, source, recovered=True)
            lane.record_seals()
            for _ in range(commits):
                lane.commit(2)
            if commits:
                lane.roll()
            lane.seal_all()
        finally:
            lane.close()
    except (FiError, OSError) as error:
        return Verdict(unreadable=1, notes=[f"recovery refused: {type(error).__name__}: {error}"])
    if commits:
        verdict.add(judge(shards, witness.receipt, witness.seals, source, recovered=True))
    return verdict


def verify(shards: Path, source: Source, witness: SealWitness) -> Verdict:
    """Reads a recovered store with persist's own verification and reader."""
    assert witness.receipt is not None
    verdict = Verdict()
    report = verify_store(shards)
    for problem in report.problems:
        verdict.unreadable += 1
        verdict.notes.append(f"verify: {problem}")
    end = report.partitions[0]
    if (end.partition, end.tree_size, end.root) != (PARTITION, witness.receipt.persisted, witness.receipt.root):
        verdict.changed += 1
        verdict.notes.append(f"verify: {end} is not what the last receipt says")
    with EventStore(shards) as store:
        if [encode_event(stored.event) for stored in store.iterate()] != source.stored(witness.receipt.origin):
            verdict.changed += 1
            verdict.notes.append("EventStore gives other events than were accepted")
    return verdict
