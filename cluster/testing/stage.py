"""`fictl` with a wall clock and a disk that a test can spoil: ``python -m cluster.testing.stage FILE run STAGE …``.

``FILE`` holds the clock's offset (`cluster.testing.clock`). While ``FILE.eio`` is there, every fdatasync of a shard
fails.

For tests alone. There is no setting for this: nothing that is deployed runs this module.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

from cluster.testing.clock import shifted


def failing(offset: Path) -> Path:
    """The file that makes syncs fail while it is there; `offset` is the process's clock."""
    return offset.with_name(f"{offset.name}.eio")


def main() -> None:
    """Puts this process's wall clock and disk into the test's hands, then is `fictl` with the other arguments."""
    offset = Path(sys.argv.pop(1))
    now_ns = shifted(offset)
    time.time_ns = now_ns
    time.time = lambda: now_ns() / 1e9
    # Only now: defaults such as `clock_ns=time.time_ns` are taken when a module is imported.
    from cluster.cli import main as fictl
    from stages.persist import files

    real = files._fdatasync

    def fdatasync(fd: int) -> None:
        if failing(offset).exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    files._fdatasync = fdatasync
    fictl()


if __name__ == "__main__":
    main()
