"""`fictl config check --connect` against real servers: it sees what is there and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import at_servers, run_fictl
from nats.aio.client import Client

from cluster.apply import apply
from contracts.settings import MIB, Settings
from stages.persist.keys import create_key

pytestmark = pytest.mark.cluster

CHOSEN = Settings(partitions=4, hop_bytes_max=64 * MIB)
FILE = f"partitions = 4\nhop_bytes_max = {64 * MIB}\n"


async def check(
    urls: tuple[str, ...], file: Path, *arguments: str | Path, **env: str
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and what was found by the name of the check."""
    checking = ("--config", file, "config", "check", "--connect", "--json", *at_servers(urls), *arguments)
    code, out, err = await run_fictl(*checking, **env)
    assert out, err
    return code, {done["name"]: done for done in json.loads(out)["checks"]}


async def configs(client: Client) -> dict[str, dict[str, object]]:
    return {str(info.config.name): info.config.as_dict() for info in await client.jetstream(timeout=10).streams_info()}


async def test_check_sees_missing_streams_drift_a_silent_server_and_all_being_well(
    client: Client, cluster_urls: tuple[str, ...], tmp_path: Path
) -> None:
    file, key = tmp_path / "pipeline.toml", tmp_path / "audit.pem"
    create_key(key)
    file.write_text(FILE + f'signing_key_file = "{key}"\ndisk_floor_bytes = 1\n')
    store = ("--shards", tmp_path / "shards")

    code, checks = await check(cluster_urls, file, *store)
    assert code == 3
    assert checks["streams"]["result"] == "failed"
    assert "FI_EVENTS" in checks["streams"]["detail"]
    assert "fictl cluster apply" in checks["streams"]["detail"]
    assert await configs(client) == {}

    await apply(client, CHOSEN)
    made = await configs(client)
    code, checks = await check(cluster_urls, file, *store)
    assert code == 0, checks
    assert list(checks) == ["settings file", "settings", "servers", "streams", "store", "signing key"]
    assert {done["result"] for done in checks.values()} == {"ok"}

    code, checks = await check(cluster_urls, file, *store, FI_HOP_BYTES_MAX=str(65 * MIB))
    assert code == 1
    assert f"FI_SEGMENT max_bytes is {64 * MIB}, the settings say {65 * MIB}" in checks["streams"]["detail"]
    code, checks = await check(cluster_urls, file, *store, "--set", "hop_storage=file")
    assert code == 1
    assert "the server cannot change this" in checks["streams"]["detail"]

    code, checks = await check((*cluster_urls, "nats://127.0.0.1:1"), file, *store)
    assert code == 3
    assert checks["servers"]["detail"].startswith("nats://127.0.0.1:1 does not answer")
    assert checks["streams"]["result"] == "ok"

    assert await configs(client) == made
    assert not (tmp_path / "shards").exists()
