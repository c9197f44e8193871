"""The health port itself: what it takes, what it refuses, and what it says of a loop or a disk in trouble."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import msgspec
import pytest
import pytest_asyncio

from cluster.health import clear_stale, get, read_health_files
from cluster.testing.waiting import until
from contracts.backups import BACKUP_FILE, LastBackup, encode_last_backup
from contracts.budgets import HEALTH_DISK, HEALTH_FRESH, HEALTH_REQUEST, HEALTH_STUCK
from contracts.errors import SettingsError, StoreFailedError
from contracts.settings import Settings
from stages.runtime import health, watch
from stages.runtime.health import CONNECTIONS_MAX, HEAD_BYTES_MAX, Answer, HealthServer
from stages.runtime.pids import process_started
from stages.runtime.telemetry import OFF, Feed
from stages.runtime.watch import Watch


async def fails() -> Answer:
    raise RuntimeError("a check that is broken")


async def works() -> Answer:
    return Answer(200, "text/plain", b"yes\n")


@pytest_asyncio.fixture
async def server() -> AsyncIterator[HealthServer]:
    served = HealthServer("127.0.0.1", 0, {"/works": works, "/fails": fails})
    await served.start()
    yield served
    await served.close()


async def exchange(server: HealthServer, request: bytes) -> bytes:
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            writer.write(request)
            return await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /works HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /works?a=b HTTP/1.0\r\n\r\n", 200),
        (b"HEAD /works HTTP/1.1\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"POST /works HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
        (b"GET /fails HTTP/1.1\r\n\r\n", 500),
        (b"\x16\x03\x01 TLS? \xff\r\n\r\n", 400),
        (b"GET /works\r\n\r\n", 400),
        (b"GET /works HTTP/1.1\r\nX: " + b"x" * HEAD_BYTES_MAX + b"\r\n\r\n", 431),
    ],
)
async def test_a_request_gets_the_status_it_deserves(server: HealthServer, request_: bytes, status: int) -> None:
    answer = await exchange(server, request_)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Connection: close" in head
    if request_.startswith(b"HEAD"):
        assert body == b""
    else:
        assert f"Content-Length: {len(body)}".encode() in head


async def test_more_clients_than_allowed_are_turned_away_and_silent_ones_are_hung_up_on(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "HEALTH_REQUEST", msgspec.structs.replace(HEALTH_REQUEST, s=0.5))
    silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(CONNECTIONS_MAX)]
    try:
        await asyncio.sleep(0)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        silent.append((reader, writer))
        async with asyncio.timeout(30):
            for waiting, _ in reversed(silent):
                try:
                    assert await waiting.read() == b""
                except ConnectionResetError:
                    continue
        assert (await exchange(server, b"GET /works HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200")
    finally:
        for _, writer in silent:
            writer.close()


async def test_a_port_that_is_taken_is_a_clear_error(server: HealthServer) -> None:
    second = HealthServer("127.0.0.1", server.port, {})
    with pytest.raises(SettingsError, match=rf"health_port = {server.port} .* 0 for a free one"):
        await second.start()


@pytest.mark.parametrize("host", ["192.0.2.1", "a..b", "x" * 64])
async def test_an_address_that_cannot_be_had_is_named_by_its_setting(host: str) -> None:
    with pytest.raises(SettingsError, match=f"health_host = '{re.escape(host)}'"):
        await HealthServer(host, 0, {}).start()


async def test_a_stuck_loop_answers_nobody_and_knows_it_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "HEALTH_STUCK", msgspec.structs.replace(HEALTH_STUCK, s=0.5))
    async with Watch("hash", "hash-0", Settings(health_port=0), {}, directory=tmp_path) as watched:
        (file,) = read_health_files(tmp_path)
        assert (file.name, file.stage) == ("hash-0", "hash")
        url = f"http://127.0.0.1:{file.port}"

        async def lives() -> bool:
            return (await get(f"{url}/livez"))[0] == 200

        # Where other work has the processor, the loop may be late by itself.
        await until(lives, "the loop turns")
        answers: list[bytes] = []

        def ask_meanwhile() -> None:
            with socket.create_connection(("127.0.0.1", file.port), timeout=0.4) as connection:
                connection.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
                try:
                    answers.append(connection.recv(1))
                except TimeoutError:
                    answers.append(b"nobody answers")

        asker = threading.Thread(target=ask_meanwhile)
        asker.start()
        time.sleep(1.0)  # noqa: ASYNC251 - the loop is to be stuck
        asker.join()
        assert answers == [b"nobody answers"]
        assert not watched.live().ok
        await until(lives, "the loop turns again")
        status, text = await get(f"{url}/metrics")
        assert status == 200
        assert b"fi_loop_lag_seconds_count" in text
    assert read_health_files(tmp_path) == []


def health_file(directory: Path, name: str, pid: int, started: int | None) -> None:
    (directory / "health").mkdir(exist_ok=True)
    file = watch.HealthFile(name=name, stage="hash", pid=pid, host="127.0.0.1", port=1, started=started)
    (directory / "health" / f"{name}.json").write_bytes(msgspec.json.encode(file))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says when a process started")
def test_a_file_that_a_crash_left_is_not_taken_for_the_process_that_has_the_id_now(tmp_path: Path) -> None:
    started = process_started(os.getpid())
    assert started is not None
    health_file(tmp_path, "ours", os.getpid(), started)
    health_file(tmp_path, "of-an-older-build", os.getpid(), None)
    health_file(tmp_path, "before-the-reboot", os.getpid(), started - 1)
    (tmp_path / "health" / "torn.json").write_bytes(b'{"v":')
    assert [file.name for file in read_health_files(tmp_path)] == ["of-an-older-build", "ours"]
    clear_stale(tmp_path)
    assert {path.stem for path in (tmp_path / "health").iterdir()} == {"of-an-older-build", "ours", "torn"}


async def test_a_process_says_since_when_it_runs(tmp_path: Path) -> None:
    async with Watch("hash", "hash-0", Settings(health_port=0), {}, directory=tmp_path):
        (file,) = read_health_files(tmp_path)
        assert (file.pid, file.started) == (os.getpid(), process_started(os.getpid()))


async def test_a_disk_below_its_floor_is_not_ready_and_says_how_much_is_free(tmp_path: Path) -> None:
    for floor_bytes, ok in ((0, True), (1 << 60, False)):
        chosen = Settings(health_port=0, disk_floor_bytes=floor_bytes)
        store = tmp_path / "not" / "there" / "yet"
        async with Watch("persist", "persist-0", chosen, {}, store=store) as watched:
            report = await watched.ready()
            assert report.checks["disk"].ok is ok
            assert f"GB free at {tmp_path}" in report.checks["disk"].why
            # Nobody told it of a connection.
            assert not report.ok
            found = await shown(watched)
            assert 0 < json.loads(found["fi_storage_free_bytes"]) < json.loads(found["fi_storage_size_bytes"])


async def test_a_disk_that_cannot_even_be_looked_for_is_not_ready_and_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path) -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(watch, "HEALTH_FRESH", msgspec.structs.replace(HEALTH_FRESH, s=0.0))
    async with Watch("persist", "persist-0", Settings(health_port=0), {}, store=tmp_path) as watched:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "exists", failing)
            found = (await watched.ready()).checks["disk"]
            assert (found.ok, found.why) == (False, f"{tmp_path}: {os.strerror(errno.ESTALE)}")
        assert (await watched.ready()).checks["disk"].ok


async def test_how_long_ago_the_store_was_copied_is_told_where_it_ever_was(tmp_path: Path) -> None:
    ago_s = 7200
    for content, known in (
        (None, False),
        (b"{", False),
        (encode_last_backup(LastBackup(at_ns=time.time_ns() - ago_s * 10**9, to="/mnt/b", copied={0: 3})), True),
    ):
        if content is not None:
            (tmp_path / BACKUP_FILE).write_bytes(content)
        async with Watch("persist", "persist-0", Settings(health_port=0), {}, store=tmp_path) as watched:
            await watched.ready()
            values = await shown(watched)
            assert ("fi_backup_age_seconds" in values) is known
    assert ago_s <= float(values["fi_backup_age_seconds"]) < ago_s + 600


async def test_a_server_that_cannot_read_what_it_stored_is_told_at_readyz() -> None:
    async with Watch("ingest", "ingest-0", Settings(health_port=0), {}) as watched:
        assert "could not read" not in (await watched.ready()).checks["streams"].why
        for _ in range(3):
            watched.telemetry.unreadable("FI_EVENTS", "n2")
        assert "n2 could not read FI_EVENTS 3 times" in (await watched.ready()).checks["streams"].why


async def test_a_partition_whose_disk_hangs_or_refuses_is_not_ready_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "HEALTH_DISK", msgspec.structs.replace(HEALTH_DISK, s=0.0))
    async with Watch("persist", "persist-0", Settings(health_port=0), {}, store=tmp_path) as watched:
        watched.planned()
        hanging, other = (watched.telemetry.lane("persist", partition) for partition in (3, 4))
        for lane in (hanging, other):
            lane.opened(cast(Feed, None))
            lane.begin([])
        other.worked()
        found = (await watched.ready()).checks["lanes"]
        assert not found.ok
        assert found.why.startswith("partitions [3] have waited to be on disk")
        assert f"the disk of {tmp_path} hang" in found.why
        hanging.worked()
        assert (await watched.ready()).checks["lanes"].ok

        other.stopped(StoreFailedError("/d: Read-only file system"))
        found = (await watched.ready()).checks["lanes"]
        assert not found.ok
        assert found.why == "partitions [4] have stopped, and the log says why each: /d: Read-only file system"
        other.stopped(StoreFailedError("/d: is not a store"))
        assert (await watched.ready()).checks["lanes"].why.endswith("/d: is not a store")


async def test_metrics_are_told_while_a_disk_that_hangs_has_taken_every_thread_of_the_lanes(tmp_path: Path) -> None:
    mended = threading.Event()
    loop = asyncio.get_running_loop()
    try:
        hanging = [loop.run_in_executor(None, mended.wait) for _ in range(40)]
        async with Watch("persist", "persist-0", Settings(health_port=0), {}, store=tmp_path) as watched:
            report = await watched.ready()
            assert report.checks["disk"].ok
            assert int((await shown(watched))["fi_storage_free_bytes"]) > 0
    finally:
        mended.set()
        await asyncio.gather(*hanging)


async def shown(watched: Watch) -> dict[str, str]:
    """Metrics without attributes and their values, as text."""
    assert watched._server is not None
    _, text = await get(f"http://127.0.0.1:{watched._server.port}/metrics")
    samples = (line.split(" ") for line in text.decode().splitlines() if not line.startswith("#"))
    return {name: value for name, value in samples if "{" not in name}


async def test_a_variable_that_opentelemetry_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_ATTRIBUTE_COUNT_LIMIT", "many")
    with pytest.raises(SettingsError, match="OTEL_ATTRIBUTE_COUNT_LIMIT"):
        async with Watch("hash", "hash-0", Settings(otlp_endpoint="http://127.0.0.1:9"), {}):
            pass


async def test_without_a_port_and_a_collector_nothing_is_watched(tmp_path: Path) -> None:
    async with Watch("hash", "hash-0", Settings(), {}, directory=tmp_path) as watched:
        assert watched.telemetry is OFF
        assert read_health_files(tmp_path) == []
