"""Sessions a day from measured rates: the sums by hand, and what the verb says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commandline import Captured, fictl

from cluster.capacity import Measured, capacity
from contracts.errors import SettingsError

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "latest.json"

ALL = Measured(
    events_per_s=1000.0,
    workers=12,
    servers_cpus=0.8,
    stages_cpus=0.4,
    cpus=2,
    disk_write_bytes_per_s=5e6,
    disk_write_bytes_per_s_max=100e6,
    stored_bytes_per_event=250,
    free_bytes=500e9,
    keep_days=30,
    stream_bytes_per_event=1024,
    stream_bytes_max={"FI_EVENTS": 4096 * 1024**2},
    hold_s=3600,
)


def test_the_formula_is_the_domains() -> None:
    found = capacity(Measured(events_per_s=2.5, workers=4))
    # 4 workers × 2.5 events/s × 86,400 s / 20 events
    assert found.sessions_per_day == 43_200
    assert found.events_per_s == 10
    assert found.limited_by == "workers"
    assert found.unknown == ("cpu", "disk writes", "disk space", "streams")
    assert "20 events a session" in found.assumption


def test_each_resource_bounds_the_rate_and_the_tightest_comes_first() -> None:
    found = capacity(ALL)
    rates = {bound.resource: bound.events_per_s for bound in found.bounds}
    assert rates == pytest.approx(
        {
            "disk space": 771.605,  # 500e9 B / 250 B = 2e9 events, in 30 days of 86,400 s
            "FI_EVENTS": 1165.084,  # 4 GiB / 1 KiB = 4,194,304 events, in 3,600 s
            "cpu": 1666.667,  # 1,000 × 2 / (0.8 + 0.4)
            "workers": 12_000,  # 12 × 1,000
            "disk writes": 20_000,  # 1,000 × 100 / 5
        },
        abs=0.001,
    )
    assert [bound.resource for bound in found.bounds] == ["disk space", "FI_EVENTS", "cpu", "workers", "disk writes"]
    assert found.limited_by == "disk space"
    assert found.sessions_per_day == 3_333_333  # 2e9 events / 30 days / 20
    assert found.unknown == ()


def test_a_busiest_time_bounds_everything_but_the_room_on_disk() -> None:
    even, uneven = capacity(ALL), capacity(ALL, peak=3)
    sessions = {bound.resource: bound.sessions_per_day for bound in uneven.bounds}
    for bound in even.bounds:
        shrunk = 1 if bound.resource == "disk space" else 3
        assert sessions[bound.resource] == pytest.approx(bound.sessions_per_day / shrunk, abs=1)
    assert uneven.limited_by == "FI_EVENTS"
    assert "busiest time of 3 times" in uneven.assumption


def test_of_several_streams_the_smallest_counts() -> None:
    limits = {"FI_EVENTS": 4e9, "FI_HASH": 1e9}
    found = capacity(msgspec.structs.replace(ALL, stream_bytes_max=limits, free_bytes=None))
    assert found.limited_by == "FI_HASH"
    assert found.unknown == ("disk space",)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"events_per_s": 0.0}, "events_per_s = 0"),
        ({"workers": -1.0}, "workers = -1"),
        ({"servers_cpus": 0.0}, "servers_cpus = 0"),
        ({"free_bytes": float("nan")}, "free_bytes = nan"),
        ({"stream_bytes_max": {"FI_HASH": 0.0}}, "stream_bytes_max of FI_HASH = 0"),
    ],
)
def test_a_number_that_cannot_be_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        capacity(msgspec.structs.replace(ALL, **changes))


def test_a_peak_below_the_mean_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"peak = 0\.5"):
        capacity(ALL, peak=0.5)


def test_the_verb_takes_what_the_benchmark_wrote(capsys: Captured) -> None:
    kept = json.loads(RESULTS.read_text())
    for batch in (1, 16):
        assert fictl("capacity", "--from", RESULTS, "--batch", str(batch), "--json") == 0
        found = json.loads(capsys.readouterr().out)
        rate = kept["headline"][f"events_per_s_batch_{batch}"]
        assert found["events_per_s"] == rate
        assert found["sessions_per_day"] == rate * 4320
        # What was measured counts: the CPU of servers and stages for 1,000 events, against the machine's.
        spent = sorted(t["costs"]["cpu_s"]["pipeline"] for t in kept["throughput"] if t["batch"] == batch)
        cpu = next(bound for bound in found["bounds"] if bound["resource"] == "cpu")
        assert cpu["events_per_s"] == pytest.approx(1000 * kept["environment"]["cpus"] / spent[len(spent) // 2], 0.01)
        assert found["unknown"] == ["disk writes", "disk space", "streams"]


def test_limits_alone_are_to_be_given_beside_what_the_benchmark_wrote(capsys: Captured) -> None:
    limits = ("--disk-write-max", "1e9", "--free", "1e12", "--stored-bytes", "279", "--stream", "FI_EVENTS=4e9")
    assert fictl("capacity", "--from", RESULTS, *limits, "--workers", "4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["unknown"] == []
    assert found["limited_by"] != "workers"
    assert fictl("capacity", "--from", RESULTS, *limits, "--cpus", "16", "--servers-cpus", "16", "--json") == 0
    assert json.loads(capsys.readouterr().out)["limited_by"] == "FI_EVENTS"


def test_the_verb_says_what_it_assumed_and_left_out(capsys: Captured) -> None:
    assert fictl("capacity", "--rate", "1000", "--cpus", "2", "--servers-cpus", "1.5", "--stages-cpus", "1") == 0
    out = capsys.readouterr().out
    assert "3,456,000 sessions a day. Runs out first: cpu." in out
    assert "Assumed: 20 events a session, at an even rate all day" in out
    assert "Not known, so not counted: disk writes, disk space, streams." in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "give either --rate EVENTS_PER_S or --from FILE"),
        (("--rate", "5", "--from", str(RESULTS)), "give either"),
        (("--from", str(RESULTS), "--batch", "7"), "--batch 7"),
        (("--from", __file__), "not what `make bench` writes"),
        (("--rate", "5", "--stream", "FI_EVENTS"), "--stream FI_EVENTS: write NAME=BYTES"),
        (("--rate", "0"), "'--rate': 0 is not above 0"),
        (("--from", str(RESULTS), "--cpus", "0"), "'--cpus': 0 is not above 0"),
        (("--rate", "1e308"), "workers (1 × 1"),
        (("--rate", "5", "--event-bytes", "1e-320", "--stream", "X=1e9"), "X (holds inf events"),
        (("--rate", "5", "--session-events", "1e-320"), "more than can be counted"),
    ],
)
def test_the_verb_refuses_what_it_cannot_use(arguments: tuple[str, ...], named: str, capsys: Captured) -> None:
    assert fictl("capacity", *arguments) == 2
    assert named in capsys.readouterr().err


def test_a_benchmark_file_that_is_not_there_is_named(tmp_path: Path, capsys: Captured) -> None:
    assert fictl("capacity", "--from", tmp_path / "none.json") == 1
    assert "none.json: No such file" in capsys.readouterr().err


def test_the_verbs_help_has_an_example(capsys: Captured) -> None:
    assert fictl("capacity", "--help") == 0
    assert "Example: fictl capacity --from benchmarks/results/latest.json" in " ".join(capsys.readouterr().out.split())
