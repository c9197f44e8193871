"""Holding a partition's shards against its receipts and seal records, which the cluster keeps: the off-box witness.

A store that was changed with care, down to its last checksum, agrees with itself. It does not agree with the receipts:
each says how many events there were up to which origin, and the Merkle root over them. Shards are those that
`verify_store` found; what is wrong *within* one is reported there, and not again here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from uuid import UUID

import numpy as np
from msgspec import UNSET

from contracts.events import format_rfc3339
from contracts.hashing import HASH_BYTES
from contracts.receipts import Receipt, SealRecord
from contracts.statements import Vouching, statement_of
from stages.persist.idfilter import ID_BYTES
from stages.persist.names import FIRST_SHARD
from stages.persist.rowaudit import changed_rows
from stages.persist.storedir import Store
from stages.persist.verify import Problem, ShardContents

Counts = np.ndarray[Any, np.dtype[np.int64]]

_SETTLED_COLUMNS = 4
_IDS_NAMED_MAX = 10


@dataclass(frozen=True, slots=True)
class Witnesses:
    """What the cluster says of one partition.

    Attributes:
        receipts: those it kept when the reading of the shards began, in stream order.
        newer: those accepted since.
        seals: in stream order.
        rewinds: the receipts with which the partition went back: what was committed after them was given up, and the
            records of that are not among the others.
        repeated: see the function of that name.
    """

    receipts: Sequence[Receipt] = ()
    newer: Sequence[Receipt] = ()
    seals: Sequence[SealRecord] = ()
    rewinds: Sequence[Receipt] = ()
    repeated: Sequence[Receipt] = ()


@dataclass(frozen=True, slots=True)
class Audited:
    """What was found of one partition.

    Attributes:
        problems: everything in which its shards and its witnesses contradict each other.
        unshown: what the last receipt commits and readers do not see yet, in words; empty when they see all. Persist
            shows a commit with the next one, or by itself soon after: one that died in between shows it when it starts.
    """

    problems: list[Problem]
    unshown: str


def audit_partition(
    partition: int,
    shards: Sequence[ShardContents],
    witnesses: Witnesses,
    store: Store,
    *,
    shown_origin: int = 0,
    trusted: Collection[str] = (),
) -> Audited:
    """Holds a partition's shards and its witnesses against each other.

    Args:
        partition: lane.
        shards: all of the partition in `store`, by number.
        witnesses: from the cluster that the store belongs to.
        store: its identity; witnesses of other stores (the partition was moved) say nothing of its files, and what no
            witness of its own speaks of was added.
        shown_origin: how far readers see now, later than `shards` were read: a commit is shown just after its receipt.
        trusted: public keys (64 hex digits). With any given, the last receipt must be signed by one, and so must
            everything after the first record that one of them signed: see `Vouching`.
            Nor may the partition have gone back with an old receipt: anybody can repeat one with its signature.
    """
    audit = _Audit(f"partition {partition}", shards)
    everything = [*witnesses.receipts, *witnesses.newer]
    for records in (everything, witnesses.seals):
        audit.check_signatures(records, trusted)
    audit.check_identity(partition, [*everything, *witnesses.seals], store)
    if trusted:
        audit.check_repeated(witnesses.repeated)
    receipts = [receipt for receipt in everything if receipt.store == store.store_id]
    seals = [seal for seal in witnesses.seals if seal.store == store.store_id]
    last = next((receipt for receipt in reversed(witnesses.receipts) if receipt.store == store.store_id), None)
    unshown = audit.check_missing(last, shown_origin)
    origins = [*(receipt.origin for receipt in receipts), *(seal.last_origin for seal in seals)]
    audit.check_added(max(origins, default=0), everything[-1] if everything else None, witnesses.rewinds, store)
    audit.check_totals(receipts)
    for seal in seals:
        audit.check_seal(seal)
    changed = audit.check_roots(receipts, seals)
    # Where events were changed, that is told, and that the rows have their checksums need not be.
    right = [receipt for receipt in receipts if receipt.persisted not in changed]
    for where, what in changed_rows(shards, right, store.store_id):
        audit.problems.append(Problem(audit.name, where, what))
    return Audited(audit.problems, unshown)


def in_force(records: Sequence[Receipt | SealRecord]) -> tuple[list[Receipt], list[SealRecord], list[Receipt]]:
    """Splits one partition's records, in stream order, by what still holds.

    A takeover before the origin of the receipt it follows goes back: what was committed after it was given up, and the
    receipts and seal records of that are void. So are the seal records of an owner that was fenced off while it sealed.
    Of several records of one shard the last holds.

    Returns:
        receipts, seal records, and the takeovers that went back; each in stream order.
    """
    receipts: list[Receipt] = []
    seals: dict[int, SealRecord] = {}
    rewinds: list[Receipt] = []
    for record in records:
        if isinstance(record, SealRecord):
            if receipts and record.store != receipts[-1].store:
                continue
            seals.pop(record.shard, None)
            seals[record.shard] = record
            continue
        if record.takeover and receipts and record.origin < receipts[-1].origin:
            rewinds.append(record)
            receipts = [receipt for receipt in receipts if receipt.origin <= record.origin]
            seals = {shard: seal for shard, seal in seals.items() if seal.last_origin <= record.origin}
        receipts.append(record)
    return receipts, list(seals.values()), rewinds


def repeated(records: Sequence[Receipt | SealRecord]) -> list[Receipt]:
    """Takeovers among one partition's records, in stream order, that go back but are older than what they follow.

    Signatures are over a receipt, not over its place in the stream. Persist goes back as it is told, by any clock: what
    came of an old receipt that was published again is for an auditor to know.
    """
    receipts = [record for record in records if isinstance(record, Receipt)]
    return [
        after
        for before, after in pairwise(receipts)
        if after.takeover and after.origin < before.origin and after.committed_ns < before.committed_ns
    ]


def name_record(record: Receipt | SealRecord) -> str:
    """A receipt or seal record in words."""
    if isinstance(record, Receipt):
        return f"receipt of {format_rfc3339(record.committed_ns)} at origin {record.origin}"
    return f"seal record of shard {record.shard}"


class _Audit:
    def __init__(self, name: str, shards: Sequence[ShardContents]) -> None:
        self.name = name
        self._shards = shards
        self.problems: list[Problem] = []

    def _report(self, where: str, what: str) -> None:
        self.problems.append(Problem(self.name, where, what))

    def check_signatures(self, records: Sequence[Receipt | SealRecord], trusted: Collection[str]) -> None:
        """Every signature that is there, and that none is missing where one must be."""
        vouching = Vouching(trusted)
        for record in records:
            is_last = isinstance(record, Receipt) and record is records[-1]
            if wrong := vouching.wrong_with(record, must=is_last):
                self._report(name_record(record), wrong)

    def check_identity(self, partition: int, records: Sequence[Receipt | SealRecord], store: Store) -> None:
        """The witnesses are of this partition and cluster, and none takes back what an earlier one said."""
        for record in records:
            cluster = store.cluster_id if record.cluster is UNSET else record.cluster
            if (record.partition, cluster) != (partition, store.cluster_id):
                self._report(name_record(record), f"is of partition {record.partition} of cluster {cluster}")
        receipts = [record for record in records if isinstance(record, Receipt)]
        for before, after in pairwise(receipts):
            if after.origin < before.origin or after.persisted < before.persisted:
                self._report(
                    name_record(after),
                    f"commits {after.persisted} events up to origin {after.origin}, after one that committed "
                    f"{before.persisted} up to {before.origin}",
                )

    def check_repeated(self, records: Sequence[Receipt]) -> None:
        """The partition did not go back with a receipt that was made before the one it follows."""
        for record in records:
            self._report(
                name_record(record),
                f"takes the partition back to {record.persisted} events, but is older than the receipt that it "
                "follows: somebody published it again, or a clock was put back",
            )

    def check_missing(self, last: Receipt | None, shown_origin: int) -> str:
        """Nothing is missing before the shards' first commit or after their last one. `last`: the store's receipt.

        Returns:
            as `Audited.unshown`.
        """
        end, events = self._end(), sum(contents.check.events for contents in self._shards)
        first = next((one.check.prev_origin for one in self._shards if one.check.prev_origin is not None), 0)
        if last is not None and len(last.ends) == 1 and first:
            self._report(f"origins up to {first}", "no other store ever held the partition, but they are not here")
        if last is None or max(end, shown_origin) >= last.origin:
            return ""
        unseen = _name_ids(b"".join(contents.check.unseen_ids for contents in self._shards))
        if self._shards and _awaits_show(self._shards[-1], last):
            return (
                f"readers do not see yet what the {name_record(last)} commits ({unseen or 'no event'}): it is whole in "
                "the live shard, and persist shows it when it starts or goes on"
            )
        hidden = "; its live shard holds, and does not show, " + unseen if unseen else ""
        self._report(
            f"events {events + 1} to {last.persisted}" if events < last.persisted else f"origins after {end}",
            f"the {name_record(last)} commits {last.persisted} events up to origin {last.origin}, but the shards "
            f"end at origin {end} with {events}: commits were removed from the end, or the watermark was lowered "
            f"(or a power cut did so and persist was not started since){hidden}",
        )
        return ""

    def check_added(self, reached: int, newest: Receipt | None, rewinds: Sequence[Receipt], store: Store) -> None:
        """No commit lies beyond every witness.

        Args:
            reached: the last origin that a receipt or seal record of this store speaks of.
            newest: the partition's last receipt, whosever it is.
            rewinds: as in `Witnesses`.
            store: which.
        """
        end = self._end()
        if end <= reached:
            return
        added = [
            _ids_between(contents, int(np.searchsorted(_settled(contents)[:, 0], reached, "right")))
            for contents in self._shards
            if (contents.check.last_origin or 0) > reached
        ]
        why = f"no receipt or seal record of store {store.store_id} speaks of anything after {reached}: it was added"
        if newest is not None and newest.store != store.store_id and store.store_id in newest.ends:
            why = (
                f"store {newest.store} on {newest.node} took the partition over after {reached}: start persist here, "
                "and it moves the rest aside"
            )
        elif any(rewind.origin >= reached and store.store_id in rewind.ends for rewind in rewinds):
            why = (
                f"the partition went back to {reached} since, and that was interrupted: run `fictl rebuild`, which "
                "moves the rest aside"
            )
        self._report(
            _name_ids(b"".join(added)) or f"origins after {reached}", f"the shards go on to origin {end}, but {why}"
        )

    def _end(self) -> int:
        return max((contents.check.last_origin or 0 for contents in self._shards), default=0)

    def check_totals(self, receipts: Sequence[Receipt]) -> None:
        """Each receipt's origin is the end of a commit, with its totals over everything up to there."""
        totals: Counts | None = np.zeros(_SETTLED_COLUMNS - 1, np.int64)
        excess = [0, 0, 0]
        reached = 0
        for number, contents in enumerate(self._shards, FIRST_SHARD):
            check = contents.check
            if check.findings or contents.shard.shard != number or check.prev_origin not in (None, reached):
                totals = None
            if check.findings or check.prev_origin is None or check.last_origin is None:
                continue
            settled = _settled(contents)
            sums = np.cumsum(settled[:, 1:], axis=0)
            agreed = 0
            for receipt in receipts:
                if not check.prev_origin < receipt.origin <= check.last_origin:
                    continue
                row = int(np.searchsorted(settled[:, 0], receipt.origin))
                if settled[row, 0] != receipt.origin:
                    self._report(name_record(receipt), f"no commit in {contents.shard.path.name} ends there")
                elif totals is not None:
                    among = _ids_slice(contents, agreed, int(sums[row, 0]))
                    excess = self._compare(receipt, (totals + sums[row]).tolist(), excess, among)
                    agreed = int(sums[row, 0])
            totals = None if totals is None else totals + sums[-1]
            reached = check.last_origin

    def _compare(self, receipt: Receipt, found: list[int], excess: list[int], among: bytes) -> list[int]:
        """Reports totals that differ otherwise than at the receipt before, by `excess`; gives the new excess."""
        told = [receipt.persisted, receipt.duplicates, receipt.dead_lettered]
        now = [is_ - said for is_, said in zip(found, told, strict=True)]
        if now != excess:
            self._report(
                name_record(receipt),
                f"says {told[0]} events, {told[1]} duplicates and {told[2]} dead-lettered up to there, "
                f"but the shards hold {found[0]}, {found[1]} and {found[2]}; "
                f"since the receipt before: {_name_ids(among) or 'nothing'}",
            )
        return now

    def check_seal(self, seal: SealRecord) -> None:
        """The sealed file is the one that was recorded, byte for byte."""
        contents = next((one for one in self._shards if one.shard.shard == seal.shard and one.shard.sealed), None)
        if contents is None:
            self._report(name_record(seal), f"{seal.file} is missing")
            return
        check, path = contents.check, contents.shard.path
        if check.sha256 and check.sha256 != seal.sha256:
            self._report(name_record(seal), f"{path.name} has SHA-256 {check.sha256}, recorded was {seal.sha256}")
        first = None if check.prev_origin is None else check.prev_origin + 1
        found = (path.name, first, check.last_origin, check.events)
        told = (seal.file, seal.first_origin, seal.last_origin, seal.events)
        if not check.findings and found != told:
            self._report(
                name_record(seal),
                "{} covers origins {} to {} with {} events".format(*found)
                + ", recorded was {}, origins {} to {} with {} events".format(*told),
            )

    def check_roots(self, receipts: Sequence[Receipt], seals: Sequence[SealRecord]) -> set[int]:
        """Every root is that over the stored events; where one is not, the events it could be are named.

        Returns:
            the sizes of tree whose root is another.
        """
        by_size: dict[int, list[Receipt | SealRecord]] = {}
        records: list[Receipt | SealRecord] = [*receipts, *seals]
        for record in records:
            by_size.setdefault(statement_of(record).tree_size, []).append(record)
        right, blamed = 0, False
        changed = set()
        for size, root in self._roots(sorted(by_size)):
            wrong = [record for record in by_size[size] if record.root != root]
            if not wrong:
                right, blamed = size, False
                continue
            changed.add(size)
            if not blamed:
                blamed = True
                self._report(
                    self._name_events(right, size),
                    f"not what was committed: the {name_record(wrong[0])} says root {wrong[0].root} "
                    f"over {size} events, the shards give {root}; up to event {right} they agree",
                )
        return changed

    def _roots(self, sizes: Sequence[int]) -> Iterator[tuple[int, str]]:
        """(size, root in hex) at those of the ascending sizes that the shards reach."""
        wanted = iter(sizes)
        size = next(wanted, None)
        for contents in self._shards:
            if contents.before is None:
                continue
            tree, leaves = contents.before.copy(), contents.check.leaves
            while size is not None and size < tree.size:
                size = next(wanted, None)
            for at in range(0, len(leaves) + HASH_BYTES, HASH_BYTES):
                while size is not None and size == tree.size:
                    yield size, tree.root().hex()
                    size = next(wanted, None)
                if at < len(leaves):
                    tree.append(leaves[at : at + HASH_BYTES])

    def _name_events(self, first: int, last: int) -> str:
        """Events [first, last) of the partition's tree by their ids, as far as the shards tell."""
        ids = []
        for contents in self._shards:
            start = 0 if contents.before is None else contents.before.size
            ids.append(_ids_slice(contents, first - start, last - start))
        return _name_ids(b"".join(ids)) or f"events {first + 1} to {last}"


def _awaits_show(contents: ShardContents, last: Receipt) -> bool:
    """True when one whole commit lies behind those that are shown, and with it the shard is what `last` says."""
    check = contents.check
    if check.findings or check.unseen != 1 or contents.before is None:
        return False
    tree, leaves = contents.before.copy(), check.leaves + check.unseen_leaves
    for at in range(0, len(leaves), HASH_BYTES):
        tree.append(leaves[at : at + HASH_BYTES])
    return (check.unseen_origin, tree.size, tree.root().hex()) == (last.origin, last.persisted, last.root)


def _settled(contents: ShardContents) -> Counts:
    """n×4: for each commit its origin, events, duplicates and dead-lettered events."""
    return np.frombuffer(contents.check.settled, "<i8").reshape(-1, _SETTLED_COLUMNS)


def _ids_between(contents: ShardContents, commit: int) -> bytes:
    """The ids of the events in the commits from number `commit` (from 0) on."""
    return _ids_slice(contents, int(_settled(contents)[:commit, 1].sum()), contents.check.events)


def _ids_slice(contents: ShardContents, first: int, last: int) -> bytes:
    return contents.check.ids[max(0, first) * ID_BYTES : max(0, last) * ID_BYTES]


def _name_ids(ids: bytes) -> str:
    """The event ids in `ids`: all of a few, else the first and last of them; empty without any."""
    count = len(ids) // ID_BYTES
    named = range(count) if count <= _IDS_NAMED_MAX else (0, count - 1)
    texts = [str(UUID(bytes=ids[at * ID_BYTES : (at + 1) * ID_BYTES])) for at in named]
    if not texts:
        return ""
    if count > _IDS_NAMED_MAX:
        return f"{count} events from {texts[0]} to {texts[1]}"
    return f"{'event' if count == 1 else 'events'} {', '.join(texts)}"
