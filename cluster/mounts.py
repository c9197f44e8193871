"""What a file system was mounted with, as Linux tells it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

MOUNTS = Path("/proc/self/mountinfo")


class Mount(NamedTuple):
    """A mounted file system.

    Attributes:
        kind: e.g. ``ext4``.
        options: its own, e.g. ``rw``, ``discard``.
    """

    kind: str
    options: tuple[str, ...]


def mount_of(path: Path, mounts: Path = MOUNTS) -> Mount | None:
    """The file system that `path` is on; None where that cannot be told (no Linux, or one without a device of its own).

    Raises:
        OSError: there is no `path`.
    """
    device = path.stat().st_dev
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return None
    # proc(5): id, parent, major:minor, root, point, options, tags …, "-", kind, source, options of the file system.
    for line in lines:
        head, _, tail = line.partition(" - ")
        if head.split()[2:3] == [f"{os.major(device)}:{os.minor(device)}"] and len(tail.split()) > 2:
            kind, _, options = tail.split()[:3]
            return Mount(kind, tuple(options.split(",")))
    return None
