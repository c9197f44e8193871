"""`fictl export` and `fictl verify` of what it wrote."""

from __future__ import annotations

import getpass
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import msgspec
import pytest
from commandline import Captured, fictl
from exporting import expected, filled_place

from cluster.testing.disk import flip
from contracts.events import format_rfc3339
from stages.persist.export.manifest import MANIFEST_SUFFIX, manifest_path
from stages.persist.sealed import Selection


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return filled_place(tmp_path)


def test_without_output_the_events_go_to_stdout_and_nothing_else_is_said(
    place: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert fictl("export", place) == 0
    printed = capfdbinary.readouterr()
    assert [json.loads(line) for line in printed.out.splitlines()] == expected(place)
    assert printed.err == b""
    assert fictl("export", place, "--format", "csv", "--site", "clinic_7") == 0
    lines = capfdbinary.readouterr().out.split(b"\r\n")
    assert lines[0].startswith(b"event_id,consultation_id,timestamp,")
    assert len(lines) - 2 == len(expected(place, Selection(site="clinic_7")))
    assert [path.name for path in place.iterdir()] == ["shards"]


def test_every_option_reaches_the_file_and_its_manifest(place: Path, capsys: Captured) -> None:
    event = expected(place)[30]
    output = place / "some.h5"
    chosen = ["--site", event["site"], "--type", event["event_type"], "--consultation", event["consultation_id"]]
    span = ["--since", event["timestamp"], "--until", format_rfc3339(2_000_000_000_000_000_000)]
    said = ["--purpose", "audit 12", "--who", "ana", "--json"]
    assert fictl("export", place, "--format", "hdf5-consultations", "--output", output, *chosen, *span, *said) == 0
    printed = capsys.readouterr()
    manifest = json.loads(printed.out)
    assert manifest == json.loads(manifest_path(output).read_bytes())
    assert manifest["filters"] == {
        "site": event["site"],
        "event_type": event["event_type"],
        "since": event["timestamp"],
        "until": span[-1],
        "consultation_id": event["consultation_id"],
    }
    assert (manifest["who"], manifest["purpose"], manifest["file"]) == ("ana", "audit 12", "some.h5")
    assert f"{manifest['events']} events written to {output}" in printed.err
    with h5py.File(output) as file:
        assert list(file["consultations"]) == [event["consultation_id"]]
        first = json.loads(file[f"consultations/{event['consultation_id']}/events"].asstr()[0])
    assert first == event


def test_who_is_the_login_name_when_not_said(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "rosa")
    assert fictl("export", place, "--output", place / "a", "--json") == 0
    assert json.loads(capsys.readouterr().out)["who"] == "rosa"

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert fictl("export", place, "--output", place / "a", "--json") == 0
    assert json.loads(capsys.readouterr().out)["who"] == f"uid {os.getuid()}"


@pytest.mark.parametrize("name", ["shards/store.json", "shards", "missing/events.csv"])
def test_an_output_that_cannot_be_is_refused_with_a_next_step(place: Path, name: str, capsys: Captured) -> None:
    assert fictl("export", place, "--output", place / name) == 2
    err = capsys.readouterr().err
    assert name in err
    assert "choose another" in err or "name a file" in err


def test_an_argument_that_is_kept_as_text_must_be_text(place: Path, capsys: Captured) -> None:
    assert fictl("export", place, "--output", place / "a.csv", "--purpose", os.fsdecode(b"audit \xff")) == 2
    assert capsys.readouterr().err == "fi: the argument 'audit \\udcff' is not UTF-8, and cannot be used here\n"
    assert {path.name for path in place.iterdir()} == {"shards"}


def test_a_link_or_pipe_is_not_replaced_by_the_export(place: Path, capsys: Captured) -> None:
    kept = place / "kept.csv"
    kept.write_text("kept")
    link, dangling, pipe = place / "link.csv", place / "dangling.csv", place / "pipe"
    link.symlink_to(kept)
    dangling.symlink_to(place / "nowhere")
    os.mkfifo(pipe)
    before = {path.name for path in place.iterdir()}
    for output in (link, dangling, pipe):
        assert fictl("export", place, "--output", output) == 2
        assert "leave --output out for stdout" in capsys.readouterr().err
    assert {path.name for path in place.iterdir()} == before
    assert (link.is_symlink(), dangling.is_symlink(), pipe.is_fifo()) == (True, True, True)
    assert kept.read_text() == "kept"


def test_verify_takes_the_file_or_its_manifest_and_exits_4_naming_what_is_wrong(place: Path, capsys: Captured) -> None:
    output = place / "all.csv"
    assert fictl("export", place, "--format", "csv", "--output", output, "--who", "ana") == 0
    for path in (output, manifest_path(output)):
        assert fictl("verify", path) == 0
        assert "all.csv: 142 events, exported " in capsys.readouterr().out
    assert fictl("verify", place) == 0
    assert "142 events, 1 exports: all is well" in capsys.readouterr().out
    flip(output, 1000)
    for path in (output, manifest_path(output), place):
        assert fictl("verify", path) == 4
        assert "all.csv.manifest.json: all.csv: was changed" in capsys.readouterr().out
    output.unlink()
    assert fictl("verify", output, "--json") == 4
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["problems"]) == (False, [{"where": "all.csv", "what": "is missing"}])
    assert report["manifest"]["events"] == 142


def test_a_file_without_a_manifest_cannot_be_verified(place: Path, capsys: Captured) -> None:
    (place / "x.csv").write_text("a")
    assert fictl("verify", place / "x.csv") == 1
    assert "fictl export --output" in capsys.readouterr().err
    assert fictl("export", place, "--output", place / "x.csv") == 0
    assert fictl("verify", place / "x.csv", "--receipts") == 2
    assert fictl("verify", place / "x.csv", "--public-key", "ab" * 32) == 2


def test_an_export_stopped_by_a_signal_leaves_no_file_under_its_name(place: Path) -> None:
    # Stops itself in the middle of writing, so that nothing depends on time.
    code = (
        "import os, signal, sys, cluster.cli\n"
        "from stages.persist.export import formats, write\n"
        "def stop(found, file):\n"
        "    for number, stored in enumerate(found):\n"
        "        file.write(b'x')\n"
        "        if number == 50: os.kill(os.getpid(), int(sys.argv[1]))\n"
        "write._STREAMS[formats.ExportFormat.NDJSON] = stop\n"
        # What runs the tests in the background may have it ignored; a person's shell does not.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "cluster.cli.main(sys.argv[2:])\n"
    )
    output = place / "all.ndjson"
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        command = [sys.executable, "-c", code, str(int(sent)), "export", str(place), "--output", str(output)]
        assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode != 0
        names = {path.name for path in place.iterdir()}
        assert not names & {output.name, output.name + MANIFEST_SUFFIX}
        assert all(name.endswith(".tmp") for name in names - {"shards"})
        assert sent is not signal.SIGINT or names == {"shards"}


class Screen(io.StringIO):
    """What was written to it; `shows` is set once a bar's title was."""

    def __init__(self) -> None:
        super().__init__()
        self.shows = threading.Event()

    def write(self, text: str) -> int:
        if "exporting" in text:
            self.shows.set()
        return super().write(text)


@pytest.mark.parametrize("told", [False, True])
def test_a_bar_shows_after_its_delay_whether_it_is_told_something_or_not(
    monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    with bar_on(monkeypatch, delay_s=0.01) as (tell, screen):
        if told:
            tell(0.25, 1.0)
        assert screen.shows.wait(60)
    assert ("25%" in screen.getvalue()) == told


def test_a_bar_within_another_shows_nothing_and_one_after_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.cli import common

    for _ in range(2):
        with bar_on(monkeypatch, delay_s=3600.0):
            (outer,) = waiting_bars()
            with common.progress_bar("connecting") as tell:
                tell(0.75, 1.0)
                assert waiting_bars() == [outer]
        assert waiting_bars() == []


@pytest.mark.parametrize(("delay_s", "terminal"), [(3600.0, True), (0.0, False)])
def test_no_bar_shows_before_its_delay_or_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, delay_s: float, terminal: bool
) -> None:
    with bar_on(monkeypatch, delay_s, terminal) as (tell, screen):
        tell(0.25, 1.0)
    assert not screen.shows.is_set()
    assert waiting_bars() == []


def waiting_bars() -> list[threading.Thread]:
    """What will show a bar when its delay is over."""
    return [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


@contextmanager
def bar_on(
    monkeypatch: pytest.MonkeyPatch, delay_s: float, terminal: bool = True
) -> Iterator[tuple[Callable[[float, float], None], Screen]]:
    from rich.console import Console

    from cluster.cli import common

    screen = Screen()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(common, "console", lambda stderr: Console(file=screen, force_terminal=True))
    monkeypatch.setattr(common, "PROGRESS", msgspec.structs.replace(common.PROGRESS, s=delay_s))
    with common.progress_bar("exporting") as tell:
        yield tell, screen
