"""`fictl config show|check`: where values come from, what is hidden, and what each failure exits with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from commandline import Captured, fictl

from cluster.cli.common import config_option, find_settings, given_settings
from cluster.config import find_file
from cluster.stageprocess import settings_environment
from contracts.errors import SettingsError
from contracts.settings import Settings


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working directory, and an environment without settings."""
    for name in [name for name in os.environ if name.startswith(("FI_", "OTEL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(capsys: Captured, *arguments: str) -> dict[str, Any]:
    assert fictl(*arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def checked(capsys: Captured, *arguments: str | Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and what was found by the name of the check."""
    code = fictl("config", "check", *arguments, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    return code, {done["name"]: done for done in report["checks"]}


def test_show_says_for_every_setting_where_its_value_came_from(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    (place / "fi.toml").write_text("replicas = 1\npartitions = 2\ndrain_s = 3\n")
    monkeypatch.setenv("FI_PARTITIONS", "4")
    monkeypatch.setenv("FI_DRAIN_S", "5")
    found = shown(capsys, "config", "show", "--set", "drain_s=6")
    assert found["file"] == str(place / "fi.toml")
    settings = found["settings"]
    assert set(settings) == set(Settings.__struct_fields__)
    assert settings["trim_s"] == {"value": 2.0, "layer": "default", "source": ""}
    assert settings["replicas"] == {"value": 1, "layer": "file", "source": "fi.toml"}
    assert settings["partitions"] == {"value": 4, "layer": "environment", "source": "FI_PARTITIONS"}
    assert settings["drain_s"] == {"value": 6.0, "layer": "command line", "source": "--set drain_s"}

    assert fictl("config", "show", "--set", "drain_s=6") == 0
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert "default" in rows["trim_s"]
    assert "file (fi.toml)" in rows["replicas"]
    assert "environment (FI_PARTITIONS)" in rows["partitions"]
    assert "command line (--set drain_s)" in rows["drain_s"]


def test_the_option_names_the_file_before_the_variable_and_that_before_the_working_directory(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    for number, name in enumerate(("fi.toml", "variable.toml", "option.toml"), 1):
        (place / name).write_text(f"partitions = {number}\n")
    assert shown(capsys, "config", "show")["settings"]["partitions"]["value"] == 1
    monkeypatch.setenv("FI_CONFIG", "variable.toml")
    assert shown(capsys, "config", "show")["settings"]["partitions"]["value"] == 2
    assert shown(capsys, "--config", "option.toml", "config", "show")["settings"]["partitions"]["value"] == 3
    assert config_option.get() is None
    monkeypatch.setenv("FI_CONFIG", "")
    found = shown(capsys, "config", "show")
    assert (found["file"], found["settings"]["partitions"]["value"]) == (None, 8)


def test_a_named_file_must_be_there_and_the_default_one_need_not(place: Path, capsys: Captured) -> None:
    assert find_file(None, {}) is None
    with pytest.raises(SettingsError, match=r"missing.toml cannot be read: No such file"):
        find_file(None, {"FI_CONFIG": "missing.toml"})
    assert fictl("--config", "missing.toml", "config", "show") == 2
    assert "missing.toml cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"replicas = 1\npartitions = four\n", "fi.toml is not TOML: .*line 2"),
        (b"replicas = 1\nreplicas = 2\n", "fi.toml is not TOML: .*line 2"),
        (b"replicas = 1 # \xff\n", "fi.toml is not UTF-8"),
    ],
)
def test_a_file_that_is_not_toml_is_told_with_its_line(place: Path, data: bytes, words: str) -> None:
    (place / "fi.toml").write_bytes(data)
    with pytest.raises(SettingsError, match=words):
        find_file(None, {})


def test_a_file_from_an_editor_that_writes_a_byte_order_mark_is_read(place: Path) -> None:
    (place / "fi.toml").write_bytes(b"\xef\xbb\xbfreplicas = 1\r\n")
    assert given_settings().settings.replicas == 1


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_credentials_are_in_neither_form_of_the_output(
    arguments: tuple[str, ...], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    (place / "fi.toml").write_text('otlp_endpoint = "http://user:hunter2@host:4318"\n')
    assert fictl("config", "show", *arguments) == 0
    out = capsys.readouterr().out
    assert "http://***@host:4318" in out
    assert "hunter2" not in out
    monkeypatch.setenv("FI_OTLP_ENDPOINT", "user:hunter2@host")
    assert fictl("config", "check", *arguments) == 2
    out = capsys.readouterr().out
    assert "otlp_endpoint" in out
    assert "hunter2" not in out


@pytest.mark.parametrize("verb", [("up",), ("run", "hash"), ("demo",), ("cluster", "plan", "--nats", "nats://a:1")])
def test_every_verb_refuses_a_wrong_file_before_it_starts_anything(
    verb: tuple[str, ...], place: Path, capsys: Captured
) -> None:
    (place / "fi.toml").write_text("partition = 4\n")
    assert fictl(*verb) == 2
    assert "fi.toml: partition names no setting; did you mean partitions?" in capsys.readouterr().err
    assert sorted(path.name for path in place.iterdir()) == ["fi.toml"]


def test_cluster_verbs_take_the_file_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "fi.toml").write_text("replicas = 1\npartitions = 2\n")
    monkeypatch.setenv("FI_PARTITIONS", "4")
    settings = find_settings(place, ["nats://a:1"], ["drain_s=6"])
    assert settings == Settings(replicas=1, partitions=4, drain_s=6.0)


def test_a_child_of_a_run_takes_the_run_s_settings_and_no_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "fi.toml").write_text("partitions = 2\nreplicas = 1\n")
    run = Settings(partitions=4)
    for name, value in settings_environment(run).items():
        monkeypatch.setenv(name, value)
    assert given_settings().settings == run


@pytest.mark.parametrize(
    ("config", "chosen"), [("two.toml", ()), ("fi.toml", ("--set", "replicas=2")), ("", ("--set", "replicas=2"))]
)
def test_a_detached_run_takes_the_file_and_the_settings_it_was_told(
    config: str, chosen: tuple[str, ...], place: Path, capsys: Captured
) -> None:
    (place / "fi.toml").write_text("replicas = 1\n")
    (place / "two.toml").write_text("replicas = 2\n")
    assert fictl("--config", config, "up", "--dir", "run", "--servers", "1", *chosen, "--detach") == 2
    assert "exit code 2" in capsys.readouterr().err
    assert "replicas = 2 needs" in (place / "run" / "supervisor.log").read_text()


def test_a_detached_run_that_does_not_start_says_why_and_nothing_of_the_runs_before_it(
    place: Path, capsys: Captured
) -> None:
    (place / "run").mkdir()
    (place / "run" / "supervisor.log").write_text("of yesterday\n")
    assert fictl("up", "--dir", "run", "--servers", "1", "--set", "replicas=2", "--detach") == 2
    err = capsys.readouterr().err
    assert "replicas = 2 needs" in err
    assert "of yesterday" not in err


def test_check_passes_good_settings_and_starts_nothing(place: Path, capsys: Captured) -> None:
    (place / "fi.toml").write_text("replicas = 1\n")
    code, checks = checked(capsys)
    assert code == 0
    assert {name: done["result"] for name, done in checks.items()} == {"settings file": "ok", "settings": "ok"}
    assert sorted(path.name for path in place.iterdir()) == ["fi.toml"]
    assert fictl("config", "check") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok", "ok"]


def test_check_says_when_receipts_will_not_fit_their_stream(place: Path, capsys: Captured) -> None:
    for partitions, told in ((8, False), (512, True)):
        code, found = checked(capsys, "--set", f"partitions={partitions}")
        assert (code, "commits stop" in found["settings"]["detail"]) == (0, told)


def test_check_names_a_wrong_setting_and_then_tries_nothing_else(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("FI_REPLICAS", "9")
    code, checks = checked(capsys, "--connect", "--nats", "nats://127.0.0.1:1")
    assert code == 2
    assert "FI_REPLICAS" in checks["settings"]["detail"]
    assert {checks[name]["result"] for name in ("servers", "streams", "store", "signing key")} == {"not checked"}


def test_check_of_a_broken_file_says_so(place: Path, capsys: Captured) -> None:
    (place / "fi.toml").write_text("replicas =\n")
    code, checks = checked(capsys)
    assert code == 2
    assert "line 1" in checks["settings file"]["detail"]
    assert checks["settings"]["result"] == "not checked"


def test_where_nothing_runs_check_says_how_to_start_it_and_still_looks_at_disk_and_key(
    place: Path, capsys: Captured
) -> None:
    code, checks = checked(capsys, "--connect", "--set", "signing_key_file=no.pem", "--set", "disk_floor_bytes=0")
    assert code == 3
    assert checks["servers"]["result"] == "failed"
    assert "fictl up" in checks["servers"]["detail"]
    assert checks["streams"]["result"] == "not checked"
    assert checks["store"]["result"] == "ok"
    assert (checks["signing key"]["result"], checks["signing key"]["exit_code"]) == ("failed", 2)
    assert list(place.iterdir()) == []


def test_a_server_that_does_not_answer_is_told_without_its_password(place: Path, capsys: Captured) -> None:
    code, checks = checked(capsys, "--connect", "--nats", "nats://user:hunter2@127.0.0.1:1")
    assert code == 3
    assert "nats://***@127.0.0.1:1" in checks["servers"]["detail"]
    assert "hunter2" not in json.dumps(checks)
    assert checks["store"]["result"] == "not checked"


@pytest.mark.parametrize(
    ("shards", "floor_bytes", "words"), [("file", 0, "cannot be written"), ("new/deep", 2**62, "make room")]
)
def test_a_store_that_cannot_be_written_or_has_too_little_room_fails(
    shards: str, floor_bytes: int, words: str, place: Path, capsys: Captured
) -> None:
    (place / "file").write_bytes(b"")
    _, checks = checked(capsys, "--connect", "--shards", place / shards, "--set", f"disk_floor_bytes={floor_bytes}")
    assert (checks["store"]["result"], checks["store"]["exit_code"]) == ("failed", 1)
    assert words in checks["store"]["detail"]
    assert sorted(path.name for path in place.iterdir()) == ["file"]


@pytest.mark.parametrize("verb", ["show", "check"])
def test_both_verbs_have_help_with_an_example(verb: str, capsys: Captured) -> None:
    assert fictl("config", verb, "--help") == 0
    assert "Example: fictl " in " ".join(capsys.readouterr().out.split())
