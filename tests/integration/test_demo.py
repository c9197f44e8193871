"""`fictl demo` as a person runs it: a process of its own, its output, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster.state import STATE_FILE

EVENTS = 600
LIMIT_S = 150
PERCENTILES = {"p50", "p95", "p99"}


def demo(directory: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cluster", "demo", "--dir", str(directory), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run_json(directory: Path, *options: str) -> tuple[int, dict[str, Any]]:
    process = demo(directory, "--events", str(EVENTS), "--json", *options)
    out, err = process.communicate(timeout=LIMIT_S)
    assert out.count(b"\n") == 1, err.decode()
    return process.returncode, json.loads(out)


def running_in(directory: Path) -> list[str]:
    """Command lines of processes that name the directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(directory).encode() in line:
                found.append(line.replace(b"\0", b" ").decode())
    return found


def test_the_demo_accounts_for_every_event_and_a_second_run_finds_only_duplicates(tmp_path: Path) -> None:
    code, first = run_json(tmp_path)
    assert code == 0
    assert list(first) == [
        "published",
        "accepted",
        "duplicates",
        "persisted",
        "dead_lettered",
        "lost",
        "events_per_s",
        "latency_ms",
        "shards",
        "verified",
    ]
    assert (first["published"], first["accepted"], first["persisted"]) == (EVENTS, EVENTS, EVENTS)
    assert (first["duplicates"], first["dead_lettered"], first["lost"], first["verified"]) == (0, 0, 0, True)
    assert first["events_per_s"] > 0
    latency = first["latency_ms"]
    assert set(latency) == {"accepted", "durable", "stages"}
    assert set(latency["stages"]) == {"ingest", "segment", "hash", "persist"}
    for row in (latency["accepted"], latency["durable"], *latency["stages"].values()):
        assert set(row) == PERCENTILES
        assert 0 < row["p50"] <= row["p95"] <= row["p99"]
    assert all(Path(shard).is_file() for shard in first["shards"])
    assert running_in(tmp_path) == []

    code, second = run_json(tmp_path)
    assert code == 0
    assert (second["accepted"], second["persisted"], second["duplicates"]) == (EVENTS, 0, EVENTS)
    # Nothing became durable this time: that took no 0 ms.
    assert set(second["latency_ms"]["durable"].values()) == {None}
    assert {value for stage in second["latency_ms"]["stages"].values() for value in stage.values()} == {None}
    assert (second["lost"], second["verified"]) == (0, True)


def test_the_demo_shows_a_person_counts_latencies_shards_and_a_consultation(tmp_path: Path) -> None:
    source = tmp_path / "input.ndjson"
    good = {
        "consultation_id": "0a0a0a0a-0000-4000-8000-000000000001",
        "event_type": "MESSAGE_RECEIVED",
        "payload": {"message_content": "Buenos días, doctora", "message_role": "user"},
        "metadata": {"user_id": "u", "session_id": "s", "site_id": "clinic-1"},
    }
    source.write_text(json.dumps(good) + "\nnot json\n" + json.dumps({**good, "event_type": "NO_SUCH"}) + "\n")
    process = demo(tmp_path / "run", "--input", str(source))
    out, err = process.communicate(timeout=LIMIT_S)
    text = out.decode()
    assert process.returncode == 0, err.decode()
    for words in (
        "persisted",
        "durable",
        "budget p95",
        "read back",
        "MESSAGE_RECEIVED",
        "line 2",
        "line 3",
        "verified",
    ):
        assert words in text, text


def test_ctrl_c_ends_the_demo_and_leaves_nothing_running(tmp_path: Path) -> None:
    process = demo(tmp_path, "--events", "100000", "--rate", "50")
    assert process.stderr is not None
    state = tmp_path / STATE_FILE
    while b'"ready"' not in (state.read_bytes() if state.exists() else b""):
        assert process.poll() is None
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert running_in(tmp_path) == []
