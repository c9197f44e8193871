"""The command line keeps data on stdout, words on stderr, and its exit codes; no error is a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from commandline import Captured, fictl, leave_state
from rich.console import Console

import cluster.cli
from cluster.cli.common import exit_code, find_servers, find_settings, make_table
from cluster.cli.run import parse_partitions
from cluster.workload import consultations
from contracts.errors import (
    ClusterUnavailableError,
    DefiniteError,
    FiError,
    NotAppliedError,
    SettingsError,
    ShardCorruptError,
    StoreFailedError,
    TopologyError,
)
from contracts.policy import EVENT_TYPES
from stages.runtime.access import Servers


@pytest.fixture(autouse=True)
def _untouched_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FI_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "events.ndjson"
    path.write_text("".join(f"{json.dumps(event)}\n" for event in consultations(1, 30)))
    return path


def test_schema_prints_one_json_schema_on_stdout(capsys: Captured) -> None:
    assert fictl("schema", "--json") == 0
    printed = capsys.readouterr()
    schema = json.loads(printed.out)
    assert schema["$defs"]["EventSchema"]["properties"]["event_type"]["enum"] == list(EVENT_TYPES)
    assert schema["x-subject"]["pattern"] == "fi.events.<site>.<consultation_id>"
    assert printed.err == ""


def test_schema_for_people_names_every_field_and_rule(capsys: Captured) -> None:
    assert fictl("schema") == 0
    out = capsys.readouterr().out
    for word in (
        "consultation_id",
        "timestamp",
        "America/Mexico_City",
        "Nats-Msg-Id",
        "payload_bytes_max",
        "from 1 to 5",
    ):
        assert word in out


GROUPS = {name: found.verbs for name, found in cluster.cli.VERBS.items() if isinstance(found, cluster.cli.Group)}
VERBS = [(), *((name,) for name in cluster.cli.VERBS), *((name, verb) for name in GROUPS for verb in GROUPS[name])]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_help_and_every_leaf_an_example(verb: tuple[str, ...], capsys: Captured) -> None:
    assert fictl(*verb, "--help") == 0
    out = capsys.readouterr().out
    # Also in a container, whose command is ``python -m cluster``.
    assert " ".join(("Usage: fictl", *verb)) in " ".join(out.split())
    if " ".join(verb) not in ("", *GROUPS):
        assert "Example: fictl " in " ".join(out.split())


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_breaks_its_lines_where_the_terminal_ends_and_nowhere_else(
    verb: tuple[str, ...], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 3000)
    assert fictl(*verb, "--help") == 0
    lines = [line.strip() for line in capsys.readouterr().out.partition("╭")[0].splitlines()]
    assert not [after for before, after in pairwise(lines) if before and after]


def test_an_answer_is_printed_also_where_the_locale_lacks_its_signs() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    command = (sys.executable, "-m", "cluster", "policy", "set", "--help")
    asked = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert r"NAME=VALUE\u2026" in asked.stdout


def test_a_narrow_table_keeps_every_sign_of_its_cells() -> None:
    table = make_table("file", "events")
    table.add_row("p000-0000000001-0000000060.h5", "123456789")
    with (screen := Console(width=20, color_system=None)).capture() as captured:
        screen.print(table)
    cells = [line.split("│")[1:3] for line in captured.get().splitlines() if line.startswith("│")]
    assert ["".join(part.strip() for part in column) for column in zip(*cells, strict=True)] == [
        "p000-0000000001-0000000060.h5",
        "123456789",
    ]


def test_a_mistyped_verb_gets_the_one_that_was_meant(capsys: Captured) -> None:
    assert fictl("statsu") == 2
    assert "Did you mean 'status'" in capsys.readouterr().err


NO_URLS = (
    *("127.0.0.1:4222", "http://a:1", "nats://", "nats://:4222", "nats://[::1", "nats://a:0", "nats://a:x"),
    *("nats://127.0.0.1:99999", "nats://a:1,nats://b:2"),
)


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",), ("publish",), ("publish", "f", "--rate", "0"), ("publish", "f", "--batch", "0"),
        ("export", ".", "--format", "xml"), ("export", ".", "--format", "hdf5-consultations"),
        ("export", ".", "--purpose", "x"), ("export", ".", "--who", "x"),
        ("export", ".", "--site", "a.b"), ("export", ".", "--type", "NONSENSE"), ("export", ".", "--since", "today"),
        ("export", ".", "--until", "2026-01-01"), ("export", ".", "--consultation", "7"),
        ("export", ".", "--since", "2026-01-02T00:00:00Z", "--until", "2026-01-01T00:00:00Z"),
        ("events",), ("schema", "--yaml"), ("cluster", "nonsense"),
        ("events", "not-a-uuid"), ("prove", "not-a-uuid"),
        ("check-proof", "f", "--public-key", "no-such-file"), ("key", "public", "no-such-file"),
        ("flush", "--partition", ""), ("flush", "--partition", ","), ("flush", "--partition", "5-3"),
        ("flush", "--partition", "0-99999999999"), ("run", "hash", "--partitions", "0-1024"),
        ("run", "hash", "--name", "../../evil"), ("run", "hash", "--name", ""), ("run", "hash", "--name", "n" * 65),
        ("run", "hash", "--log-level", "FOO"), ("verify", ".", "--shard-timeout", "inf"),
        ("verify", ".", "--shard-timeout", "nan"), ("flush", "--timeout", "inf"), ("policy", "set", "--timeout", "nan"),
        ("pause", "hash", "--wait", "nan"), ("rebuild", "--wait", "inf"), ("demo", "--rate", "nan"),
        ("publish", "f", "--rate", "nan"), ("publish", "f", "--deadline", "nan"), ("status", "--window", "nan"),
        ("top", "--interval", "nan"),
        ("dlq", "ls", "--limit", "1" + "0" * 20), ("dlq", "show", "0"), ("dlq", "show", str(2**64)),
        ("dlq", "drop", "0", "--yes"), ("dlq", "replay", str(2**64), "--yes"),
        ("dlq", "drop", "--stage", "hash", "--site", "", "--yes"), ("dlq", "ls", "--reason", ""),
        *(("cluster", "status", "--nats", url) for url in NO_URLS),
        ("rebuild", "--nats", "nats://127.0.0.1:1"), ("partitions", "move", "0", "--nats", "nats://127.0.0.1:1"),
        ("partitions", "restore", "--nats", "nats://127.0.0.1:1"),
        ("cluster", "plan", "--nats", "nats://127.0.0.1:1", "--set", "partitions"),
        ("cluster", "plan", "--nats", "nats://127.0.0.1:1", "--set", "partition=4"),
        ("cluster", "plan", "--nats", "nats://127.0.0.1:1", "--set", "partitions=0"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_usage_exits_2_with_words_on_stderr(arguments: tuple[str, ...], capsys: Captured) -> None:
    assert fictl(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("text", ["x", "-", "1-", "-1", "5-3", "1024", "0-99999999999", "9" * 99, "0,5-3", "٣"])
def test_a_choice_of_partitions_is_refused_under_its_options_name(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--partition .* is neither"):
        parse_partitions("--partition", text)


def test_partitions_are_chosen_by_number_and_range_each_once() -> None:
    assert parse_partitions("--partitions", "7,0,2-4,3") == [0, 2, 3, 4, 7]
    assert parse_partitions("--partitions", "0-1023") == list(range(1024))
    assert parse_partitions("--partitions", "") == []


@pytest.mark.parametrize(
    "verb", [("cluster", "status"), ("cluster", "plan"), ("cluster", "apply"), ("publish", "-")], ids=" ".join
)
def test_where_nothing_runs_the_exit_code_is_3_and_the_next_step_is_named(
    verb: tuple[str, ...], tmp_path: Path, file: Path, capsys: Captured
) -> None:
    arguments = [file if part == "-" else part for part in verb]
    assert fictl(*arguments, "--dir", tmp_path) == 3
    printed = capsys.readouterr()
    assert "fictl up --dir" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("verb", ["export", "verify", "shards"])
def test_a_directory_without_a_store_is_told(verb: str, tmp_path: Path, capsys: Captured) -> None:
    assert fictl(verb, tmp_path) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_a_file_that_is_not_there_is_told(tmp_path: Path, capsys: Captured) -> None:
    assert fictl("publish", tmp_path / "missing.ndjson", "--check-only") == 1
    assert "missing.ndjson: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("up", "--dir", "FILE"), ("up", "--detach", "--dir", "FILE"), ("demo", "--dir", "FILE"),
        ("run", "persist", "--nats", "nats://127.0.0.1:1", "--shards", "FILE"),
        ("partitions", "move", "0", "--nats", "nats://127.0.0.1:1", "--shards", "FILE"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_file_where_a_directory_should_be_is_called_that(
    arguments: tuple[str, ...], file: Path, capsys: Captured
) -> None:
    assert fictl(*(str(file) if part == "FILE" else part for part in arguments)) == 2
    assert f"{file}: is no directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("scale", "hash=2", "--dir", ""), "--dir"), (("down", "--dir="), "--dir"), (("backup", "DIR", ""), "TO"),
        (("run", "persist", "--nats", "nats://127.0.0.1:1", "--shards", ""), "--shards"),
        (("partitions", "move", "0", "--nats", "nats://127.0.0.1:1", "--shards", ""), "--shards"),
        (("verify", ""), "DIR|FILE"), (("publish", "", "--check-only"), "file"), (("key", "new", ""), "FILE"),
    ],
    ids=str,
)  # fmt: skip
def test_an_empty_path_is_not_the_working_directory(
    arguments: tuple[str, ...], named: str, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fictl(*(str(tmp_path) if part == "DIR" else part for part in arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    said = " ".join(printed.err.replace("│", " ").split())
    assert f"Invalid value for '{named}': is empty; name a file or directory" in said
    assert not list(tmp_path.iterdir())


def test_a_directory_where_a_file_of_events_should_be_is_named(tmp_path: Path, capsys: Captured) -> None:
    assert fictl("publish", tmp_path, "--check-only") == 1
    assert capsys.readouterr().err == f"fi: {tmp_path}: Is a directory\n"


def test_a_run_of_another_user_is_not_stopped_and_called_that(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_ours(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    pid = os.getpid()
    leave_state(tmp_path, "ready", pid)
    monkeypatch.setattr(os, "kill", not_ours)
    assert fictl("down", "--dir", tmp_path) == 1
    assert f"process {pid}, which runs {tmp_path}, is another user's" in capsys.readouterr().err


def test_what_is_stopped_is_stopped_again_and_what_never_ran_is_not(tmp_path: Path, capsys: Captured) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    for status, told in (("stopped", "was stopped"), ("ready", "ended without stopping")):
        leave_state(tmp_path, status, gone.pid)
        assert fictl("down", "--dir", tmp_path) == 0
        assert told in capsys.readouterr().err
    assert fictl("down", "--dir", tmp_path / "never") == 3
    assert "nothing runs in" in capsys.readouterr().err


def test_check_only_needs_no_cluster_and_passes_good_lines(file: Path, capsys: Captured) -> None:
    assert fictl("publish", file, "--check-only", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["lines"], report["refused"], report["published"]) == (30, 0, 0)


def test_refused_lines_are_listed_with_number_field_and_reason(file: Path, capsys: Captured) -> None:
    lines = file.read_bytes().splitlines()
    lines[4] = b"{nope"
    lines[9] = lines[9].replace(b'"event_type": "', b'"event_type": "X')
    file.write_bytes(b"\n".join(lines))
    assert fictl("publish", file, "--check-only", "--json") == 1
    printed = capsys.readouterr()
    refused = json.loads(printed.out)["refused_lines"]
    assert [(line["line"], line["field"], line["reason"]) for line in refused] == [
        (5, "", "json.malformed"),
        (10, "event_type", "event_type.unknown"),
    ]
    assert "line 10: event_type: " in printed.err


def test_no_more_than_a_screenful_of_refused_lines_is_shown(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "bad.ndjson"
    path.write_bytes(b"nope\n" * 3000)
    assert fictl("publish", path, "--check-only") == 1
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 21
    assert "2980 more" in printed.err
    assert "3000" in printed.out


def test_a_proof_that_is_wrong_is_named(file: Path, capsys: Captured) -> None:
    assert fictl("check-proof", file) == 4
    assert capsys.readouterr().err.startswith(f"fi: {file}: not a proof")


def test_stdin_is_read_for_a_dash(file: Path) -> None:
    command = [sys.executable, "-m", "cluster", "publish", "-", "--check-only", "--json"]
    done = subprocess.run(command, input=file.read_bytes(), capture_output=True, check=True, timeout=60)
    assert json.loads(done.stdout)["lines"] == 30


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("arguments", ["publish - --check-only --json", "schema --json", "publish - --check-only"])
def test_a_standard_stream_that_is_closed_is_as_one_to_nowhere(closed: str, arguments: str) -> None:
    command = f'exec "$0" -m cluster {arguments} {closed}'
    done = subprocess.run(
        ["/bin/sh", "-c", command, sys.executable],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert bool(done.stdout) is (">&-" not in closed.replace("2>&-", ""))


def test_a_files_name_need_not_be_text(file: Path, capsys: Captured) -> None:
    named = file.rename(file.with_name(os.fsdecode(b"\xff.ndjson")))
    assert fictl("publish", named, "--check-only", "--json") == 0
    assert json.loads(capsys.readouterr().out)["lines"] == 30


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FiError("x"), 1), (DefiniteError("x"), 1), (StoreFailedError("x"), 1), (SettingsError("x"), 2),
        (ClusterUnavailableError("x"), 3), (NotAppliedError("x"), 3),
        (TopologyError("x"), 1), (ShardCorruptError("x"), 4),
    ],
)  # fmt: skip
def test_each_kind_of_error_has_its_exit_code(error: FiError, code: int) -> None:
    assert exit_code(error) == code


def test_an_error_is_one_line_without_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ShardCorruptError("p0-1.h5: wrong checksum; restore it")

    monkeypatch.setattr(cluster.cli, "app", fail)
    assert fictl("schema") == 4
    assert capsys.readouterr().err == "fi: p0-1.h5: wrong checksum; restore it\n"


def test_settings_come_from_options_before_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FI_REPLICAS", "1")
    monkeypatch.setenv("FI_PARTITIONS", "4")
    settings = find_settings(tmp_path, ["nats://a:1"], ["partitions=2"])
    assert (settings.replicas, settings.partitions) == (1, 2)
    assert find_servers(tmp_path, ["nats://a:1", "nats://b:2"]) == Servers(("nats://a:1", "nats://b:2"))


def in_fresh_interpreter(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_help_imports_nothing_heavy() -> None:
    heavy = ("h5py", "numpy", "nats", "uvloop", "opentelemetry", "rich.progress")
    code = (
        "import sys, typer, cluster.cli\n"
        "commands = dict(typer.main.get_command(cluster.cli.app).commands)\n"
        f"print(len(commands), [name for name in {heavy} if name in sys.modules])"
    )
    assert in_fresh_interpreter(code) == f"{len(cluster.cli.VERBS)} []"


def test_a_verb_that_prints_json_to_a_program_loads_nothing_that_draws(tmp_path: Path) -> None:
    (tmp_path / "events").write_bytes(b"")
    for verb in (["verify", str(tmp_path / "none")], ["publish", str(tmp_path / "events"), "--check-only"]):
        code = (
            "import sys, cluster.cli\n"
            f"try: cluster.cli.main({[*verb, '--json']})\n"
            "except SystemExit: print([name for name in sys.modules if name.partition('.')[0] == 'rich'])"
        )
        assert in_fresh_interpreter(code).splitlines()[-1] == "[]"


def test_a_process_loads_the_module_of_its_own_verb_and_of_no_other() -> None:
    code = (
        "import sys, cluster.cli\n"
        "try: cluster.cli.main(['run', 'no-such-stage'])\n"
        "except SystemExit as ended: print(ended.code)\n"
        "print(*sorted(name for name in sys.modules if name.startswith('cluster.cli.')))"
    )
    assert in_fresh_interpreter(code).split() == ["2", "cluster.cli.common", "cluster.cli.run"]


@pytest.mark.parametrize("loading", ["contextlib", "typer", "cluster.cli.status", "uvloop"])
def test_ctrl_c_while_a_verb_is_loaded_ends_it_without_a_word(loading: str) -> None:
    code = (
        "import os, runpy, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *given):\n"
        f"        if name == {loading!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        f"sys.modules.pop({loading!r}, None)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        # What runs the tests in the background may have it ignored; a person's shell does not.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv = ['fictl', 'status', '--nats', 'nats://127.0.0.1:9']\n"
        "runpy.run_module('cluster', run_name='__main__')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
