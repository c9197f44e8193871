"""Keys are files, signatures are over statements, and evidence that was changed anywhere is refused."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from contracts.errors import ProofError, SettingsError
from contracts.events import decode_event, encode_event
from contracts.evidence import InclusionProof, TreeHead, check_evidence, decode_evidence, encode_evidence
from contracts.hashing import leaf_hash
from contracts.receipts import Receipt, Signature, StoreEnd, decode_receipt, encode_receipt
from contracts.statements import Signer, check_signature, statement_bytes, statement_of
from stages.persist.keys import create_key, load_key, read_public_key
from stages.persist.moved import signed

GOLDEN = Path(__file__).parents[1] / "conformance" / "golden"
SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
RECEIPT = Receipt(
    partition=1,
    cluster="c",
    writer="w",
    node="n",
    store="s",
    ends={"s": StoreEnd(shard=1, commits=2)},
    origin=9,
    trail=(1, 2, 3),
    persisted=7,
    duplicates=1,
    dead_lettered=1,
    root="ab" * 32,
    closed=b"",
    committed_ns=5,
)


def test_a_new_key_is_its_owners_alone_and_never_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    made = create_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(SettingsError, match=r"key\.pem: is there already"):
        create_key(path)
    assert path.read_bytes() == before
    assert load_key(path).public_key == made.public_key


def test_a_key_that_the_disk_does_not_take_leaves_no_file_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key.pem"

    def refuse(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="No space left") as refused:
            create_key(path)
    assert refused.value.filename == str(path)
    assert create_key(path).public_key == load_key(path).public_key


def test_a_key_others_can_read_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "key.pem"
    create_key(path)
    load_key(path)
    assert caplog.messages == []
    path.chmod(0o640)
    load_key(path)
    assert "can be read by others" in caplog.text


@pytest.mark.parametrize(
    "content", [None, b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_key_file_that_is_none_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "key.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"signing key .*key\.pem"):
        load_key(path)


def test_a_public_key_is_read_as_digits_or_from_a_file(tmp_path: Path) -> None:
    private, pem, digits = tmp_path / "key.pem", tmp_path / "pub.pem", tmp_path / "pub.txt"
    public = create_key(private).public_key
    digits.write_text(f"{public}\n")
    pem.write_bytes(
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).public_bytes(
            Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        )
    )
    assert {read_public_key(text) for text in (public, public.upper(), str(digits), str(pem))} == {public}
    for text in ("ab", str(private), str(tmp_path / "missing")):
        with pytest.raises(SettingsError, match="public key"):
            read_public_key(text)


def test_a_signature_travels_with_the_receipt_and_covers_what_an_auditor_relies_on() -> None:
    signed = decode_receipt(encode_receipt(SIGNER.sign(RECEIPT)))
    assert isinstance(signed.signature, Signature)
    check_signature(statement_of(signed), signed.signature, [SIGNER.public_key])
    assert json.loads(statement_bytes(statement_of(signed)))["v"] == "receipt-statement.1"
    changes: dict[str, Any] = {
        "partition": 2, "cluster": "d", "store": "t", "origin": 8, "persisted": 6, "duplicates": 2,
        "dead_lettered": 0, "root": "ac" * 32, "committed_ns": 6, "takeover": True,
    }  # fmt: skip
    for name, value in changes.items():
        changed = msgspec.structs.replace(signed, **{name: value})
        with pytest.raises(ProofError, match="not over what it states"):
            check_signature(statement_of(changed), signed.signature)


def test_who_goes_on_without_the_key_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    signer = Signer(Ed25519PrivateKey.generate())
    before = signed(RECEIPT, signer)
    after = signed(before, None)
    assert after.signature is msgspec.UNSET
    (record,) = caplog.records
    assert f"partition 1: receipts were signed with key {signer.public_key} and no longer are" in record.getMessage()
    signed(after, None)
    assert len(caplog.records) == 1


def test_a_signature_by_another_key_or_by_none_is_refused(tmp_path: Path) -> None:
    other = create_key(tmp_path / "other.pem")
    signature = SIGNER.sign(RECEIPT).signature
    assert isinstance(signature, Signature)
    statement = statement_of(RECEIPT)
    check_signature(statement, signature, [other.public_key, SIGNER.public_key])
    with pytest.raises(ProofError, match="not the one given"):
        check_signature(statement, signature, [other.public_key])
    for key in ("ab", "x" * 64):
        with pytest.raises(ProofError, match="is not a public key"):
            check_signature(statement, Signature(key, signature.value))
    with pytest.raises(ProofError, match="not by key"):
        check_signature(statement, Signature(other.public_key, signature.value))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [place for key, inner in value.items() for place in places(inner, (*path, key))]
    if isinstance(value, list):
        return [place for key, inner in enumerate(value) for place in places(inner, (*path, key))]
    return [path]


def other_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if value == "00010203-0405-0607-0809-0a0b0c0d0e0f":
        return "00010203-0405-0607-0809-0a0b0c0d0e0e"
    middle = len(value) // 2
    return value[:middle] + ("0" if value[middle] != "0" else "1") + value[middle + 1 :]


@pytest.mark.parametrize("name", ["inclusion-proof.1.json", "consistency-proof.1.json"])
def test_evidence_with_any_field_changed_or_left_out_is_refused(name: str) -> None:
    whole = json.loads((GOLDEN / name).read_bytes())
    keys = [SIGNER.public_key]
    check_evidence(decode_evidence(json.dumps(whole).encode()), keys)
    for place in places(whole):
        for how in ("change", "drop"):
            spoiled = json.loads(json.dumps(whole))
            target = spoiled
            for key in place[:-1]:
                target = target[key]
            if how == "drop":
                del target[place[-1]]
            else:
                target[place[-1]] = other_value(target[place[-1]])
            with pytest.raises(ProofError):
                check_evidence(decode_evidence(json.dumps(spoiled).encode()), keys)


def test_an_unsigned_root_satisfies_nobody_who_gave_a_key() -> None:
    proof = decode_evidence((GOLDEN / "inclusion-proof.1.json").read_bytes())
    assert hasattr(proof, "head")
    unsigned = msgspec.structs.replace(proof, head=msgspec.structs.replace(proof.head, signature=None))
    check_evidence(unsigned)
    with pytest.raises(ProofError, match="is not signed"):
        check_evidence(unsigned, [SIGNER.public_key])
    assert decode_evidence(encode_evidence(unsigned)) == unsigned


def test_a_record_whose_audit_hash_is_not_its_payloads_is_refused_though_the_path_leads_to_the_root() -> None:
    proof = decode_evidence((GOLDEN / "inclusion-proof.1.json").read_bytes())
    assert isinstance(proof, InclusionProof)
    event = decode_event(proof.record)

    def alone(audit_hash: bytes) -> InclusionProof:
        """A proof of the event as the only one of its tree, by somebody who could write what he liked."""
        record = encode_event(msgspec.structs.replace(event, audit_hash=audit_hash))
        head = TreeHead(tree_size=1, root=leaf_hash(record).hex())
        return msgspec.structs.replace(proof, record=record, index=0, path=(), head=head)

    check_evidence(alone(event.audit_hash))
    with pytest.raises(ProofError, match="not to its audit hash"):
        check_evidence(alone(bytes(32)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_key_without_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    create_key(path)
    path.chmod(0)
    with pytest.raises(SettingsError, match="cannot be read: Permission denied"):
        load_key(path)
