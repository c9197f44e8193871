"""`fictl top` and `fictl status` as a person sees them, in a real terminal, on a live pipeline."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from pipeline import Load, Pipeline, running, settings, under_load, until, workload
from terminal import PROMPT, Terminal, needs_tmux, terminal

from contracts.settings import MIB
from contracts.subjects import publish_subject

pytestmark = [pytest.mark.cluster, needs_tmux, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    """Its hops are small, so that they can be filled."""
    chosen = settings(health_port=0, hop_bytes_max=MIB, frame_bytes_max=MIB // 16)
    async with running(tmp_path_factory.mktemp("top"), chosen) as started:
        yield started


async def top(window: Terminal, pipeline: Pipeline) -> None:
    await window.fictl("top", "--dir", str(pipeline.supervisor.directory))
    await window.sees("q quit")


async def is_restored(window: Terminal) -> None:
    """The shell is back, on the screen it had, and what is typed is shown and read by lines."""
    await window.sees(f"{PROMPT.strip()}$")
    assert await window.told("#{alternate_on} #{cursor_flag}") == "0 1"
    await window.type("stty -a | grep -ow -e '-\\?icanon' -e '-\\?echo' | tr '\\n' ' '; echo end=$?")
    seen = await window.sees("(?<!')end=0")
    assert re.search(r"^icanon echo ", seen, re.MULTILINE) or re.search(r"^echo icanon ", seen, re.MULTILINE), seen


async def test_a_person_sees_rates_lag_and_latencies_and_quits(pipeline: Pipeline) -> None:
    async with terminal(80, 24) as window:
        load = Load(workload(seed=301, events=2500))
        async with under_load(load, pipeline.client, rate_per_s=150):
            await top(window, pipeline)
            seen = await window.sees(r"persisted [1-9]\S* events/s .*[▂▃▄▅▆▇█].* durable p95 [1-9]\S* m?s")
            assert len(seen.splitlines()) <= 24
            for essential in ("ingest ", "segment ", "hash ", "persist ", "FI_EVENTS", "budget"):
                assert essential in seen
            await window.press("p")
            await window.sees(r"part ingest segment hash persist oldest stored")
            await window.press("Space")
            frozen = await window.sees("FROZEN")
            await load.reached(load.accepted + 300)
            assert (await window.screen()).splitlines()[1:] == frozen.splitlines()[1:]
            await window.press("Space")
            await window.resize(160, 50)
            await window.sees(r"accepted \S+ msg/s \S+ persisted \S+ events/s \S+ waiting .* part .* persist-0 .* yes")

            async def fills() -> bool:
                return len((await window.screen()).rstrip("\n").splitlines()) == 50

            await until(fills, "the screen's 50 lines are used")
        await window.press("q")
        await is_restored(window)
    await pipeline.assert_whole(load)


@pytest.mark.parametrize("how", ["C-c", pytest.param("SIGTERM", marks=pytest.mark.slow)])
async def test_the_terminal_is_restored_however_it_ends(pipeline: Pipeline, how: str) -> None:
    async with terminal(100, 30) as window:
        await top(window, pipeline)
        assert await window.told("#{alternate_on}") == "1"
        if how == "SIGTERM":
            os.kill(await window.child(), signal.SIGTERM)
        else:
            await window.press(how)
        await is_restored(window)
        assert "Traceback" not in await window.screen()


@pytest.mark.slow
async def test_a_stage_that_was_stopped_is_named(pipeline: Pipeline) -> None:
    load = Load(workload(seed=302, events=600))
    async with terminal(120, 40) as window:
        await top(window, pipeline)
        await window.sees("all well")
        async with under_load(load, pipeline.client, rate_per_s=100):
            await load.reached(50)
            pipeline.supervisor.freeze("persist-0")
            try:
                await window.sees(r"NOT WELL.* persist.* persist-0 does not answer .*kill -CONT \d+")
                await window.sees(r"no member holds partitions 0-3 of persist: persist-0 does not answer")
            finally:
                pipeline.supervisor.thaw("persist-0")
        await pipeline.assert_whole(load)
        await window.sees("all well")


async def test_a_full_hop_says_who_waits_and_what_to_do(pipeline: Pipeline) -> None:
    load = Load(workload(seed=303, events=1500, padding_bytes=4000))
    directory = str(pipeline.supervisor.directory)
    async with terminal(120, 40) as window, terminal(80, 24) as other:
        await other.fictl("pause", "persist", "--dir", directory)
        await other.sees("persist is paused: 1 processes")
        await top(window, pipeline)
        await window.sees(r"1 persist is paused since \d\d:\d\d by \S+@\S+ -> `fictl resume persist`")
        async with under_load(load, pipeline.client):
            # Nothing empties the hops now: whichever is the first to be full, it is for one reason.
            await window.sees(
                r"1 hop FI_\w+ is full.*: \w+ waits in partitions? \S.*; "
                r"persist is paused since \S+ by \S+@\S+ -> `fictl resume persist`"
            )
            await other.type("clear")
            await other.fictl("status", "--dir", directory)
            await other.sees(r"NOT WELL.* hop FI_\w+ is full.* \w+ waits .* -> `fictl resume persist`")
            await other.type("echo code=$?")
            await other.sees("code=3")
            await other.fictl("resume", "persist", "--dir", directory)
        await pipeline.assert_whole(load)
        await window.sees("all well")


@pytest.mark.slow
async def test_a_server_that_was_killed_is_named_until_it_is_back(pipeline: Pipeline) -> None:
    async with terminal(120, 40) as window:
        await top(window, pipeline)
        await window.sees("all well")
        await pipeline.supervisor.hold_down("n2")
        await window.sees(r"NOT WELL.* 2 servers answer of 3: not nats://\S+ .*servers 2 of 3 answer")
        await pipeline.supervisor.bring_back("n2")
        await window.sees("all well")


async def test_without_any_server_it_says_so_and_goes_on_when_they_are_back(pipeline: Pipeline) -> None:
    servers = ("n1", "n2", "n3")
    async with terminal(100, 30) as window:
        await top(window, pipeline)
        await window.sees("all well")
        await asyncio.gather(*map(pipeline.supervisor.hold_down, servers))
        try:
            await window.sees(r"1 no server answers at nats://.* nothing is accepted .*accepted \? .*waiting \?")
        finally:
            await asyncio.gather(*map(pipeline.supervisor.bring_back, servers))
        await window.sees(r"all well .*servers 3 of 3 answer")
        await window.press("q")
        await is_restored(window)


async def test_dead_letters_are_told_as_they_come(pipeline: Pipeline) -> None:
    async with terminal(120, 40) as window:
        await top(window, pipeline)
        await window.sees("all well")
        jetstream = pipeline.client.jetstream(timeout=10)
        for number in range(7):
            subject = publish_subject("clinic-1", "5f7c3c7e-30f1-4a6a-9a3c-6f5d1f9b2a11")
            await jetstream.publish(subject, b"not json %d" % number)
        await window.sees(r"dead letters grew by 7 in the last minute \(now 7\) -> `fictl dlq ls")
        await window.sees(r"dead letters 7 \(ingest 7\), 7 in the last minute")


async def test_without_a_terminal_top_says_what_to_use(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster", "top", "--dir", str(tmp_path)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert (process.returncode, out) == (2, b"")
    assert b"use `fictl status`" in err
