"""The kept corpus: ``corpus/<target>/<name>``, and the verdict on each in ``corpus/index.json``.

Files are named by what they are, or ``found-…`` by the search. A new file is added by laying it there and running
``python -m tests.hostile.fuzz index``; a changed verdict then shows in the difference.
"""

from __future__ import annotations

import json
from pathlib import Path

from .engine import Finding, run
from .targets import TARGETS

CORPUS = Path(__file__).parents[1] / "corpus"
INDEX = CORPUS / "index.json"
FOUND = "found-"


def files_of(target: str) -> list[Path]:
    """The target's kept inputs, by name."""
    return sorted((CORPUS / target).glob("*"))


def verdicts() -> dict[str, dict[str, str]]:
    """Target → file name → what becomes of it now; findings begin with ``FOUND OUT``."""
    return {
        name: {path.name: _words(run(target, path.read_bytes())) for path in files_of(name)}
        for name, target in TARGETS.items()
    }


def recorded() -> dict[str, dict[str, str]]:
    """Target → file name → what becomes of it, as the index has it."""
    index: dict[str, dict[str, str]] = json.loads(INDEX.read_text())
    return index


def _words(result: str | Finding) -> str:
    return result if isinstance(result, str) else f"FOUND OUT {result.kind}"
