"""`fictl publish --check-only`: what it tells of lines, and that a person sees it work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import Captured, fictl

from cluster.workload import consultations


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "events.ndjson"
    path.write_text("".join(f"{json.dumps(event)}\n" for event in consultations(1, 30)))
    return path


def test_a_check_alone_tells_also_what_segment_would_refuse(file: Path, capsys: Captured) -> None:
    event = next(consultations(1, 1))
    wrong = {**event, "event_type": "EXTRACTION_COMPLETED", "payload": {"iteration": 6}}
    file.write_text(f"{json.dumps(event)}\n{json.dumps(wrong)}\n")
    assert fictl("publish", file, "--check-only", "--json") == 1
    (refused,) = json.loads(capsys.readouterr().out)["refused_lines"]
    assert (refused["line"], refused["field"], refused["reason"]) == (2, "payload.iteration", "payload.range")


def test_a_check_that_takes_long_shows_a_bar_on_a_terminal(file: Path) -> None:
    terminal, stderr = os.openpty()
    command = [sys.executable, "-m", "cluster", "publish", "-", "--check-only", "--json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr) as running:
        os.close(stderr)
        shown = b""
        while b"checking" not in shown:
            shown += os.read(terminal, 4096)
        out, _ = running.communicate(file.read_bytes(), timeout=60)
    os.close(terminal)
    assert json.loads(out)["lines"] == 30
