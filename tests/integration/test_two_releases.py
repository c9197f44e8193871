"""The last release's processes and today's on one stream: a rolling upgrade under load, and the way back.

The last release is the tree of `RELEASE`, run with this environment's libraries. In a clone without that commit there
is nothing to compare with, and the tests are skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import Load, Pipeline, fictl, settings, under_load, workload

from cluster.apply import apply
from contracts.frames import DeflatedHead, decode_frame_head
from contracts.subjects import HOPS, STAGES, Stage

ROOT = Path(__file__).resolve().parents[2]
RELEASE = "1aa69b8"
"""Move it on with each release."""
GOLDEN = ROOT / "tests" / "conformance" / "golden"

STRUCTS = {
    "frame": ("contracts.frames", "decode_frame", "frame.1.bin"),
    "empty frame": ("contracts.frames", "decode_packed_frame", "frame.1.empty.bin"),
    "event": ("contracts.events", "decode_event", "event.1.stored.bin"),
    "receipt": ("contracts.receipts", "decode_receipt", "receipt.1.signed.bin"),
    "takeover": ("contracts.receipts", "decode_receipt", "receipt.1.takeover.bin"),
    "receipt with rows": ("contracts.receipts", "decode_receipt", "receipt.1.unsealed.bin"),
    "seal record": ("contracts.receipts", "decode_seal", "seal.1.signed.bin"),
    "member": ("contracts.membership", "decode_member", "member.1.json"),
    "shard header": ("stages.persist.header", "decode_header", "sealed-header.1.bin"),
    "live shard header": ("stages.persist.header", "decode_header", "live-header.1.bin"),
}
"""What processes of two releases read of each other: today's encoder writes these files (`test_golden.py`)."""

_READ = """
import importlib, json, pathlib, sys
import contracts.frames
answers = {"tree": contracts.frames.__file__}
for struct, (module, name, path) in json.loads(sys.argv[1]).items():
    more = [pathlib.Path("x.h5")] if name == "decode_header" else []
    try:
        getattr(importlib.import_module(module), name)(pathlib.Path(path).read_bytes(), *more)
        answers[struct] = ""
    except Exception as error:
        answers[struct] = f"{type(error).__name__}: {error}"
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def last_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages as they were."""
    known = subprocess.run(["git", "cat-file", "-e", f"{RELEASE}^{{commit}}"], cwd=ROOT, capture_output=True)
    if known.returncode != 0:
        pytest.skip(f"the tree of the last release, {RELEASE}, is not in this clone")
    tree = tmp_path_factory.mktemp("release")
    archive = subprocess.run(
        ["git", "archive", RELEASE, "contracts", "stages", "cluster"], cwd=ROOT, capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    return tree


def python_of(tree: Path) -> list[str]:
    """Python that imports our packages from `tree` alone: not from its working directory, nor as installed."""
    return ["env", f"PYTHONPATH={tree}", sys.executable, "-P"]


def test_the_last_release_reads_every_struct_that_this_one_writes(last_release: Path) -> None:
    """By name, so that a rolling upgrade that fails below says what it failed of."""
    asked = {struct: (module, name, str(GOLDEN / file)) for struct, (module, name, file) in STRUCTS.items()}
    done = subprocess.run(
        [*python_of(last_release), "-c", _READ, json.dumps(asked)], capture_output=True, text=True, check=True
    )
    answers = json.loads(done.stdout)
    assert Path(answers.pop("tree")).is_relative_to(last_release)
    assert {struct: error for struct, error in answers.items() if error} == {}


class Mixed:
    """Which release each process is of: what it is started as next, by stage."""

    def __init__(self, pipeline: Pipeline, release: Path, *today: str) -> None:
        """Args: `today` are variables for today's processes alone, as ``NAME=VALUE``."""
        self._pipeline = pipeline
        self._today = today
        self._trees = {"last": release, "today": ROOT}
        self.next: dict[Stage, str] = dict.fromkeys(STAGES, "last")
        pipeline.supervisor._command = self._command

    def _command(self, stage: Stage, name: str) -> list[str]:
        pipeline = self._pipeline
        urls = [part for url in pipeline.supervisor.urls for part in ("--nats", url)]
        run = ["-m", "cluster", "run", stage, *urls, "--name", name, "--shards", str(pipeline.shards)]
        release = self.next[stage]
        variables = ["env", *self._today] if release == "today" else []
        return [*variables, *python_of(self._trees[release]), *run]

    def running(self) -> dict[str, str]:
        """Process → the release that it really runs."""
        names = {str(tree): name for name, tree in self._trees.items()}
        found = {}
        for process in self._pipeline.supervisor.processes:
            if process.kind != "server" and process.pid is not None:
                variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                tree = next(row for row in variables if row.startswith(b"PYTHONPATH=")).decode().partition("=")[2]
                found[process.name] = names[tree]
        return found


def refusals(logs: str) -> list[str]:
    """What the processes said that they cannot read."""
    return [line for line in logs.splitlines() if "cannot read on" in line or "does not belong there" in line]


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
async def test_a_rolling_upgrade_and_the_way_back_under_load_lose_double_and_reorder_nothing(
    last_release: Path, tmp_path: Path
) -> None:
    pipeline = Pipeline(tmp_path, settings(), {"segment": 2, "hash": 2})
    mixed = Mixed(pipeline, last_release)
    load = Load(workload(seed=31, events=4000))
    seen = []
    async with pipeline:
        assert set(mixed.running().values()) == {"last"}
        async with under_load(load, pipeline.client, rate_per_s=150):
            # Upwards in flow order and against it: every neighbour is met as reader and as writer.
            for release, order in (("today", STAGES), ("last", STAGES[::-1]), ("today", STAGES[::-1])):
                for stage in order:
                    await load.reached(min(len(load.lines), 250 * (1 + len(seen))))
                    mixed.next[stage] = release
                    await pipeline.supervisor.restart(stage)
                    seen.append(mixed.running())
                    assert all(found == release for name, found in seen[-1].items() if name.startswith(f"{stage}-")), (
                        seen[-1]
                    )
        await pipeline.assert_whole(load)
        logs = await pipeline.logs(10_000)
    assert any(set(row.values()) == {"last", "today"} for row in seen)
    assert set(seen[-1].values()) == {"today"}
    assert refusals(logs) == []


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
async def test_frames_that_the_last_release_cannot_read_hold_up_no_update_and_go_with_the_hops_on_the_way_back(
    last_release: Path, tmp_path: Path
) -> None:
    """As README, "Updates", tells operators."""
    pipeline = Pipeline(tmp_path, settings())
    # From ADR 24 on. Without a backlog few frames are large enough.
    mixed = Mixed(pipeline, last_release, "FI_FRAME_DEFLATE_BYTES_MIN=1")
    load = Load(workload(seed=32, events=20_000, padding_bytes=400))
    async with pipeline:
        async with under_load(load, pipeline.client, rate_per_s=150):
            await load.reached(100)
            mixed.next = dict.fromkeys(STAGES, "today")
            code, _, err = await fictl(pipeline, "restart")
            assert (code, set(mixed.running().values())) == (0, {"today"}), err
            assert refusals(await pipeline.logs(10_000)) == []

            await load.reached(load.accepted + 100)
            for stage in STAGES:
                await pipeline.supervisor.stop_stage(stage)
            left = [await pipeline.api.last_message(hop, ">") for hop in HOPS]
            assert all(frame is not None and is_deflated(frame.data) for frame in left)
            for hop in HOPS:
                await pipeline.client.jetstream(timeout=10).delete_stream(hop)
            await apply(pipeline.client, pipeline.settings)
            mixed.next = dict.fromkeys(STAGES, "last")
            for stage in STAGES:
                await pipeline.supervisor.start_stage(stage)
            assert set(mixed.running().values()) == {"last"}
        await pipeline.assert_whole(load)
        assert refusals(await pipeline.logs(10_000)) == []


def is_deflated(frame: bytes) -> bool:
    return isinstance(decode_frame_head(frame), DeflatedHead)
