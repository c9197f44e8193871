"""What came from outside does not steer the terminal it is shown on, whichever verb shows it."""

from __future__ import annotations

import sys
from pathlib import Path
from uuid import UUID

import msgspec
import pytest
from commandline import Captured, fictl
from shard_maker import PartitionMaker, make_event, new_store

from cluster.cli.demo import _show
from cluster.demo import DemoResult
from contracts.events import encode_event

STEERING = '{"message_content":"a\x9b31mb\x7f\u202ec"}'


def test_events_on_a_terminal(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = PartitionMaker(new_store(tmp_path), 0)
    event = msgspec.structs.replace(make_event(maker.rng, 1), payload=STEERING.encode())
    live = maker.begin()
    live.append([encode_event(event)], prev_origin=0, origin=1, duplicates=0, dead_lettered=0, committed_ns=1)
    live.sync()
    live.set_watermark(live.commits)
    maker.close()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert fictl("events", str(UUID(bytes=event.consultation_id)), "--dir", tmp_path) == 0
    assert_plain(capsys.readouterr().out)


def test_the_consultation_that_demo_reads_back(capsys: Captured) -> None:
    latency = dict.fromkeys(("p50", "p95", "p99"), 1.0)
    event = {
        "consultation_id": "x",
        "timestamp": "t",
        "event_type": "MESSAGE_RECEIVED",
        "audit_hash": "ab",
        "payload": STEERING.encode(),
    }
    result = DemoResult(
        published=1,
        accepted=1,
        duplicates=0,
        persisted=1,
        dead_lettered=0,
        lost=0,
        events_per_s=1.0,
        latency_ms={"accepted": latency, "durable": latency, "stages": {}},
        shards=[],
        verified=True,
        refused=[],
        problems=[],
        consultation=[event],
        store="s",
    )
    _show(result)
    assert_plain(capsys.readouterr().out)


def assert_plain(out: str) -> None:
    assert not set(STEERING) & set(out) - set(map(chr, range(32, 127)))
    assert "·" in out
