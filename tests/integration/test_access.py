"""Files for TLS and credentials: what is not what it should be is refused by the setting's name."""

from __future__ import annotations

import base64
import time
from pathlib import Path

import nkeys
import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from papers import Authority, Nkey, Operator

from contracts.errors import SettingsError
from contracts.settings import Settings
from stages.runtime.access import OPEN, Access, access_of
from stages.runtime.expiry import Paper, own_papers

JWT = "-----BEGIN NATS USER JWT-----\nabc\n------END NATS USER JWT------\n"


def test_without_files_nothing_is_read() -> None:
    assert access_of(Settings()) == OPEN
    assert OPEN.read() == (None, None)
    assert not OPEN.encrypted


def test_certificates_and_credentials_are_read_anew(tmp_path: Path) -> None:
    certificate, key = Authority(tmp_path, "a").sign("stage")
    both = tmp_path / "both.pem"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    creds = tmp_path / "user.creds"
    operator = Operator()
    read = []
    for name in ("first", "second"):
        creds.write_text(operator.credentials(name, 60).replace("\n", "\r\n" if name == "second" else "\n"))
        access = Access(str(tmp_path / "a-ca.pem"), str(both), creds_file=str(creds))
        assert access.encrypted
        papers = access.read()
        assert papers.tls is not None
        assert len(papers.tls.get_ca_certs()) == 1
        read.append(papers.credentials)
    assert read[0] != read[1]
    for own in read:
        assert own is not None
        assert own.jwt.count(b".") == 2
        public = nkeys.from_seed(bytearray(own.seed))
        assert public.verify(b"nonce", base64.b64decode(own.sign("nonce")))


def test_secrets_that_others_can_read_are_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificate, key = Authority(tmp_path, "a").sign("stage")
    both, seed = tmp_path / "both.pem", tmp_path / "user.nk"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    seed.write_bytes(Nkey(nkeys.PREFIX_BYTE_USER).seed)
    for file in (certificate, both, seed):
        file.chmod(0o644)
    key.chmod(0o600)
    for _ in range(2):
        Access(cert_file=str(certificate), key_file=str(key)).read()
        Access(cert_file=str(both), creds_file=str(seed)).read()
    told = "can be read by others than its owner; chmod 600 it"
    assert caplog.messages == [f"nats_cert_file {both} {told}", f"nats_creds_file {seed} {told}"]


def test_an_nkey_seed_alone_is_enough(tmp_path: Path) -> None:
    user = Nkey(nkeys.PREFIX_BYTE_USER)
    file = tmp_path / "user.nk"
    file.write_bytes(user.seed + b"\n")
    own = Access(creds_file=str(file)).read().credentials
    assert own is not None
    assert (own.jwt, own.public_nkey()) == (b"", user.public)


def test_what_is_not_what_it_should_be_is_refused_by_name(tmp_path: Path) -> None:
    certificate, key = Authority(tmp_path, "a").sign("stage")
    _, other = Authority(tmp_path, "b").sign("other")
    sealed, junk, empty = tmp_path / "sealed.pem", tmp_path / "junk", tmp_path / "empty"
    loaded = load_pem_private_key(key.read_bytes(), None)
    sealed.write_bytes(loaded.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))
    junk.write_bytes(b"\x00 junk")
    empty.write_bytes(b"")
    seed = Nkey(nkeys.PREFIX_BYTE_USER).seed.decode()
    broken = seed[:-3] + ("AAA" if seed[-3:] != "AAA" else "BBB")
    creds = {
        "only-jwt": JWT,
        "damaged": broken,
        "damaged-beside-jwt": f"{JWT}-----BEGIN USER NKEY SEED-----\n{broken}\n------END USER NKEY SEED------\n",
        "account-seed": Nkey(nkeys.PREFIX_BYTE_ACCOUNT).seed.decode(),
        "not-ascii": JWT.replace("JWT-----\n", "JWT-----\n\xa0", 1)
        + f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n",
        "cut": JWT[:30] + f"\n-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n",
    }
    for name, text in creds.items():
        (tmp_path / name).write_text(text)
    cases = [
        (Access(ca_file="/none.pem"), "nats_ca_file /none.pem: No such file"),
        (Access(ca_file=str(tmp_path)), "nats_ca_file"),
        *((Access(ca_file=str(file)), "nats_ca_file .* holds no certificate") for file in (junk, empty, key)),
        (Access(key_file=str(key)), "nats_key_file .* set nats_cert_file too"),
        (Access(cert_file="/none.pem"), "nats_cert_file /none.pem: No such file"),
        (Access(cert_file=str(certificate), key_file="/none.pem"), "nats_key_file /none.pem: No such file"),
        (Access(cert_file=str(certificate)), r"nats_key_file \(the same\): no certificate and its key"),
        *(
            (Access(cert_file=str(certificate), key_file=str(file)), "no certificate and its key")
            for file in (other, sealed, junk, empty)
        ),
        (Access(creds_file="/none.creds"), "nats_creds_file /none.creds: No such file"),
        *((Access(creds_file=str(tmp_path / name)), "nats_creds_file") for name in (*creds, "junk", "empty")),
    ]
    for access, words in cases:
        with pytest.raises(SettingsError, match=words):
            access.read()


def test_when_papers_are_to_be_renewed(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    certificate, key = old.sign("node", 86400)
    soon, _ = new.sign("other", 3600)
    both = tmp_path / "both.pem"
    both.write_bytes(soon.read_bytes() + certificate.read_bytes())
    credentials = tmp_path / "user.creds"
    credentials.touch(0o600)
    credentials.write_text(Operator().credentials("user", 7200))
    now_s = time.time()
    found = own_papers(Access(str(both), str(both), str(key), str(credentials)))
    left_s = {name: round((paper.ends_s - now_s) / 3600) for name, paper in found.items()}
    assert left_s == {"nats_ca_file": 24, "nats_cert_file": 1, "nats_creds_file": 2}
    assert abs(found["nats_creds_file"].due_s - now_s - 0.8 * 7200) < 60
    assert Paper(0, 365 * 86400).due_s == 351 * 86400
    credentials.write_bytes(Nkey(nkeys.PREFIX_BYTE_USER).seed)
    assert own_papers(Access(str(tmp_path / "none.pem"), creds_file=str(credentials))) == {}
