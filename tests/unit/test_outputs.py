"""What a command writes for people takes no place of the store's own files, and is whole or not there."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
from commandline import fictl
from exporting import filled_place

from stages.persist import output
from stages.persist.output import OutputError, write_output
from stages.persist.store import EventStore

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return filled_place(tmp_path)


def an_event(place: Path) -> UUID:
    with EventStore(place) as store:
        return UUID(bytes=next(iter(store.iterate())).event.event_id)


def verb(name: str, place: Path) -> list[str | Path]:
    if name == "prove":
        return ["prove", str(an_event(place)), "--store", place]
    if name == "consistency":
        return ["consistency", "0", "--from", "1", "--store", place]
    return ["dlq", "drop", "1", "--yes", "--nats", "nats://127.0.0.1:1"]


@pytest.mark.parametrize("name", ["prove", "consistency", "dlq drop"])
@pytest.mark.parametrize("there", ["sealed", "live", "store.json", "new"])
def test_no_command_writes_over_a_file_of_the_store(name: str, there: str, place: Path, capsys: Captured) -> None:
    before = {path: path.read_bytes() for path in (place / "shards").iterdir()}
    shards = sorted(path for path in before if path.suffix == ".h5")
    file = {
        "sealed": next(path for path in shards if ".live" not in path.name),
        "live": next(path for path in shards if ".live" in path.name),
        "store.json": place / "shards" / "store.json",
        "new": place / "shards" / "p007-00000001.live.h5",
    }[there]
    assert fictl(*verb(name, place), "--output", file) == 2
    assert f"{file}: is a name that the store itself uses; choose another" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (place / "shards").iterdir()} == before


def test_letters_are_not_appended_to_a_shard_that_a_link_leads_to(place: Path, capsys: Captured) -> None:
    shard = next((place / "shards").glob("*.live.h5"))
    (link := place / "letters.ndjson").symlink_to(shard)
    assert fictl(*verb("dlq drop", place), "--output", link) == 2
    assert f"{link}: is a name that the store itself uses" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prove", "consistency"])
def test_a_place_that_cannot_be_is_told_before_anything_is_read(name: str, place: Path, capsys: Captured) -> None:
    (link := place / "link.json").symlink_to(place / "elsewhere.json")
    for given, told in (
        (place, f"{place}: is a directory; name a file in it"),
        (place / "none" / "proof.json", f"there is no directory {place / 'none'}; make it first"),
        ("/dev/full", "/dev/full: is not a regular file"),
        (link, f"{link}: is not a regular file"),
    ):
        assert fictl(*verb(name, place), "--output", given) == 2
        err = capsys.readouterr().err
        assert told in err
        assert len(err.splitlines()) == 1


def test_a_file_that_the_disk_refuses_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:3])
        raise OSError(28, "No space left on device")

    (file := tmp_path / "proof.json").write_bytes(b"an earlier proof")
    monkeypatch.setattr(output, "write_new_file", full)
    with pytest.raises(OutputError, match=r"proof.json: was not written, the disk refused \(No space left on device\)"):
        write_output(file, b"a new proof")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("proof.json", b"an earlier proof")]
