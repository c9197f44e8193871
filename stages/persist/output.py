"""Files that commands write for people: never in the place of one of a store's own, and whole or not at all."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from contracts.errors import DefiniteError, SettingsError
from stages.persist.files import publish_file, write_new_file
from stages.persist.names import tmp_path
from stages.persist.storedir import STORE_FILE

_STORE_NAMES = re.compile(r"p\d{3,4}[-.].*|(store|backup)\..*", re.ASCII)


class OutputError(DefiniteError):
    """A file was not written; nothing is left of it. The message says why and what to do."""


def check_place(output: Path) -> None:
    """Holds that a file may be at `output`: in a directory, under no name that a store uses. Raises `SettingsError`."""
    if not output.parent.is_dir():
        raise SettingsError(f"{output}: there is no directory {output.parent}; make it first, or choose another place")
    place = output.resolve()
    if _STORE_NAMES.fullmatch(place.name) and (place.parent / STORE_FILE).exists():
        raise SettingsError(f"{output}: is a name that the store itself uses; choose another")


def check_output(output: Path) -> None:
    """Holds that a file may be made at `output`, or replaced there. Raises `SettingsError`."""
    check_place(output)
    if output.is_dir():
        raise SettingsError(f"{output}: is a directory; name a file in it")
    # What is there is replaced: a link, pipe or device would be gone, and whoever reads it would get nothing.
    if output.is_symlink() or (output.exists() and not output.is_file()):
        raise SettingsError(f"{output}: is not a regular file; choose another place, or leave --output out for stdout")


def write_output(output: Path, data: bytes) -> None:
    """Makes or replaces the file `output`, which `check_output` passed. Durable at the end.

    If the process dies or the power fails before: `output` is what it was; a `*.tmp` file beside it may be left.

    Raises:
        OutputError: the disk refused.
    """
    tmp = tmp_path(output)
    with all_or_nothing(output, tmp):
        write_new_file(tmp, data)
        publish_file(tmp, output)


@contextlib.contextmanager
def all_or_nothing(output: Path, *temporary: Path) -> Iterator[None]:
    """Removes the temporary files whatever happens, and says what it means when the disk refuses one of the output's.

    What is read meanwhile, such as a store, is another's to tell of.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            named = Path(str(error.filename))
            if output.parent not in (named, named.parent):
                raise
        reason = str(error.strerror or error).splitlines()[0]
        raise OutputError(
            f"{output}: was not written, the disk refused ({reason}); "
            "make room or choose another place (--output), and try again"
        ) from error
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
