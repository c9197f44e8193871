"""The supervisor while its directory's disk refuses what it is asked."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path

import msgspec
import pytest
from tiny_stages import journal, make, pid_of

from cluster import statewriter
from cluster.control import ask_restart, ask_scale
from cluster.keeper import ProcessEvent
from cluster.state import State, read_state, write_state
from cluster.testing.waiting import until
from contracts.budgets import RESTART, SCALE, STATE_WRITE
from contracts.errors import FiError

pytestmark = pytest.mark.cluster

LIMIT_S = 60.0


async def test_a_stage_that_dies_while_its_log_cannot_be_read_is_started_again(tmp_path: Path) -> None:
    events: list[ProcessEvent] = []
    async with make(tmp_path, events) as supervisor:
        log = tmp_path / "logs" / "hash-0.log"
        log.rename(tmp_path / "kept.log")
        # Neither read nor written, like a file on a bad sector or with no descriptor left.
        log.mkdir()
        await supervisor.kill("hash-0")
        await until(lambda: sum(event.kind == "died" for event in events) >= 2, "it was tried to start it again")
        log.rmdir()
        (tmp_path / "kept.log").rename(log)
        await until(lambda: events[-1].kind == "started", "it is started again")
        assert pid_of(supervisor, "hash-0") is not None


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(directory: Path, state: State) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(statewriter, "write_state", refuse)


async def test_on_a_full_disk_stages_are_scaled_and_restarted_and_stop_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with make(tmp_path):
        full_disk(monkeypatch)
        control = read_state(tmp_path).control
        assert (await ask_scale(control, {"segment": 2}, SCALE.s)).after["segment"] == 2
        assert (await ask_restart(control, ("hash",), RESTART.s)).replaced == {"hash": 1}
    assert [name.partition("-")[0] for name in journal(tmp_path, "stop")] == [
        *("hash", "ingest", "segment", "segment", "hash", "persist")
    ]
    assert "No space left on device" in caplog.text


async def test_once_a_full_disk_has_room_the_state_file_says_again_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make(tmp_path) as supervisor:
        with monkeypatch.context() as meanwhile:
            full_disk(meanwhile)
            await supervisor.stop_stage("hash")
            assert "hash-0" in [process.name for process in read_state(tmp_path).processes if process.pid is not None]
        await until(
            lambda: "hash-0" in [process.name for process in read_state(tmp_path).processes if process.pid is None],
            "the state file is written again",
        )


async def test_while_the_disk_hangs_a_stage_that_dies_is_started_again_and_one_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[ProcessEvent] = []
    answers = threading.Event()
    held: list[State] = []

    def hang(directory: Path, state: State) -> None:
        held.append(state)
        answers.wait(2 * LIMIT_S)
        write_state(directory, state)

    monkeypatch.setattr(statewriter, "STATE_WRITE", msgspec.structs.replace(STATE_WRITE, s=0.1))
    async with make(tmp_path, events) as supervisor:
        monkeypatch.setattr(statewriter, "write_state", hang)
        try:
            for _ in range(2):
                events.clear()
                await supervisor.kill("hash-0")
                await until(lambda: [event.kind for event in events] == ["died", "started"], "it is started again")
            async with asyncio.timeout(LIMIT_S):
                await supervisor.stop_stage("segment")
            assert len(held) == 1
        finally:
            answers.set()
        await until(lambda: read_state(tmp_path).processes == supervisor.processes, "the file says what runs")


async def test_a_start_on_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch)
    supervisor = make(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        await supervisor.start()
    assert supervisor.processes == ()


async def test_a_process_whose_log_cannot_be_made_is_an_answer_not_a_lost_connection(tmp_path: Path) -> None:
    async with make(tmp_path) as supervisor:
        (tmp_path / "logs" / "hash-1.log").mkdir()
        with pytest.raises(FiError, match=r"hash-1 cannot be started: .*Is a directory"):
            await ask_scale(read_state(tmp_path).control, {"hash": 2}, SCALE.s)
        assert pid_of(supervisor, "hash-0") is not None
