"""Without the cluster, the records beside sealed shards are held against them, and a public key against the records."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from shard_maker import PartitionMaker
from verifying import verify_here
from witnessed import SIGNER, Witnessed, events_of

from contracts.receipts import SealRecord, encode_receipt
from contracts.statements import Signer
from stages.persist.names import live_name
from stages.persist.records import keep_record, kept_record, record_path
from stages.persist.verify import verify_store

KEYS = [SIGNER.public_key]


@pytest.fixture
def honest(tmp_path: Path) -> Witnessed:
    maker = Witnessed(tmp_path / "honest")
    maker.fill(*events_of(maker))
    return maker


@pytest.fixture
def forged(honest: Witnessed, tmp_path: Path) -> Path:
    """The same store with one event changed, laid down anew: every checksum in it is right. It has no records."""
    path = tmp_path / "forged"
    path.mkdir()
    shutil.copy(honest.store.directory / "store.json", path)
    maker = Witnessed(path)
    commits, origins = events_of(PartitionMaker(honest.store, 3))
    commits[1][2] = msgspec.structs.replace(commits[1][2], site="elsewhere")
    maker.fill(commits, origins)
    for shard in sealed_in(path):
        record_path(shard).unlink()
    return path


def sealed_in(store: Path) -> list[Path]:
    return sorted(path for path in store.glob("p003-*.h5") if not path.name.endswith(".live.h5"))


def rewrite(shard: Path, record: SealRecord) -> None:
    record_path(shard).write_bytes(encode_receipt(record))


def told(store: Path, trusted: list[str] = KEYS) -> str:
    return "\n".join(f"{one.shard}: {one.where}: {one.what}" for one in verify_here(store, trusted=trusted).problems)


def test_an_honest_store_agrees_with_the_records_beside_it(honest: Witnessed) -> None:
    report = verify_store(honest.store.directory, trusted=KEYS)
    assert (report.problems, report.seal_records, report.signed_records) == ([], 2, 2)


def test_a_forged_store_agrees_with_itself_but_not_with_a_record_or_a_key(honest: Witnessed, forged: Path) -> None:
    assert told(forged, []) == ""
    first, second = sealed_in(forged)
    for shard in (first, second):
        assert f"{shard.name}: seal record: {shard.name}.seal.json is missing: nobody vouches for the file" in told(
            forged
        )
    for shard, record in zip((first, second), honest.seals, strict=True):
        rewrite(shard, record)
    for trusted in ([], KEYS):
        text = told(forged, trusted)
        assert (
            f"{first.name}: seal record: {first.name}.seal.json is of a file with SHA-256 {honest.seals[0].sha256}"
            in text
        )
        assert f"{second.name}: seal record" in text


def test_a_record_that_is_not_signed_by_the_key_is_named(honest: Witnessed) -> None:
    store = honest.store.directory
    first, second = sealed_in(store)
    stranger = Signer(Ed25519PrivateKey.generate())
    rewrite(second, stranger.sign(honest.seals[1]))
    assert f"{second.name}.seal.json: it is signed with key {stranger.public_key}, which is not the one" in told(store)
    assert told(store, []) == ""
    rewrite(second, msgspec.structs.replace(honest.seals[1], events=1))
    assert "its signature is not over what it states" in told(store, [])
    rewrite(second, msgspec.structs.replace(honest.seals[1], signature=msgspec.UNSET))
    assert f"{second.name}.seal.json: is not signed" in told(store)
    rewrite(first, msgspec.structs.replace(honest.seals[0], signature=msgspec.UNSET))
    assert "no record is signed by a key given, nor by any other" in told(store)
    # A key that came later vouches, by its roots, for what was sealed before.
    rewrite(second, honest.seals[1])
    assert told(store) == told(store, []) == ""
    record_path(second).write_bytes(b"{")
    assert f"{second.name}.seal.json cannot be read (not a seal record: " in told(store, [])


def test_after_the_key_was_changed_the_new_one_alone_vouches_for_all_before(honest: Witnessed) -> None:
    store, later = honest.store.directory, Signer(Ed25519PrivateKey.generate())
    first, second = sealed_in(store)
    rewrite(second, later.sign(honest.seals[1]))
    for trusted in ([later.public_key], [SIGNER.public_key, later.public_key]):
        assert told(store, trusted) == ""
    # Who has the old key alone, as one that was stolen, adds nothing after the new one, and is no longer believed.
    assert f"{second.name}.seal.json: it is signed with key {later.public_key}, which is not the one" in told(store)
    rewrite(first, later.sign(honest.seals[0]))
    rewrite(second, honest.seals[1])
    assert f"it is signed with key {SIGNER.public_key}, which is not" in told(store, [later.public_key])
    rewrite(first, honest.seals[0])
    assert told(store, [later.public_key]) == (
        f"all shards: seal record: no record is signed by a key given, but by {SIGNER.public_key}"
    )
    # What it signed must be what it signed all the same.
    rewrite(second, later.sign(honest.seals[1]))
    rewrite(first, msgspec.structs.replace(honest.seals[0], sealed_ns=7))
    assert f"{first.name}.seal.json: its signature is not over what it states" in told(store, [later.public_key])


def test_a_shard_that_is_just_being_sealed_needs_no_record_yet(honest: Witnessed) -> None:
    store = honest.store.directory
    first, second = sealed_in(store)
    record_path(second).unlink()
    live = store / live_name(3, 2)
    live.touch()
    assert told(store) == ""
    live.unlink()
    assert f"{second.name}.seal.json is missing" in told(store)
    # Only the newest is ever just being sealed.
    keep_record(second, honest.seals[1])
    record_path(first).unlink()
    (store / live_name(3, 1)).touch()
    assert f"{first.name}.seal.json is missing" in told(store)


def test_a_record_of_a_file_that_had_the_name_before_is_replaced(honest: Witnessed) -> None:
    shard = sealed_in(honest.store.directory)[1]
    again = SIGNER.sign(msgspec.structs.replace(honest.seals[1], sha256="ab" * 32, sealed_ns=7))
    keep_record(shard, again)
    assert kept_record(shard) == again
    before = record_path(shard).stat().st_ino
    keep_record(shard, again)
    assert record_path(shard).stat().st_ino == before
