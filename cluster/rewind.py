"""Takes partitions back: `fictl rebuild` after damage, `partitions move` to another store, `restore` without receipts.

All end alike: a fenced takeover receipt states the last place that is vouched for, the partition's hop streams are
emptied, and the stages make what is after it again from `FI_EVENTS`; so nothing is done unless that holds it all.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import partial
from operator import methodcaller
from typing import Final

import msgspec
from msgspec import UNSET

from cluster.audit import read_partition
from cluster.retained import is_retained
from contracts.budgets import REWIND_LOCK, REWIND_LOCK_POLL, REWIND_POLL
from contracts.errors import ClusterUnavailableError, FencedError, NotOursError, ShardError
from contracts.events import format_rfc3339
from contracts.receipts import Receipt, SealRecord, StoreEnd, encode_receipt, first_receipt
from contracts.statements import Signer
from contracts.subjects import EVENTS, HOPS, INPUT_STREAM, RECEIPTS, STAGES, input_filter, receipt_subject
from stages.persist.audit import in_force
from stages.persist.disk import LOCAL_STORE, StoreFiles
from stages.persist.moved import check_signer, signed
from stages.persist.names import FIRST_SHARD, ShardFile, lock_name
from stages.persist.rewind import Damage, Place, place_after_seals
from stages.persist.storedir import HALF_DONE, Store, disk_of
from stages.runtime.api import Api
from stages.runtime.checkpoint import last_receipt
from stages.runtime.tasks import run_blocking
from stages.runtime.writer import FencedWriter

log = logging.getLogger(__name__)

_TRIES: Final = 5
_NO_COPY: Final = "; where none has more, see FiPartitionUnattended in the runbooks"


class Rewind(msgspec.Struct, frozen=True, kw_only=True):
    """What taking a partition back means.

    Attributes:
        partition: lane.
        from_store, from_node: who owns it now.
        store: who owns it afterwards.
        committed_origin, committed_events: how far it is committed now.
        origin, events: the place it is taken back to.
        shard: where it goes on.
        why: what is wrong with the files; empty for a move.
        aside: files that are moved aside, by name.
    """

    partition: int
    from_store: str
    from_node: str
    store: str
    committed_origin: int
    committed_events: int
    origin: int
    events: int
    shard: int
    why: str
    aside: tuple[str, ...]

    @property
    def again(self) -> int:
        """How many committed events are made again."""
        return self.committed_events - self.events


class _Records(msgspec.Struct):
    """A partition's records: those in force, all seal records, and the sequence of the last receipt."""

    receipts: list[Receipt]
    seals: list[SealRecord]
    all_seals: list[SealRecord]
    last_seq: int


class Rewinder:
    """Takes partitions back to `store`, of one cluster.

    Args:
        api: connected.
        store: that owns them or is to own them.
        signer: signs the receipts; None: nobody.
        clock_ns: the wall clock.
        files: the store's.
        token: gives what nobody else has.
        node: the host's name.
    """

    def __init__(
        self,
        api: Api,
        store: Store,
        signer: Signer | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        files: StoreFiles = LOCAL_STORE,
        token: Callable[[], str] = lambda: secrets.token_hex(6),
        node: str = "",
    ) -> None:
        self._api = api
        self._store = store
        self._signer = signer
        self._clock_ns = clock_ns
        self._files = files
        self._token = token
        self._node = node or socket.gethostname()
        self._made: tuple[int, int, bytes] | None = None  # Prepared to begin with: partition, number, tree before it

    async def rebuild(self, partition: int, *, dry_run: bool = False) -> Rewind | None:
        """Takes a partition of this store back to before its first damaged shard, if there is one.

        Returns:
            what was done, or for `dry_run` would be; None when every file is as the records say.

        Raises:
            NotOursError: a persister works on it, or another store owns it.
            ShardError: `FI_EVENTS` no longer holds what is damaged.
            StoreFailedError: the disk refused.
            FencedError: a receipt came meanwhile: somebody else owns the partition after all.
        """
        async with self._locked(partition, dry_run):
            records = await self._records(partition)
            last = records.receipts[-1] if records.receipts else None
            if last is None:
                return None
            self._check_cluster(last)
            if last.store != self._store.store_id:
                raise NotOursError(
                    f"partition {partition} belongs to store {last.store} on {last.node}; rebuild it there, or take it "
                    f"with `fictl partitions move {partition}`"
                )
            with disk_of(self._store):
                place, damage = await run_blocking(
                    self._files.last_good_place, self._store, partition, records.receipts, records.seals
                )
            first = last.end_of(self._store.store_id).first
            end = StoreEnd(shard=place.shard, commits=place.commits, first=first, rows=place.rows)
            with disk_of(self._store):
                given_up = partial(self._files.given_up, unseen=damage is not None)
                aside = await run_blocking(given_up, self._store, partition, end, records.seals)
            if damage is None and not aside:
                return None
            why = "files that were given up before are still there" if damage is None else damage.why
            await self._check_retained(partition, place, records, damage)
            if not dry_run:
                await self._go_back(last, records.last_seq, place, end, aside)
            return self._told(last, place, why, aside)

    async def move(self, partition: int, *, dry_run: bool = False) -> Rewind:
        """Lets this store take a partition over, from after its last sealed shard; whoever owned it is fenced off.

        Raises:
            NotOursError: this store owns it already, or its owner goes on committing, faster than it can be taken over.
            ShardError: nobody owns it yet, or `FI_EVENTS` no longer holds what its owner did not seal.
            StoreFailedError: the disk refused.
        """
        async with self._locked(partition, dry_run):
            for _ in range(_TRIES):
                with suppress(FencedError):
                    return await self._move(partition, dry_run)
            receipt, _ = await last_receipt(self._api, partition)
            owner = "its owner" if receipt is None else f"store {receipt.store} on {receipt.node}"
            raise NotOursError(
                f"partition {partition} was not moved: {owner} goes on committing. Stop persist there first; or `fictl "
                "pause persist`, move, and `fictl resume persist`"
            )

    async def restore(
        self, partition: int, *, begin_anew: bool = False, accept_loss: bool = False, dry_run: bool = False
    ) -> Rewind:
        """Writes where a partition of this store goes on, when the cluster lost its receipts.

        Args:
            begin_anew: begin the partition, of which the store has no shard; no other store may have one.
            accept_loss: where `FI_EVENTS` no longer has what comes after whole shards, go on without it.

        Raises:
            NotOursError: it has receipts, or a persister works on it.
            ShardError: the store has no shard of it, or `FI_EVENTS` no longer has what comes after a damaged one.
            StoreFailedError: the disk refused.
            FencedError: a receipt came meanwhile.
        """
        # Nobody works on a partition without receipts: a look needs no lock, which who stands by holds now and then.
        async with nullcontext() if dry_run else self._locked(partition, dry_run):
            records = await self._records(partition)
            if records.receipts:
                last = records.receipts[-1]
                raise NotOursError(
                    f"partition {partition} has its receipts: it belongs to store {last.store} on {last.node}"
                )
            with disk_of(store := self._store):
                files = (await run_blocking(self._files.shards, store.directory)).get(partition, [])
            if not (files or begin_anew):
                raise ShardError(
                    f"{store.directory} has no shard of partition {partition}: restore it on the node whose store has, "
                    "or with --begin-anew if none has"
                )
            with disk_of(store):
                place, damage = await run_blocking(self._files.last_place, files)
            if damage is not None and not place.origin and (len(files) > 1 or files[0].sealed):
                raise ShardError(
                    f"partition {partition} cannot begin again from {EVENTS}, which no longer has what was sealed: put "
                    f"{damage.file} right from a copy ({damage.why})"
                )
            why = "its receipts were lost" if damage is None else damage.why
            if damage is not None:
                await self._check_retained(partition, place, records, damage)
            elif files and not await is_retained(self._api, partition, place.origin, records.all_seals):
                with disk_of(store):
                    place, _ = await run_blocking(partial(self._files.last_place, files, unshown=True))
                why = f"{why}, and {EVENTS} no longer has what it had accepted of it after {_told_place(place)}"
                if not accept_loss:
                    raise ShardError(
                        f"partition {partition}: {why}. If another store, or a copy, has more of its shards, restore "
                        "it with those; if none has, go on with --accept-loss; gateways must send again what is newer"
                    )
            end = StoreEnd(shard=place.shard, commits=place.commits, rows=place.rows)
            with disk_of(store):
                aside = await run_blocking(partial(self._files.given_up, unseen=True), store, partition, end)
            lost = first_receipt(partition, store.cluster_id, store.store_id, "")
            lost = msgspec.structs.replace(lost, signature=place.signature)
            if not dry_run:
                await self._go_back(lost, records.last_seq, place, end, aside)
            reached = msgspec.structs.replace(lost, origin=place.origin, persisted=place.tree.size)
            return self._told(reached, place, why, aside)

    async def _move(self, partition: int, dry_run: bool) -> Rewind:
        records = await self._records(partition)
        if not records.receipts:
            raise ShardError(f"partition {partition} has no owner yet: the first persister that starts takes it")
        last = records.receipts[-1]
        self._check_cluster(last)
        if last.store == self._store.store_id:
            raise NotOursError(f"partition {partition} belongs to store {last.store} ({self._store.directory}) already")
        place = place_after_seals(last, records.seals)
        end = StoreEnd(shard=place.shard, commits=place.commits, first=place.shard)
        with disk_of(self._store):
            aside = await run_blocking(self._files.given_up, self._store, partition, end, records.seals)
        await self._check_retained(partition, place, records, None)
        if not dry_run:
            await self._go_back(last, records.last_seq, place, end, aside)
        return self._told(last, place, "", aside)

    async def _records(self, partition: int) -> _Records:
        rows, last_seq = await read_partition(self._api, partition)
        receipts, seals, _ = in_force(rows)
        return _Records(receipts, seals, [row for row in rows if isinstance(row, SealRecord)], last_seq)

    def _check_cluster(self, last: Receipt) -> None:
        if last.cluster != self._store.cluster_id:
            raise ShardError(
                f"{self._store.directory}: is of cluster {self._store.cluster_id}, the servers are of {last.cluster}"
            )

    def _told(self, last: Receipt, place: Place, why: str, aside: Sequence[ShardFile]) -> Rewind:
        return Rewind(
            partition=last.partition,
            from_store=last.store,
            from_node=last.node,
            store=self._store.store_id,
            committed_origin=last.origin,
            committed_events=last.persisted,
            origin=place.origin,
            events=place.tree.size,
            shard=place.shard,
            why=why,
            aside=tuple(file.path.name for file in aside),
        )

    async def _check_retained(self, partition: int, place: Place, records: _Records, damage: Damage | None) -> None:
        """Holds that `FI_EVENTS` has everything after `place`, if what was committed goes back."""
        is_back = not records.receipts or place.origin < records.receipts[-1].origin
        if is_back and not await is_retained(self._api, partition, place.origin, records.all_seals):
            lost = "what its owner held" if damage is None else f"what {damage.file} holds"
            raise ShardError(
                f"partition {partition} cannot be taken back to origin {place.origin}: {EVENTS} no longer has {lost}. "
                f"Restore the files of the store from a copy{_NO_COPY if damage is None else f' ({damage.why})'}"
            )

    async def _go_back(
        self, last: Receipt, last_seq: int, place: Place, end: StoreEnd, aside: Sequence[ShardFile]
    ) -> None:
        """Publishes the takeover to `place`, takes the files back to it, and empties the hop streams.

        If the process dies or the power fails here: before the receipt nothing is changed; after it `rebuild` finds
        what is left to do, and persist refuses the files until then. Raises as `check_signer` besides.
        """
        check_signer(last, self._signer)
        store = self._store
        with disk_of(store):
            await run_blocking(self._prepare, last.partition, place, end, aside)
            await run_blocking(self._files.forget_copies, store.directory, last.partition, end.shard)
        ends = {**last.ends, store.store_id: end}
        if last.store != store.store_id:
            owner = last.end_of(last.store)
            if (owner.shard, owner.commits) > (place.shard, 0):
                ends[last.store] = msgspec.structs.replace(owner, shard=place.shard, commits=0, rows={})
        nonce = f"rewind-{self._token()}"
        receipt = msgspec.structs.replace(
            last,
            writer=nonce,
            node=self._node,
            store=store.store_id,
            ends=ends,
            origin=place.origin,
            trail=(),
            persisted=place.tree.size,
            duplicates=place.duplicates,
            dead_lettered=place.dead_lettered,
            root=place.tree.root().hex(),
            closed=place.closed,
            committed_ns=self._clock_ns(),
            takeover=True,
            stored_ns=place.stored_ns or UNSET,
        )
        writer = FencedWriter(self._api, RECEIPTS, receipt_subject(last.partition), nonce)
        writer.expected_seq = last_seq
        await writer.publish(encode_receipt(signed(receipt, self._signer)), f"rewind/{place.origin}")
        with disk_of(store, HALF_DONE):
            await run_blocking(self._take_files_back, last.partition, place, end, aside)
        for stage in STAGES:
            if INPUT_STREAM[stage] in HOPS:
                await self._api.purge(INPUT_STREAM[stage], input_filter(stage, last.partition))

    def _prepare(self, partition: int, place: Place, end: StoreEnd, aside: Sequence[ShardFile]) -> None:
        """Does all that needs room; what takes long once only, however often it is tried."""
        self._files.prepare_aside(self._store, aside, end)
        made = partition, place.shard, place.tree.to_bytes()
        if _begins(end) and made != self._made:
            self._files.prepare_begin(self._store, partition, place, self._api.settings, self._clock_ns)
            self._made = made

    def _take_files_back(self, partition: int, place: Place, end: StoreEnd, aside: Sequence[ShardFile]) -> None:
        self._files.set_aside(self._store, aside, end, self._clock_ns())
        if _begins(end):
            self._files.begin_at(self._store, partition, place)
            self._made = None

    @asynccontextmanager
    async def _locked(self, partition: int, dry_run: bool) -> AsyncIterator[None]:
        """Holds the partition's lock in this store. A persister that stands by, or has stopped, lets go of it soon.

        A `dry_run` makes no lock file: where there is none, nobody works on the partition. It does not wait either.
        """
        if dry_run and not (self._store.directory / lock_name(partition)).exists():
            yield
            return
        now_s = asyncio.get_running_loop().time
        deadline = now_s() + (0.0 if dry_run else REWIND_LOCK.s)
        while True:
            try:
                lock = await run_blocking(self._files.lock, self._store, partition, undo=methodcaller("close"))
                break
            except NotOursError as error:
                if now_s() > deadline:
                    raise NotOursError(
                        f"{error}. A persister works on partition {partition}: stop it first if its files are damaged"
                    ) from error
                await asyncio.sleep(REWIND_LOCK_POLL.s)
        try:
            yield
        finally:
            lock.close()


def _told_place(place: Place) -> str:
    """An origin, and when what is there was accepted, where that is known."""
    return f"origin {place.origin}" + (f" of {format_rfc3339(place.stored_ns)}" if place.stored_ns else "")


def _begins(end: StoreEnd) -> bool:
    return end.shard == end.first != FIRST_SHARD and not end.commits


async def wait_caught_up(
    api: Api, rewinds: Sequence[Rewind], *, wait_s: float, on_progress: Callable[[float, float], None]
) -> None:
    """Returns when every partition is committed as far as it was before it went back.

    Args:
        api: connected.
        rewinds: what was done.
        wait_s: limit.
        on_progress: told (events made again, of how many).

    Raises:
        ClusterUnavailableError: not within `wait_s`.
    """
    total = sum(rewind.again for rewind in rewinds)
    deadline = time.monotonic() + wait_s
    while True:
        behind = []
        done = 0
        for rewind in rewinds:
            receipt, _ = await last_receipt(api, rewind.partition)
            done += min(rewind.again, (receipt.persisted if receipt is not None else 0) - rewind.events)
            if receipt is None or receipt.origin < rewind.committed_origin:
                behind.append(rewind.partition)
        on_progress(done, total)
        if not behind:
            return
        if time.monotonic() > deadline:
            raise ClusterUnavailableError(
                f"partitions {behind} have not caught up within {wait_s:g} s; does persist run for them? See its log"
            )
        await asyncio.sleep(REWIND_POLL.s)
