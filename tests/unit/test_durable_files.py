"""What a power cut must not take back: every file that was said to be kept, under its name, with all of its bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exporting import ALL, NAMES, expected, exported, filled_place
from shard_maker import CLUSTER, NOW_NS, filled_store
from test_dlq_letters import letter

from cluster.cli.letters import append
from contracts.events import parse_rfc3339
from stages.persist import files
from stages.persist.backup import back_up
from stages.persist.export.formats import ExportFormat
from stages.persist.keys import create_key
from stages.persist.sealed import Selection
from stages.persist.storedir import open_store


class Disk:
    """What is on it for certain: a file's bytes since they were synced, its name since its directory was.

    A file may take a name only when its bytes are there, and what was removed beside it before is gone.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._bytes: dict[int, bytes] = {}
        self._names: dict[Path, dict[str, int]] = {}
        for owner, name in ((os, "fsync"), (files, "_fdatasync")):
            patch.setattr(owner, name, self._synced(getattr(owner, name)))
        self._removed: set[Path] = set()
        rename, unlink = os.rename, os.unlink

        def checked(old: Any, new: Any) -> None:
            path = Path(old)
            assert self._bytes.get(path.stat().st_ino) == path.read_bytes(), f"{path} gets its name before its bytes"
            assert path.parent not in self._removed, f"{path} gets its name before another has lost its own"
            rename(old, new)

        def noted(path: Any, **given: Any) -> None:
            unlink(path, **given)
            self._removed.add(Path(path).parent)

        patch.setattr(os, "rename", checked)
        patch.setattr(os, "unlink", noted)

    def _synced(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(fd: int) -> None:
            real(fd)
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            if path.is_dir():
                self._names[path] = {entry.name: entry.inode() for entry in os.scandir(path)}
                self._removed.discard(path)
            else:
                self._bytes[os.fstat(fd).st_ino] = path.read_bytes()

        return call

    def holds(self, path: Path) -> bool:
        """True when a power cut now leaves the file or directory, whole."""
        inode = path.stat().st_ino
        named = self._names.get(path.parent, {}).get(path.name) == inode
        return named and (path.is_dir() or self._bytes.get(inode) == path.read_bytes())


def drop_letters(place: Path) -> set[str]:
    append(place / "dropped.ndjson", [letter()], "")
    return {"dropped.ndjson"}


def drop_more_letters(place: Path) -> set[str]:
    for _ in range(2):
        append(place / "dropped.ndjson", [letter()], "")
    return {"dropped.ndjson"}


def make_key(place: Path) -> set[str]:
    create_key(place / "key.pem")
    return {"key.pem"}


def make_store(place: Path) -> set[str]:
    open_store(place / "new" / "store", cluster_id=CLUSTER, now_ns=NOW_NS)
    return {"new", "new/store", "new/store/store.json"}


def copy_shards(place: Path) -> set[str]:
    filled_store(place / "store")
    back_up(place / "store", place / "copy", now_ns=NOW_NS)
    return {"copy", *(f"copy/{path.name}" for path in (place / "copy").glob("p*.h5"))}


def export(file_format: ExportFormat) -> Callable[[Path], set[str]]:
    def act(place: Path) -> set[str]:
        first_ns = parse_rfc3339(expected(filled_place(place))[0]["timestamp"])
        # What is so little that it stays in a buffer is not forgotten there.
        few = Selection(since_ns=first_ns, until_ns=first_ns + 1)
        for wanted in (ALL, few):
            exported(place, file_format, wanted)
        return {path.name for path in place.iterdir() if path.is_file()}

    return act


@pytest.mark.parametrize(
    "act",
    [
        *(drop_letters, drop_more_letters, make_key, make_store, copy_shards),
        *(pytest.param(export(file_format), id=file_format.name.lower()) for file_format in NAMES),
    ],
)
def test_a_power_cut_takes_nothing_that_was_said_to_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], set[str]]
) -> None:
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        kept = act(tmp_path)
    assert {name for name in kept if disk.holds(tmp_path / name)} == kept
