"""How a process knows the servers, and shows them who it is: TLS files and credentials.

They are read anew for every connection, so that renewed ones serve from the next reconnect on.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import ssl
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from contracts.errors import SettingsError
from contracts.settings import Settings

log = logging.getLogger(__name__)

_OTHERS: Final = 0o077
_JWT: Final = re.compile(rb"-+BEGIN NATS USER JWT-+\s+([\w.=-]+)\s+-+END")
_SEED: Final = re.compile(rb"(?:-+BEGIN USER NKEY SEED-+\s+|\A\s*)(SU[A-Z2-7]+)\s*(?:-+END|\Z)")

_SEED_BYTES: Final = 32


class Credentials(NamedTuple):
    """Of a user: `jwt` is empty for a user that the servers know by the public half of its nkey alone."""

    jwt: bytes
    seed: bytes

    def public_nkey(self) -> str:
        """Of the user, as servers have it in their configuration."""
        import nkeys

        return str(nkeys.from_seed(bytearray(self.seed)).public_key.decode())

    def sign(self, nonce: str) -> bytes:
        """What a server asks for: its nonce, signed."""
        import nkeys

        return base64.b64encode(nkeys.from_seed(bytearray(self.seed)).sign(nonce.encode()))


class Papers(NamedTuple):
    """What an `Access` names, as it is now."""

    tls: ssl.SSLContext | None
    credentials: Credentials | None


class Access(msgspec.Struct, frozen=True):
    """Names of files; empty where there is none.

    Attributes:
        ca_file: certificates, as PEM, that sign the servers'. Empty: those that the system trusts.
        cert_file: our own certificate, and what signs it, as PEM.
        key_file: its key, without a passphrase. Empty: it stands in `cert_file`.
        creds_file: a user's JWT and nkey seed, as `nsc` writes them, or an nkey seed alone.
    """

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    creds_file: str = ""

    @property
    def encrypted(self) -> bool:
        """True when files for TLS are named: then nothing is said to a server that does not speak it."""
        return bool(self.ca_file or self.cert_file or self.key_file)

    def read(self) -> Papers:
        """Reads all files. Blocks.

        Raises:
            SettingsError: a file cannot be read, or is not what it should be; names the setting.
        """
        return Papers(self._read_tls() if self.encrypted else None, self._read_credentials())

    def _read_tls(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ca_file or None)
        except ssl.SSLError as error:
            raise SettingsError(f"nats_ca_file {self.ca_file}: holds no certificate as PEM") from error
        except OSError as error:
            raise SettingsError(f"nats_ca_file {self.ca_file}: {error.strerror}") from error
        if self.key_file and not self.cert_file:
            raise SettingsError(f"nats_key_file {self.key_file}: set nats_cert_file too, the certificate of this key")
        if self.cert_file:
            _read("nats_cert_file", self.cert_file, secret=not self.key_file)
            if self.key_file:
                _read("nats_key_file", self.key_file, secret=True)
            try:
                # Without a password to give, OpenSSL would ask for it on the terminal.
                context.load_cert_chain(self.cert_file, self.key_file or None, password="")
            except (ssl.SSLError, OSError, ValueError) as error:
                where = f"nats_cert_file {self.cert_file}, nats_key_file {self.key_file or '(the same)'}"
                raise SettingsError(
                    f"{where}: no certificate and its key as PEM, without a passphrase ({error})"
                ) from error
        return context

    def _read_credentials(self) -> Credentials | None:
        if not self.creds_file:
            return None
        data = _read("nats_creds_file", self.creds_file, secret=True)
        jwt, seed = _JWT.search(data), _SEED.search(data)
        if seed is None or (jwt is None and b"JWT" in data):
            raise SettingsError(
                f"nats_creds_file {self.creds_file}: holds neither a user's JWT and nkey seed, as `nsc generate creds` "
                "writes them, nor a user's nkey seed alone"
            )
        if not _is_whole(seed[1]):
            raise SettingsError(f"nats_creds_file {self.creds_file}: its nkey seed is damaged")
        return Credentials(b"" if jwt is None else jwt[1], seed[1])


OPEN: Final = Access()
"""Neither TLS files nor credentials: what a server's URL says is all."""


class Servers(NamedTuple):
    """Client URLs of a cluster's servers, and how they are spoken to."""

    urls: tuple[str, ...]
    access: Access = OPEN


def access_of(settings: Settings) -> Access:
    """The files that `settings` name."""
    return Access(settings.nats_ca_file, settings.nats_cert_file, settings.nats_key_file, settings.nats_creds_file)


@cache
def _warn_once(text: str) -> None:
    """The files are read for each connection; what is wrong with them stays the same."""
    log.warning("%s", text)


def _is_whole(seed: bytes) -> bool:
    """True for a seed whose check sum is right, which `nkeys` writes and does not look at."""
    import nkeys

    try:
        prefix, raw = nkeys.decode_seed(seed)
        return len(raw) == _SEED_BYTES and bytes(nkeys.encode_seed(raw, prefix)) == seed
    except (nkeys.NkeysError, ValueError):
        return False


def _read(name: str, file: str, *, secret: bool = False) -> bytes:
    try:
        with Path(file).open("rb") as opened:
            if secret and os.fstat(opened.fileno()).st_mode & _OTHERS:
                _warn_once(f"{name} {file} can be read by others than its owner; chmod 600 it")
            return opened.read()
    except OSError as error:
        raise SettingsError(f"{name} {file}: {error.strerror}") from error
