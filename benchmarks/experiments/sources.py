"""The figures that the source documents name (DOMAIN, "Targets the source documents name")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

ACCEPTED_MS: Final = {"p50": 3.0, "p95": 5.0, "p99": 8.0}
DURABLE_MS: Final = {"p50": 25.0, "p95": 50.0, "p99": 80.0}
"""Their best phase: 12 workers, 10 GbE, NVMe."""
APPEND_MS: Final = {0: 100.0, 100: 300.0, 1_000: 800.0, 10_000: 1_700.0}
"""One event more, by stored events."""
HASH_MS: Final = {1: 15.0, 10: 30.0, 100: 150.0}
"""By KB of the event."""
STORED_MS: Final = {"gzip-4": 300.0, "gzip-1": 150.0, "lzf": 80.0}
STORED_KB: Final = {"gzip-4": 250.0, "gzip-1": 300.0, "lzf": 400.0}
"""1,000 events of 1 KB."""


def percentiles(figures: Mapping[str, float]) -> str:
    """``p50 / p95 / p99``."""
    return " / ".join(f"{figures[name]:g}" for name in ("p50", "p95", "p99"))
