"""HDF5 files: the format that every stock reader opens, what happens on a full disk, and why one cannot be read."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import h5py

from contracts.errors import ShardCorruptError
from stages.persist.files import SYNC_EVERY_BYTES, close_file, sync_data, write_all_at
from stages.persist.header import HEADER_BYTES

_LIBVER = ("earliest", "v110")
"""HDF5 2.0's own format is not readable by the 1.10 tools."""


READ_ERRORS = (
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    OSError,
    OverflowError,
    RuntimeError,
    MemoryError,
)
"""What reading a file raises, by h5py and numpy, be it damaged or refused by the system."""

_REFUSED = re.compile(r"\berrno = ([1-9]\d*), error message = ")


def refused(error: Exception, path: Path) -> OSError | None:
    """What the system refused while HDF5 read the file; None where it refused nothing: what was read makes no sense.

    The library says so in the text of its errors alone, whatever kind of error h5py makes of it.
    """
    found = _REFUSED.search(str(error))
    number = int(found[1]) if found else error.errno if isinstance(error, OSError) else None
    return OSError(number, os.strerror(number), str(path)) if number else None


@contextlib.contextmanager
def read_back(path: Path) -> Iterator[None]:
    """For reading a file that was just written.

    Raises:
        OSError: the system refused.
        ShardCorruptError: it makes no sense.
    """
    try:
        yield
    except READ_ERRORS as error:
        if (why := refused(error, path)) is not None:
            raise why from error
        raise ShardCorruptError(f"{path}: did not read back as written ({error}); check disk and memory") from error


@contextlib.contextmanager
def new_hdf5(
    path: Path, *, user_block_bytes: int = HEADER_BYTES, align_from_bytes: int = 1, align_to_bytes: int = 1
) -> Iterator[h5py.File]:
    """A new HDF5 file; replaces what is at `path`. Closed, not synced, at the end.

    Args:
        path: a temporary name.
        user_block_bytes: room before it, by default that for our header; 0 for none.
        align_from_bytes, align_to_bytes: datasets of at least that size begin at multiples of the other.

    Raises:
        OSError: the disk refused.
    """
    with contextlib.closing(_Disk(path)) as disk:
        try:
            with h5py.File(
                disk,
                "w",
                libver=_LIBVER,
                userblock_size=user_block_bytes,
                alignment_threshold=align_from_bytes,
                alignment_interval=align_to_bytes,
            ) as file:
                yield file
        except (RuntimeError, OSError) as error:
            if disk.refused is None:
                raise OSError(errno.EIO, f"HDF5 could not write: {error}", str(path)) from error
        if disk.refused is not None:
            raise disk.refused


class _Disk(io.RawIOBase):
    """What HDF5 writes to. A disk that refuses is kept from it: a failed write or close leaves the library's own state
    broken, up to a crash when the process exits. It goes on as if all were well, and `refused` is raised afterwards.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._at = 0
        self._size = 0
        self._unsynced = 0
        self.refused: OSError | None = None

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer)).cast("B")
        found = 0
        while found < len(view) and (count := os.preadv(self._fd, [view[found:]], self._at + found)):
            found += count
        # HDF5 may ask for what it has not written yet.
        view[found:] = bytes(len(view) - found)
        self._at += len(view)
        return len(view)

    def write(self, data: object) -> int:
        view = memoryview(cast(bytes, data)).cast("B")
        if self.refused is None:
            try:
                write_all_at(self._fd, view, self._at)
                self._unsynced += len(view)
                if self._unsynced >= SYNC_EVERY_BYTES:
                    sync_data(self._fd)
                    self._unsynced = 0
            except OSError as error:
                self.refused = OSError(error.errno, error.strerror, str(self._path))
        self._at += len(view)
        self._size = max(self._size, self._at)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        self._size = self._at if size is None else size
        if self.refused is None:
            try:
                os.ftruncate(self._fd, self._size)
            except OSError as error:
                self.refused = OSError(error.errno, error.strerror, str(self._path))
        return self._size

    def close(self) -> None:
        close_file(self._fd)
        self._fd = -1
        super().close()
