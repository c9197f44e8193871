"""The screen fits, shows the verdict first, and never a zero for what is not known."""

from __future__ import annotations

import pytest
from overviews import members, overview, partition, stream, waiting

from cluster.members import Unheld
from cluster.overview import Letters, Overview
from cluster.screen import BLOCKS, Page, Trends, render, spark
from cluster.status import ServerStatus
from cluster.summary import summarize
from cluster.verdict import judge
from contracts.subjects import STAGES, STREAMS, Stage

TRENDS = Trends(
    accepted_per_s=(1.0, 5.0) * 30,
    persisted_per_s=(None,) * 60,
    waiting=(0.0,) * 60,
    durable_p95_s=(0.5, None) * 30,
)


def bad() -> Overview:
    """Much is wrong at once, and everywhere numbers are large."""
    gone = tuple(
        Unheld(stage=stage, partition=p, why=f"no process of {stage} announces itself")
        for stage in STAGES
        for p in (1, 3)
    )
    lags: dict[Stage, object] = {stage: waiting(123_456_789, 4000) for stage in STAGES}
    return overview(
        servers=tuple(ServerStatus(url=f"nats://a-long-name-{n}.example.org:4222", reachable=False) for n in range(5)),
        streams=tuple(stream(name, problem="nats: timeout, and a long story why") for name in STREAMS),
        partitions=tuple(partition(n, lags, persisted=10**12) for n in range(8)),  # type: ignore[arg-type]
        members=members(paused="hash", unheld=gone),
        letters=Letters(by_stage=dict.fromkeys(STAGES, 10**9), recent=10**6),
        unread=tuple(f"partition {n}: no answer in time" for n in range(20)),
    )


def unknown() -> Overview:
    """No server was reached, and no run is on this machine."""
    return overview(
        connected=False,
        servers=(ServerStatus(url="nats://n1:4222", reachable=False),),
        streams_s=0.0,
        streams=(),
        facts=None,
        partitions=(),
        members=None,
        letters=None,
        processes=None,
        disk=None,
    )


def screen(look: Overview, width: int, height: int | None, **changes: object) -> list[str]:
    summary = summarize((look,))
    page = Page(width=width, height=height, title="/var/lib/fi", footer="q quit", trends=TRENDS, **changes)  # type: ignore[arg-type]
    return [line.plain for line in render(summary, judge(summary), page)]


@pytest.mark.parametrize("by_partition", [False, True])
@pytest.mark.parametrize("look", [overview(), bad(), unknown()], ids=["well", "bad", "unknown"])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (160, 50), (40, 10), (200, 12)])
def test_the_screen_is_as_large_as_the_terminal_and_no_line_is_wider(
    look: Overview, width: int, height: int, by_partition: bool
) -> None:
    lines = screen(look, width, height, by_partition=by_partition)
    assert len(lines) == height
    assert [line for line in lines if len(line) > width] == []
    assert lines[-1] == "q quit"


@pytest.mark.parametrize(("width", "height"), [(80, 24), (160, 50)])
def test_the_essentials_are_on_a_small_screen(width: int, height: int) -> None:
    lines = screen(overview(), width, height)
    assert lines[0].startswith("all well")
    text = "\n".join(lines)
    for essential in (
        "accepted ",
        "persisted ",
        "waiting ",
        "durable p95",
        *STAGES,
        "FI_EVENTS",
        "FI_DLQ",
        "dead letters 3",
    ):
        assert essential in text
    assert "8 live" in text
    assert "servers 3 of 3 answer" in text


def test_the_verdict_comes_first_with_its_next_step_however_small_the_screen() -> None:
    for height in (24, 10):
        lines = screen(bad(), 80, height)
        assert lines[0].startswith("NOT WELL: ")
        verdict = lines[1 : next(n for n, line in enumerate(lines) if line.startswith("  … and "))]
        assert verdict[0].startswith("1 all streams: nats: timeout")
        assert "-> bring back a majority of the servers" in " ".join(map(str.strip, verdict))


def test_without_a_height_every_problem_is_told() -> None:
    summary = summarize((bad(),))
    problems = judge(summary)
    text = " ".join(line.plain.strip() for line in render(summary, problems, Page(width=100)))
    assert len(problems) > 5
    for number, problem in enumerate(problems, 1):
        assert f"{number} {problem.what}"[:60] in text


def test_what_is_not_known_is_no_zero() -> None:
    lines = screen(unknown(), 120, 40)
    text = "\n".join(lines)
    assert lines[0].startswith("NOT WELL")
    assert "accepted ?" in text
    assert "waiting ?" in text
    assert "shards ?" in text
    assert "dead letters ?" in text
    rows = [line.split() for line in lines if line.split()[:1] in ([stage] for stage in STAGES)]
    assert [row[1:6] for row in rows] == [["?"] * 5] * 4


def test_a_percentile_over_its_budget_is_marked_without_colour() -> None:
    from overviews import histogram, process, processes

    from cluster.scrape import Metered
    from contracts.telemetry import STAGE_LATENCY

    slow = Metered(histograms={STAGE_LATENCY["hash"].name: histogram(STAGE_LATENCY["hash"], s_5_0=100)})
    looks = (overview(), overview(1, processes=processes(hash=process("hash-0", 102, slow))))
    summary = summarize(looks)
    lines = [line.plain for line in render(summary, judge(summary), Page(width=120))]
    (row,) = [line for line in lines if line.startswith("hash ")]
    assert "4.9 s !" in row
    assert "150 ms" in row


def test_a_sparkline_is_scaled_to_its_highest_value_and_leaves_gaps() -> None:
    assert spark((0.0, 25.0, None, 50.0), 10) == f"{BLOCKS[0]}{BLOCKS[4]} {BLOCKS[7]}"
    assert spark((1.0, 2.0, 3.0), 2) == spark((2.0, 3.0), 5)
    assert spark((0.0, 0.0), 5) == BLOCKS[0] * 2
