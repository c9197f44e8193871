"""A wall clock that a test can move while the process that reads it runs.

The offset is eight bytes of a file that both have mapped: the process sees a change at its next look, without a system
call. Only the wall clock moves; waiting goes by the monotonic clock, which no administrator can set either.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_OFFSET: Final = struct.Struct("<q")


def set_offset(path: Path, offset_ns: int) -> None:
    """Makes the clocks that read `path` go `offset_ns` before the machine's (negative: after). Makes the file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_OFFSET.pack(0))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), _OFFSET.size) as mapped:
        _OFFSET.pack_into(mapped, 0, offset_ns)


def shifted(path: Path) -> Callable[[], int]:
    """A clock like `time.time_ns`, moved by what `path` says at each call. Raises `OSError`: no such file."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), _OFFSET.size, prot=mmap.PROT_READ)
    real_ns = time.time_ns

    def now_ns() -> int:
        return real_ns() + int(_OFFSET.unpack_from(mapped)[0])

    return now_ns
