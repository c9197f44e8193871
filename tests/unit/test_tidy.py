"""Style as a test: layers, purity of the cores, file length."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

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


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
    return found


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_layer_imports_only_the_layers_below_it(package: str) -> None:
    wrong = {path.name: roots(path) & OURS - MAY_IMPORT[package] for path in modules(package)}
    assert {name: found for name, found in wrong.items() if found} == {}


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
