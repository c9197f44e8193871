"""What a lane of persist has threads do beside its commits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from shard_maker import new_store

from cluster.testing.waiting import until
from contracts.receipts import StoreEnd, first_receipt
from contracts.settings import Settings
from stages.persist import actor
from stages.persist.actor import PersistLane
from stages.persist.disk import LOCAL, Turns
from stages.runtime.tasks import end_tasks, run_blocking
from stages.runtime.telemetry import OFF

LANES = 3


class Files:
    """A partition's files, as far as they are asked here: at work, a thread waits until it may go on."""

    cut_commits = False
    end = StoreEnd(shard=1, commits=0)
    trees: Mapping[int, tuple[int, str]] = {}
    to_seal: tuple[object, ...] = ()
    seen = SimpleNamespace(unsummarized=lambda: None)

    def __init__(self, go_on: threading.Event) -> None:
        self.sealed: dict[int, Path] = {}
        self.at_work = threading.Event()
        self.go_on = go_on
        self.prepared = False
        self.closed = False
        self.closed_at_work = False

    def work(self) -> None:
        self.at_work.set()
        assert self.go_on.wait(60)
        self.closed_at_work = self.closed

    def wants_next(self) -> bool:
        return not self.prepared

    def prepare_next(self) -> None:
        self.work()
        self.prepared = True

    def is_flushed(self, target: int) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


class Lane(PersistLane):
    """One that has its partition, waits for input, and has nothing that may leave `FI_EVENTS`."""

    async def _take_over(self, nonce: str) -> None:
        self._receipt = first_receipt(0, "c", "s", nonce)

    def _open_feed(self, *_: object) -> Any:
        async def close() -> None:
            pass

        return SimpleNamespace(reader=SimpleNamespace(close=close))

    async def _await_input(self, feed: object) -> bool:
        return await asyncio.Event().wait()

    async def _settle(self) -> None:
        pass


class SealingLane(Lane):
    """One that does nothing else but seal."""

    async def _keep_sealing(self, nonce: str) -> None:
        files: Any = self._files
        await run_blocking(files.work)


def lane_of(kind: type[Lane], tmp_path: Path, files: Files, turns: Turns | None = None) -> Lane:
    api: Any = SimpleNamespace(settings=Settings(), telemetry=OFF, jitter=lambda: 0.0, gate=lambda stream: None)
    disk = LOCAL._replace(open=lambda *_: files)  # type: ignore[arg-type, return-value]
    return kind(api, new_store(tmp_path), 0, "n", lambda _: None, disk=disk, turns=turns)


async def test_cut_off_again_while_it_waits_for_its_seal_it_closes_its_files_behind_the_thread(tmp_path: Path) -> None:
    """One that is left open keeps a file on the disk that has lost its name."""
    files = Files(threading.Event())
    lane = lane_of(SealingLane, tmp_path, files)
    working = asyncio.create_task(lane._own("n"))
    try:
        assert await asyncio.to_thread(files.at_work.wait, 60)
        working.cancel()
        await until(lambda: lane._background[-1].cancelling() > 0, "it ends what it began", 60)
        working.cancel()
    finally:
        files.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert files.closed
    assert not files.closed_at_work


class CountedLock(asyncio.Lock):
    """A lock that counts who has asked for it."""

    asked = 0

    async def acquire(self) -> Literal[True]:
        self.asked += 1
        return await super().acquire()


async def test_lanes_of_a_process_prepare_one_after_the_other_and_wait_for_nobodys_seal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def last_seal(*_: object) -> tuple[None, int]:
        return None, 0

    monkeypatch.setattr(actor, "last_seal", last_seal)
    turns, preparing, go_on = Turns(), CountedLock(), threading.Event()
    turns.preparing = preparing
    all_files = [Files(go_on) for _ in range(LANES)]
    lanes = [lane_of(Lane, tmp_path, files, turns) for files in all_files]
    try:
        async with turns.sealing:
            working = [asyncio.create_task(lane._own("n")) for lane in lanes]
            await until(lambda: preparing.asked == LANES, "all ask for their turn", 60)
            await until(lambda: any(files.at_work.is_set() for files in all_files), "one is at work", 60)
            assert sum(files.at_work.is_set() for files in all_files) == 1
            go_on.set()
            await until(lambda: all(files.prepared for files in all_files), "all have prepared", 60)
    finally:
        go_on.set()
        await end_tasks(*working)
