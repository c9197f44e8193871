"""What lies in the working directory is data: an auditor may stand in a store that others laid down."""

import subprocess
from pathlib import Path

import pytest
from shard_maker import filled_store

from cluster.supervisor import run_command
from stages.persist.verify import verify_store

ROOT = Path(__file__).resolve().parents[2]
_FORGED = "import os\nos.write(2, b'taken for code')\nos._exit(99)\n"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with files that have the names of what our processes import."""
    for name in ("h5py", "json", "msgspec", "random"):
        (tmp_path / f"{name}.py").write_text(_FORGED)
    for package in ("cluster", "contracts", "stages"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(_FORGED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_store_is_verified_by_no_code_that_lies_in_it(hostile: Path) -> None:
    filled_store(hostile)
    assert verify_store(".").problems == []


def test_a_stage_runs_no_code_of_the_directory_it_is_started_in(hostile: Path) -> None:
    command = run_command(hostile)("hash", "hash-1")
    assert subprocess.run([*command, "--help"], cwd=hostile, capture_output=True, text=True, timeout=60).returncode == 0


def test_no_process_of_ours_looks_for_code_in_its_working_directory() -> None:
    sources = [path for package in ("stages", "cluster") for path in (ROOT / package).rglob("*.py")]
    started = [(path.name, line) for path in sources for line in path.read_text().splitlines() if '"-m"' in line]
    assert started
    assert [(name, line) for name, line in started if '"-P", "-m"' not in line] == []
