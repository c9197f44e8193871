"""Numbers in words, as people on call read them. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence


def partitions(numbers: Sequence[int]) -> str:
    """``partition 3``, ``partitions 0-3, 5``. `numbers` must be sorted."""
    return f"partition{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


def ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` → ``0-2, 5``; ``-`` for none. They must be sorted."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "-"


def duration(seconds: float) -> str:
    """For people: ``0.4 ms``, ``41 ms``, ``3.1 s``, ``12 s``, ``5 min``, ``3 h``."""
    for limit, unit, scale, digits in (
        (0.001, "ms", 1e3, 2),
        (0.01, "ms", 1e3, 1),
        (1, "ms", 1e3, 0),
        (10, "s", 1, 1),
        (120, "s", 1, 0),
        (7200, "min", 1 / 60, 0),
    ):
        if seconds < limit:
            return f"{seconds * scale:.{digits}f} {unit}"
    return f"{seconds / 3600:.0f} h"


def expiry(ends_s: float, now_s: float) -> str:
    """``2026-12-24 08:00 UTC, in 31 days``; both in seconds since the epoch."""
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ends_s))
    left_s = abs(ends_s - now_s)
    left = f"{left_s / 86400:.0f} days" if left_s >= 2 * 86400 else f"{left_s / 3600:.1f} hours"
    return f"{date}, in {left}" if ends_s > now_s else f"{date}, {left} ago"


def size(count_bytes: float) -> str:
    """For people: ``512 B``, ``1.3 MB``, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count_bytes < 1000:
            return f"{count_bytes:.{0 if unit == 'B' or count_bytes >= 100 else 1}f} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.1f} TB"
