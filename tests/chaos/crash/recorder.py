"""Records what a process does to the files of one directory, below persist's code, at the calls to the kernel.

HDF5 writes by itself, unseen: but only files under a temporary name, whose content is therefore taken whole when they
are synced. `Recorder.stop` proves that nothing else went unseen.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from stages.persist import files

from .disk import DirectorySynced, Image, Log, Named, Synced, Wrote, everything

_TMP_SUFFIX = ".tmp"
_UNSEEN_SUFFIXES = (".lock", _TMP_SUFFIX)
"""Locks say nothing that a restart reads."""


class Recorder:
    """Between `start` and `stop`, every operation of this process on files in `directory` goes into `log`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()
        self.log = Log(read_image(directory))
        self._numbers = {name: number for number, name in enumerate(self.log.start)}
        self._made = len(self._numbers)
        self._patches = contextlib.ExitStack()

    def start(self) -> None:
        """Begins to record."""
        for owner, name, call in (
            (os, "pwrite", self._pwrite(os.pwrite)),
            (os, "fsync", self._sync(os.fsync)),
            (os, "fdatasync", self._sync(os.fdatasync)),
            (files, "_fdatasync", self._sync(os.fdatasync)),
            (os, "rename", self._rename(os.rename)),
            (os, "unlink", self._unlink(os.unlink)),
        ):
            self._patches.enter_context(mock.patch.object(owner, name, call))

    def stop(self) -> Log:
        """Ends recording.

        Raises:
            AssertionError: a file is not what the recorded operations make of it.
        """
        self._patches.close()
        seen, there = everything(self.log), read_image(self._directory)
        for image in (seen, there):
            for name in [name for name in image if name.endswith(_UNSEEN_SUFFIXES)]:
                del image[name]
        assert seen == there, f"unrecorded writes: {[n for n in {*seen, *there} if seen.get(n) != there.get(n)]}"
        return self.log

    def _number(self, name: str) -> int:
        """The file of that name; one that was not seen before was just created."""
        if name not in self._numbers:
            self._numbers[name] = self._made
            self.log.operations.append(Named({name: self._made}))
            self._made += 1
        return self._numbers[name]

    def _name(self, path: str) -> str | None:
        """The path's name, if it is in the directory."""
        head, name = os.path.split(path)
        return name if head == str(self._directory) and not name.endswith(" (deleted)") else None

    def _pwrite(self, real: Callable[..., int]) -> Callable[..., int]:
        def pwrite(fd: int, data: Any, offset: int) -> int:
            name = self._name(os.readlink(f"/proc/self/fd/{fd}"))
            if name is not None:
                number = self._number(name)
            written = real(fd, data, offset)
            if name is not None:
                self.log.operations.append(Wrote(number, offset, bytes(data[:written])))
            return written

        return pwrite

    def _sync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def sync(fd: int) -> None:
            real(fd)
            path = os.readlink(f"/proc/self/fd/{fd}")
            name = self._name(path)
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                if path == str(self._directory):
                    self.log.operations.append(DirectorySynced())
            elif name is not None:
                content = Path(path).read_bytes() if name.endswith(_TMP_SUFFIX) else None
                self.log.operations.append(Synced(self._number(name), content))

        return sync

    def _rename(self, real: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Any, target: Any) -> None:
            real(source, target)
            old, new = self._name(os.fspath(source)), self._name(os.fspath(target))
            if old is not None and new is not None:
                number = self._number(old)
                del self._numbers[old]
                self._numbers[new] = number
                self.log.operations.append(Named({old: None, new: number}))

        return rename

    def _unlink(self, real: Callable[..., None]) -> Callable[..., None]:
        def unlink(path: Any) -> None:
            name = self._name(os.fspath(path))
            if name is not None and os.path.exists(path):
                self._number(name)
            real(path)
            if name is not None:
                del self._numbers[name]
                self.log.operations.append(Named({name: None}))

        return unlink


def read_image(directory: Path) -> Image:
    """The files of a directory."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


def write_image(directory: Path, image: Image) -> None:
    """Makes the directory with these files."""
    directory.mkdir()
    for name, data in image.items():
        (directory / name).write_bytes(data)
