"""The storage benchmark: its tables say what was measured, and a tiny run of all of it goes through."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import msgspec
import pytest

from benchmarks.report import costs_ms, markdown_table, spread
from benchmarks.storage.__main__ import measure, write_results
from benchmarks.storage.classic import DESIGNS, ClassicEffort
from benchmarks.storage.ours import Effort
from benchmarks.storage.samples import MADE_UP_EVENTS, Samples
from benchmarks.storage.tables import as_markdown, by_size
from contracts.events import decode_event
from stages.hash.core import payload_hash


@pytest.fixture(scope="module")
def samples() -> Samples:
    return Samples()


def test_costs_are_in_milliseconds() -> None:
    assert costs_ms([1_000_000] * 99 + [101_000_000]) == {"p50": 1.0, "p95": 1.0, "p99": 2.0, "mean": 2.0}


def test_a_spread_names_median_and_extremes() -> None:
    assert spread([3.0, 1.0, 2000.0], 1) == "3.0 (1.0-2,000.0)"


def test_a_cell_cannot_break_a_table() -> None:
    assert markdown_table(["a", "b"], [["x|y", "1\n2"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 2 |\n"


def test_repetitions_are_gathered_by_size() -> None:
    rows = [{"size": size, "p50": cost} for size, cost in ((0, 1.0), (100, 2.0), (0, 3.0))]
    assert by_size(rows, "p50") == {0: [1.0, 3.0], 100: [2.0]}


def test_samples_are_what_the_stages_would_hand_down(samples: Samples) -> None:
    for number in (1, MADE_UP_EVENTS, MADE_UP_EVENTS + 1, 3 * MADE_UP_EVENTS + 5):
        sample = samples.event(number)
        event = decode_event(sample.record)
        line = msgspec.json.decode(sample.line)
        assert event.origin == number
        assert event.event_id == sample.event_id
        assert line["event_id"].replace("-", "") == event.event_id.hex()
        assert line["consultation_id"].replace("-", "") == event.consultation_id.hex() == sample.consultation_id.hex()
        assert msgspec.json.decode(event.payload) == line["payload"]
        assert event.audit_hash == payload_hash(event.payload)
    assert samples.event(7) == samples.event(7)


def test_samples_do_not_repeat_an_id_and_mix_their_consultations(samples: Samples) -> None:
    taken = list(samples.take(1, 3 * MADE_UP_EVENTS))
    assert len({sample.event_id for sample in taken}) == len(taken)
    runs = [len(list(run)) for _, run in groupby(taken, key=lambda sample: sample.consultation_id)]
    assert max(runs) < 20


def test_a_tiny_run_fills_every_table(tmp_path: Path) -> None:
    effort = Effort(6000, repetitions=1, long_repetitions=1, commits=5, ids=12_000, look_ups=5, shard_bytes=1 << 20)
    classic = ClassicEffort((0, 100), appends=5, cpu_s_max=5.0)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    result = measure(scratch, None, effort, classic, 5, lambda _: None)
    assert result["headline"]["plain_opens_correct"] == "5 of 5"
    assert result["headline"]["filter_bytes_per_event"] == pytest.approx(1.5, abs=0.02)
    text = as_markdown(result)
    assert all(design.name in text for design in DESIGNS)
    write_results(result, text, tmp_path / "results")
    assert (tmp_path / "results" / "storage.md").read_text() == text
    assert msgspec.json.decode((tmp_path / "results" / "storage.json").read_bytes())["headline"]
    assert (tmp_path / "results" / "storage.png").read_bytes().startswith(b"\x89PNG")
