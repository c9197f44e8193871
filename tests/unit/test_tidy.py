"""Style as a test: layers, purity of the cores, file length."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from contracts.budgets import BUDGETS

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "contracts": {"contracts"},
    "stages": {"contracts", "stages"},
    "cluster": {"contracts", "stages", "cluster"},
    "benchmarks": {"contracts", "stages", "cluster", "benchmarks"},
}
OURS = {"contracts", "stages", "cluster", "benchmarks", "tests"}
STAGES = {"ingest", "segment", "hash", "persist"}
NO_IO_IN_CONTRACTS = {"asyncio", "socket", "subprocess", "os", "pathlib", "time", "random", "secrets", "h5py", "nats"}
NOT_IN_A_CORE = {"asyncio", "time", "random", "secrets", "os", "pathlib", "socket", "h5py", "nats", "uuid"}
LINES_MAX = 420


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@cache
def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_layer_imports_only_the_layers_below_it(package: str) -> None:
    wrong = {path.name: roots(path) & OURS - MAY_IMPORT[package] for path in modules(package)}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_other_programs_see_the_types_of_what_they_import() -> None:
    """PEP 561: setuptools takes the file into the wheel. Without it mypy passes over every import of ours."""
    assert [package for package in MAY_IMPORT if (ROOT / package / "py.typed").is_file()] == [*MAY_IMPORT][:-1]


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Not for its types either."""
    paths = [path for package in MAY_IMPORT for path in modules(package)]
    names = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in paths}
    TopologicalSorter({name: imports(path) & names.keys() - {name} for name, path in names.items()}).prepare()


def test_contracts_does_no_input_or_output() -> None:
    wrong = {path.name: roots(path) & NO_IO_IN_CONTRACTS for path in modules("contracts")}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_a_stage_core_is_pure() -> None:
    cores = list((ROOT / "stages").glob("*/core.py"))
    assert {path.parent.name for path in cores} == STAGES
    wrong = {path.parent.name: roots(path) & NOT_IN_A_CORE for path in cores}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_the_runtime_and_the_stages_do_not_import_another_stage() -> None:
    wrong = {}
    for path in modules("stages"):
        place = path.relative_to(ROOT / "stages").parts[0]
        if place == "actors.py":
            continue
        foreign = {
            name for name in imports(path) for stage in STAGES - {place} if f"{name}.".startswith(f"stages.{stage}.")
        }
        if foreign:
            wrong[str(path.relative_to(ROOT))] = foreign
    assert wrong == {}


def test_files_stay_short_enough_to_read() -> None:
    long = {}
    for package in OURS:
        for path in modules(package):
            lines = len(path.read_text().splitlines())
            if lines > LINES_MAX:
                long[str(path.relative_to(ROOT))] = lines
    assert long == {}


NOT_WAITS = {
    ("stages/runtime/client.py", "timeout"): "nats-py's own signature",
    ("cluster/capacity.py", "DAY_S"): "a unit",
    ("cluster/cli/common.py", "_UNITS_S"): "units",
    ("cluster/capacity.py", "hold_s"): "what the disk of a cluster should hold, no wait",
    ("cluster/cli/capacity.py", "hold_s"): "the same",
    ("cluster/overview.py", "RECENT_S"): "over how long letters are counted",
    ("cluster/summary.py", "RATE_S"): "over how long a rate is",
    ("cluster/summary.py", "LATENCY_S"): "the same for percentiles",
    ("cluster/top.py", "STALE_S"): "how old a screen may be before its age is shown",
    ("cluster/broker_verdict.py", "CLOCK_APART_S_MAX"): "how far a server's clock may be from ours",
    ("cluster/verdict.py", "HELD_S_MIN"): "how long a hold must last to be a problem",
    ("stages/runtime/expiry.py", "AHEAD_S_MAX"): "how long before it expires a certificate is to be renewed",
    ("cluster/verdict.py", "LOOP_LAG_S_MAX"): "how late an event loop may be",
}
SECONDS = re.compile(r"(^|_)(s|seconds|timeout|wait|interval)(_min|_max)?$", re.IGNORECASE)
WAITING_CALLS = {"timeout", "timeout_at", "sleep", "wait_for", "wait"}


def is_number(node: ast.AST | None) -> bool:
    """A literal other than 0 (which waits for nothing), something computed of such, or a row or table with one."""
    if isinstance(node, ast.BinOp):
        return is_number(node.left) and is_number(node.right)
    if isinstance(node, ast.Tuple | ast.List):
        return any(map(is_number, node.elts))
    if isinstance(node, ast.Dict):
        return any(map(is_number, node.values))
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, int | float)
        and not isinstance(node.value, bool)
        and node.value != 0
    )


def named_numbers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of every number that is given to a name of seconds, or to a call that waits."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            yield from ((name, node.lineno) for name in names if SECONDS.search(name) and is_number(node.value))
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in WAITING_CALLS and any(map(is_number, node.args)):
                yield called, node.lineno
            words = [word.arg or "" for word in node.keywords if is_number(word.value)]
            yield from ((word, node.lineno) for word in words if SECONDS.search(word))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args]
            pairs = [
                *zip(given[len(given) - len(node.args.defaults) :], node.args.defaults, strict=True),
                *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
            ]
            yield from (
                (word.arg, node.lineno) for word, value in pairs if SECONDS.search(word.arg) and is_number(value)
            )


def test_every_wait_is_a_budget_or_a_setting() -> None:
    found = {}
    for package in ("stages", "cluster"):
        for path in modules(package):
            place = path.relative_to(ROOT).as_posix()
            if place.startswith("cluster/testing/"):
                continue  # what a test waits for is no wait of the pipeline
            for name, line in named_numbers(ast.parse(path.read_text())):
                found[place, name] = line
    elsewhere = {place: line for place, line in found.items() if place not in NOT_WAITS}
    assert elsewhere == {}, "give it a name and a meaning in contracts/budgets.py"
    assert set(NOT_WAITS) <= set(found)


@pytest.mark.parametrize(
    "text",
    [
        "RETRY_S: Final = 0.5",
        "LOW_S, HIGH_S = 0.1, 2",
        "POLL_S_MAX = 3 * 60",
        "async def f():\n async with asyncio.timeout(3): pass",
        "asyncio.wait_for(x, 2.0)",
        "time.sleep(0.1)",
        "asyncio.wait(tasks, timeout=1)",
        "def f(*, wait_s: float = 5.0): pass",
        "connect(reconnect_wait=2)",
    ],
)
def test_a_wait_written_as_a_number_is_found(text: str) -> None:
    assert len({line for _, line in named_numbers(ast.parse(text))}) == 1


def test_every_budget_is_used() -> None:
    used = {
        node.id
        for package in ("stages", "cluster")
        for path in modules(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name)
    }
    assert set(BUDGETS) - used == set()


def test_every_decision_is_listed_by_its_title() -> None:
    directory = ROOT / "contracts" / "decisions"
    listed = [line for line in (directory / "README.md").read_text().splitlines() if line.startswith("- ")]
    titles = {path.name: path.read_text().splitlines()[0] for path in sorted(directory.glob("0*.md"))}
    numbered = {name: title.removeprefix("# ").partition(". ") for name, title in titles.items()}
    assert listed == [f"- [{number}]({name}) {title}" for name, (number, _, title) in numbered.items()]
