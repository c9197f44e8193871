"""Servers that speak TLS, verify clients, and know their users by nkeys or JWTs; and what wears out is renewed."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import nkeys
import pytest
from commands import Ran, at_servers, run_fictl
from papers import Authority, Nkey, Operator

from cluster.health import get
from cluster.nodes import find_nats_server
from cluster.ports import HeldPorts
from cluster.testing.waiting import until
from cluster.workload import consultations
from contracts.errors import ClusterUnavailableError, SettingsError
from contracts.settings import Settings
from contracts.subjects import STAGES
from contracts.telemetry import PAPER_DUE
from stages.runtime.access import Access, Servers
from stages.runtime.api import Api
from stages.runtime.connection import connect, server_name
from stages.runtime.control import Control
from stages.runtime.meters import Meters
from stages.runtime.watch import Watch

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

EVENTS = 300
EXAMPLE = Path("cluster/deploy/nats/nats-server.conf").absolute()
NAMES = ("n1", "n2", "n3")


class Server:
    """One nats-server on a port of its own, started and killed as the test says."""

    def __init__(self, directory: Path, port: int, name: str = "server") -> None:
        self.port = port
        self.config = directory / f"{name}.conf"
        self._process: asyncio.subprocess.Process | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        return (f"nats://127.0.0.1:{self.port}",)

    async def start(self, config: str) -> None:
        listen = "" if "listen:" in config else f"port: {self.port}\n"
        self.config.write_text(listen + config)
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


async def is_healthy(monitor: int) -> bool:
    try:
        status, _ = await get(f"http://127.0.0.1:{monitor}/healthz")
        return status == 200
    except (OSError, ValueError):
        return False


@asynccontextmanager
async def example(directory: Path, users: dict[str, Nkey]) -> AsyncIterator[tuple[str, ...]]:
    """Three servers that run by the example, with our places, ports and keys in it; gives their URLs."""
    with HeldPorts() as held:
        clients, routes, monitors = held.take(3), held.take(3), held.take(3)
        servers = [Server(directory, port, name) for port, name in zip(clients, NAMES, strict=True)]
        text = EXAMPLE.read_text().replace("/etc/fi/", f"{directory}/")
        for name, port in zip(NAMES, routes, strict=True):
            text = text.replace(f"nats-route://{name}:6222", f"nats-route://127.0.0.1:{port}")
        for name, user in users.items():
            text = text.replace(name, user.public)
        try:
            for server, name, port, monitor in zip(servers, NAMES, routes, monitors, strict=True):
                own = text
                for what, by in (
                    ("server_name: n1", f"server_name: {name}"),
                    ("/var/lib/nats", f"{directory}/{name}"),
                    ("0.0.0.0:4222", f"127.0.0.1:{server.port}"),
                    ("0.0.0.0:6222", f"127.0.0.1:{port}"),
                    ("127.0.0.1:8222", f"127.0.0.1:{monitor}"),
                ):
                    assert what in own
                    own = own.replace(what, by)
                await server.start(own)
            for monitor in monitors:
                await until(partial(is_healthy, monitor), "the server says that it is current", 60)
            yield tuple(url for server in servers for url in server.urls)
        finally:
            for server in servers:
                await server.kill()


def tls(authority: Authority, name: str, lasts_s: float = 86400) -> str:
    certificate, key = authority.sign(name, lasts_s)
    return f'tls {{ cert_file: "{certificate}", key_file: "{key}" }}\n'


@asynccontextmanager
async def stages(urls: tuple[str, ...], shards: Path, environment: dict[str, str]) -> AsyncIterator[None]:
    """One process of each stage, ready."""
    running = []
    try:
        for stage in STAGES:
            where = ["--shards", str(shards)] if stage == "persist" else []
            command = [sys.executable, "-m", "cluster", "run", stage, "--name", f"{stage}-a", *at_servers(urls)]
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


async def test_a_pipeline_on_the_example_servers_which_verify_their_clients_and_know_their_users(
    tmp_path: Path,
) -> None:
    authority = Authority(tmp_path, "hospital")
    authority.file.rename(tmp_path / "ca.pem")
    authority.sign("server")
    certificate, key = authority.sign("node-1")
    users = {name: Nkey(nkeys.PREFIX_BYTE_USER) for name in ("UCSTAGES", "UCGATEWAYS", "UCADMIN")}
    for name, user in users.items():
        (tmp_path / name).write_bytes(user.seed)
        (tmp_path / name).chmod(0o600)
    files = {
        "FI_NATS_CA_FILE": str(tmp_path / "ca.pem"),
        "FI_NATS_CERT_FILE": str(certificate),
        "FI_NATS_KEY_FILE": str(key),
        "FI_NATS_CREDS_FILE": str(tmp_path / "UCSTAGES"),
    }
    config = tmp_path / "fi.toml"
    config.write_text("".join(f'{name.removeprefix("FI_").lower()} = "{file}"\n' for name, file in files.items()))
    rows = list(consultations(seed=61, events=EVENTS))
    events, shards = tmp_path / "events.ndjson", tmp_path / "shards"
    events.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in rows))
    async with example(tmp_path, users) as urls:

        async def fictl(*arguments: str | Path, **environment: str) -> Ran:
            return await run_fictl(*arguments, *at_servers(urls), **environment)

        made = await fictl("cluster", "apply", **files)
        assert (made.code, made.err) == (0, "")
        async with stages(urls, shards, {"FI_CONFIG": str(config)}):
            sent = await fictl("publish", events, **files)
            assert sent.code == 0, sent.err
            access = Access(files["FI_NATS_CA_FILE"], str(certificate), str(key), str(tmp_path / "UCGATEWAYS"))
            gateway = await connect(urls, "gateway", access=access)
            subject = f"fi.events.clinic-1.{rows[0]['consultation_id']}"
            accepted = await gateway.request(subject, msgspec.json.encode(rows[0]), timeout=60)
            assert json.loads(accepted.data)["seq"] > EVENTS
            await gateway.close()
            flushed = await fictl("flush", **files)
            assert flushed.code == 0, flushed.err
            seen = await fictl("status", "--json", **files)
            assert seen.code == 0, seen.out
            assert [server["name"] for server in json.loads(seen.out)["servers"]] == list(NAMES)
            checked = await run_fictl(
                *("--config", config, "config", "check", "--connect", *at_servers(urls), "--shards", shards)
            )
            assert checked.code == 0, checked.out
        audited = await fictl("verify", shards, "--receipts", "--json", **files)
        assert audited.code == 0, audited.err
        assert json.loads(audited.out)["store"]["events"] == EVENTS

        for missing, words in (
            ("FI_NATS_CA_FILE", "no TLS with .*CERTIFICATE_VERIFY_FAILED; FI_NATS_CA_FILE names"),
            ("FI_NATS_CREDS_FILE", "refused the connection: .*FI_NATS_CREDS_FILE"),
        ):
            given = {name: file for name, file in files.items() if name != missing}
            refused = await fictl("cluster", "status", **given)
            assert refused.code == 3
            assert re.search(words, refused.err), refused.err
        nameless = {name: file for name, file in files.items() if "CERT" not in name and "KEY" not in name}
        unknown = await fictl("cluster", "status", **nameless)
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


async def test_a_user_that_is_refused_over_tls_is_told_once_and_the_log_is_not_filled(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(tmp_path, "hospital")
    words = "authorization { user: gateway, password: right }\n"
    await server.start(tls(authority, "server") + words)
    (url,) = server.urls
    access = Access(ca_file=str(authority.file))
    with caplog.at_level(logging.WARNING), pytest.raises(ClusterUnavailableError, match="Authorization Violation"):
        await connect((url.replace("//", "//gateway:wrong@"),), "test", access=access, wait_s=1.0)
    assert caplog.text == ""


async def test_one_server_with_a_certificate_that_is_not_trusted_keeps_nobody_from_the_others_and_is_named(
    server: Server, tmp_path: Path
) -> None:
    authority, other = Authority(tmp_path, "hospital"), Authority(tmp_path, "other")
    await server.start(tls(authority, "good") + "max_payload: 8MB\n")
    access = Access(ca_file=str(authority.file))
    with HeldPorts() as held:
        bad = Server(tmp_path, *held.take(1), "bad")
        try:
            await bad.start(tls(other, "bad"))
            client = await connect((*bad.urls, *server.urls), "test", access=access, in_order=True)
            await client.flush(timeout=60)
            await client.close()
            checked = await run_fictl(
                *("config", "check", "--connect", "--json", *at_servers((*server.urls, *bad.urls))),
                FI_NATS_CA_FILE=access.ca_file,
            )
            (found,) = (check for check in json.loads(checked.out)["checks"] if check["name"] == "servers")
            assert (checked.code, found["result"]) == (3, "failed"), checked.out
            assert found["detail"].startswith(f"no TLS with {bad.urls[0]}: CERTIFICATE_VERIFY_FAILED")
            assert server.urls[0] not in found["detail"]
            await bad.kill()
            await bad.start(tls(authority, "small"))
            small = await run_fictl(
                *("config", "check", "--connect", *at_servers((*server.urls, *bad.urls))),
                FI_NATS_CA_FILE=access.ca_file,
            )
            assert f"max_payload of {bad.urls[0]} is 1048576" in " ".join(small.out.split())
            await bad.kill()
            await bad.start(tls(other, "bad"))
            seen = await run_fictl("status", "--json", *at_servers(bad.urls), FI_NATS_CA_FILE=access.ca_file)
        finally:
            await bad.kill()
    (problem,) = json.loads(seen.out)["problems"]
    assert (seen.code, problem["kind"]) == (3, "disconnected")
    assert "no TLS with" in problem["what"]
    assert "FI_NATS_CA_FILE" in problem["next"]


async def test_a_server_whose_certificate_expired_does_not_answer_and_what_soon_expires_is_told_with_its_date(
    server: Server, tmp_path: Path
) -> None:
    authority = Authority(tmp_path, "hospital")
    await server.start(tls(authority, "soon", 3600) + "max_payload: 8MB\n")
    certificate, key = authority.sign("mine", -60)
    files = {"FI_NATS_CA_FILE": str(authority.file)}
    with HeldPorts() as held:
        bad = Server(tmp_path, *held.take(1), "bad")
        try:
            await bad.start(tls(authority, "gone", -60))
            both = at_servers((*server.urls, *bad.urls))
            seen = await run_fictl("cluster", "status", "--json", *both, **files)
            soon, gone = json.loads(seen.out)["servers"]
            assert (soon["reachable"], soon["problem"], soon["certificate_due"]) == (True, "", True)
            assert abs(soon["certificate_ends_s"] - time.time() - 3600) < 120
            assert (gone["reachable"], gone["problem"]) == (False, "certificate refused: certificate has expired")
            shown = " ".join((await run_fictl("cluster", "status", *both, **files)).out.split())
            assert "NO: certificate refused" in shown
            assert "RENEW: " in shown
            found = json.loads((await run_fictl("status", "--json", *both, **files)).out)["problems"]
            whats = {problem["kind"]: problem["what"] for problem in found}
            assert f"{bad.urls[0]} (certificate refused: certificate has expired)" in whats["server_down"]
            assert " UTC, in " in whats["certificate_due"]
        finally:
            await bad.kill()
    checked = await run_fictl("config", "check", "--connect", *at_servers(server.urls), **files)
    lines = " ".join(checked.out.split())
    assert f"nats_ca_file: {authority.file} expires" in lines
    assert f"their certificates expire: {server.urls[0]}" in lines
    mine = files | {"FI_NATS_CERT_FILE": str(certificate), "FI_NATS_KEY_FILE": str(key)}
    expired = await run_fictl("config", "check", **mine)
    assert (expired.code, f"nats_cert_file: {certificate} expired" in " ".join(expired.out.split())) == (1, True)

    access = Access(ca_file=files["FI_NATS_CA_FILE"], cert_file=str(certificate), key_file=str(key))
    client = await connect(server.urls, "test", access=Access(ca_file=access.ca_file))
    async with Watch("ingest", "ingest-0", Settings(health_port=0), {}) as watched:
        api = Api(client, Settings())
        watched.connected(api, Control(api, lambda: None), Servers(server.urls, access))
        meters = watched.telemetry
        assert isinstance(meters, Meters)
        await until(lambda: meters.papers, "it has looked")
        (due,) = (family.points for family in meters.collect() if family.what is PAPER_DUE)
        left_s = {attributes["paper"]: value for attributes, value in due}
    await client.close()
    assert left_s.keys() == {"nats_ca_file", "nats_cert_file", f"127.0.0.1:{server.port}"}
    assert left_s["nats_ca_file"] > 0 > left_s["nats_cert_file"]
    assert left_s[f"127.0.0.1:{server.port}"] < 0
