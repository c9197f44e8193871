"""The fuzzer's command: ``python -m tests.hostile.fuzz search --target ingest --minutes 5 --seed 1``.

``search`` looks for inputs that nobody gave a reason for; ``--keep`` adds what it found to the corpus, as little as
shows as much. ``replay FILE --target T`` runs one input. ``index`` writes the verdicts down, ``check`` holds them.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .corpus import CORPUS, FOUND, INDEX, files_of, recorded, verdicts
from .engine import Finding, minimal, name_of, run, search
from .targets import TARGETS

MEMORY_BYTES_MAX = 3 * 1024**3
"""Address space, most of it the libraries' own. No input of a few KB may come near."""
_ALL_TRIES = 10**9
_KEPT_BYTES_MAX = 24 * 1024
"""What the search may add to the corpus of one target."""


def main() -> int:
    """Exit code 0: nothing found; 1: findings, or a verdict that changed."""
    parser = argparse.ArgumentParser(prog="tests.hostile.fuzz", description=__doc__)
    parser.add_argument("action", choices=("search", "replay", "index", "check"))
    parser.add_argument("file", type=Path, nargs="?", help="of replay")
    parser.add_argument("--target", choices=("all", *TARGETS), default="all")
    parser.add_argument("--minutes", type=float, default=5.0, help="for all targets together")
    parser.add_argument("--tries", type=int, default=_ALL_TRIES, help="inputs for each target, if that comes first")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="add what shows something new to the corpus")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="where findings are written")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "search": _search,
        "replay": _replay,
        "index": _index,
        "check": _check,
    }
    return actions[options.action](options)


def _search(options: argparse.Namespace) -> int:
    names = list(TARGETS) if options.target == "all" else [options.target]
    found = 0
    for name in names:
        target = TARGETS[name]
        seeds = [path.read_bytes() for path in files_of(name)]
        until_s = time.monotonic() + options.minutes * 60 / len(names)
        result = search(target, seeds, seed=options.seed, tries=options.tries, until_s=until_s)
        print(
            f"{name}: {result.tries} inputs, {len(result.seen)} features, {len(result.kept)} inputs show them, "
            f"{len(result.findings)} findings",
            flush=True,
        )
        for finding in result.findings.values():
            _write(options.findings / name, name, finding)
        found += len(result.findings)
        if options.keep:
            _keep(name, list(result.kept))
    return 1 if found else 0


def _write(directory: Path, target: str, finding: Finding) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name_of(finding.data)
    path.write_bytes(finding.data)
    path.with_suffix(".txt").write_text(finding.trace)
    print(f"  {finding.kind}\n  python -m tests.hostile.fuzz replay {path} --target {target}")


def _keep(name: str, inputs: list[bytes]) -> None:
    """Named files stay; what an earlier search found is weighed again."""
    named = {path.read_bytes() for path in files_of(name) if not path.name.startswith(FOUND)}
    for path in files_of(name):
        if path.name.startswith(FOUND):
            path.unlink()
    kept_bytes = 0
    for data in minimal(TARGETS[name], [*named, *inputs]):
        kept_bytes += len(data)
        if data not in named and kept_bytes <= _KEPT_BYTES_MAX:
            (CORPUS / name / name_of(data)).write_bytes(data)


def _replay(options: argparse.Namespace) -> int:
    result = run(TARGETS[options.target], options.file.read_bytes())
    print(result.trace if isinstance(result, Finding) else result)
    return 1 if isinstance(result, Finding) else 0


def _index(options: argparse.Namespace) -> int:
    INDEX.write_text(json.dumps(verdicts(), indent=1, sort_keys=True) + "\n")
    return 0


def _check(options: argparse.Namespace) -> int:
    now, before = verdicts(), recorded()
    differences = [
        f"{target}/{name}: {before.get(target, {}).get(name)} → {now.get(target, {}).get(name)}"
        for target in sorted(now.keys() | before.keys())
        for name in sorted(now.get(target, {}).keys() | before.get(target, {}).keys())
        if now.get(target, {}).get(name) != before.get(target, {}).get(name)
    ]
    print("\n".join(differences) or f"{sum(map(len, now.values()))} inputs, each with the verdict it had")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
