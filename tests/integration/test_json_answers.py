"""What README says that `--json` prints is what each verb prints, on a pipeline that works and one that is gone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from commands import run_fictl
from pipeline import Load, Pipeline, running, settings, workload

import cluster.cli

pytestmark = pytest.mark.cluster

README = Path(__file__).resolve().parents[2] / "README.md"
OPTIONS = {"verify --receipts": "verify", "verify FILE": "verify", "dlq ls --summary": "dlq ls"}
"""Rows that are about one way of calling a verb."""
ALWAYS = {"partitions ls": 3, "rebuild": 1, "partitions move": 1, "partitions restore": 1}
"""Rows that begin with so many fields that are always there; the others are there at times."""


class Row(NamedTuple):
    """What README says of a verb's answer."""

    fields: tuple[str, ...]
    has_more: bool
    shape: str


def rows() -> dict[str, Row]:
    section = README.read_text().partition("#### What `--json` prints")[2].partition("\n### ")[0]
    found: dict[str, Row] = {}
    for verbs, what in re.findall(r"^\| (`.*?) \| (.*) \|$", section, re.MULTILINE):
        own = what.split(", each with ")[0] + what.partition("; then")[2]
        fields = tuple(name for name in re.findall(r"`([^`]+)`", own))
        shape = "list" if what.startswith("a list") else "lines" if what.startswith("one a line") else "object"
        for verb in re.findall(r"`([^`]+)`", verbs):
            found[verb] = Row(fields, "…" in what, shape)
    return found


def verbs_with_json() -> set[str]:
    found = set()
    for name, command in typer.main.get_command(cluster.cli.app).commands.items():  # type: ignore[attr-defined]
        leaves = {f"{name} {leaf}": of for leaf, of in getattr(command, "commands", {}).items()} or {name: command}
        for verb, of in leaves.items():
            if any("--json" in getattr(parameter, "opts", ()) for parameter in of.params):
                found.add(verb)
    return found


def test_readme_has_a_row_for_every_verb_that_takes_json() -> None:
    assert {OPTIONS.get(verb, verb) for verb in rows()} == verbs_with_json()


def objects(row: Row, out: str) -> list[dict[str, Any]]:
    """The objects that an answer of that shape holds."""
    if row.shape == "lines":
        return [json.loads(line) for line in out.splitlines()]
    answer = json.loads(out)
    return list(answer) if row.shape == "list" else [answer]


async def test_each_verb_prints_what_readme_says(tmp_path: Path) -> None:
    async with running(tmp_path / "run", settings(partitions=2)) as pipeline:
        load = Load(workload(seed=811, events=60))
        await load.publish(pipeline.client)
        consultation = json.loads(load.lines[0])["consultation_id"]
        await pipeline.client.jetstream().publish(f"fi.events.clinic-1.{consultation}", b"no JSON")
        await pipeline.settled()
        checked = set()
        for verb, arguments in calls(pipeline, load, tmp_path, consultation).items():
            row = rows()[verb]
            ran = await run_fictl(*arguments, "--json")
            found = objects(row, ran.out)
            assert found, (verb, ran)
            for answer in found:
                assert set(row.fields[: ALWAYS.get(verb)]) <= answer.keys(), (verb, ran)
                assert row.has_more or answer.keys() <= set(row.fields), (verb, ran)
            checked.add(verb)
    # The demo starts a pipeline of its own; tests/integration/test_demo.py looks at what it prints.
    assert checked == rows().keys() - {"demo"}


def calls(pipeline: Pipeline, load: Load, scratch: Path, consultation: str) -> dict[str, tuple[str, ...]]:
    """How each verb of README's table is called, in an order in which each finds what it is about."""
    run = str(pipeline.supervisor.directory)
    here = ("--dir", run)
    events = scratch / "events.ndjson"
    events.write_bytes(b"\n".join(load.lines[:3]))
    shards = str(pipeline.shards)
    return {
        "status": ("status", *here),
        "cluster status": ("cluster", "status", *here),
        "cluster plan": ("cluster", "plan", *here),
        "cluster apply": ("cluster", "apply", *here),
        "health": ("health", *here),
        "members": ("members", *here),
        "publish": ("publish", str(events), *here),
        "events": ("events", consultation, *here),
        "flush": ("flush", *here),
        "export": ("export", run, "--output", str(scratch / "out.ndjson")),
        "verify FILE": ("verify", str(scratch / "out.ndjson")),
        "shards": ("shards", run),
        "verify": ("verify", run),
        "verify --receipts": ("verify", run, "--receipts"),
        "backup": ("backup", run, str(scratch / "copy")),
        "partitions ls": ("partitions", "ls", *here),
        # Persist works on them: each is passed over, or failed.
        "rebuild": ("rebuild", *here),
        "partitions move": ("partitions", "move", "0", *here),
        "partitions restore": ("partitions", "restore", "0", "--shards", shards, *here),
        "dlq ls": ("dlq", "ls", *here),
        "dlq show": ("dlq", "show", "1", *here),
        "dlq ls --summary": ("dlq", "ls", "--summary", *here),
        "dlq replay": ("dlq", "replay", "--all", "--dry-run", *here),
        "dlq drop": ("dlq", "drop", "--all", "--yes", *here),
        "policy show": ("policy", "show", *here),
        "policy set": ("policy", "set", "check_payload=false", *here),
        "policy history": ("policy", "history", *here),
        "config show": ("config", "show"),
        "config check": ("config", "check", "--connect", *here),
        "config budgets": ("config", "budgets"),
        "capacity": ("capacity", "--rate", "100"),
        "metrics": ("metrics",),
        "schema": ("schema",),
        "pause": ("pause", "hash", *here),
        "resume": ("resume", "hash", *here),
        "scale": ("scale", "hash=2", *here),
        "restart": ("restart", "hash", *here),
        "drain": ("drain", *here),
    }
