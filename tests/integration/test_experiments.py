"""The experiments run from end to end on a real cluster, a few events each, and keep what they measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.experiments.__main__ import JSON, MARKDOWN, read_kept, run
from benchmarks.experiments.catalogue import picture_of
from benchmarks.experiments.curves import BATCHES
from benchmarks.experiments.harness import Bench, Case, Setup, measure_cases, new_seeds
from benchmarks.experiments.messages import sized_messages
from benchmarks.experiments.soak import soak, write_results
from benchmarks.load import Message
from contracts.subjects import STAGES

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]


async def test_experiments_keep_their_own_sections_and_feed_the_model(tmp_path: Path) -> None:
    results = tmp_path / "results"
    await run(["senders", "ceilings", "batch"], {}, 1, True, tmp_path, results)
    measured = await run(["model"], read_kept(results), 1, True, tmp_path, results)
    assert list(measured) == ["model"]
    kept = read_kept(results)
    assert list(kept) == ["senders", "ceilings", "batch", "model"]
    assert all(row["events_per_s"] > 0 for row in kept["ceilings"]["rows"])
    assert [row["at"] for row in kept["batch"]["rows"]] == list(BATCHES)
    for row in kept["batch"]["rows"]:
        assert row["full"]["events_per_s"] > 0
        assert set(row["full"]["cpu_us"]) == {*STAGES, "server", "load"}
    assert {file.name for file in results.iterdir()} == {JSON, MARKDOWN, picture_of("batch")}
    assert "breaks first" in (results / MARKDOWN).read_text()


async def test_pipelines_with_switches_carry_everything(tmp_path: Path) -> None:
    switches = ("no-uvloop", "rare-gc", "no-fdatasync")
    setup = Setup((("partitions", 2), ("replicas", 1)), 2, 1, switches)

    def make(seed: int, count: int) -> list[Message]:
        return sized_messages(seed, count, 300, consultations=20)

    cases = [Case("lazy", 1, setup._replace(lazy=True), make, 2_000, 100, backlog=4_000)]
    (row,) = await measure_cases(Bench(tmp_path, True, 1, lambda _: None, {}, new_seeds()), cases)
    assert row["full"]["events"] == 50
    assert row["paced"]["durable_ms"]["p50"] > 0
    assert row["full"]["messages"]["FI_EVENTS"] == 1


async def test_a_soak_samples_every_process_and_says_why_it_ended(tmp_path: Path) -> None:
    result = await soak(tmp_path, 3, 200, 4, 1, lambda _: None)
    assert result["ended"].endswith("of disk are in use")
    assert result["replaced"] == []
    assert set(result["verdicts"]) == {"n1", "n2", "n3", *(f"{stage}-0" for stage in STAGES), "load"}
    assert result["events"] == 200 * len(result["windows"])
    write_results(result, tmp_path / "results")
    assert {file.name for file in (tmp_path / "results").iterdir()} == {"soak.json", "soak.png"}
