"""The settings file: where it is, and what it says. What its keys mean is `contracts.settings`' to say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from contracts.errors import SettingsError
from contracts.settings import CONFIG_VARIABLE, SettingsFile
from stages.persist.files import read_small

DEFAULT_FILE: Final = "fi.toml"


def find_file(chosen: str | None, env: Mapping[str, str]) -> SettingsFile | None:
    """The file `chosen`, else the one that ``FI_CONFIG`` names, else ``fi.toml`` in the working directory, if any.

    Args:
        chosen: what the command line names; None when it names none. Empty, here or in ``FI_CONFIG``: no file.
        env: the environment.

    Raises:
        SettingsError: as `read_file`; a file that was named must be there.
    """
    named = chosen if chosen is not None else env.get(CONFIG_VARIABLE)
    if named is not None:
        return read_file(Path(named)) if named else None
    default = Path(DEFAULT_FILE)
    return read_file(default) if default.exists() else None


def read_file(path: Path) -> SettingsFile:
    """What the TOML file `path` says.

    Raises:
        SettingsError: it cannot be read, or is not TOML. Names the file, and the line of a mistake.
    """
    try:
        data = read_small(path)
    except OSError as error:
        raise SettingsError(
            f"settings file {path} cannot be read: {error.strerror}; see --config and {CONFIG_VARIABLE}"
        ) from error
    return parse_file(data, str(path))


def parse_file(data: bytes, path: str) -> SettingsFile:
    """What the TOML text `data` of the file `path` says. Raises `SettingsError`, naming the line of a mistake."""
    import tomllib

    try:
        values = tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SettingsError(f"settings file {path} is not UTF-8 text: {error}; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits and arrays in arrays in arrays raise no `TOMLDecodeError`.
        raise SettingsError(
            f"settings file {path} is not TOML: {error}; write each setting as NAME = VALUE, text in quotes"
        ) from None
    return SettingsFile(path, values)
