"""A partition is moved to a store on a disk that has no room, and away from an owner that goes on committing."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import UNSET
from msgspec.structs import replace
from virtual import Ground, in_virtual_time

from cluster.rewind import Rewinder
from cluster.testing.sim.world import CLUSTER
from contracts.errors import SettingsError, StoreFailedError
from contracts.hashing import MerkleFrontier
from contracts.receipts import (
    Receipt,
    ResumePoint,
    SealRecord,
    StoreEnd,
    decode_receipt,
    encode_receipt,
    first_receipt,
)
from contracts.settings import MIB
from contracts.statements import Signer
from contracts.subjects import RECEIPTS, publish_subject, receipt_subject, seal_subject
from stages.persist import rewind
from stages.persist.disk import LOCAL_STORE
from stages.persist.header import read_live_header
from stages.persist.moved import signed
from stages.persist.names import live_name
from stages.persist.storedir import Store, open_store

OWNER = "a" * 32


def last_receipt(ground: Ground) -> Receipt:
    message = ground.broker.streams[RECEIPTS].last_by_subject(receipt_subject(0))
    assert message is not None
    return decode_receipt(message.data)


def moving(tmp_path: Path, job: Callable[[Ground, Store], Awaitable[None]], *, signer: Signer | None = None) -> None:
    """Of three messages the first two are in a sealed shard of a store that is gone. `signer`: of its receipt."""

    async def prepared(ground: Ground) -> None:
        for _ in range(3):
            await ground.publish(publish_subject("clinic-1", "aac18039-54dd-5c5d-a12f-d0aaa1882a18"), b"{}")
        tree = MerkleFrontier()
        tree.extend([b"one", b"two"])
        resume = ResumePoint(frontier=tree.to_bytes(), duplicates=0, dead_lettered=0, closed=b"")
        size, root = tree.size, tree.root().hex()
        seal = SealRecord(
            partition=0, store=OWNER, shard=1, file="p000-1.h5", sha256="0" * 64, first_origin=1, last_origin=2,
            events=2, tree_size=size, root=root, sealed_ns=1, bytes=1, cluster=CLUSTER, resume=resume,
        )  # fmt: skip
        receipt = first_receipt(0, CLUSTER, OWNER, "w")
        ends = {OWNER: StoreEnd(shard=2, commits=0)}
        await ground.publish(seal_subject(0), encode_receipt(seal))
        receipt = replace(receipt, origin=2, persisted=size, root=root, ends=ends)
        await ground.publish(receipt_subject(0), encode_receipt(signed(receipt, signer)))
        await job(ground, open_store(tmp_path, CLUSTER, now_ns=1))

    in_virtual_time(prepared, shard_bytes=MIB)


def test_a_move_to_a_disk_without_room_for_a_shard_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def job(ground: Ground, store: Store) -> None:
        def full(*arguments: Any, **named: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(rewind, "create_shard", full)
            with pytest.raises(StoreFailedError, match="No space left"):
                await Rewinder(ground.api, store).move(0)
        assert last_receipt(ground).store == OWNER
        await Rewinder(ground.api, store).move(0)
        assert last_receipt(ground).ends[store.store_id] == StoreEnd(shard=2, commits=0, first=2)
        assert read_live_header(tmp_path / live_name(0, 2)).begins

    moving(tmp_path, job)
    assert not list(tmp_path.glob("*.tmp"))


def test_who_is_outrun_makes_the_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def job(ground: Ground, store: Store) -> None:
        made: list[Path] = []
        outrun = 2

        def noted(path: Path, *arguments: Any, **named: Any) -> None:
            made.append(path)
            create_shard(path, *arguments, **named)

        async def commits() -> None:
            await ground.publish(receipt_subject(0), encode_receipt(last_receipt(ground)))

        def between(*arguments: Any) -> None:
            nonlocal outrun
            if outrun:
                outrun -= 1
                ground.broker.loop.create_task(commits())

        create_shard = rewind.create_shard
        monkeypatch.setattr(rewind, "create_shard", noted)
        await Rewinder(ground.api, store, files=LOCAL_STORE._replace(forget_copies=between)).move(0)
        assert outrun == 0
        assert len(made) == 1
        assert read_live_header(tmp_path / live_name(0, 2)).begins

    moving(tmp_path, job)


def test_no_receipt_without_a_signature_follows_a_signed_one(tmp_path: Path) -> None:
    signer, other = (Signer(Ed25519PrivateKey.generate()) for _ in range(2))

    async def job(ground: Ground, store: Store) -> None:
        with pytest.raises(SettingsError, match=f"are signed with key {signer.public_key}, and this would not be"):
            await Rewinder(ground.api, store).move(0)
        assert last_receipt(ground).store == OWNER
        await Rewinder(ground.api, store, other).move(0)
        signature = last_receipt(ground).signature
        assert signature is not UNSET
        assert signature.key == other.public_key

    moving(tmp_path, job, signer=signer)


def refused(*arguments: Any) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_move_that_the_disk_breaks_off_says_that_rebuild_does_the_rest_and_it_does(tmp_path: Path) -> None:
    async def job(ground: Ground, store: Store) -> None:
        told = r"Input/output error.* then run `fictl rebuild`, which does the rest"
        with pytest.raises(StoreFailedError, match=told):
            await Rewinder(ground.api, store, files=LOCAL_STORE._replace(begin_at=refused)).move(0)
        assert last_receipt(ground).store == store.store_id
        assert await Rewinder(ground.api, store).rebuild(0) is not None
        assert read_live_header(tmp_path / live_name(0, 2)).begins

    moving(tmp_path, job)


def test_a_store_that_cannot_be_listed_is_not_restored_from_and_is_named(tmp_path: Path) -> None:
    async def job(ground: Ground) -> None:
        store = open_store(tmp_path, CLUSTER, now_ns=1)
        with pytest.raises(StoreFailedError, match=f"{tmp_path}: .*Input/output error"):
            await Rewinder(ground.api, store, files=LOCAL_STORE._replace(shards=refused)).restore(0)

    in_virtual_time(job)
