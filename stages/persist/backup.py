"""Copies of sealed shards on another disk: a store lies on one disk of one node.

Sealed shards do not change, so a copy is made once, beside a working persister. Live shards are not copied: `FI_EVENTS`
has what is in them. A copy is never deleted; one that the store does not have any more is moved aside once another
shard has its number. The store is told what is copied: until then `FI_EVENTS` keeps it, while it has room to spare. So
it does when the store is put back from its copies, which have the same mark and claim nothing in it.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from contracts.backups import BACKUP_FILE, LastBackup, decode_last_backup, encode_last_backup
from contracts.errors import NotOursError, ShardCorruptError, ShardError, WireFormatError
from contracts.events import format_rfc3339
from contracts.receipts import decode_seal
from stages.persist.aside import ASIDE, move_aside
from stages.persist.files import (
    SYNC_EVERY_BYTES,
    is_lost,
    publish_file,
    read_own,
    sync_data,
    sync_file,
    told_of,
    write_all_at,
    write_new_file,
)
from stages.persist.header import HEADER_BYTES, is_named, read_live_header, read_sealed_header
from stages.persist.names import FIRST_SHARD, ShardFile, list_shards, live_name, tmp_path
from stages.persist.records import record_path
from stages.persist.seal import sealed_info
from stages.persist.store import find_store
from stages.persist.storedir import STORE_FILE, Store, make_directory, read_store

log = logging.getLogger(__name__)

_LOCK: Final = "backup.lock"
_READ_BYTES: Final = 1024 * 1024


class NotCopied(msgspec.Struct, frozen=True):
    """A shard of which, or of the record beside which, no copy was made, and why."""

    shard: str
    why: str


class Backup(msgspec.Struct, frozen=True, kw_only=True):
    """What a run found and did.

    Attributes:
        store: whose shards they are.
        shards: sealed shards of the store that the copy has now.
        copied: those of them that it did not have before.
        bytes: of these.
        aside: copies that were moved aside, by name.
        problems: sealed shards of the store that the copy does not have, or not with their records.
        same_disk: the copies lie on the file system of the store itself, and go with it.
        unmarked: why the store does not say that it is copied up to now; empty where it does.
    """

    store: str
    shards: int
    copied: int
    bytes: int
    aside: tuple[str, ...]
    problems: tuple[NotCopied, ...]
    same_disk: bool
    unmarked: str


def back_up(
    path: Path, target: Path, *, now_ns: int, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Backup:
    """Copies what is sealed in the store at `path` to the directory `target`, where it is not there yet.

    When that is all there is, and on another disk, the store is marked with it (`contracts.backups`), and `target` with
    the time.

    If the process dies or the power fails here: what has its name in `target` is whole; run it again.

    Args:
        path: as for `find_store`.
        target: made when missing.
        now_ns: the time; also names what is moved aside.
        on_progress: told (bytes looked at, of how many).

    Raises:
        ShardError: there is no store, or `target` is in use by one, or holds copies of another.
        NotOursError: another run copies to `target`.
        OSError: a disk refused.
    """
    source = find_store(path)
    store = read_store(source)
    _check_apart(source, target)
    _check_mounted(source, target)
    make_directory(target)
    with _locked(target):
        _identify(source, target)
        gaps = _gaps(source)
        sealed = [file for files in list_shards(source).values() for file in files if file.sealed]
        total = sum(_size(file.path) for file in sealed)
        run = _Run(store, target, now_ns)
        looked_at = 0
        for file in sealed:
            on_progress(looked_at, total)
            looked_at += _size(file.path)
            run.take(file)
        on_progress(total, total)
        # One that a rebuild gives up, or that got its sealed form while the directory was read, is not missing.
        run.problems += [run.missing(source, *gap) for gap in _gaps(source) if gap in gaps]
        # What is not there any more was given up by a rebuild, unless the whole store went.
        if read_store(source) != store:
            raise ShardError(f"{source}: holds another store than when this began; run it again")
        same_disk = source.stat().st_dev == target.stat().st_dev
        if same_disk or run.problems or run.gone:
            unmarked = "not all of it is copied to another disk"
        else:
            copied = {file.partition: file.shard for file in sealed}
            last = LastBackup(at_ns=now_ns, to=str(target.absolute()), copied=copied)
            unmarked = _mark(source, last)
            if not unmarked:
                # For a store that is put back from the copies, which may be moved: none of it counts as copied.
                _write_mark(target / BACKUP_FILE, msgspec.structs.replace(last, copied={}))
    return Backup(
        store=store.store_id,
        shards=run.shards,
        copied=run.copied,
        bytes=run.bytes,
        aside=tuple(run.aside),
        problems=tuple(run.problems),
        same_disk=same_disk,
        unmarked=unmarked,
    )


def forget_copies(directory: Path, partition: int, shard: int) -> None:
    """From shard `shard` on, the store's copies are not counted any more: it is taken back there, and made again.

    Raises:
        OSError: the disk refused.
    """
    mark = directory / BACKUP_FILE
    with suppress(FileNotFoundError, WireFormatError):
        last = decode_last_backup(read_own(mark))
        if last.copied.get(partition, 0) >= shard:
            _write_mark(mark, msgspec.structs.replace(last, copied={**last.copied, partition: shard - 1}))


def copied_shard(directory: Path, partition: int) -> int | None:
    """The newest sealed shard that a partition had when its store was last backed up, by number.

    None for a store that never was; 0 where nobody knows, so that nothing counts as copied that may not be.
    """
    try:
        return decode_last_backup(read_own(directory / BACKUP_FILE)).copied.get(partition, 0)
    except FileNotFoundError:
        return None
    except (OSError, WireFormatError) as error:
        log.warning("%s: %s", directory / BACKUP_FILE, error)
        return 0


def _check_apart(source: Path, target: Path) -> None:
    own, there = source.resolve(), target.resolve()
    if own == there or own in there.parents or there in own.parents:
        raise ShardError(f"{target}: is the store {source}, or has it in it, or lies in it; choose another directory")


def _check_mounted(source: Path, target: Path) -> None:
    """Raises `ShardError` if the copies that the last run made are not in `target`."""
    try:
        last = decode_last_backup(read_own(source / BACKUP_FILE))
    except (OSError, WireFormatError):
        return
    if last.to == str(target.absolute()) and not (target / STORE_FILE).exists():
        raise ShardError(
            f"{target}: the copies of {format_rfc3339(last.at_ns)} are not there; is its disk mounted? If they are "
            f"lost, remove {source / BACKUP_FILE} and run it again"
        )


class _Run:
    """One run: what it did so far."""

    def __init__(self, store: Store, target: Path, now_ns: int) -> None:
        self._store = store
        self._target = target
        self._now_ns = now_ns
        self._there = list_shards(target)
        self.shards = 0
        self.copied = 0
        self.bytes = 0
        self.gone = 0
        self.aside: list[str] = []
        self.problems: list[NotCopied] = []

    def take(self, file: ShardFile) -> None:
        """Sees to it that there is a copy of a sealed shard, and of the record beside it."""
        final = self._target / file.path.name
        same_number = [one for one in self._there.get(file.partition, ()) if one.shard == file.shard]
        try:
            self._check_own(file)
            digest = ""
            if not (final.exists() and _is_copy(file.path, final)):
                size, digest = _copy(file.path, final, lambda digest: self._make_room(file, digest, same_number))
                self.copied += 1
                self.bytes += size
            self.shards += 1
            _copy_record(file, final, digest)
        except FileNotFoundError:
            if file.path.exists():
                raise
            # A rebuild gave it up just now.
            self.gone += 1
        except ShardError as error:
            self.problems.append(NotCopied(file.path.name, str(error)))

    def _check_own(self, file: ShardFile) -> None:
        """Holds that it is the shard that its name says, of this store: it may stand for another one that is lost."""
        with _reading(file.path):
            header = read_sealed_header(file.path)
        store = self._store
        if not is_named(header, file) or (header.store, header.cluster) != (store.store_id, store.cluster_id):
            raise ShardError(
                f"{file.path}: is not the shard that its name and place say (`fictl verify` tells what it is); put the "
                "right one in its place, or run `fictl rebuild`"
            )

    def missing(self, source: Path, partition: int, shard: int) -> NotCopied:
        """What is to be said of a shard that the store should have and has not."""
        copy = next((file.path for file in self._there.get(partition, ()) if file.shard == shard), None)
        step = "run `fictl rebuild`" if copy is None else f"put the copy {copy} in its place"
        return NotCopied(f"shard {shard} of partition {partition}", f"is missing in {source}; {step}")

    def _make_room(self, file: ShardFile, digest: str, copies: list[ShardFile]) -> None:
        """A copy gives way only to a shard that the record beside it, if there is one, is of: either may be forged."""
        if copies:
            _record_of(file, digest)
            moved = move_aside(copies, self._target / ASIDE, self._now_ns)
            self.aside += [copy.name for copy in moved]


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    fd = os.open(target / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            with told_of(target):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise NotOursError(f"{target}: another backup is at work there; let it end") from error
        yield
    finally:
        os.close(fd)


def _identify(source: Path, target: Path) -> None:
    """Holds that `target` is for copies of this store, and makes it so when it is new."""
    shards = [file for files in list_shards(target).values() for file in files]
    if live := next((file for file in shards if not file.sealed), None):
        raise ShardError(f"{target}: {live.path.name} is there, so a persister works in it; choose another directory")
    if not (target / STORE_FILE).exists():
        if shards:
            raise ShardError(f"{target}: has shards and no {STORE_FILE}: nobody knows of which store; choose another")
        tmp = tmp_path(target / STORE_FILE)
        write_new_file(tmp, read_own(source / STORE_FILE))
        publish_file(tmp, target / STORE_FILE)
    own, there = read_store(source), read_store(target)
    if (own.store_id, own.cluster_id) != (there.store_id, there.cluster_id):
        raise ShardError(
            f"{target}: holds copies of store {there.store_id}, and {source} is store {own.store_id}; choose another "
            "directory. Was the disk lost, and a new store begun? Then leave these copies: there is nothing else"
        )


def _gaps(source: Path) -> list[tuple[int, int]]:
    """(partition, number) of each shard that is not there, and that the one after it goes on from."""
    gaps = []
    for partition, files in list_shards(source).items():
        numbers = {file.shard for file in files}
        after_none = [file for file in files if file.shard > FIRST_SHARD and file.shard - 1 not in numbers]
        gaps += [(partition, file.shard - 1) for file in after_none if not _begins(file)]
    return gaps


def _begins(file: ShardFile) -> bool:
    try:
        return (read_sealed_header if file.sealed else read_live_header)(file.path).begins
    except (OSError, ShardError):
        return False


def _mark(source: Path, last: LastBackup) -> str:
    """Why it could not be, where the copies may be made by one who may not write to the store; else empty."""
    mark = source / BACKUP_FILE
    try:
        _write_mark(mark, last)
    except OSError as error:
        return f"{mark}: {error.strerror}"
    return ""


def _write_mark(mark: Path, last: LastBackup) -> None:
    write_new_file(tmp_path(mark), encode_last_backup(last))
    publish_file(tmp_path(mark), mark)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _is_copy(path: Path, copy: Path) -> bool:
    """By length and header, which has the check sum of everything after it: what is in the copy is not read."""
    with _reading(path):
        wanted = _length_and_header(path)
    with told_of(copy):
        return _length_and_header(copy) == wanted


def _length_and_header(path: Path) -> tuple[int, bytes]:
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size, file.read(HEADER_BYTES)


def _copy(path: Path, final: Path, make_room: Callable[[str], None]) -> tuple[int, str]:
    """Copies a sealed shard, held against its check sum; gives its length and SHA-256, which `make_room` gets."""
    with _reading(path):
        header = read_sealed_header(path)
        read = path.open("rb")
    tmp = tmp_path(final)
    body, whole = sha256(), sha256()
    size = unsynced = 0
    try:
        with read, tmp.open("wb") as write, told_of(tmp):
            while data := _read(read, _READ_BYTES if size else HEADER_BYTES):
                whole.update(data)
                if size:
                    body.update(data)
                write_all_at(write.fileno(), data, size)
                size += len(data)
                unsynced += len(data)
                if unsynced >= SYNC_EVERY_BYTES:
                    sync_data(write.fileno())
                    unsynced = 0
            if body.hexdigest() != header.body_sha256:
                raise ShardCorruptError(f"{path}: its bytes are not those that were sealed; run `fictl rebuild`")
            sync_file(write.fileno())
        make_room(whole.hexdigest())
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    publish_file(tmp, final)
    return size, whole.hexdigest()


def _read(file: BinaryIO, size: int) -> bytes:
    with _reading(Path(file.name)):
        return file.read(size)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What cannot be read of the store is told of, and keeps no other shard from being copied. Raises `ShardError`."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if is_lost(error):
            raise ShardCorruptError(f"{path}: {error.strerror}; run `fictl rebuild`") from error
        raise ShardError(f"{path}: cannot be read ({error.strerror}); put that right, and run it again") from error


def _copy_record(file: ShardFile, final: Path, digest: str) -> None:
    """Copies the record beside a shard whose copy is `final`. Raises as `_record_of`. `digest`: "" if not known yet."""
    own, there = record_path(file.path), record_path(final)
    with suppress(OSError):
        if not own.exists() or (there.exists() and read_own(there) == read_own(own)):
            return
    with _reading(file.path):
        digest = digest or sealed_info(file.path).sha256
    if (data := _record_of(file, digest)) is not None:
        write_new_file(tmp_path(there), data)
        publish_file(tmp_path(there), there)


def _record_of(file: ShardFile, digest: str) -> bytes | None:
    """The record beside a shard with this SHA-256; None while there is none: it comes a moment after its shard.

    Raises:
        ShardError: it is of another file, or cannot be read.
    """
    path, own = file.path, record_path(file.path)
    try:
        data = read_own(own)
        is_its = decode_seal(data).sha256 == digest
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ShardError(f"{own}: cannot be read ({error.strerror}); put that right, and run it again") from error
    except WireFormatError as error:
        raise ShardCorruptError(f"{own}: is no record ({error}); put a copy of the right one in its place") from error
    # While the live form is there, the record may still be that of a file that had the name before.
    if not (is_its or path.with_name(live_name(file.partition, file.shard)).exists()):
        raise ShardCorruptError(f"{path}: is not the file that the record beside it is of; run `fictl verify`")
    return data if is_its else None
