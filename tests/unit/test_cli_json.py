"""With --json stdout has JSON in any case: the verb's answer, or why there is none and the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commandline import Captured, fictl, leave_state

import cluster.cli
from cluster.cli.common import print_json
from contracts.errors import ShardCorruptError

UNKNOWN = "11111111-1111-4111-8111-111111111111"


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where no run is, and no store."""
    for name in [name for name in os.environ if name.startswith("FI_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("members", "--json"), 3), (("dlq", "ls", "--json"), 3), (("dlq", "ls", "--summary", "--json"), 3),
        (("dlq", "show", "1", "--json"), 3), (("flush", "--nats", "nowhere", "--json"), 2),
        (("scale", "hash=x", "--json"), 2), (("export", ".", "--json"), 2), (("publish", "none", "--json"), 1),
        (("events", UNKNOWN, "--json"), 1), (("shards", ".", "--json"), 1), (("backup", ".", "to", "--json"), 1),
        # What typer itself finds: before the verb is known, and in what was given to it.
        (("nonsense", "--json"), 2), (("cluster", "nonsense", "--json"), 2), (("scale", "--json"), 2),
        (("status", "--nonsense", "--json"), 2), (("members", "--json", "--dir"), 2), (("shards", "", "--json"), 2),
        (("status", "--window", "nan", "--json"), 2), (("dlq", "show", "zero", "--json"), 2),
        (("events", "\udcff", "--json"), 2), (("capacity", "--rate", "0", "--json"), 2),
        # The answer itself cannot be written as JSON.
        (("status", "--json", "--dir", "\udcff"), 2),
    ],
    ids=ascii,
)  # fmt: skip
def test_a_verb_without_an_answer_prints_why_and_its_exit_code(
    arguments: tuple[str, ...], code: int, capsys: Captured
) -> None:
    assert fictl(*arguments) == code
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer == {"error": answer["error"], "exit_code": code}
    # It says what people are told, whose terminal breaks it into lines.
    assert "".join(answer["error"].split()) in "".join(printed.err.replace("│", "").split())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("scale", "hash=x"), "STAGE=N 'hash=x'"), (("up", "--scale", "hash=x"), "--scale 'hash=x'"),
        (("capacity", "--rate", "-5"), "'--rate': -5 is not above 0"),
        (("capacity", "--rate", "5", "--free", "nan"), "'--free': nan is not above 0"),
        (("dlq", "drop", "1", "--yes", "--output", "none/x"), "none/x: there is no directory none"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_named_as_it_was_given(arguments: tuple[str, ...], named: str, capsys: Captured) -> None:
    assert fictl(*arguments) == 2
    assert named in " ".join(capsys.readouterr().err.replace("│", "").split())


@pytest.mark.parametrize("arguments", [("members",), ("scale",), ("events", UNKNOWN)], ids=str)
def test_who_did_not_ask_for_json_gets_words_on_stderr_alone(arguments: tuple[str, ...], capsys: Captured) -> None:
    assert fictl(*arguments) != 0
    printed = capsys.readouterr()
    assert (printed.out, bool(printed.err)) == ("", True)


def test_what_goes_wrong_after_the_answer_does_not_print_a_second_one(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def fail_late(*_: Any, **__: Any) -> None:
        print_json({"settled": False})
        raise ShardCorruptError("still moves")

    monkeypatch.setattr(cluster.cli, "app", fail_late)
    for _ in range(2):
        assert fictl("scale", "hash=2", "--json") == 4
        assert json.loads(capsys.readouterr().out) == {"settled": False}
    # What an earlier command of the process answered is not this one's.
    monkeypatch.undo()
    assert fictl("members", "--json", "--dir", "none") == 3
    assert json.loads(capsys.readouterr().out)["exit_code"] == 3


def test_the_status_of_what_does_not_run_is_not_well(tmp_path: Path, capsys: Captured) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    leave_state(tmp_path, "stopped", gone.pid)
    for directory, told in ((tmp_path, "was stopped"), (tmp_path / "never", "nothing runs in")):
        assert fictl("status", "--dir", directory, "--json") == 3
        printed = capsys.readouterr()
        answer = json.loads(printed.out)
        (problem,) = answer["problems"]
        assert answer == {"well": False, "problems": [problem]}
        assert (problem["kind"], problem["next"]) == ("not_running", f"`fictl up --dir {directory}`")
        assert told in problem["what"]
        assert problem["what"] in printed.err


def test_a_run_of_another_user_takes_no_request_and_is_called_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    async def not_ours(path: str) -> None:
        raise PermissionError(13, "Permission denied")

    pid = os.getpid()
    leave_state(tmp_path, "ready", pid, "/run/theirs.sock")
    monkeypatch.setattr("asyncio.open_unix_connection", not_ours)
    for verb in (("scale", "hash=2"), ("restart",)):
        assert fictl(*verb, "--dir", tmp_path, "--json") == 1
        answer = json.loads(capsys.readouterr().out)
        told = "/run/theirs.sock is another user's, whose run it is: ask as that user"
        assert answer == {"error": told, "exit_code": 1}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_an_answer_that_cannot_be_written_is_told_once_and_without_traceback() -> None:
    with Path("/dev/full").open("wb") as full:
        command = (sys.executable, "-m", "cluster", "schema", "--json")
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (1, "fi: [Errno 28] No space left on device\n")


def test_ctrl_c_while_a_verb_that_is_done_ends_prints_no_traceback() -> None:
    code = (
        "import atexit, os, runpy, signal, sys\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv = ['fictl', 'schema', '--json']\n"
        "runpy.run_module('cluster', run_name='__main__')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "")
    assert json.loads(ended.stdout)["$defs"]
