"""The store directory: its identity, and the lock that keeps two processes off one partition's files.

The lock only protects files from two processes of one machine. Which process may *commit* is decided by the fence on
the receipts, never here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

import msgspec

from contracts.errors import NotOursError, ShardCorruptError, ShardError, ShardLostError, StoreFailedError
from contracts.events import format_rfc3339
from contracts.wire import UNREADABLE
from stages.persist.files import (
    close_file,
    is_lost,
    publish_file,
    read_own,
    remove_file,
    sync_dir,
    told_of,
    why_not_at,
    write_all_at,
    write_new_file,
)
from stages.persist.names import SHARDS, lock_name, probe_name, tmp_path

STORE_FILE = "store.json"
STORE_FORMAT = 1

COPIED: Final = (
    "if this is a copy of a store that another process works on (`fictl members` shows two of one store), start "
    "persist on that one alone; else `fictl rebuild` makes it again from the stream"
)
"""Said where receipts commit more than whole files hold: nothing was damaged."""

HALF_DONE: Final = (
    "Free space or mend the disk, then run `fictl rebuild`, which does the rest: until then persist waits"
)
"""To be done where a receipt was accepted, and the files are not as it says yet."""

_GOES_ON = "Free space or mend the disk: the partition goes on by itself"
_STORE_LOCK = "store.lock"
_PROBE_BYTES = 4096
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True, slots=True)
class Store:
    """A directory of shards.

    Attributes:
        directory: where.
        store_id: 32 hex digits, made with the directory.
        cluster_id: the cluster whose origins its shards count in.
    """

    directory: Path
    store_id: str
    cluster_id: str


class _Identity(msgspec.Struct, frozen=True):
    format: int
    store_id: str
    cluster_id: str
    created: str


class _Format(msgspec.Struct):
    format: int


def open_store(directory: Path, cluster_id: str, *, now_ns: int) -> Store:
    """The store in `directory`; made there, durably, when it has none yet.

    If the process dies or the power fails on first use: the directory has no identity yet; the next call gives it one.

    Args:
        directory: made with its parents when missing.
        cluster_id: the cluster the caller is connected to.
        now_ns: written into a new store.

    Raises:
        ShardError: it belongs to another cluster, has a newer format, or may not be written; or it has a store below.
        ShardCorruptError: its identity cannot be read.
        OSError: the disk refused.
    """
    _check_not_around(directory)
    try:
        make_directory(directory)
        lock = os.open(directory / _STORE_LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno not in _NOT_ALLOWED:
            raise
        raise ShardError(
            f"{directory}: may not be written ({error.strerror}); give this user access or choose another store"
        ) from error
    try:
        with told_of(directory):
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (directory / STORE_FILE).exists():
                _create(directory, cluster_id, now_ns)
    finally:
        os.close(lock)
    return existing_store(directory, cluster_id)


def existing_store(directory: Path, cluster_id: str) -> Store:
    """The store in `directory`, of this cluster; nothing is made or written.

    Raises:
        ShardError: there is no store, it belongs to another cluster, or its format is newer.
        ShardCorruptError: its identity cannot be read.
    """
    store = read_store(directory)
    if store.cluster_id != cluster_id:
        raise ShardError(
            f"{directory}: belongs to cluster {store.cluster_id}, not to {cluster_id}; "
            "choose another directory, or connect to its own cluster. Did its servers lose their streams, and were new "
            "ones made? See FiPartitionUnattended in the runbooks"
        )
    return store


def planned_store(directory: Path, cluster_id: str) -> Store:
    """The store in `directory`, or the one that `open_store` would make there, under an id of its own; nothing is made.

    Raises as `existing_store`, unless there is no store at all.
    """
    _check_not_around(directory)
    if not (directory / STORE_FILE).exists():
        return Store(directory, uuid4().hex, cluster_id)
    return existing_store(directory, cluster_id)


def _check_not_around(directory: Path) -> None:
    """Holds that a `directory` without a store is not that of a run, whose store is below. Raises `ShardError`."""
    below = directory / SHARDS
    if (below / STORE_FILE).exists() and not (directory / STORE_FILE).exists():
        raise ShardError(f"{directory}: is not a store, but {below} is; name that one")


def read_store(directory: Path) -> Store:
    """The identity of an existing store, whatever cluster it belongs to.

    Raises:
        ShardError: there is no store, or its format is newer.
        ShardCorruptError: its identity cannot be read.
    """
    path = directory / STORE_FILE
    _check_not_around(directory)
    try:
        data = read_own(path)
    except FileNotFoundError as error:
        raise ShardError(f"{directory}: is not a store ({STORE_FILE} is missing)") from error
    try:
        version = msgspec.json.decode(data, type=_Format).format
        if version != STORE_FORMAT:
            raise ShardError(
                f"{path}: store format {version} is not known to this build; use the version that wrote it"
            )
        identity = msgspec.json.decode(data, type=_Identity)
    except UNREADABLE as error:
        raise ShardCorruptError(
            f"{path}: cannot be read ({error}); write it again from the store and cluster ids in a shard's attributes"
        ) from error
    return Store(directory, identity.store_id, identity.cluster_id)


class PartitionLock:
    """A partition's files are this process's own while it is held. Ends with `close` or the process.

    Args:
        path: of the lock file.
        fd: the file, open.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    def take(self) -> None:
        """Locks the open file, and writes into it who holds it.

        Raises:
            NotOursError: another process holds it.
            OSError: the disk refused.
        """
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip() or "another process"
            raise NotOursError(f"{self._path}: held by {holder}; stop it, or leave the partition to it") from error
        os.ftruncate(self._fd, 0)
        write_all_at(self._fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def check(self) -> None:
        """Holds that the file is still the one at its path: whoever opens the path now must meet this lock.

        It is not once somebody removed the file, or moved, mounted over or unmounted the store's directory.

        Raises:
            StoreFailedError: it is not. Nothing more may be written to the partition's files.
        """
        try:
            why = why_not_at(self._path, self._fd)
        except OSError as error:
            why = str(error.strerror)
        if why:
            raise StoreFailedError(
                f"{self._path}: is no longer the file that this process locked ({why}). Was it removed, or the store "
                "moved or mounted over? Nothing more is written there; the partition goes on by itself once the store "
                "is back"
            )

    def close(self) -> None:
        """Lets go. Closing again does nothing."""
        close_file(self._fd)
        self._fd = -1


def lock_partition(store: Store, partition: int) -> PartitionLock:
    """Takes the partition's lock at once or not at all. A frozen (SIGSTOP) holder keeps it.

    Raises:
        NotOursError: another process holds it.
        StoreFailedError: the lock file cannot be made, or the directory holds another store now, or none.
    """
    path = store.directory / lock_name(partition)
    _check_there(store)
    with disk_of(store):
        lock = PartitionLock(path, os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
        try:
            lock.take()
        except BaseException:
            lock.close()
            raise
    return lock


@contextlib.contextmanager
def disk_of(store: Store, then: str = _GOES_ON) -> Iterator[None]:
    """Turns a disk operation that was refused into the error that stops a partition. `then`: what to do."""
    try:
        yield
    except (OSError, ShardLostError) as error:
        refused = error if isinstance(error, OSError) else error.__cause__
        is_bad = isinstance(refused, OSError) and is_lost(refused)
        lost = ". Where a shard lies on a bad sector, run `fictl rebuild`" if is_bad else ""
        raise StoreFailedError(
            f"{store.directory}: {error}; nothing that is not durable was acknowledged. {then}{lost}"
        ) from refused


def probe_disk(store: Store, partition: int, room_bytes: int) -> None:
    """Holds that the store is there, and that its disk takes a durable write again and has `room_bytes` free.

    Raises:
        StoreFailedError: it does not.
    """
    path = store.directory / probe_name(partition)
    _check_there(store)
    with disk_of(store):
        write_new_file(path, bytes(_PROBE_BYTES))
        remove_file(path)
        free_bytes = shutil.disk_usage(store.directory).free
        if free_bytes < room_bytes:
            raise OSError(errno.ENOSPC, f"{free_bytes} bytes are free, {room_bytes} are needed", str(store.directory))


def _check_there(store: Store) -> None:
    """Raises `StoreFailedError` if the directory holds another store, or none: a disk that is not mounted, say."""
    try:
        with disk_of(store):
            found = read_store(store.directory).store_id
    except ShardError as error:
        raise StoreFailedError(
            f"{error}; is its disk mounted? The partition goes on by itself once the store is back"
        ) from error
    if found != store.store_id:
        raise StoreFailedError(
            f"{store.directory}: holds store {found} now, not {store.store_id}, which this process began with; put "
            "that one back, or restart the process to work with this one"
        )


def make_directory(directory: Path) -> None:
    """Makes it, with its parents, durably; one that is there is left so. Raises `OSError`."""
    if not directory.is_dir():
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        sync_dir(directory.parent)


def _create(directory: Path, cluster_id: str, now_ns: int) -> None:
    identity = _Identity(STORE_FORMAT, uuid4().hex, cluster_id, format_rfc3339(now_ns))
    final = directory / STORE_FILE
    tmp = tmp_path(final)
    write_new_file(tmp, msgspec.json.format(msgspec.json.encode(identity)) + b"\n")
    publish_file(tmp, final)
