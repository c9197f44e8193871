"""The supervisor with a tiny real process as every stage: order, restarts, force, crash, one directory for one."""

from __future__ import annotations

import asyncio
import math
import os
import sys
from pathlib import Path

import msgspec
import pytest
from tiny_stages import SETTINGS, is_gone, journal, make, pid_of

from cluster import keeper
from cluster import lock as lock_module
from cluster import supervisor as supervisor_module
from cluster.keeper import ProcessEvent
from cluster.lock import DirectoryBusyError, DirectoryLock
from cluster.process import ProcessError
from cluster.stageprocess import settings_environment
from cluster.state import NotRunningError, State, read_state, write_state
from cluster.supervisor import Supervisor, run_command
from cluster.testing.waiting import until
from contracts.budgets import DIRECTORY_LOCK, RESTART_HEALTHY
from contracts.errors import SettingsError
from contracts.settings import Settings, load_settings
from stages.runtime.pids import process_started
from stages.runtime.watch import HealthFile

pytestmark = pytest.mark.cluster

LIMIT_S = 60.0


async def test_every_process_gets_the_settings_and_stages_stop_in_flow_order(tmp_path: Path) -> None:
    async with make(tmp_path, segment=2) as supervisor:
        assert [process.name for process in supervisor.processes] == [
            *("n1", "ingest-0", "segment-0", "segment-1", "hash-0", "persist-0")
        ]
        lines = (tmp_path / "journal").read_text().splitlines()
        assert {"start segment-0 4", "start segment-1 4", "start hash-0 4"} <= set(lines)
        state = read_state(tmp_path)
        assert (state.status, state.urls, state.settings) == ("ready", supervisor.urls, SETTINGS)
        assert {p.name: p.pid for p in state.processes} == {p.name: p.pid for p in supervisor.processes}
        pids = [process.pid for process in supervisor.processes]
    stops = [name.partition("-")[0] for name in journal(tmp_path, "stop")]
    assert stops == ["ingest", "segment", "segment", "hash", "persist"]
    assert all(is_gone(pid) for pid in pids if pid is not None)
    assert "some chatter" in (tmp_path / "logs" / "hash-0.log").read_text()
    with pytest.raises(NotRunningError, match="was stopped"):
        read_state(tmp_path)


async def test_a_killed_stage_and_a_killed_server_come_back_and_the_reason_is_told(tmp_path: Path) -> None:
    events: list[ProcessEvent] = []
    async with make(tmp_path, events) as supervisor:
        for name in ("hash-0", "n1"):
            before = pid_of(supervisor, name)
            assert before is not None
            await supervisor.kill(name)
            await until(
                lambda name=name, before=before: pid_of(supervisor, name) not in (None, before),
                "the process runs again",
            )
            await until(lambda name=name: [e.kind for e in events if e.name == name][-1] == "started", "that is told")
            (death,) = [event for event in events if event.name == name and event.kind == "died"]
            assert "SIGKILL" in death.detail
        assert journal(tmp_path, "start").count("hash-0") == 2
        assert {p.name: p.pid for p in read_state(tmp_path).processes}["n1"] == pid_of(supervisor, "n1")


async def test_a_stage_that_keeps_dying_is_started_again_ever_later(tmp_path: Path) -> None:
    events: list[ProcessEvent] = []
    async with make(tmp_path, events) as supervisor:
        (tmp_path / "broken-segment-0").touch()
        await supervisor.kill("segment-0")
        await until(lambda: sum(event.kind == "died" for event in events) >= 4, "it has died four times")
        deaths = [event for event in events if event.kind == "died"]
        assert [death.restart_in_s for death in deaths[:4]] == [0.1, 0.2, 0.4, 0.8]
        assert "exited with code 3" in deaths[1].detail
        assert "the disk is on fire" in deaths[1].detail
        (tmp_path / "broken-segment-0").unlink()
        await until(lambda: events[-1].kind == "started", "it is started again")
        assert pid_of(supervisor, "segment-0") is not None


async def test_after_a_healthy_life_a_stage_starts_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "RESTART_HEALTHY", msgspec.structs.replace(RESTART_HEALTHY, s=0.0))
    events: list[ProcessEvent] = []
    async with make(tmp_path, events) as supervisor:
        for deaths in (1, 2, 3):
            await supervisor.kill("hash-0")
            await until(
                lambda deaths=deaths: sum(event.kind == "died" for event in events) == deaths, "it has died once more"
            )
            await until(lambda: events[-1].kind == "started", "it is started again")
        assert [event.restart_in_s for event in events if event.kind == "died"] == [0.1, 0.1, 0.1]


async def test_what_goes_wrong_while_a_death_is_told_is_logged_and_does_not_end_the_watch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: ProcessEvent) -> None:
        raise RuntimeError(f"told of {event.kind}")

    async with make(tmp_path) as supervisor:
        supervisor._on_event = fail
        before = pid_of(supervisor, "hash-0")
        await supervisor.kill("hash-0")
        await until(lambda: pid_of(supervisor, "hash-0") not in (None, before), "it is started again")
    assert "told of died" in caplog.text


async def test_a_watch_that_fails_is_logged_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def describe(code: int) -> str:
        monkeypatch.undo()
        raise RuntimeError("cannot start new thread")

    async with make(tmp_path) as supervisor:
        before = pid_of(supervisor, "hash-0")
        monkeypatch.setattr(keeper, "describe_exit", describe)
        await supervisor.kill("hash-0")
        await until(lambda: pid_of(supervisor, "hash-0") not in (None, before), "it is started again")
    assert "the watch over hash-0 failed, and goes on" in caplog.text
    assert "cannot start new thread" in caplog.text


async def test_a_stage_can_be_stopped_started_and_scaled_while_the_others_run(tmp_path: Path) -> None:
    async with make(tmp_path) as supervisor:
        others = pid_of(supervisor, "hash-0")
        await supervisor.stop_stage("persist")
        assert pid_of(supervisor, "persist-0") is None
        await supervisor.start_stage("persist")
        assert pid_of(supervisor, "persist-0") is not None
        first = pid_of(supervisor, "segment-0")
        await supervisor.scale("segment", 3)
        assert [p.name for p in supervisor.processes if p.kind == "segment"] == ["segment-0", "segment-1", "segment-2"]
        await supervisor.scale("segment", 2)
        assert [p.name for p in supervisor.processes if p.kind == "segment"] == ["segment-0", "segment-1"]
        assert journal(tmp_path, "stop")[-1] == "segment-2"
        assert pid_of(supervisor, "segment-0") == first
        assert pid_of(supervisor, "hash-0") == others
        await supervisor.hold_down("n1")
        assert pid_of(supervisor, "n1") is None
        # Two who bring it back start it once: a second one would find its ports taken.
        await asyncio.gather(supervisor.bring_back("n1"), supervisor.bring_back("n1"))
        assert pid_of(supervisor, "n1") is not None


async def test_a_frozen_process_is_still_stopped(tmp_path: Path) -> None:
    async with make(tmp_path) as supervisor:
        supervisor.freeze("hash-0")
    assert "hash-0" in journal(tmp_path, "stop")


async def test_a_second_stop_request_kills_what_will_not_stop(tmp_path: Path) -> None:
    supervisor = make(tmp_path)
    await supervisor.start()
    pids = [process.pid for process in supervisor.processes if process.pid is not None]
    (tmp_path / "stubborn").touch()
    supervisor.request_stop()
    await supervisor.wait_stop_requested()
    stopping = asyncio.create_task(supervisor.stop())
    await until(lambda: journal(tmp_path, "ignored"), "it has been told to stop")
    assert not stopping.done()
    supervisor.request_stop()
    async with asyncio.timeout(SETTINGS.drain_s - 5):
        await stopping
    assert all(map(is_gone, pids))


async def test_a_stage_that_never_gets_ready_fails_the_start_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken-hash-0").touch()
    supervisor = make(tmp_path)
    with pytest.raises(ProcessError, match="the disk is on fire"):
        await supervisor.start()
    assert all(process.pid is None for process in supervisor.processes)
    with pytest.raises(NotRunningError):
        read_state(tmp_path)


async def test_a_directory_has_one_supervisor_and_a_second_one_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "DIRECTORY_LOCK", msgspec.structs.replace(DIRECTORY_LOCK, s=math.inf))
    async with make(tmp_path):
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(DirectoryBusyError, match=f"in use .* `fictl down --dir {tmp_path}`"):
                await make(tmp_path).start()
        assert read_state(tmp_path).status == "ready"


def waits_for_lock(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once somebody has found a directory's lock taken."""
    found_taken, try_lock = asyncio.Event(), lock_module._try_lock

    def tell(fd: int) -> bool:
        if try_lock(fd):
            return True
        found_taken.set()
        return False

    monkeypatch.setattr(lock_module, "_try_lock", tell)
    return found_taken


async def test_a_run_that_is_ending_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make(tmp_path) as supervisor:
        state = read_state(tmp_path)
    other = DirectoryLock(tmp_path / "lock")
    await other.acquire(1)
    write_state(tmp_path, msgspec.structs.replace(state, status="stopping"))
    found_taken = waits_for_lock(monkeypatch)
    starting = asyncio.create_task(supervisor.start())
    async with asyncio.timeout(LIMIT_S):
        await found_taken.wait()
    other.release()
    await starting
    await supervisor.stop()


async def test_a_stop_that_is_requested_while_the_directory_is_another_ones_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = make(tmp_path)
    other = DirectoryLock(tmp_path / "lock")
    await other.acquire(1)
    found_taken = waits_for_lock(monkeypatch)
    starting = asyncio.create_task(supervisor.start())
    async with asyncio.timeout(LIMIT_S):
        await found_taken.wait()
    supervisor.request_stop()
    other.release()
    await starting
    async with asyncio.timeout(5):
        await supervisor.wait_stop_requested()
    await supervisor.stop()
    # It asks for one end alone.
    async with supervisor:
        assert not supervisor._stop_requested.is_set()


SUPERVISING = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tiny_stages import make

async def main():
    supervisor = make(Path(sys.argv[1]))
    await supervisor.start()
    print(*(process.pid for process in supervisor.processes), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
async def test_killing_the_supervisor_leaves_nothing_and_the_next_one_takes_over(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SUPERVISING, str(tmp_path), str(Path(__file__).parent)), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert parent.stdout is not None
        pids = [int(pid) for pid in (await parent.stdout.readline()).split()]
        assert len(pids) == 5
        assert read_state(tmp_path).supervisor_pid == parent.pid
    finally:
        parent.kill()
        await parent.communicate()
    await until(lambda: all(map(is_gone, pids)), "all processes are gone")
    with pytest.raises(NotRunningError, match="without stopping"):
        read_state(tmp_path)
    async with make(tmp_path):
        assert read_state(tmp_path).status == "ready"


def test_an_empty_directory_says_how_to_start(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError, match="fictl up --dir"):
        read_state(tmp_path)


async def test_a_start_clears_what_processes_that_were_killed_say_of_themselves(tmp_path: Path) -> None:
    killed = await asyncio.create_subprocess_exec("true")
    await killed.wait()
    left = tmp_path / "health" / "joined.json"
    left.parent.mkdir()
    file = HealthFile(name="joined", stage="hash", pid=killed.pid, host="127.0.0.1", port=1)
    left.write_bytes(msgspec.json.encode(file))
    async with make(tmp_path):
        assert not left.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says when a process started")
def test_a_supervisor_is_told_from_a_later_process_with_its_id(tmp_path: Path) -> None:
    started = process_started(os.getpid())
    assert started is not None
    state = State(
        status="ready",
        supervisor_pid=os.getpid(),
        supervisor_started=started,
        urls=(),
        processes=(),
        settings=SETTINGS,
    )
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    write_state(tmp_path, msgspec.structs.replace(state, supervisor_started=started - 1))
    with pytest.raises(NotRunningError, match="without stopping"):
        read_state(tmp_path)


def test_settings_reach_a_child_through_its_environment() -> None:
    settings = Settings(partitions=3, partition_by="site", hop_storage="file", drain_s=1.5)
    environment = settings_environment(settings)
    assert environment == {
        "FI_CONFIG": "",
        "FI_PARTITIONS": "3",
        "FI_PARTITION_BY": "site",
        "FI_HOP_STORAGE": "file",
        "FI_DRAIN_S": "1.5",
    }
    assert load_settings(environment) == settings


def test_impossible_runs_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="needs as many servers"):
        Supervisor(tmp_path, Settings(replicas=3), servers=1)
    with pytest.raises(SettingsError, match="can share the partitions"):
        Supervisor(tmp_path, SETTINGS, {"hash": 5}, servers=1)


def test_a_real_stage_is_told_its_directory_and_name(tmp_path: Path) -> None:
    assert run_command(tmp_path)("hash", "hash-1")[1:] == [
        *("-P", "-m", "cluster", "run", "hash", "--dir", str(tmp_path), "--name", "hash-1")
    ]
