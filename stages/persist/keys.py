"""Signing keys as files: PKCS #8 PEM without a passphrase, readable by its owner only; `openssl pkey` reads it too."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from contracts.errors import SettingsError
from contracts.statements import Signer
from stages.persist.files import close_file, read_small, sync_dir, sync_file, told_of, write_all_at

log = logging.getLogger(__name__)

_OTHERS = 0o077
_HEX_DIGITS = 64


def create_key(path: Path) -> Signer:
    """A new key in a new file, durable on return.

    Raises:
        SettingsError: there is a file already; it is left as it is.
        OSError: the disk refused.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SettingsError(f"{path}: is there already and is not replaced; choose another name") from None
    try:
        with told_of(path):
            write_all_at(fd, pem, 0)
            sync_file(fd)
    except BaseException:
        path.unlink()
        raise
    finally:
        close_file(fd)
    sync_dir(path.parent)
    return Signer(key)


def load_key(path: Path) -> Signer:
    """The key in `path`. Warns when others than its owner can read it.

    Raises:
        SettingsError: it cannot be read, or is not such a key.
    """
    try:
        if path.stat().st_mode & _OTHERS:
            log.warning("signing key %s can be read by others than its owner; chmod 600 it", path)
        key = serialization.load_pem_private_key(read_small(path), None)
    except OSError as error:
        raise SettingsError(f"signing key {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SettingsError(
            f"signing key {path} is not an unencrypted private key in PEM; see `fictl key new`"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SettingsError(f"signing key {path} is not an Ed25519 key; see `fictl key new`")
    return Signer(key)


def read_public_key(text: str) -> str:
    """A public key as 64 hex digits, from those digits, or from a file that holds them or is a public key in PEM.

    Raises:
        SettingsError: it is neither.
    """
    if _is_hex_key(text):
        return text.lower()
    try:
        data = read_small(Path(text))
    except OSError as error:
        raise SettingsError(
            f"public key {text}: neither {_HEX_DIGITS} hex digits nor a file that can be read ({error.strerror})"
        ) from error
    written = data.decode(errors="replace").strip()
    if _is_hex_key(written):
        return written.lower()
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise SettingsError(f"public key {text}: holds no Ed25519 public key; `fictl key public` prints one")
    return key.public_bytes_raw().hex()


def _is_hex_key(text: str) -> bool:
    return len(text) == _HEX_DIGITS and all(digit in "0123456789abcdefABCDEF" for digit in text)
