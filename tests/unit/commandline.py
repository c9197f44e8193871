"""Runs `fictl` inside a test's own process."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cluster.cli import main

Captured = pytest.CaptureFixture[str]


def fictl(*arguments: str | Path) -> int:
    """Runs `fictl` in this process and gives its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        # The command line takes the logs of its process over, which here is a test's.
        patch.setattr(logging.root, "handlers", list(logging.root.handlers))
        patch.setattr(logging.root, "level", logging.root.level)
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
    return int(exited.value.code or 0)
