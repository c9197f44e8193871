"""What a terminal would obey reaches none: names and ids out of files and of servers can be anything."""

from __future__ import annotations

import ast
import json
import logging
from pathlib import Path

import pytest
from commandline import Captured, fictl
from rich.text import Text
from shard_maker import filled_store

from cluster.cli import common
from cluster.cli.common import console, make_table, print_json, print_lines, say
from stages.persist.storedir import STORE_FILE

FORGED = "id\x1b]0;owned\x07\x9b2J\u202e\nall is well [/bold]"
SHOWN = "id·]0;owned··2J··all is well [/bold]"


def test_lines_and_tables_show_text_as_it_is_without_what_a_terminal_would_obey(capsys: Captured) -> None:
    print_lines(FORGED, "and more")
    table = make_table("name")
    table.add_row(FORGED.replace("\n", ""))
    console().print(table)
    console().print(Text(FORGED, style="bold"))
    out = capsys.readouterr().out.split("\n")
    assert out[:2] == [SHOWN, "and more"]
    assert f"│ {SHOWN.replace('··all', '·all')} │" in out
    assert all(line.isprintable() for line in out)
    say(f"the end of a log:\n{FORGED}")
    assert capsys.readouterr().err == "the end of a log:\nid·]0;owned··2J·\nall is well [/bold]\n"


def test_json_says_the_same_without_such_signs(capsys: Captured) -> None:
    print_json({"store": FORGED, "site": "clínica"})
    out = capsys.readouterr().out
    assert out.rstrip("\n").isprintable()
    assert "clínica" in out
    assert json.loads(out) == {"store": FORGED, "site": "clínica"}


@pytest.mark.parametrize("verb", ["backup", "verify", "shards"])
def test_a_forged_identity_of_a_store_is_not_obeyed(verb: str, tmp_path: Path, capsys: Captured) -> None:
    store = filled_store(tmp_path / "store")[0].directory
    identity = json.loads((store / STORE_FILE).read_text())
    (store / STORE_FILE).write_text(json.dumps(identity | {"store_id": FORGED, "cluster_id": FORGED}))
    fictl(verb, store, *([tmp_path / "copies"] if verb == "backup" else []))
    fictl("events", "0" * 32, "--dir", store)
    printed = "".join(capsys.readouterr()).replace("\n", "")
    assert printed.isprintable()


def test_nor_is_what_the_log_says_of_it(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.cli.keys.print_lines", lambda _: logging.getLogger("a").warning("%s", FORGED))
    monkeypatch.setattr("stages.persist.keys.load_key", lambda _: type("Key", (), {"public_key": ""}))
    assert fictl("key", "public", "any") == 0
    assert capsys.readouterr().err == "fi: id·]0;owned··2J·\nall is well [/bold]\n"


def test_no_verb_prints_past_it() -> None:
    """All but the word that a supervisor waits for goes through `cluster.cli.common`."""
    for path in Path(common.__file__).parent.glob("*.py"):
        if path.name == "common.py":
            continue
        tree = ast.parse(path.read_text())
        called = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        printed = [ast.unparse(node.args[0]) for node in called if ast.unparse(node.func) == "print"]
        assert set(printed) <= {"'READY'"}, path.name
        assert "Console" not in {ast.unparse(node.func) for node in called}, path.name
