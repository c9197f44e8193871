"""A mutant that survives is a hole in the suite: each rule is taken out of the code, and a run must convict the rest.

A mutant is a patch of the source (`mutants/*.patch`). It must apply without fuzz: when the code it speaks of changes,
it is written anew. The first seed that convicts it ends the search.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import pytest

ROOT = Path(__file__).resolve().parents[2]
PATCHES = Path(__file__).with_name("mutants")
PACKAGES = ("contracts", "stages", "cluster")


class Mutant(NamedTuple):
    """What a patch takes away, and the seeds among which one convicts it. `quick`: one of the first does.

    `among`: the kind of fault that it is aimed at, where it is rare among all.
    """

    without: str
    seeds: int
    quick: bool = False
    among: str = ""


VERDICTS = (
    "not drained",
    "are settled",
    "is nowhere",
    "is stored again",
    "is stored after",
    "dead-lettered twice",
    "both stored and dead-lettered",
    "the receipt has",
    "should not be",
    "does not hold",
)
"""What the checker and the books say of events. A mutant that merely crashes is not convicted by them."""

BESIDE_ONE_THAT_HANGS: Final = "a server's disk is damaged beside one that hangs"
MUTANTS = {
    "copies-do-not-count": Mutant("FI_EVENTS keeps what no backup has", 200, among="store lost"),
    "counting-anew-is-not-seen": Mutant("a FI_EVENTS that counts anew is not read", 60, among="FI_EVENTS rolled back"),
    "duplicates-forgotten": Mutant("rule 4: ids seen before", 60, quick=True),
    "fenced-writer-goes-on": Mutant("rule 2: who is refused reads the checkpoint again", 300, among="server hangs"),
    "gaps-are-not-seen": Mutant("rule 3: the consumer's sequence is checked", 160, quick=True),
    "going-back-is-not-seen": Mutant(
        "a stage sees that its partition went back", 120, among="store lost after all servers restarted"
    ),
    "holes-are-never-purged": Mutant("rule 1: the last resort, purging the input", 120),
    "holes-are-not-seen": Mutant("rule 1: prev at most the cursor", 120),
    "letter-from-one-read": Mutant("a letter's original is looked for again", 120, among="stale leader"),
    "letters-after-the-frame": Mutant("letters are buried before their frame", 120, among="kill after a publish"),
    "letters-without-a-checkpoint": Mutant("letters that are there are not buried again", 60, quick=True),
    "lost-receipts-begin-anew": Mutant("receipts that were lost are restored", 200, among="receipts purged"),
    "memory-is-forgotten": Mutant("segment's memory rides in the frame", 120, among="kill"),
    "message-id-of-origins-only": Mutant("rule 2: a nonce in the message id", 120, quick=True),
    "no-fence": Mutant("rule 2: the fence", 60, quick=True),
    "no-takeover-receipt": Mutant("rule 2: no cut without an accepted takeover", 300, among="kill in a commit"),
    "one-nonce-for-all-sessions": Mutant("rule 2: a nonce for each session", 120, among="hop emptied twice"),
    "one-server-is-believed": Mutant("what waits on disk is read from two servers", 200, among=BESIDE_ONE_THAT_HANGS),
    "output-is-not-checked": Mutant("an idle lane looks at its output", 120),
    "overlap-is-not-skipped": Mutant(
        "rule 1: overlap is skipped event by event", 600, among="all servers restart on a backlog"
    ),
    "persist-skips-nothing": Mutant(
        "rule 4: anything at or below what is committed is skipped", 400, among="all servers restart on a backlog"
    ),
    "receipt-before-the-data": Mutant("a receipt is published after the data is durable", 120),
    "receipt-is-no-checkpoint": Mutant(
        "rule 1: from the last receipt if the output is empty", 600, among="hop purged by hand"
    ),
    "resume-without-looking": Mutant("rule 1: the message at the sequence is looked at", 120),
    "silence-is-agreed": Mutant("a second server that hangs is waited for", 120, among=BESIDE_ONE_THAT_HANGS),
    "silence-is-trusted": Mutant("rule 3: heartbeats, and idle readers are checked", 60, quick=True),
}
"""Not here, because another guard takes over and only time is lost: heartbeats alone and the idle check alone (each
covers for the other), the end statuses of a pull (heartbeats do), overlap in one stage only (persist skips it too)."""


def mutated(name: str, directory: Path) -> Path:
    """A copy of the packages with the patch applied."""
    directory.mkdir()
    for package in PACKAGES:
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    applied = subprocess.run(
        ["git", "apply", str(PATCHES / f"{name}.patch")],
        cwd=directory,
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(directory.parent), "GIT_DIR": str(directory / "none")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert applied.returncode == 0, f"{name}.patch does not apply any more: {applied.stderr}"
    return directory


def test_every_patch_is_in_the_table() -> None:
    assert sorted(path.stem for path in PATCHES.glob("*.patch")) == sorted(MUTANTS)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if mutant.quick else [pytest.mark.slow]) for name, mutant in MUTANTS.items()]
)
def test_a_run_convicts_the_pipeline_without(name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    done = subprocess.run(
        [sys.executable, "-m", "cluster.testing.sim", "--seeds", str(mutant.seeds), "--first", "--json"]
        + (["--among", mutant.among] if mutant.among else []),
        cwd=mutated(name, tmp_path / "mutant"),
        env=os.environ | {"PYTHONPATH": str(tmp_path / "mutant"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, f"the mutant does not run at all: {done.stderr}"
    summary = msgspec.json.decode(done.stdout)
    assert done.returncode == 1, f"survived {summary['runs']} seeds, though it is without: {mutant.without}"
    assert "ended with" not in done.stderr, done.stderr
    assert any(words in done.stderr for words in VERDICTS), done.stderr


def test_the_code_without_a_patch_is_what_such_a_run_would_use(tmp_path: Path) -> None:
    """Or every mutant would be judged by the code that is installed."""
    where = "import stages.runtime.writer as module; print(module.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where],
        cwd=mutated("no-fence", tmp_path / "mutant"),
        env=os.environ | {"PYTHONPATH": str(tmp_path / "mutant")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()).is_relative_to(tmp_path)
