"""`fictl key new`, `fictl key public`: the key that persist signs with (setting `signing_key_file`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.common import print_lines

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The private key.", show_default=False)]


def new(file: FileArgument) -> None:
    """Makes an Ed25519 key in a new FILE that only its owner can read, and prints its public key.

    A file that is there is never replaced. Give the public key to whoever is to check proofs, and the file's name to
    persist as FI_SIGNING_KEY_FILE.

    Example: fictl key new /etc/fi/signing.pem > /etc/fi/signing.pub
    """
    from stages.persist.keys import create_key

    print_lines(create_key(file).public_key)


def public(file: FileArgument) -> None:
    """Prints the public key of the private key in FILE, 64 hex digits.

    Example: fictl key public /etc/fi/signing.pem
    """
    from stages.persist.keys import load_key

    print_lines(load_key(file).public_key)
