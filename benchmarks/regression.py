"""Whether ratios have become clearly worse than the kept ones. Pure.

Ratios within one run are compared, not rates or times: the machine falls out of them, more or less.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

WORSE_MAX = 0.30
"""How much lower a median may be: two cores that do other things as well move ratios by a quarter."""


def judge_ratios(kept: Mapping[str, Sequence[float]], found: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Each ratio that was found: ``{"figure", "kept", "found", "verdict", "words"}``.

    A ratio is ``worse`` when its median is more than `WORSE_MAX` below the kept one and every repetition is so, too, or
    below every kept one: a bad repetition among the kept ones excuses nothing. It is ``unknown`` when there is nothing
    to compare it with; else ``ok``. Higher is better for all of them.

    Args:
        kept: figure → one value for each repetition of the kept run.
        found: the same, of the run to be judged.
    """
    return [_judge(figure, kept.get(figure, ()), values) for figure, values in found.items()]


def _judge(figure: str, before: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    if not values or not before:
        why = "is not in the kept result; run `make bench`" if values else "was not measured now"
        return {"figure": figure, "kept": None, "found": None, "verdict": "unknown", "words": f"{figure} {why}"}
    was, now = statistics.median(before), statistics.median(values)
    limit = (1 - WORSE_MAX) * was
    worse = now < limit and max(values) < max(limit, min(before))
    return {
        "figure": figure,
        "kept": was,
        "found": now,
        "verdict": "worse" if worse else "ok",
        "words": _words(figure, was, now) if worse else f"{figure}: {now:g}, kept {was:g}",
    }


def _words(figure: str, was: float, now: float) -> str:
    return (
        f"{figure} is {now:g}, kept was {was:g}: {1 - now / was:.0%} worse, beyond the spread of both runs. Run it "
        "again on a quiet machine; if it stays, see what was changed since the kept result (its commit is in the file) "
        "and where `make bench` says that the CPU goes. `make bench` also keeps the new figure"
    )
