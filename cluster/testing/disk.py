"""Disks that are small, and files that are damaged."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

from cluster.testing.errors import NotSupportedError

BALLAST = "ballast"


class SmallDisk:
    """A real file system of a limited size, in memory, mounted on a directory. Linux, and root, are needed.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Args: `path` is made when it is not there."""
        self.path = path
        self._size_bytes = size_bytes

    def mount(self) -> None:
        """Mounts it. Raises `NotSupportedError` where this user may not."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={self._size_bytes},mode=0777", "none", str(self.path)],
                capture_output=True,
                text=True,
            )
        except OSError as error:
            raise NotSupportedError(f"a disk of limited size cannot be made here: {error}") from error
        if done.returncode:
            raise NotSupportedError(
                f"a disk of limited size needs root, to mount a file system: {done.stderr.strip()}; "
                "run this test as root, or leave disk_bytes out"
            )

    def unmount(self) -> None:
        """Takes it away with all that is on it; files still open stay readable to who has them open."""
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    def fill(self, left_bytes: int) -> None:
        """Takes all of the free space but `left_bytes`."""
        self.free()
        with (self.path / BALLAST).open("wb") as file:
            while True:
                space = os.statvfs(self.path)
                wanted = space.f_bavail * space.f_frsize - left_bytes
                if wanted <= 0:
                    return
                try:
                    os.posix_fallocate(file.fileno(), 0, wanted)
                    return
                except OSError as error:
                    # Others write there too: there is less now than a moment ago.
                    if error.errno != errno.ENOSPC:
                        raise

    def free(self) -> None:
        """Gives back what `fill` took."""
        (self.path / BALLAST).unlink(missing_ok=True)


def flip(path: Path, offset: int) -> None:
    """Changes one bit of a file, as a bad disk does. `offset` counts bytes; a negative one from the end."""
    with path.open("r+b") as file:
        place = file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
