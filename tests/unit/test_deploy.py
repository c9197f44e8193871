"""Dashboards, alerts, runbooks and example files say nothing that the code does not know."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from promql_reader import problems, shown

from cluster.cli import app
from cluster.deploy.alerts import GROUPS, Alert
from cluster.deploy.dashboards import DASHBOARDS
from cluster.deploy.files import files
from cluster.deploy.promql import JOB, grown, quantile, rate, series
from contracts.settings import Settings, load_settings
from contracts.subjects import STAGES
from contracts.telemetry import (
    CATALOGUE,
    DURABLE_LATENCY,
    EVENTS_APPENDED,
    EVENTS_FAILED,
    MEMORY_USAGE,
    STAGE_BUDGET_MS_P95,
    STAGE_LATENCY,
)

DEPLOY = Path(__file__).resolve().parents[2] / "cluster" / "deploy"
METRICS = shown()
ALERTS = [alert for group in GROUPS.values() for alert in group]
PANELS: list[tuple[str, dict[str, Any]]] = [
    (name, panel) for name, board in DASHBOARDS.items() for panel in board["panels"] if panel["type"] != "row"
]
QUERIES = [(f"{name}: {panel['title']}", target["expr"]) for name, panel in PANELS for target in panel["targets"]]


def runbook() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", (DEPLOY / "runbooks.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_files_are_what_is_made_from_the_catalogue() -> None:
    made = files()
    there = {
        path.relative_to(DEPLOY).as_posix() for path in (*DEPLOY.glob("grafana/*"), DEPLOY / "prometheus/alerts.yml")
    }
    assert there == set(made)
    stale = [name for name, text in made.items() if (DEPLOY / name).read_text() != text]
    assert stale == [], "run `python -m cluster.deploy`"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        (sys.executable, "-m", "cluster.deploy", "--output", tmp_path / "file"), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"{tmp_path / 'file'}"), done.stderr
    assert "choose an --output that can be written" in done.stderr


@pytest.mark.parametrize(("where", "expression"), [*QUERIES, *((alert.name, alert.expr) for alert in ALERTS)])
def test_every_query_names_only_what_a_process_shows(where: str, expression: str) -> None:
    assert problems(expression, METRICS) == [], where


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("fi_events_appended > 0", "no metric fi_events_appended"),
        ('sum(rate(fi_events_appended_total{stage="x"}[5m]))', "fi_events_appended_total has no label stage"),
        ("sum by (stage) (rate(fi_events_appended_total[5m]))", "by stage: not of fi_events_appended_total"),
        ("sum by (le) (rate(fi_loop_lag_seconds_count[5m]))", "by le: not of fi_loop_lag_seconds_count"),
        ("rate(fi_storage_free_bytes[5m])", "rate of the gauge fi_storage_free_bytes"),
        ("deriv(fi_reconnects_total[5m])", "deriv of the counter fi_reconnects_total"),
        ("rate(fi_reconnects_total)", "rate needs a range"),
        ("sum(fi_storage_free_bytes))", "brackets do not match"),
        ("sum(fi_storage_free_bytes]", "brackets do not match"),
        ("median(fi_storage_free_bytes)", "no function median"),
        ("fi_storage_free_bytes ; 1", "';' is no PromQL"),
        ("fi_durable_latency_seconds > 2", "no metric fi_durable_latency_seconds"),
    ],
)
def test_the_reader_of_queries_finds_what_is_wrong(expression: str, problem: str) -> None:
    assert problem in problems(expression, METRICS)


def test_a_query_cannot_be_built_of_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="has no label 'stage'"):
        rate(EVENTS_APPENDED, "stage")
    with pytest.raises(ValueError, match="has no label 'site'"):
        series(EVENTS_FAILED, 'stage="hash",site!~"a"')
    with pytest.raises(ValueError, match="is a gauge"):
        rate(MEMORY_USAGE)
    with pytest.raises(ValueError, match="is a histogram"):
        series(DURABLE_LATENCY)
    with pytest.raises(ValueError, match="is a counter"):
        quantile(0.95, EVENTS_APPENDED)
    assert grown(EVENTS_FAILED, "stage", window="1h").startswith("sum by (stage) (increase(fi_events_failed_total[1h])")


def test_every_metric_is_on_a_dashboard() -> None:
    words = set(re.findall(r"\w+", " ".join(expression for _, expression in QUERIES)))
    bare = {re.sub(r"_(bucket|sum|count)$", "", word) for word in words} | words
    assert [name for name, what in CATALOGUE.items() if what.prometheus_name not in bare] == []


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboards_panels_lie_side_by_side_and_use_only_its_variables(name: str) -> None:
    board = DASHBOARDS[name]
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells
        assert place["x"] + place["w"] <= 24
        cells |= own
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"]))) - {"__rate_interval"}
    assert used == variables
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
            assert label in METRICS[metric][1]


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    sections = runbook()
    assert list(sections) == list(dict.fromkeys(alert.name for alert in ALERTS))
    for name, text in sections.items():
        parts = re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE)
        assert parts == ["Means", "Look first", "Do", "Over when"], name


def verbs() -> set[str]:
    found: set[str] = set()

    def walk(command: Any, words: tuple[str, ...]) -> None:
        for name, below in getattr(command, "commands", {}).items():
            walk(below, (*words, name))
        if not hasattr(command, "commands"):
            found.add(" ".join(words))

    walk(typer.main.get_command(app), ())
    return found


def test_runbooks_name_only_commands_settings_and_metrics_that_exist() -> None:
    text = (DEPLOY / "runbooks.md").read_text()
    known = verbs()
    groups = {verb.partition(" ")[0] for verb in known if " " in verb}
    for first, second in re.findall(r"`fictl ([a-z-]+)(?: ([a-z-]+))?", text):
        assert (f"{first} {second}" if first in groups else first) in known
    streams = {"FI_EVENTS", "FI_SEGMENT", "FI_HASH", "FI_PERSIST", "FI_RECEIPTS", "FI_DLQ"}
    settings = set(re.findall(r"\bFI_[A-Z_]+", text)) - streams
    assert {name[3:].lower() for name in settings} <= set(Settings.__struct_fields__)
    assert set(re.findall(r"`(fi\.[a-z.]+)`", text)) <= set(CATALOGUE)
    titles = " ".join([*(panel["title"] for _, panel in PANELS), *(board["title"] for board in DASHBOARDS.values())])
    rows = {panel["title"] for board in DASHBOARDS.values() for panel in board["panels"] if panel["type"] == "row"}
    for quoted in re.findall(r'"([^"]+)"', text.replace("\n", " ")):
        assert quoted in titles or any(row.startswith(quoted) for row in rows), quoted


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: f"{alert.name} {alert.labels.get('stage', '')}".strip())
def test_an_alert_says_how_urgent_it_is_and_speaks_of_labels_it_has(alert: Alert) -> None:
    assert alert.severity in {"page", "ticket"}
    assert re.fullmatch(r"\d+[smh]", alert.held)
    text = alert.summary + alert.description
    assert (
        text.count("{{") == text.count("}}") == len(re.findall(r"\{\{ \$(?:labels\.\w+|value(?: \| \w+)?) \}\}", text))
    )
    groupings = re.findall(r"\bby \(([^)]*)\)", alert.expr)
    has = (
        {name for names in groupings for name in names.split(", ")}
        | set(alert.labels)
        | ({"instance"} - set(groupings))
    )
    assert set(re.findall(r"\$labels\.(\w+)", text)) <= has


def test_a_latency_alert_compares_with_a_bound_of_the_histogram() -> None:
    for stage in STAGES:
        assert STAGE_BUDGET_MS_P95[stage] / 1000 in STAGE_LATENCY[stage].buckets
    thresholds = {
        alert.labels["stage"]: float(alert.expr.split()[-1]) for alert in ALERTS if alert.name == "FiStageLatencyHigh"
    }
    assert thresholds == {stage: budget / 1000 for stage, budget in STAGE_BUDGET_MS_P95.items()}


def test_what_operators_were_promised_to_be_told_of_is_told_as_soon() -> None:
    held = {alert.name: (alert.expr.rpartition(" ")[2], alert.held) for alert in ALERTS}
    assert held["FiDurableLatencyHigh"] == ("2", "5m")
    # Servers that are down or without a quorum answer nobody: the circuits say so while they do not.
    assert held["FiCircuitOpen"] == ("1)", "1m")
    assert "min_over_time" not in next(alert.expr for alert in ALERTS if alert.name == "FiCircuitOpen")
    # Over 90 % full.
    assert held["FiDiskNearFull"][0] == "0.1"
    assert {"FiLagGrows", "FiStreamNearFull", "FiDeadLetters", "FiBreakerOpen"} <= set(held)


def environment(name: str) -> dict[str, str]:
    lines = (DEPLOY / "systemd" / name).read_text().splitlines()
    # What is commented out is meant to be taken in: it must hold too.
    return dict(line.removeprefix("# ").split("=", 1) for line in lines if "=" in line)


def test_a_shell_reads_the_units_settings_as_the_runbooks_have_it_do() -> None:
    text = (DEPLOY / "runbooks.md").read_text()
    commands = re.findall(r"`([^`]*\. /etc/fi/fi\.env[^`]*)`", text.partition("\n## ")[0])
    assert commands == re.findall(r"`([^`]*/etc/fi/fi\.env[^`]*)`", text) != []
    for command in commands:
        script = f'{command.replace("/etc/fi", ".")}; unexported=1; printf "%s\\n" $SERVERS; env'
        told = subprocess.run(
            ("sh", "-c", script),
            cwd=DEPLOY / "systemd",
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        )
        assert (told.returncode, told.stderr) == (0, "")
        assert told.stdout.startswith("--nats\nnats://node1:4222\n--nats\nnats://node2:4222\n--nats\n")
        # What `fictl` is to be told must reach it, and the shell is as before afterwards.
        assert "FI_HEALTH_HOST=0.0.0.0" in told.stdout.splitlines()
        assert "unexported" not in told.stdout


def test_the_examples_agree_on_ports_settings_and_the_time_to_stop() -> None:
    scraped = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    assert f"job_name: {JOB}\n" in scraped
    ports = {stage: set(re.findall(rf":(\d+).*# {stage}$", scraped, re.MULTILINE)) for stage in STAGES}
    for stage in STAGES:
        settings = load_settings({**environment("fi.env"), **environment(f"{stage}.env")})
        every = set(re.findall(r"node\d:(\d+)", next(x for x in scraped.splitlines() if x.endswith(f"# {stage}"))))
        assert every == ports[stage] == {str(settings.health_port)}
        assert settings.health_host == "0.0.0.0"
        unit = (DEPLOY / "systemd" / "fi-stage@.service").read_text()
        assert int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0]) > 2 * settings.drain_s
    collector = (DEPLOY / "otel-collector.yml").read_text()
    assert f"endpoint: 0.0.0.0:{settings.otlp_endpoint.rpartition(':')[2]}" in collector
    (command,) = re.findall(r"^ExecStart=/opt/fi/bin/fictl (.*)$", unit, re.MULTILINE)
    run = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    options = {option for parameter in run.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", command + environment("fi.env")["SERVERS"])) <= options


def test_the_backups_unit_runs_a_verb_that_there_is_with_what_it_takes() -> None:
    unit = (DEPLOY / "systemd" / "fi-backup.service").read_text()
    (command,) = re.findall(r"^ExecStart=/opt/fi/bin/fictl (\w+) (\S+) (\S+)$", unit, re.MULTILINE)
    verb = typer.main.get_command(app).commands[command[0]]  # type: ignore[attr-defined]
    required = [parameter for parameter in verb.params if parameter.required]
    assert (command[0], len(required)) == ("backup", 2)
    (read, written) = re.findall(r"^RequiresMountsFor=(\S+) (\S+)$", unit, re.MULTILINE)[0]
    assert command[1] == read
    assert Path(command[2]).parent == Path(written)
    assert f"ReadWritePaths={written} {read}\n" in unit
    for name in re.findall(r"^EnvironmentFile=/etc/fi/(\S+)$", unit, re.MULTILINE):
        load_settings(environment(name))


def test_the_cases_for_promtool_speak_of_alerts_that_exist() -> None:
    text = (DEPLOY / "prometheus" / "alerts.test.yml").read_text()
    names = set(re.findall(r'alertname(?:="|: )(Fi\w+)', text))
    assert len(names) > 5
    assert names <= {alert.name for alert in ALERTS}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")
@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts.test.yml")],
)
def test_promtool_takes_the_rules_and_their_cases_hold(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
