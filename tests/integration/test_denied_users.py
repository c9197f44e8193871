"""Who may not do what a command or stage needs is told what is denied and the next step, not to mend the servers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import pytest_asyncio
from commands import run_fictl, stop_stage_once_it_says
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from pipeline import until

from cluster.nodes import find_nats_server
from cluster.ports import HeldPorts
from cluster.workload import consultations
from stages.runtime.client import GuardedClient
from stages.runtime.connection import connect

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

LIMIT_S = 60.0
DENIED = "publish: { deny: [%s] }"
UNHEARD = 'subscribe: { deny: "_INBOX.>" }'
NO_API = DENIED % '"$JS.API.>"'
NO_READS = DENIED % '"$JS.API.STREAM.MSG.>", "$JS.API.DIRECT.>", "$KV.>"'
NO_EVENTS = DENIED % '"fi.>"'
STEP = "let the URL's user do that, or take another user"


class Server(NamedTuple):
    """One server whose users may do different things; `process` is to be ended by whoever started it."""

    process: asyncio.subprocess.Process
    port: int
    config: Path

    def url(self, user: str) -> str:
        return f"nats://{user}:x@127.0.0.1:{self.port}"

    def allow(self, permissions: str, *, password: str = "x", limits: str = "") -> None:
        """Gives the user `changed` these permissions and this password, and the server further settings."""
        users = {"full": "", "api": NO_API, "inbox": UNHEARD, "reads": NO_READS, "events": NO_EVENTS}
        lines = [
            f"{{ user: {name}, password: {password if name == 'changed' else 'x'}, permissions: {{ {given} }} }}"
            for name, given in {**users, "changed": permissions}.items()
        ]
        self.config.write_text(
            f'port: {self.port}\n{limits}\njetstream {{ store_dir: "{self.config.parent}/js" }}\n'
            f"accounts {{\n A {{ jetstream: enabled, users: [{', '.join(lines)}] }}\n"
            " B { users: [{ user: bare, password: x }] }\n}\n"
        )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """With the streams of an empty pipeline."""
    config = tmp_path_factory.mktemp("denied") / "server.conf"
    with HeldPorts() as held:
        (port,) = held.take(1)
        Server(None, port, config).allow(NO_API)  # type: ignore[arg-type]
        process = await asyncio.create_subprocess_exec(
            find_nats_server(), "-c", config, stderr=asyncio.subprocess.DEVNULL
        )
    try:
        server = Server(process, port, config)
        settings = ("--set", "replicas=1", "--set", "partitions=2")
        made = await run_fictl("cluster", "apply", "--nats", server.url("full"), *settings)
        assert made.code == 0, made.err
        yield server
    finally:
        process.kill()
        await process.wait()


@pytest.fixture
def events(tmp_path: Path) -> Path:
    file = tmp_path / "events.ndjson"
    file.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in consultations(seed=5, events=3)))
    return file


VERBS = {
    "members": ("members",),
    "pause": ("pause", "hash"),
    "policy": ("policy", "set", "closed_remembered=9"),
    "letters": ("dlq", "ls"),
    "apply": ("cluster", "apply", "--set", "replicas=1"),
    "look": ("cluster", "status"),
    "status": ("status",),
    "run": ("run", "hash", "--name", "h"),
}
CASES = [
    *(("api", verb, '"$js.api.stream.') for verb in ("members", "letters", "apply", "look", "status", "run")),
    *(("inbox", verb, 'subscription to "_inbox.') for verb in ("apply", "publish")),
    *(("reads", verb, '"$js.api.stream.msg.get.') for verb in ("letters", "pause", "status")),
    ("reads", "members", '"$js.api.direct.get.kv_fi_members"'),
    ("reads", "policy", '"$kv.fi_control.policy.2"'),
    ("events", "publish", '"fi.events.'),
]


async def test_a_stage_that_waits_for_the_streams_of_its_cluster_stops_when_told(server: Server) -> None:
    ran = await stop_stage_once_it_says("leader of FI_SEGMENT is not known", "ingest", "--nats", server.url("bare"))
    assert ran.code == 0, ran.err
    assert "draining" in ran.err


@pytest.mark.parametrize(("user", "verb", "what"), CASES)
async def test_what_is_denied_is_named_with_the_next_step(
    server: Server, events: Path, user: str, verb: str, what: str
) -> None:
    arguments = VERBS.get(verb, ("publish", str(events)))
    ran = await run_fictl(*arguments, "--nats", server.url(user))
    told = " ".join((ran.out + ran.err).split())
    assert ran.code == 3, told
    assert "a server refuses: permissions violation for " in told
    assert what in told
    assert STEP in told
    assert "majority" not in told
    assert f"{user}:x" not in told


@pytest.mark.parametrize("verb", ["members", "look", "status"])
async def test_an_account_without_jetstream_is_called_that(server: Server, events: Path, verb: str) -> None:
    arguments = VERBS.get(verb, ("publish", str(events)))
    ran = await run_fictl(*arguments, "--nats", server.url("bare"))
    told = " ".join((ran.out + ran.err).split())
    assert ran.code == 3, told
    assert "JetStream not enabled for account (10039)" in told
    assert "enable JetStream for the account of the URL's user" in told
    assert "majority" not in told


async def test_a_client_whose_permissions_are_mended_is_answered_by_the_connection_it_has(server: Server) -> None:
    server.allow(UNHEARD)
    server.process.send_signal(signal.SIGHUP)
    client = await connect([server.url("changed")], "changed")
    try:

        async def answers() -> bool:
            try:
                return bool((await client.request("$JS.API.INFO", b"", timeout=1)).data)
            except NatsError as error:
                told.append(str(error))
                return False

        async def is_unheard() -> bool:
            return not await answers() and "permissions violation for subscription" in told[-1]

        told: list[str] = []
        await until(is_unheard, "the server goes by the first change", LIMIT_S)
        server.allow("")
        server.process.send_signal(signal.SIGHUP)
        await until(answers, "the client is answered", LIMIT_S)
        assert len(client._subs) == 1
    finally:
        await client.close()


async def answers(client: GuardedClient) -> bool:
    """Whether JetStream does; just after a reload nobody may be there who would."""
    try:
        return client.is_connected and bool((await client.request("$JS.API.INFO", b"", timeout=LIMIT_S)).data)
    except NoRespondersError:
        return False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"password": "y"}, "authorization violation"),
        ({"limits": "max_connections: 1"}, "maximum connections exceeded"),
    ],
)
async def test_a_client_that_a_server_puts_out_comes_back_once_it_may(
    server: Server, change: dict[str, str], words: str
) -> None:
    clients = [await connect([server.url("changed")], "changed") for _ in range(2)]
    try:
        server.allow("", **change)
        server.process.send_signal(signal.SIGHUP)
        await until(
            lambda: any(words in one.trouble.lower() for one in clients), "the server puts one of them out", LIMIT_S
        )
        server.allow("")
        server.process.send_signal(signal.SIGHUP)
        for one in clients:
            await until(partial(answers, one), "it is back", LIMIT_S)
    finally:
        for one in clients:
            await one.close()
