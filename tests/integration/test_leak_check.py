"""The leak check convicts: each kind of thing left behind fails its test, and a tidy test passes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.testing import leaks

LEAKS = {
    "task": "asyncio.create_task(asyncio.sleep(60), name='the leak')",
    "process": "kept.append(await asyncio.create_subprocess_exec('sleep', '5', stdin=-3))",
    "daemon": "subprocess.run(['sh', '-c', 'setsid sleep 5 & disown 2>/dev/null; true'])",
    "thread": "threading.Thread(target=time.sleep, args=(5,), daemon=True).start()",
    "port": "kept.append(socket.create_server(('127.0.0.1', 0)))",
    "file": "kept.append(open(__file__))",
    "temporary": "tempfile.mkdtemp()",
    "here": "open('left.txt', 'w').close()",
}
WORDS = {
    "task": "task the leak",
    "process": "process ",
    "daemon": "sleep 5",
    "thread": "thread Thread-",
    "port": "listens on port",
    "file": "test_leaking.py",
    "temporary": "file ",
    "here": "left.txt",
}
HEAD = "import asyncio, socket, subprocess, tempfile, threading, time\nimport pytest\nkept = []\n"


def run(directory: Path, text: str, *options: str) -> str:
    """pytest's output for a module with this text."""
    (directory / "test_leaking.py").write_text(HEAD + text)
    (directory / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\nfi_leaks = true\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, f"--basetemp={directory / 'tmp'}"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.stdout + done.stderr


def test_each_kind_of_leak_fails_its_own_test_and_no_other(tmp_path: Path) -> None:
    tests = [
        f"async def test_{name}():\n    {leak}\nasync def test_after_{name}(): ...\n" for name, leak in LEAKS.items()
    ]
    output = run(tmp_path, "".join(tests))
    errors = {line.partition("::")[2].split()[0] for line in output.splitlines() if line.startswith("ERROR ")}
    assert errors == {f"test_{name}" for name in LEAKS}, output
    for name, words in WORDS.items():
        told = output.partition(f"ERROR at teardown of test_{name} ")[2].partition("ERROR at")[0]
        assert words in told, (name, told)


def test_a_process_that_is_just_becoming_another_program_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has for an environment at that moment cannot be had at will: none."""
    environments = iter([b"", b"", f"A=b\0{leaks._MARK}={leaks._RUN}\0".encode()])
    monkeypatch.setattr(Path, "read_bytes", lambda path: next(environments))
    assert leaks._is_marked("1")


def test_a_process_with_the_number_of_one_that_was_none_of_ours_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as ours:
        monkeypatch.setitem(leaks._strangers, str(ours.pid), os.stat("/proc/self").st_ino)
        assert ours.pid in list(leaks._processes())


def test_what_a_wider_fixture_holds_open_is_no_leak_of_the_test(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        "@pytest.fixture(scope='module')\n"
        "def held(tmp_path_factory):\n"
        "    with open(__file__), socket.create_server(('127.0.0.1', 0)):\n"
        "        process = subprocess.Popen(['sleep', '60'])\n"
        "        yield\n"
        "        process.kill()\n"
        "        process.wait()\n"
        "def test_one(held): ...\n"
        "async def test_two(held): await asyncio.create_task(asyncio.sleep(0.01))\n",
    )
    assert "2 passed" in output, output


@pytest.mark.cluster
def test_tests_that_share_a_cluster_are_judged_when_it_ends(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        "from cluster.testing.plugin import cluster_fixture\n"
        "pytestmark = pytest.mark.asyncio(loop_scope='module')\n"
        "shared = cluster_fixture('module', nodes=1, partitions=1)\n"
        "async def test_restart(shared):\n"
        "    await shared.kill('hash-0')\n"
        "    await shared.start('hash-0')\n"
        "    kept.append(open(__file__))\n"
        "async def test_last(shared): ...\n",
        "--fi-backend=embedded",
    )
    assert "2 passed, 1 error" in output, output
    assert "ERROR at teardown of test_last" in output
    told = output.partition("left behind")[2].partition("FiCluster")[0]
    assert "test_leaking.py" in told
    assert "process" not in told, told


@pytest.mark.cluster
def test_the_logs_of_a_cluster_are_part_of_a_failed_tests_report(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        "@pytest.mark.fi_cluster(nodes=1, partitions=1)\nasync def test_it(fi_cluster): assert fi_cluster.urls == ()\n",
        "--fi-backend=embedded",
    )
    assert "1 failed" in output, output
    assert "1 error" not in output, output
    assert "--- persist-0" in output
    assert "EVENT_WORKER_STARTED" in output
