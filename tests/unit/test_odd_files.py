"""What lies in a store beside its shards, and what it is called, is somebody's choice: verify reads on and says so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import Captured, fictl
from shard_maker import NOW_NS, filled_store

from cluster.cli.common import FAILED, USAGE
from contracts.backups import BACKUP_FILE
from stages.persist.backup import back_up, copied_shard
from stages.persist.files import SMALL_BYTES_MAX, read_small
from stages.persist.header import read_sealed_header
from stages.persist.live import LiveShard
from stages.persist.records import record_path
from stages.persist.store import EventStore
from stages.persist.storedir import STORE_FILE, read_store

PREPARED = "p003-00000009.next.h5"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled_store(tmp_path_factory.mktemp("made") / "store")[0].directory


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """Under a name that is no text."""
    return Path(shutil.copytree(made, tmp_path / os.fsdecode(b"st\xf8re")))


def first_sealed(store: Path) -> Path:
    return min(store.glob("p003-00000001-*.h5"))


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "name that is no text": (
        lambda store: (store / os.fsdecode(b"\xff.h5")).touch(),
        "·.h5: file name: is not the name of a shard\n",
    ),
    "name with lines": (
        lambda store: (store / "\x1b[2J\n4 shards: all is well\n.h5").touch(),
        "·[2J·4 shards: all is well·.h5: file name: is not the name of a shard\n",
    ),
    "manifest whose name is no text": (
        lambda store: (store / os.fsdecode(b"\xff.csv.manifest.json")).touch(),
        "·.csv.manifest.json: manifest: is not a manifest",
    ),
    "pipe for a record": (
        lambda store: os.mkfifo(record_path(first_sealed(store))),
        ".seal.json cannot be read ([Errno 22] is not a file",
    ),
    "pipe for a prepared shard": (
        lambda store: os.mkfifo(store / PREPARED),
        f"{PREPARED}: header: is no prepared shard ([Errno 22] is not a file",
    ),
    "directory for a prepared shard": (
        lambda store: (store / PREPARED).mkdir(),
        f"{PREPARED}: header: is no prepared shard ([Errno 22] is not a file",
    ),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_verify_reads_on_and_names_it_in_one_line(
    store: Path, capsys: Captured, name: str, options: tuple[str, ...]
) -> None:
    make, expected = ODD[name]
    make(store)
    assert fictl("verify", store, *options) == 4
    out, err = capsys.readouterr()
    assert err == ""
    if options:
        assert '"ok":false' in out
        assert len(out.splitlines()) == 1
    else:
        assert expected in out
        assert "4 shards, 91 events" in out
        assert "\x1b" not in out


@pytest.mark.parametrize("shard", ["sealed", "live"])
def test_nobody_waits_for_a_pipe_under_a_shards_name(store: Path, tmp_path: Path, capsys: Captured, shard: str) -> None:
    path = first_sealed(store) if shard == "sealed" else next(store.glob("*.live.h5"))
    path.unlink()
    os.mkfifo(path)
    assert fictl("verify", store) == 4
    assert f"{path.name}: file: [Errno 22] is not a file" in capsys.readouterr().out
    with EventStore(store) as events, pytest.raises(OSError, match="is not a file"):
        events.event(bytes(16))
    with pytest.raises(OSError, match="is not a file"):
        (read_sealed_header if shard == "sealed" else LiveShard)(path)
    done = back_up(store, tmp_path / "copy", now_ns=NOW_NS)
    assert [problem.shard for problem in done.problems] == ([path.name] if shard == "sealed" else [])
    assert done.copied == (2 if shard == "sealed" else 3)


@pytest.mark.parametrize("name", [STORE_FILE, BACKUP_FILE])
def test_nobody_waits_for_a_pipe_under_the_name_of_a_stores_own_file(made: Path, tmp_path: Path, name: str) -> None:
    # Its path is logged, and test processes tell each other what was, as text.
    store = Path(shutil.copytree(made, tmp_path / "store"))
    (store / name).unlink(missing_ok=True)
    os.mkfifo(store / name)
    if name == STORE_FILE:
        with pytest.raises(OSError, match="is not a file"):
            read_store(store)
    else:
        assert copied_shard(store, 3) == 0


def test_a_store_whose_path_is_no_text_is_verified(store: Path, capsys: Captured) -> None:
    assert fictl("verify", store) == 0
    assert "4 shards, 91 events: all is well" in capsys.readouterr().out


@pytest.mark.parametrize(
    "verb",
    [
        ("check-proof", "FILE"),
        ("check-proof", os.devnull, "--public-key", "FILE"),
        ("capacity", "--from", "FILE"),
        ("policy", "set", "--file", "FILE"),
        ("dlq", "replay", "1", "--yes", "--body", "FILE"),
        ("--config", "FILE", "config", "show"),
    ],
    ids=lambda verb: " ".join(verb).replace(os.devnull, "null"),
)
def test_what_is_to_hold_something_small_is_not_read_for_ever(
    tmp_path: Path, capsys: Captured, verb: tuple[str, ...]
) -> None:
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, SMALL_BYTES_MAX + 1)
    assert fictl(*(str(large) if word == "FILE" else word for word in verb)) in (FAILED, USAGE)
    assert "File too large" in capsys.readouterr().err


def test_a_device_that_never_ends_is_given_up() -> None:
    with pytest.raises(OSError, match="File too large"):
        read_small(Path("/dev/zero"))
