"""Receipts that the cluster lost: what a store can still say, and why nobody begins anew meanwhile.

Partitions begin while nothing has left `FI_RECEIPTS` or `FI_EVENTS` yet: the first persister then keeps the place of
all of them. Whatever has no receipt and no such place later has lost its receipts: it waits until `fictl partitions
restore` has written where its store goes on. So it is in a stream that `fictl cluster apply` made again, and marked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from hashlib import sha256
from pathlib import Path

import msgspec
from msgspec import UNSET

from contracts.errors import FencedError, NotOursError, ShardCorruptError, ShardError, WireFormatError
from contracts.events import decode_event, stored_ns_at
from contracts.hashing import MerkleFrontier
from contracts.lifecycle import ClosedConsultations
from contracts.receipts import Receipt, ResumePoint, encode_receipt, first_receipt, place_kept
from contracts.rules import CLOSED_REMEMBERED_MAX
from contracts.subjects import EVENTS, RECEIPTS, receipt_subject
from stages.persist.files import sync_path
from stages.persist.header import read_live_header, read_sealed_header
from stages.persist.live import LiveReader
from stages.persist.names import FIRST_SHARD, ShardFile
from stages.persist.records import kept_record
from stages.persist.resume import resume_after
from stages.persist.rewind import Damage, Place
from stages.persist.rows import encode_row
from stages.persist.seal import events_of_sealed
from stages.persist.storedir import Store, disk_of
from stages.runtime.api import Api
from stages.runtime.checkpoint import last_receipt
from stages.runtime.facts import META_RECEIPTS_LOST
from stages.runtime.tasks import run_blocking
from stages.runtime.writer import FencedWriter


class _Config(msgspec.Struct):
    metadata: dict[str, str] = {}


class _State(msgspec.Struct, frozen=True):
    messages: int = 0
    last_seq: int = 0


class _Info(msgspec.Struct):
    config: _Config
    state: _State = _State()


async def receipts_lost(api: Api) -> str:
    """Since when `FI_RECEIPTS` is another than the one that the cluster began with, RFC 3339; empty if it is not.

    Raises:
        RequestRefusedError: there is none.
        ClusterUnavailableError: as `Api.request`.
    """
    return (await _info(api, RECEIPTS)).config.metadata.get(META_RECEIPTS_LOST, "")


async def _info(api: Api, stream: str) -> _Info:
    return await api.ask(stream, f"$JS.API.STREAM.INFO.{stream}", b"", _Info)


async def _why_not_new(api: Api) -> str:
    """By what the cluster shows that partitions without receipts may have had some; empty where it cannot be."""
    receipts, events = await _info(api, RECEIPTS), await _info(api, EVENTS)
    if since := receipts.config.metadata.get(META_RECEIPTS_LOST, ""):
        return f"{RECEIPTS} was made again {since}"
    gone = [
        name for name, info in ((RECEIPTS, receipts), (EVENTS, events)) if info.state.messages < info.state.last_seq
    ]
    return f"it has none, and messages are gone from {' and '.join(gone)}" if gone else ""


async def keep_places(api: Api, partitions: int, cluster: str, nonce: str) -> None:
    """For a persister that starts: in a new cluster, keeps the place of every partition that nobody owns yet.

    Args:
        partitions: how many there are.
        cluster: its id.
        nonce: of this session.
    Raises as `receipts_lost`.
    """
    if await _why_not_new(api):
        return
    for partition in range(partitions):
        # What cannot be read was kept, and its lane says so.
        with suppress(FencedError, WireFormatError):
            _, seq = await last_receipt(api, partition)
            if not seq:
                writer = FencedWriter(api, RECEIPTS, receipt_subject(partition), nonce)
                await writer.publish(encode_receipt(place_kept(partition, cluster, nonce)), "place")


async def begin(
    api: Api, partition: int, store: Store, nonce: str, files: Callable[[Path, int], object], *, kept: bool
) -> Receipt:
    """What a partition begins with that has no receipt.

    Args:
        files: gives something of the partition's files in a directory, if there are any; blocking.
        kept: its place was kept.

    Raises:
        NotOursError: it may have had some.
        StoreFailedError: the store cannot be read.
    As `receipts_lost` besides.
    """
    # A claim that says "nothing" would be a receipt, and stand in the way of what the shards say.
    with disk_of(store):
        found = await run_blocking(files, store.directory, partition)
    if found:
        raise NotOursError(
            f"the receipts of partition {partition} were lost: {store.directory} has shards of it, and {RECEIPTS} has "
            f"no receipt; run `fictl partitions restore {partition}` there"
        )
    if not kept and (why := await _why_not_new(api)):
        raise NotOursError(
            f"the receipts of partition {partition} were lost ({why}); run `fictl partitions restore {partition}` on "
            "the node whose store has its shards"
        )
    return first_receipt(partition, store.cluster_id, store.store_id, nonce)


def last_place(files: Sequence[ShardFile], *, unshown: bool = False) -> tuple[Place, Damage | None]:
    """Where a partition goes on by its shards alone, and what is wrong with those after it (None: there are none).

    Reads and hashes every shard. A live one counts as far as readers were shown it: what a receipt had accepted.

    Args:
        files: the partition's, by number.
        unshown: count every whole commit of a live one, and make it durable: nothing else can give it again.

    Raises:
        ShardError: the first goes on from the shards of another store, of which nothing here tells.
        OSError: the store cannot be read.
    """
    if files:
        first = files[0].path
        if (read_sealed_header if files[0].sealed else read_live_header)(first).begins:
            raise ShardError(
                f"{first}: goes on from the shards of another store, and only the lost receipts said from which; "
                f"restore {RECEIPTS} from a backup"
            )
    place = Place(0, FIRST_SHARD, 0, MerkleFrontier(), 0, 0, b"")
    for file in files:
        try:
            if file.shard != place.shard:
                raise ShardCorruptError(f"{file.path.parent}: shard {place.shard} is missing")
            is_full = file is not files[-1]
            place = _after_sealed(place, file) if file.sealed else _after_live(place, file, is_full, unshown=unshown)
        except (ShardError, OSError) as error:
            return place, Damage.by(file, error)
    return place, None


def _after_sealed(place: Place, file: ShardFile) -> Place:
    info = events_of_sealed(file.path)
    header = info.header
    if (header.tree_size_before, header.frontier_before) != (place.tree.size, place.tree.to_bytes()):
        raise ShardCorruptError(f"{file.path}: does not go on from the shard before it")
    record = kept_record(file.path)
    if record is not None and record.sha256 != info.sha256:
        record = None
    if record is not None and record.resume is not UNSET:
        point = record.resume
    else:
        before = ResumePoint(
            frontier=place.tree.to_bytes(),
            duplicates=place.duplicates,
            dead_lettered=place.dead_lettered,
            closed=place.closed,
        )
        point = resume_after(before, file.path)
    return Place(
        header.last_origin,
        file.shard + 1,
        0,
        info.frontier,
        point.duplicates,
        point.dead_lettered,
        point.closed,
        place.rows,
        point.stored_ns,
        place.signature if record is None else record.signature,
    )


def _after_live(place: Place, file: ShardFile, is_full: bool, *, unshown: bool) -> Place:
    """`is_full`: another follows it, so every commit in it was accepted. `unshown`: as for `last_place`."""
    origin, tree, event = place.origin, place.tree.copy(), None
    duplicates, dead_lettered = place.duplicates, place.dead_lettered
    closed = ClosedConsultations(place.closed, CLOSED_REMEMBERED_MAX)
    if unshown:
        sync_path(file.path)
    with closing(LiveReader(file.path)) as reader:
        shown, whole, digest = reader.watermark(), 0, sha256()
        for row, records in reader.scan(None if is_full or unshown else shown):
            digest.update(encode_row(row))
            tree.extend(records)
            for event in map(decode_event, records):
                closed.note(event)
            origin, whole = row.origin, row.ordinal
            duplicates += row.duplicates
            dead_lettered += row.dead_lettered
    if whole < shown:
        raise ShardCorruptError(f"{file.path}: only {whole} of {shown} committed rows are whole")
    shard, commits = (file.shard + 1, 0) if is_full else (file.shard, whole)
    rows = {**place.rows, file.shard: digest.hexdigest()} if whole else place.rows
    told = rows, stored_ns_at(origin, event) if whole else place.stored_ns, place.signature
    return Place(origin, shard, commits, tree, duplicates, dead_lettered, closed.packed, *told)
