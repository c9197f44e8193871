"""The disk operations everything durable is made of, each with what a dead process or a power cut leaves behind.

They raise `OSError` as it comes. After a failed write or fsync the kernel may have dropped the dirty pages and will
report success next time, so nothing here retries and callers must stop (`StoreFailedError`). A read that meets a page
which the disk cannot give is cut short before it, without an error: no length may be trusted but after `read_all_at`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from contracts.errors import ShardCorruptError

PAGE_BYTES = 4096
"""What a disk cannot read is lost in such pieces."""

SMALL_BYTES_MAX = 16 * 1024 * 1024

_ZEROS = bytes(1024 * 1024)
_WINDOW_BYTES = 1024 * 1024

SYNC_EVERY_BYTES = 4 * 1024 * 1024
"""Whoever writes a large file beside commits syncs it so often: their fdatasync waits for what is on its way."""

_fdatasync = getattr(os, "fdatasync", os.fsync)


def is_lost(error: OSError) -> bool:
    """True where the medium itself fails: what was there is damaged. With other errors nothing is known of it."""
    return error.errno == errno.EIO


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Names `path` in errors of the system that name no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def why_not_at(path: Path, fd: int) -> str:
    """Why `path` does not lead to the open file `fd` any more; empty while it does. Raises `OSError`: nobody knows."""
    try:
        return "" if os.path.samestat(os.stat(path), os.fstat(fd)) else "another file has its name"
    except (FileNotFoundError, NotADirectoryError) as error:
        return str(error.strerror)


def close_file(fd: int) -> None:
    """Closes it (-1: nothing), whatever the system says: it is closed then too, and what counts was synced before."""
    with suppress(OSError):
        if fd >= 0:
            os.close(fd)


def check_regular(path: Path) -> None:
    """Holds that `path` is a file: opening a pipe in its place would wait for ever. Raises `OSError`."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is not a file", str(path))


def read_small(path: Path) -> bytes:
    """All bytes of a file or pipe that is to hold something small, such as a proof, a key or settings.

    Raises:
        OSError: it cannot be read, or holds more than `SMALL_BYTES_MAX`: a device such as /dev/zero never ends.
    """
    with told_of(path), path.open("rb") as file:
        data = file.read(SMALL_BYTES_MAX + 1)
    if len(data) > SMALL_BYTES_MAX:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return data


def read_own(path: Path) -> bytes:
    """All bytes of a small file of the store's own. Raises as `check_regular` and `read_small`."""
    check_regular(path)
    return read_small(path)


def write_all_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset` in bytes, continuing after short writes.

    If the process dies here: a prefix of `data` is in the page cache and will reach the disk.
    If the power fails here: any subset of the touched pages may be on disk.
    """
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def read_all_at(fd: int, length: int, offset: int, path: Path, *, ahead: int = 0) -> bytes:
    """The `length` bytes at `offset`, continuing after short reads.

    Args:
        fd: the file.
        length, offset: in bytes.
        path: the file's, for messages.
        ahead: so many bytes more are welcome, as far as they come along without an error.

    Raises:
        ShardCorruptError: the file ends before.
        OSError: the disk cannot give them (see `is_lost`). Names the file.
    """
    pieces: list[bytes] = []
    while length > 0:
        try:
            piece = os.pread(fd, length + ahead, offset)
        except OSError as error:
            error.filename = str(path)
            raise
        if not piece:
            raise ShardCorruptError(f"{path}: was cut short while in use, to {offset} bytes; run `fictl verify`")
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def has_hole(fd: int, start: int, length: int) -> bool:
    """True where more than `_WINDOW_BYTES` of a range at once take no room on the disk: they would take memory to read.

    Nothing that we write has so many zeros, of which a copy may make a hole. Some file systems do not tell: then False.
    """
    at, end = start, start + length
    with suppress(OSError):
        while end - at > _WINDOW_BYTES and (hole := os.lseek(fd, at, os.SEEK_HOLE)) < end:
            try:
                at = os.lseek(fd, hole, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                at = end  # Nothing comes after it.
            if min(at, end) - hole > _WINDOW_BYTES:
                return True
    return False


class Window:
    """Reads a part of a file forwards in large pieces.

    Args:
        fd, path: the file.
        offset, length: the part, in bytes.
    """

    def __init__(self, fd: int, path: Path, offset: int, length: int) -> None:
        self._fd = fd
        self._path = path
        self._offset = offset
        self._length = length
        self._start = 0
        self._data = b""

    def take(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of the part. Raises as `read_all_at`, whatever becomes of others that it reads ahead."""
        if start < self._start or end > self._start + len(self._data):
            ahead = max(0, min(_WINDOW_BYTES, self._length - start) - (end - start))
            self._data = read_all_at(self._fd, end - start, self._offset + start, self._path, ahead=ahead)
            self._start = start
        return self._data[start - self._start : end - self._start]


def sync_data(fd: int) -> None:
    """Makes the file's written content durable; its size and blocks too, where they changed.

    If the process dies here: nothing is lost, the kernel finishes.
    If the power fails here: as for `write_all_at`; after the return, everything written before is on disk.
    """
    _fdatasync(fd)


def sync_file(fd: int) -> None:
    """Makes the file's content and all of its metadata durable. Otherwise as `sync_data`."""
    os.fsync(fd)


def sync_path(path: Path) -> None:
    """`sync_file` of a closed file: what another process wrote and perhaps did not sync. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY)
    try:
        sync_file(fd)
    finally:
        close_file(fd)


def sync_dir(path: Path) -> None:
    """Makes the names in directory `path` durable: created, renamed and removed ones.

    If the process dies here: the names stay as they are.
    If the power fails here: each rename or removal since the last sync may or may not have happened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with told_of(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def publish_file(tmp: Path, final: Path) -> None:
    """Gives the complete, synced file `tmp` its name `final` (same directory), replacing what had it.

    If the process dies here: the file has one of the two names.
    If the power fails here: likewise; its content is whole under either, because it was synced before.
    """
    tmp.rename(final)
    sync_dir(final.parent)


def write_new_file(path: Path, data: bytes) -> None:
    """Makes `path` (a temporary name) a file of `data` that is ready for `publish_file`; replaces what had the name.

    If the process dies or the power fails here: the file may hold any part of `data`, under its temporary name.
    """
    with told_of(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        sync_file(file.fileno())


def remove_file(path: Path) -> None:
    """Removes `path` durably; a path that is not there is left so.

    If the process dies or the power fails here: the file may still be there, whole.
    """
    path.unlink(missing_ok=True)
    sync_dir(path.parent)


def zero_fill(fd: int, start: int, length: int) -> None:
    """Writes `length` bytes of zeros from byte `start`.

    Real blocks, not a hole or `fallocate`: a later `sync_data` then has no block allocation to journal, which halves
    its time (measured). If the process dies or the power fails here: part of the range may hold what was there before.
    """
    end = start + length
    unsynced = 0
    while start < end:
        size = min(len(_ZEROS), end - start)
        write_all_at(fd, memoryview(_ZEROS)[:size], start)
        start += size
        unsynced += size
        if unsynced >= SYNC_EVERY_BYTES:
            sync_data(fd)
            unsynced = 0


def zero_dirty(fd: int, start: int, length: int) -> bool:
    """Zeroes what is not zero in `length` bytes from byte `start`, or cannot be read; writes only the dirty pieces.

    A disk puts another sector in the place of one that it cannot read, when that is written.

    Returns:
        whether anything had to be written. Interrupted as `zero_fill`.
    """
    dirty = False
    for at, size, is_clean in _pieces(fd, start, length):
        if not is_clean:
            zero_fill(fd, at, size)
            dirty = True
    return dirty


def is_zero(fd: int, start: int, length: int) -> bool:
    """True when the `length` bytes from byte `start` can be read and are all zero, as far as the file goes."""
    return all(is_clean for _, _, is_clean in _pieces(fd, start, length))


def _pieces(fd: int, start: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """Where each piece of a range begins, its length, and whether it can be read and is zero. Ends where the file does.

    Pieces begin and end where pages do, as far as the range reaches: a page of which a part is written is read first.
    """
    end = start + length
    while start < end:
        size = min(len(_ZEROS) - start % PAGE_BYTES, end - start)
        try:
            piece = os.pread(fd, size, start)
        except OSError as error:
            if not is_lost(error):
                raise
            yield start, size, False
        else:
            if not piece:
                return
            size = len(piece)
            yield start, size, piece.count(0) == size
        start += size
