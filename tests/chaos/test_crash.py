"""The crash harness: a short run of it, and that it finds what it looks for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from crash.cuts import run_cuts
from crash.reader import Verdict
from crash.stand import Stand

from stages.persist.live import LiveReader

ROOT = Path(__file__).parents[2]
RUNS = 12


def test_nothing_is_lost_to_kills_and_power_cuts(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.chaos.crash",
        "--runs",
        str(RUNS),
        "--seed",
        "7",
        "--scratch",
        str(tmp_path),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=220)
    assert run.returncode == 0, run.stderr
    summary = json.loads(run.stdout)
    assert (summary["kills"], summary["cuts"]) == (RUNS, RUNS)
    assert (summary["lost"], summary["changed"], summary["unreadable"]) == (0, 0, 0)
    assert summary["events"] > RUNS
    assert not list(tmp_path.iterdir())


def cuts(tmp_path: Path) -> Verdict:
    total = Verdict()
    for _, _, verdict in run_cuts(RUNS, 1, tmp_path):
        total.add(verdict)
    return total


def test_power_cuts_find_a_commit_that_is_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.persist.live.sync_data", lambda fd: None)
    total = cuts(tmp_path)
    assert total.lost
    assert total.unreadable


def test_power_cuts_find_a_directory_that_is_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.persist.files.sync_dir", lambda path: None)
    total = cuts(tmp_path)
    assert total.lost
    assert total.unreadable


def zero_an_event(data: bytes) -> bytes:
    at = data.index(b"message_content", len(data) // 20)
    return data[:at] + bytes(40) + data[at + 40 :]


@pytest.mark.parametrize("hurt", [zero_an_event, lambda data: data[:-1], lambda data: b""])
def test_the_reader_sees_a_shard_that_is_not_as_it_was(tmp_path: Path, hurt: Callable[[bytes], bytes]) -> None:
    stand = Stand(tmp_path / "shards")
    stand.fill(sealed=1, commits=6)
    assert stand.judge().ok
    path = stand.path(2)
    path.write_bytes(hurt(path.read_bytes()))
    verdict = stand.judge()
    assert verdict.lost
    assert not verdict.ok


def test_the_reader_sees_shards_that_changed_places(tmp_path: Path) -> None:
    stand = Stand(tmp_path / "shards")
    stand.fill(full=2)
    first, second = stand.path(1), stand.path(2)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert stand.judge().changed


def test_a_full_shard_shows_its_last_commit_though_no_other_follows_it_there(tmp_path: Path) -> None:
    stand = Stand(tmp_path / "shards")
    lane = stand.lane()
    lane.open()
    lane.append(3)
    lane.roll()
    (full,) = lane.files.to_seal
    with LiveReader(full.path) as live:
        assert live.watermark() == full.commits == 1
    lane.close()
