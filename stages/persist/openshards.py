"""The shards in a directory, as they are listed and opened for reading while persist writes, rolls and seals.

What is opened once is kept, for as long as the directory shows the same file: looking for one id then reads almost
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from contracts.errors import ShardCorruptError, ShardError
from stages.persist.header import is_named
from stages.persist.liveview import LiveView
from stages.persist.names import ShardFile, list_shards
from stages.persist.sealed import SealedReader

_TRIES_MAX = 10

View = LiveView | SealedReader
Opened = TypeVar("Opened", LiveView, SealedReader)


class OpenShards:
    """See the module's text. For one thread at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sealed: dict[Path, SealedReader] = {}
        self._live: dict[Path, LiveView] = {}
        self._files: dict[str, int] = {}
        self._shards: dict[int, list[ShardFile]] = {}

    def close(self) -> None:
        """Closes what is kept. Everything can still be used."""
        views: list[View] = [*self._sealed.values(), *self._live.values()]
        for view in views:
            view.close()
        self._sealed.clear()
        self._live.clear()

    def shards(self, *, again: bool = False) -> dict[int, list[ShardFile]]:
        """The shards by partition, as `list_shards`; listed until two listings agree.

        A directory read while a shard is renamed can show neither of its names. The last listing holds for as long as
        the directory shows the same names with the same inodes, unless `again`.

        Raises:
            ShardCorruptError: two of them have one number.
            OSError: the directory cannot be read.
        """
        with os.scandir(self._directory) as entries:
            files = {entry.name: entry.inode() for entry in entries}
        if again or files != self._files:
            listing = list_shards(self._directory)
            for _ in range(_TRIES_MAX):
                latest = list_shards(self._directory)
                if _numbers(latest) == _numbers(listing):
                    break
                listing = latest
            _check_numbers(latest)
            self._forget_gone(files)
            self._shards, self._files = latest, files
        return self._shards

    def snapshot(self, shard: ShardFile) -> View:
        """The shard as it stands now. A live one is the caller's own, to be closed.

        Raises:
            ShardCorruptError, ShardError: not a whole shard of a known format, or it vanished.
            OSError: it cannot be read.
        """
        return self._open(shard, _new_live)

    def kept(self, shard: ShardFile) -> View:
        """The shard as it stands now, with what was learnt of it before; stays open. Raises as `snapshot`."""
        return self._open(shard, self._kept_live)

    def _open(self, shard: ShardFile, live_view: Callable[[ShardFile], LiveView]) -> View:
        for _ in range(_TRIES_MAX):
            try:
                if not shard.sealed:
                    return live_view(shard)
                if shard.path not in self._sealed:
                    self._sealed[shard.path] = _checked(shard, SealedReader(shard.path))
                return self._sealed[shard.path]
            except FileNotFoundError:
                now = self.shards(again=True).get(shard.partition, [])
                same = [other for other in now if other.shard == shard.shard]
                if not same:
                    break
                shard = same[0]
        raise ShardError(
            f"{shard.path}: vanished while being read; rebuild it from the stream, or look for who removed it"
        )

    def _kept_live(self, shard: ShardFile) -> LiveView:
        view = self._live.get(shard.path)
        if view is None:
            view = self._live[shard.path] = _new_live(shard)
        else:
            view.refresh()
        return view

    def _forget_gone(self, files: dict[str, int]) -> None:
        """Lets go of shards that are gone or another file than before; while one is open, no other has its inode."""
        gone = {name for name, inode in self._files.items() if files.get(name) != inode}
        for path in [path for path in self._live if path.name in gone]:
            self._live.pop(path).close()
        for path in [path for path in self._sealed if path.name in gone]:
            # Not closed: an iteration may be in the middle of it.
            del self._sealed[path]


def _new_live(shard: ShardFile) -> LiveView:
    return _checked(shard, LiveView(shard.path))


def _checked(shard: ShardFile, view: Opened) -> Opened:
    """Holds that the file has its own name: under another one its events would be shown twice, or as another lane's."""
    if not is_named(view.header, shard):
        view.close()
        raise ShardCorruptError(f"{shard.path}: has the name of another shard; `fictl verify` says what it is")
    return view


def _check_numbers(listing: dict[int, list[ShardFile]]) -> None:
    for one, other in (pair for shards in listing.values() for pair in pairwise(shards)):
        if one.shard == other.shard:
            raise ShardCorruptError(
                f"{other.path}: has the number of {one.path.name}; find out with `fictl verify` which of them is "
                "right, and move the other out of the store"
            )


def _numbers(listing: dict[int, list[ShardFile]]) -> set[tuple[int, int]]:
    return {(shard.partition, shard.shard) for shards in listing.values() for shard in shards}
