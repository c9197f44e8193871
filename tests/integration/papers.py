"""Makes what a secured cluster needs: certificates, nkeys, and JWTs of an operator, an account and its users."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import secrets
import time
from pathlib import Path
from typing import Any, Final

import nkeys
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_DAY_S: Final = 86400
_UNLIMITED: Final = dict.fromkeys(("subs", "conn", "leaf", "imports", "exports", "data", "payload"), -1)


class Authority:
    """Signs certificates for 127.0.0.1. `file` is its own."""

    def __init__(self, directory: Path, name: str) -> None:
        self.file = directory / f"{name}-ca.pem"
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        unsigned = _begin(self._name, self._name, self._key.public_key())
        unsigned = unsigned.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        unsigned = unsigned.add_extension(usage, critical=True)
        self._issuer = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        unsigned = unsigned.add_extension(self._issuer, critical=False)
        self.file.write_bytes(unsigned.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def sign(self, name: str, lasts_s: float = _DAY_S) -> tuple[Path, Path]:
        """A certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        unsigned = _begin(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), self._name, key.public_key(), lasts_s
        )
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        unsigned = unsigned.add_extension(address, critical=False)
        known = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(self._issuer)
        unsigned = unsigned.add_extension(known, critical=False)
        certificate, key_file = self._directory / f"{name}.pem", self._directory / f"{name}-key.pem"
        certificate.write_bytes(unsigned.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))
        key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        key_file.chmod(0o600)
        return certificate, key_file


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, lasts_s: float = _DAY_S
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    begin, end = (now + datetime.timedelta(seconds=after_s) for after_s in (-_DAY_S, lasts_s))
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(begin).not_valid_after(end)


class Nkey:
    """A new key. `kind` is one of `nkeys.PREFIX_BYTE_…`."""

    def __init__(self, kind: int) -> None:
        self.seed = bytes(nkeys.encode_seed(secrets.token_bytes(32), kind))
        self._pair = nkeys.from_seed(bytearray(self.seed))
        self.public = self._pair.public_key.decode()

    def token(self, subject: Nkey, name: str, nats: dict[str, Any], **claims: Any) -> str:
        """A JWT of `subject`, signed by this key."""
        body = {"jti": secrets.token_hex(8), "iat": int(time.time()), "iss": self.public, "sub": subject.public}
        body |= {"name": name, "nats": nats | {"version": 2}, **claims}
        text = ".".join(map(_part, ({"typ": "JWT", "alg": "ed25519-nkey"}, body)))
        return f"{text}.{_base64(self._pair.sign(text.encode()))}"


class Operator:
    """An operator with one account, whose users it lets in. `config` is what a server needs to know."""

    def __init__(self) -> None:
        own, self._account = Nkey(nkeys.PREFIX_BYTE_OPERATOR), Nkey(nkeys.PREFIX_BYTE_ACCOUNT)
        account = own.token(self._account, "hospital", {"type": "account", "limits": _UNLIMITED | {"wildcards": True}})
        self.config = (
            f"operator: {own.token(own, 'operator', {'type': 'operator'})}\n"
            f"resolver: MEMORY\nresolver_preload {{ {self._account.public}: {account} }}\n"
        )

    def credentials(self, name: str, lasts_s: float) -> str:
        """A new user's credentials, in the form of `nsc generate creds`."""
        user = Nkey(nkeys.PREFIX_BYTE_USER)
        limits = dict.fromkeys(("subs", "data", "payload"), -1)
        ends = int(time.time() + lasts_s)
        token = self._account.token(user, name, {"type": "user", "pub": {}, "sub": {}, **limits}, exp=ends)
        return (
            f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
        )


def _part(value: dict[str, Any]) -> str:
    return _base64(json.dumps(value).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
