"""The kept corpus of hostile bytes: each file still gets the verdict it had, and every change of one shows here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.fuzz.corpus import CORPUS, files_of, recorded
from tests.hostile.fuzz.engine import Finding, minimal, run, search
from tests.hostile.fuzz.targets import TARGETS, Target

ROOT = Path(__file__).parents[2]
CORPUS_BYTES_MAX = 600 * 1024
REPLAY_S_MAX = 200.0


def test_every_kept_input_gets_the_verdict_it_had() -> None:
    """In a process of its own, whose memory is bounded and which must end."""
    command = [sys.executable, "-m", "tests.hostile.fuzz", "check"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=REPLAY_S_MAX)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_no_kept_input_goes_without_a_reason() -> None:
    words = {f"{target}/{name}": words for target, rows in recorded().items() for name, words in rows.items()}
    assert {name for name, verdict in words.items() if verdict.startswith("FOUND OUT")} == set()
    assert words.keys() == {f"{target}/{path.name}" for target in TARGETS for path in files_of(target)}


def test_the_corpus_stays_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < CORPUS_BYTES_MAX


@pytest.mark.parametrize("name", TARGETS)
def test_a_short_search_beside_the_corpus_finds_nothing(name: str) -> None:
    found = search(
        TARGETS[name], [path.read_bytes() for path in files_of(name)], seed=1, tries=len(files_of(name)) + 60
    )
    assert {kind: finding.data for kind, finding in found.findings.items()} == {}


def crashing(data: bytes) -> str:
    """Falls over four bytes that no blind guess hits, one test at a time."""
    if data[:1] == b"{":
        if data[1:2] == b"\xff":
            if data[2:3] == b"\x00":
                raise KeyError(data)
            return "nearly"
        return "warmer"
    return "cold"


def test_the_search_finds_a_crash_behind_several_conditions_and_the_same_one_again() -> None:
    target = Target(crashing, (__name__,), (b"{", b"\xff", b"\x00"))
    first, again = (search(target, [b"x"], seed=3, tries=20_000) for _ in range(2))
    (finding,) = first.findings.values()
    assert finding.kind == "KeyError at test_corpus.py:crashing"
    assert finding == again.findings[finding.kind]
    assert isinstance(run(target, finding.data), Finding)


def test_the_minimal_corpus_shows_all_that_the_whole_one_showed() -> None:
    target = Target(crashing, (__name__,), (b"{",))
    kept = minimal(target, [b"cold and long", b"c", b"{warm", b"{", b"{\xffnear", b"{\xff"])
    assert sorted(kept) == [b"", b"{", b"{\xff"]
