"""Commands while no stream has a majority: each ends and says so, where a stage would go on asking."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from uuid import UUID

import pytest
import pytest_asyncio
from commands import Ran, run_fictl
from pipeline import Load, Pipeline, running, settings, until, workload

from contracts.errors import ClusterUnavailableError
from contracts.subjects import CONTROL, DLQ, EVENTS, RECEIPTS
from stages.runtime.api import Api
from stages.runtime.connection import connect

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

FROZEN = ("n2", "n3")
READ = (CONTROL, DLQ, EVENTS, RECEIPTS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def minority(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    """A pipeline that has stored and sealed events, two of whose three servers are frozen."""
    async with running(tmp_path_factory.mktemp("minority"), settings(partitions=2)) as pipeline:
        await Load(workload(seed=951, events=40)).publish(pipeline.client)
        for prepared in (("flush",), ("policy", "set", "closed_remembered=9")):
            assert (await fictl(pipeline, *prepared)).code == 0
        for server in FROZEN:
            pipeline.supervisor.freeze(server)
        try:
            # A leader that is left alone answers until it notices.
            alone = await connect(pipeline.supervisor.urls[:1], "test", wait_s=30)
            api = Api(alone, pipeline.settings, give_up_s=3.0)
            await until(lambda: silent(api), "no stream answers any more", 90)
            await alone.close()
            yield pipeline
        finally:
            for server in FROZEN:
                pipeline.supervisor.thaw(server)


async def silent(api: Api) -> bool:
    for stream in READ:
        try:
            await api.last_message(stream, ">")
        except ClusterUnavailableError:
            continue
        return False
    return True


async def fictl(pipeline: Pipeline, *arguments: str) -> Ran:
    return await run_fictl(*arguments, "--dir", str(pipeline.supervisor.directory))


async def test_commands_give_up_and_say_where_to_look(minority: Pipeline) -> None:
    commands = (
        ("dlq", "ls"),
        ("policy", "show"),
        ("policy", "history"),
        ("policy", "set", "closed_remembered=7", "--timeout", "5"),
        ("partitions", "ls"),
        ("rebuild", "--dry-run"),
        ("members",),
        ("verify", str(minority.supervisor.directory), "--receipts"),
    )
    for arguments, ran in zip(commands, await asyncio.gather(*(fictl(minority, *a) for a in commands)), strict=True):
        assert (ran.code, "see `fictl cluster status`" in ran.err) == (3, True), f"{arguments}: {ran}"


async def test_a_proof_is_made_from_what_lies_beside_the_shards(minority: Pipeline) -> None:
    wanted = UUID(bytes=minority.stored()[0].event_id)
    code, out, err = await fictl(minority, "prove", str(wanted))
    assert (code, "without the cluster's receipts" in err) == (0, True), err
    assert json.loads(out)["event_id"] == str(wanted)


async def test_a_flush_ends_and_says_that_the_cluster_is_silent(minority: Pipeline) -> None:
    ran = await fictl(minority, "flush", "--timeout", "8", "--json")
    answer = json.loads(ran.out)
    assert (ran.code, answer["done"]) == (3, False), ran.err
    assert {"the cluster does not answer" in holdup["why"] for holdup in answer["holdups"]} == {True}
