"""Servers that speak TLS, verify clients, and know their users by nkeys or JWTs; and what wears out is renewed."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import nkeys
import pytest
from commands import Ran, at_servers, run_fictl
from papers import Authority, Nkey, Operator

from cluster.nodes import find_nats_server
from cluster.ports import HeldPorts
from cluster.testing.waiting import until
from cluster.workload import consultations
from contracts.errors import ClusterUnavailableError, SettingsError
from contracts.subjects import STAGES
from stages.runtime.access import Access
from stages.runtime.connection import connect, server_name

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

EVENTS = 300
MAY_ALL = 'publish: ["fi.>", "$JS.API.>", "$KV.>"], subscribe: "_INBOX.>"'
MAY_PUBLISH = 'publish: "fi.events.>", subscribe: "_INBOX.>"'
"""As README gives them, to stages and operators, and to gateways."""
SMALL = {"FI_REPLICAS": "1", "FI_PARTITIONS": "2"}


class Server:
    """One nats-server on a port of its own, started and killed as the test says."""

    def __init__(self, directory: Path, port: int) -> None:
        self.port = port
        self.config = directory / "server.conf"
        self._process: asyncio.subprocess.Process | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        return (f"nats://127.0.0.1:{self.port}",)

    async def start(self, config: str) -> None:
        self.config.write_text(f"port: {self.port}\n{config}")
        self._process = await asyncio.create_subprocess_exec(
            find_nats_server(), "-c", self.config, stderr=asyncio.subprocess.DEVNULL
        )

        async def greets() -> bool:
            return await server_name(self.urls[0]) is not None

        await until(greets, "the server greets", 60)

    async def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    with HeldPorts() as held:
        (port,) = held.take(1)
        server = Server(tmp_path, port)
        try:
            yield server
        finally:
            await server.kill()


def tls(authority: Authority, name: str = "server", *, verify: bool = False) -> str:
    certificate, key = authority.sign(name)
    asked = f', ca_file: "{authority.file}", verify: true' if verify else ""
    return f'tls {{ cert_file: "{certificate}", key_file: "{key}"{asked} }}\n'


@asynccontextmanager
async def stages(server: Server, shards: Path, environment: dict[str, str]) -> AsyncIterator[None]:
    """One process of each stage, ready."""
    running = []
    try:
        for stage in STAGES:
            where = ["--shards", str(shards)] if stage == "persist" else []
            command = [sys.executable, "-m", "cluster", "run", stage, "--name", f"{stage}-a", *at_servers(server.urls)]
            running.append(
                await asyncio.create_subprocess_exec(*command, *where, stdout=asyncio.subprocess.PIPE, env=environment)
            )
        for process in running:
            assert process.stdout is not None
            async with asyncio.timeout(60):
                assert await process.stdout.readline() == b"READY\n"
        yield
    finally:
        for process in running:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        for process in running:
            assert await process.wait() == 0


async def test_a_pipeline_on_servers_that_verify_their_clients_and_know_their_users(
    server: Server, tmp_path: Path
) -> None:
    authority = Authority(tmp_path, "hospital")
    certificate, key = authority.sign("node-1")
    user, edge = Nkey(nkeys.PREFIX_BYTE_USER), Nkey(nkeys.PREFIX_BYTE_USER)
    seed, edge_seed = tmp_path / "node-1.nk", tmp_path / "edge.nk"
    seed.write_bytes(user.seed)
    edge_seed.write_bytes(edge.seed)
    files = {
        "FI_NATS_CA_FILE": str(authority.file),
        "FI_NATS_CERT_FILE": str(certificate),
        "FI_NATS_KEY_FILE": str(key),
        "FI_NATS_CREDS_FILE": str(seed),
    }
    await server.start(
        tls(authority, verify=True)
        + f'jetstream {{ store_dir: "{tmp_path}/js" }}\n'
        + f"authorization {{ users: [ {{ nkey: {user.public}, permissions: {{ {MAY_ALL} }} }},"
        + f" {{ nkey: {edge.public}, permissions: {{ {MAY_PUBLISH} }} }} ] }}\n"
    )

    async def fictl(*arguments: str | Path, **environment: str) -> Ran:
        return await run_fictl(*arguments, *at_servers(server.urls), **(SMALL | environment))

    made = await fictl("cluster", "apply", **files)
    assert (made.code, made.err) == (0, "")
    events = tmp_path / "events.ndjson"
    rows = list(consultations(seed=61, events=EVENTS))
    events.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in rows))
    shards = tmp_path / "shards"
    config = tmp_path / "fi.toml"
    config.write_text("".join(f'{name.removeprefix("FI_").lower()} = "{file}"\n' for name, file in files.items()))
    async with stages(server, shards, {**SMALL, "FI_CONFIG": str(config)}):
        sent = await fictl("publish", events, **files)
        assert sent.code == 0, sent.err
        access = Access(str(authority.file), str(certificate), str(key), str(edge_seed))
        gateway = await connect(server.urls, "gateway", access=access)
        subject = f"fi.events.clinic-1.{rows[0]['consultation_id']}"
        accepted = await gateway.request(subject, msgspec.json.encode(rows[0]), timeout=60)
        assert json.loads(accepted.data)["seq"] > EVENTS
        await gateway.close()
        flushed = await fictl("flush", **files)
        assert flushed.code == 0, flushed.err
        seen = await fictl("status", "--json", **files)
        assert seen.code == 0, seen.out
        assert json.loads(seen.out)["servers"][0]["reachable"]
        checked = await run_fictl(
            "--config", config, "config", "check", "--connect", *at_servers(server.urls), "--shards", shards, **SMALL
        )
        assert checked.code == 0, checked.out
    audited = await fictl("verify", shards, "--receipts", "--json", **files)
    assert audited.code == 0, audited.err
    assert json.loads(audited.out)["store"]["events"] == EVENTS

    for missing, words in (
        ("FI_NATS_CA_FILE", "no TLS with .*CERTIFICATE_VERIFY_FAILED; FI_NATS_CA_FILE names"),
        ("FI_NATS_CREDS_FILE", "refused the connection: .*FI_NATS_CREDS_FILE"),
    ):
        refused = await fictl("cluster", "status", **{name: file for name, file in files.items() if name != missing})
        assert refused.code == 3
        assert re.search(words, refused.err), refused.err
    unknown = await fictl("cluster", "status", FI_NATS_CA_FILE=str(authority.file), FI_NATS_CREDS_FILE=str(seed))
    assert unknown.code == 3
    assert "FI_NATS_CERT_FILE" in unknown.err, unknown.err
    nowhere = await fictl("cluster", "status", **(files | {"FI_NATS_KEY_FILE": "/none.pem"}))
    assert (nowhere.code, "nats_key_file /none.pem: No such file" in nowhere.err) == (2, True), nowhere.err


async def test_nothing_is_said_in_plain_text_where_files_for_tls_are_named(server: Server, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "hospital")
    await server.start("")
    with pytest.raises(ClusterUnavailableError, match="nats_ca_file or nats_cert_file is set, and this server"):
        await connect(server.urls, "test", access=Access(ca_file=str(authority.file)), wait_s=1.0)
    with pytest.raises(SettingsError, match="nats_ca_file"):
        await connect(server.urls, "test", access=Access(ca_file="/none.pem"))


async def test_a_renewed_authority_is_read_for_the_next_connection(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(old.file.read_bytes())
    await server.start(tls(old, "before"))
    client = await connect(server.urls, "test", access=Access(ca_file=str(trusted)))
    try:
        await server.kill()
        trusted.unlink()
        with caplog.at_level(logging.WARNING):
            await server.start(tls(new, "after"))
            await until(lambda: "nats_ca_file" in caplog.text, "the missing file is told of", 60)
            assert not client.is_connected
            trusted.write_bytes(new.file.read_bytes())
        await until(lambda: client.is_connected, "it is connected again", 60)
        await client.flush(timeout=60)
    finally:
        await client.close()


async def test_credentials_that_expired_are_read_anew(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    operator = Operator()
    await server.start(operator.config)
    creds = tmp_path / "user.creds"
    creds.write_text(operator.credentials("short", 3))
    reconnected = asyncio.Event()
    client = await connect(
        server.urls, "test", access=Access(creds_file=str(creds)), reconnected=reconnected.set, wait_s=60
    )
    try:
        with caplog.at_level(logging.WARNING):
            await until(lambda: "expired" in caplog.text, "the server ends the connection", 60)
            creds.write_text(operator.credentials("long", 3600))
            async with asyncio.timeout(60):
                await reconnected.wait()
        await client.flush(timeout=60)
    finally:
        await client.close()
