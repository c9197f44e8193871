"""Letting go of a partition that another store took over."""

from __future__ import annotations

import logging
from collections.abc import Callable
from operator import methodcaller

import msgspec
from msgspec import UNSET

from contracts.errors import FencedError, NotOursError, SettingsError, ShardError, StoreFailedError, WireFormatError
from contracts.receipts import Receipt, encode_receipt
from contracts.statements import Record, Signer
from contracts.subjects import RECEIPTS, receipt_subject
from stages.persist.aside import given_up, prepare_aside, set_aside
from stages.persist.storedir import Store, disk_of, lock_partition
from stages.runtime.api import Api
from stages.runtime.checkpoint import last_receipt
from stages.runtime.tasks import run_blocking
from stages.runtime.writer import FencedWriter

log = logging.getLogger(__name__)


def signed(record: Record, signer: Signer | None) -> Record:
    """The record with the signer's signature; without one, with none (a receipt follows from the one before)."""
    if signer is not None:
        return signer.sign(record)
    if record.signature is not UNSET:
        log.warning(
            "partition %d: receipts were signed with key %s and no longer are: signing_key_file is empty",
            record.partition,
            record.signature.key,
        )
    return msgspec.structs.replace(record, signature=UNSET)


def check_signer(last: Receipt, signer: Signer | None) -> None:
    """Holds that what follows a signed receipt will be signed: an auditor takes what is not for forged, for good.

    Raises:
        SettingsError: it will not.
    """
    if signer is None and last.signature is not UNSET:
        raise SettingsError(
            f"the receipts of partition {last.partition} are signed with key {last.signature.key}, and this would not "
            "be: name the key file in FI_SIGNING_KEY_FILE (`fictl key new` makes another, if that one is lost)"
        )


async def let_go_of_moved(
    api: Api, store: Store, partitions: int, nonce: str, signer: Signer | None, clock_ns: Callable[[], int]
) -> None:
    """For a process that starts: lets go of what other stores took over from this one while nobody was here.

    A partition that cannot be let go of is told of and left as it is, until the next start; others do not wait for it.
    """
    for partition in range(partitions):
        try:
            last, seq = await last_receipt(api, partition)
        except WireFormatError:
            # Its lane says so.
            continue
        if last is None or last.store == store.store_id or store.store_id not in last.ends:
            continue
        writer = FencedWriter(api, RECEIPTS, receipt_subject(partition), nonce)
        writer.expected_seq = seq
        try:
            lock = await run_blocking(lock_partition, store, partition, undo=methodcaller("close"))
            try:
                await let_go(store, last, writer, nonce, signer, clock_ns)
            finally:
                lock.close()
        except (NotOursError, FencedError) as error:
            log.info("partition %d is let go of another time: %s", partition, error)
        except (ShardError, StoreFailedError) as error:
            log.error("partition %d, which store %s has now, is not let go of: %s", partition, last.store, error)


async def let_go(
    store: Store,
    last: Receipt,
    writer: FencedWriter,
    nonce: str,
    signer: Signer | None,
    clock_ns: Callable[[], int],
) -> None:
    """The partition was taken by another store: what that one did not accept of our files is moved aside.

    What was read may be stale. So the owner's receipt is first repeated, fenced: only that shows that it is the last
    one. The owner sees a stranger's receipt, and takes over again: it must not come of a move that cannot be made.

    Raises:
        FencedError: it was stale.
        ShardError, StoreFailedError: the files cannot be moved aside; the owner is left alone.
    """
    partition = last.partition
    end = last.ends.get(store.store_id)
    if end is None:
        return
    with disk_of(store):
        files = await run_blocking(given_up, store, partition, end)
        if not files:
            return
        await run_blocking(prepare_aside, store, files, end)
    witness = signed(msgspec.structs.replace(last, writer=nonce, takeover=True), signer)
    await writer.publish(encode_receipt(witness), f"witness/{last.origin}")
    with disk_of(store):
        moved = await run_blocking(set_aside, store, files, end, clock_ns())
    for path in moved:
        log.warning(
            "persist partition %d: store %s has it now and made its end again; given up: %s",
            partition,
            last.store,
            path,
        )
