"""The verbs that need a cluster, as processes of their own against real servers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import fictl_at
from nats.aio.client import Client

from cluster.workload import consultations

pytestmark = pytest.mark.cluster


async def test_from_nothing_to_published_and_published_again(
    client: Client, cluster_urls: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "events.ndjson"
    file.write_text("".join(f"{json.dumps(event)}\n" for event in consultations(1, 300)) + "not json\n")

    code, out, err = await fictl_at(cluster_urls, "publish", str(file))
    assert (code, out) == (3, "")
    assert "fictl cluster apply" in err

    code, out, _ = await fictl_at(cluster_urls, "cluster", "plan", "--json")
    assert code == 0
    assert {change["action"] for change in json.loads(out)["changes"]} == {"create"}
    assert (await fictl_at(cluster_urls, "cluster", "status"))[0] == 3

    assert (await fictl_at(cluster_urls, "cluster", "apply"))[0] == 0
    code, out, _ = await fictl_at(cluster_urls, "cluster", "plan", "--json")
    assert (code, json.loads(out)["changes"]) == (0, [])
    code, out, _ = await fictl_at(cluster_urls, "cluster", "status", "--json")
    assert code == 0
    assert json.loads(out)["healthy"] is True
    code, out, _ = await fictl_at(cluster_urls, "cluster", "status")
    assert "FI_EVENTS" in out

    code, out, err = await fictl_at(cluster_urls, "publish", str(file), "--json")
    report = json.loads(out)
    assert code == 1
    assert (report["accepted"], report["duplicates"], report["refused"]) == (300, 0, 1)
    assert report["latency_ms"]["accepted"]["p50"] > 0
    assert "line 301" in err

    code, out, _ = await fictl_at(cluster_urls, "publish", str(file), "--json", "--rate", "1000")
    report = json.loads(out)
    assert (report["accepted"], report["duplicates"]) == (300, 300)
    assert report["elapsed_s"] >= 0.29


async def test_drift_is_shown_field_by_field_and_another_p_under_data_is_refused(
    client: Client, cluster_urls: tuple[str, ...], tmp_path: Path
) -> None:
    assert (await fictl_at(cluster_urls, "cluster", "apply"))[0] == 0
    code, out, _ = await fictl_at(cluster_urls, "cluster", "plan", "--set", "hop_bytes_max=300000000", "--json")
    assert code == 0
    drifts = [drift for change in json.loads(out)["changes"] for drift in change["drifts"]]
    assert {(drift["field"], drift["wanted"]) for drift in drifts} >= {("max_bytes", 300_000_000)}

    file = tmp_path / "events.ndjson"
    file.write_text("".join(f"{json.dumps(event)}\n" for event in consultations(1, 5)))
    assert (await fictl_at(cluster_urls, "publish", str(file)))[0] == 0
    code, _, err = await fictl_at(cluster_urls, "cluster", "plan", "--set", "partitions=3")
    assert code == 1
    assert "refused" in err
    code, _, err = await fictl_at(cluster_urls, "cluster", "apply", "--set", "partitions=3")
    assert code == 1
    assert "Traceback" not in err


async def test_an_apply_that_lowers_a_limit_says_so(client: Client, cluster_urls: tuple[str, ...]) -> None:
    raised = ("cluster", "apply", "--set", "events_bytes_max=6000000000")
    assert (await fictl_at(cluster_urls, "cluster", "apply"))[0] == 0
    code, _, err = await fictl_at(cluster_urls, *raised)
    assert (code, err) == (0, "")
    code, out, err = await fictl_at(cluster_urls, "cluster", "apply")
    assert (code, out.count("max_bytes")) == (0, 1)
    assert "FI_EVENTS was lowered from 6000000000 to 4294967296 bytes" in err
