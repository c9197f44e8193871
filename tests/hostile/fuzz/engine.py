"""The coverage-guided search: an input that shows something new is kept and changed again.

New is a step from one line to another in the target's own modules, or a verdict that no input had before (msgspec's
decoders are C and show no lines). The same seed, corpus and number of tries give the same inputs.
"""

from __future__ import annotations

import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from types import CodeType, FrameType, ModuleType
from typing import Any

from .mutate import mutate
from .targets import Target, verdict

RUN_S_MAX = 10.0
"""One input that takes longer hangs. Machines are busy: a real hang takes for ever."""

_SHORTENING_TRIES = 100

Feature = tuple[str, int, int] | str


class HangError(Exception):
    """One input took longer than `RUN_S_MAX`."""


@dataclass(frozen=True)
class Finding:
    """An input that no reason was given for.

    Attributes:
        data: the input.
        kind: the exception's class and the line it came from: what is the same finding.
        trace: what Python says.
    """

    data: bytes
    kind: str
    trace: str


@dataclass
class Search:
    """What was found so far.

    Attributes:
        kept: input → what it was the first to show.
        seen: all that was shown.
        findings: by kind, the shortest input of each.
        tries: inputs that were run.
    """

    kept: dict[bytes, frozenset[Feature]] = field(default_factory=dict)
    seen: set[Feature] = field(default_factory=set)
    findings: dict[str, Finding] = field(default_factory=dict)
    tries: int = 0


@contextmanager
def time_limit(seconds: float = RUN_S_MAX) -> Iterator[None]:
    """Raises `HangError` in the block when it takes longer. For the main thread."""

    def late(number: int, frame: FrameType | None) -> None:
        raise HangError(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(target: Target, data: bytes) -> str | Finding:
    """The verdict on `data`, or why there is none."""
    try:
        with time_limit():
            return verdict(target, data)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f for f in reversed(frames) if "/tests/" not in f.filename), frames[-1])
        kind = f"{type(error).__name__} at {place.filename.rpartition('/')[2]}:{place.name}"
        return Finding(data, kind, "".join(traceback.format_exception(error))[-4000:])


class Coverage:
    """Which steps between lines of some modules a call takes."""

    def __init__(self, modules: Iterable[ModuleType]) -> None:
        self._files = {module.__file__ for module in modules}
        self._arcs: set[Feature] = set()
        self._names: dict[CodeType, str] = {}

    def of(self, call: Callable[[], Any]) -> tuple[Any, set[Feature]]:
        """What `call` gives, and the steps it took."""
        self._arcs = set()
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            result = call()
        finally:
            sys.settrace(before)
        return result, self._arcs

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in self._files:
            return None
        name = self._names.setdefault(code, f"{code.co_filename.rpartition('/')[2]}:{code.co_qualname}")
        last = 0

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                self._arcs.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            return step

        return step


def search(target: Target, seeds: Iterable[bytes], *, seed: int, tries: int, until_s: float = float("inf")) -> Search:
    """Looks for inputs that show something new.

    Args:
        target: what reads them.
        seeds: inputs to begin with.
        seed: decides all changes.
        tries: how many inputs to run.
        until_s: monotonic time to stop at, if that comes first.
    """
    rng = random.Random(seed)
    coverage = Coverage(target.loaded())
    found = Search()
    for data in sorted(set(seeds), key=lambda data: (len(data), data)):
        _try(target, coverage, found, data)
    pool = list(found.kept) or [b""]
    while found.tries < tries and time.monotonic() < until_s:
        # What was found last leads on; the rest is not forgotten.
        parent = pool[-1 - min(int(rng.expovariate(1 / 20)), len(pool) - 1)] if rng.random() < 0.5 else rng.choice(pool)
        data = mutate(rng, parent, pool, target.tokens)
        if _try(target, coverage, found, data):
            pool.append(data)
    return found


def _try(target: Target, coverage: Coverage, found: Search, data: bytes) -> bool:
    result, shown = coverage.of(lambda: run(target, data))
    found.tries += 1
    if isinstance(result, Finding):
        known = found.findings.get(result.kind)
        if known is None or len(data) < len(known.data):
            found.findings[result.kind] = result
        return False
    shown.add(_shape(result))
    new = shown - found.seen
    if not new:
        return False
    found.seen |= new
    found.kept[data] = frozenset(shown)
    return True


def _shape(words: str) -> str:
    """A verdict without its numbers: that one message held 7 events and not 8 is nothing new."""
    return "".join("0" if char.isdigit() and char != "0" else char for char in words)[:200]


def minimal(target: Target, inputs: Iterable[bytes]) -> list[bytes]:
    """As few and as short of `inputs` as show all that they show together, each shortened."""
    coverage = Coverage(target.loaded())
    shown: dict[bytes, set[Feature]] = {}
    for data in inputs:
        result, arcs = coverage.of(lambda data=data: run(target, data))  # type: ignore[misc]
        if not isinstance(result, Finding):
            shown[data] = arcs | {_shape(result)}
    missing = set().union(*shown.values())
    chosen = []
    while missing:
        # The most that is missing for the fewest bytes.
        best = max(shown, key=lambda data: (len(shown[data] & missing) / (64 + len(data)), -len(data), data))
        gains = shown[best] & missing
        missing -= gains
        chosen.append(_shortened(target, coverage, best, gains))
    return chosen


def _shortened(target: Target, coverage: Coverage, data: bytes, needed: set[Feature]) -> bytes:
    size = (len(data) + 1) // 2
    tries = 0
    while size >= 1:
        at = 0
        while at < len(data) and tries < _SHORTENING_TRIES:
            tries += 1
            shorter = data[:at] + data[at + size :]
            result, arcs = coverage.of(lambda shorter=shorter: run(target, shorter))  # type: ignore[misc]
            if not isinstance(result, Finding) and needed <= arcs | {_shape(result)}:
                data = shorter
            else:
                at += size
        size = size // 2 if tries < _SHORTENING_TRIES else 0
    return data


def name_of(data: bytes) -> str:
    """What an input that the search found is called."""
    return f"found-{blake2b(data, digest_size=6).hexdigest()}"
