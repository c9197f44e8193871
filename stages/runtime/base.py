"""What every lane shares: its input, its life, and what it does when it was refused or something is missing."""

from __future__ import annotations

import asyncio
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

from contracts.errors import FencedError, HoleError, StrayFrameError, WireFormatError
from contracts.frames import decode_frame_head, held_bytes
from contracts.subjects import HOPS, INPUT_STREAM, Stage, input_filter
from contracts.telemetry import EVENT_WORKER_STARTED
from stages.runtime.api import Api
from stages.runtime.checkpoint import Cursor, check_counting, last_receipt, locate, read_frame
from stages.runtime.reader import OrderedReader
from stages.runtime.witness import Witness

log = logging.getLogger(__name__)

HOLES_BEFORE_PURGE: Final = 3
STRAYS_MAX: Final = 5
"""Attempts at an input with something in it that is no frame, without one frame in between: the last ones purge."""
PROBE_BACKOFF_MAX: Final = 4.0
_LINE_BYTES: Final = 256
"""A line takes ingest as long as so many bytes, however short it is."""


def message_work(data: bytes) -> int:
    """What ingest has to do with a gateway's message, in bytes."""
    return max(len(data), _LINE_BYTES * data.count(b"\n"))


class InputFeed:
    """A lane's input: the ordered reader of its partition, and the suspicion that something was missed."""

    def __init__(self, api: Api, stage: Stage, partition: int, nonce: str, cursor: Cursor, known: Cursor) -> None:
        self._api = api
        self._stage: Stage = stage
        self._partition = partition
        self.cursor = cursor
        self._known = known
        self._nonce = nonce
        self._witnesses = 0
        settings = api.settings
        self.reader = OrderedReader(
            api,
            INPUT_STREAM[stage],
            input_filter(stage, partition),
            batch=settings.pull_batch if stage == "ingest" else settings.pull_batch_hop,
            locate=self._locate,
            nonce=nonce,
            weigh=message_work if stage == "ingest" else held_bytes,
            witness=self._witness if stage == "ingest" else None,
        )

    def _witness(self, first: OrderedReader) -> Witness:
        self._witnesses += 1
        return Witness(
            self._api,
            INPUT_STREAM[self._stage],
            input_filter(self._stage, self._partition),
            batch=self._api.settings.pull_batch,
            nonce=f"{self._nonce}_w{self._witnesses}",
            first=first,
        )

    async def _locate(self) -> int:
        if self._known.stored_ns and self._stage == "ingest":
            await check_counting(self._api, self._partition, self._known)
        return await locate(self._api, self._stage, self._partition, self.cursor)

    async def check(self) -> None:
        """For an idle reader: reopens it if the stream holds input that it should have given by now.

        A consumer that stands beyond the end of a restarted memory stream beats its heart and waits for ever.
        """
        stage = self._stage
        last = await self._api.last_message(INPUT_STREAM[stage], input_filter(stage, self._partition))
        if last is None or self.reader.buffered or self.reader.held:
            return
        reached = last.seq if stage == "ingest" else read_frame(last, decode_frame_head).last
        if reached > self.cursor.origin:
            self.reader.reopen(f"idle at origin {self.cursor.origin} while the stream reaches {reached}")


class LaneBase(ABC):
    """One partition of one stage, worked on in sessions: each starts from what is stored and ends when refused.

    Args:
        api: the process's connection.
        stage: which stage.
        partition: which lane.
        nonce: of this lane; no other lane ever had it.
        on_open: called each time the lane has found its place.
    """

    def __init__(self, api: Api, stage: Stage, partition: int, nonce: str, on_open: Callable[[int], None]) -> None:
        self._api = api
        self._stage: Stage = stage
        self._partition = partition
        self._nonce = nonce
        self._on_open = on_open
        self._probe = api.telemetry.lane(stage, partition)
        self._feed: InputFeed | None = None
        self._known = Cursor()
        """The last place that this lane reached: its output may be lost, and with it what it says of the input."""
        self._sessions = 0
        self._holes = 0
        self._stopping = asyncio.Event()
        self._suspicious = False
        self._handing_over = False

    def stop(self, *, handing_over: bool = False) -> None:
        """Finish what is in hand and return from `run`; `handing_over` when another process goes on at once."""
        self._handing_over = handing_over
        self._stopping.set()
        self._probe.leaving()
        if self._feed is not None:
            self._feed.reader.wake()

    def nudge(self) -> None:
        """The connection was lost and is back: look again at everything that was read before."""
        self._suspicious = True
        if self._feed is not None:
            self._feed.reader.reopen("reconnected")
            self._feed.reader.wake()

    async def run(self) -> None:
        """Works until `stop`.

        Raises:
            TopologyError: the streams are not there or not ours.
            ClusterUnavailableError: the connection was closed.
            DefiniteError: something can never be stored.
            StoreFailedError: the disk failed (persist).
        """
        to_heal = False
        while not self._stopping.is_set():
            self._sessions += 1
            self._suspicious = False
            try:
                # What goes wrong with it is met as it is in a session.
                if to_heal:
                    to_heal = False
                    await self._heal_hole()
                    continue
                # Each session has a nonce of its own: after a purge the same frame may come again under the same
                # expectation, and must not be taken for a repeated publish.
                await self._session(f"{self._nonce}_{self._sessions}")
            except FencedError as error:
                self._probe.restarting(error)
                log.info("%s partition %d starts again: %s", self._stage, self._partition, error)
                await self._api.pause()
            except HoleError as error:
                self._probe.restarting(error)
                self._holes += 1
                log.warning("%s partition %d: %s (attempt %d)", self._stage, self._partition, error, self._holes)
                to_heal = True
            except StrayFrameError as error:
                self._probe.restarting(error)
                to_heal = await self._is_hole(error)
            except WireFormatError as error:
                self._probe.restarting(error)
                log.error("%s partition %d cannot read on: %s", self._stage, self._partition, error)
                await self._rest(self._api.settings.probe_s)
            finally:
                self._probe.closed(sys.exception())
                self._feed = None

    @abstractmethod
    async def _session(self, nonce: str) -> None:
        """From what is stored until stopped (returns) or refused (raises)."""

    @abstractmethod
    async def _check_output(self) -> None:
        """Raises `FencedError` if the output is no longer what this session wrote."""

    def _open_feed(self, nonce: str, cursor: Cursor) -> InputFeed:
        """The session's input, reading from `cursor`. The caller closes its reader."""
        if self._holes:
            cursor = Cursor(cursor.origin, 0, cursor.closed)
        feed = InputFeed(self._api, self._stage, self._partition, nonce, cursor, self._known)
        self._feed = feed
        feed.reader.start()
        self._probe.opened(feed)
        self._on_open(self._partition)
        log.info(
            EVENT_WORKER_STARTED, extra={"stage": self._stage, "partition": self._partition, "origin": cursor.origin}
        )
        return feed

    async def _await_input(self, feed: InputFeed) -> bool:
        """Waits for input, looking for trouble when there is none; False when told to stop."""
        settings = self._api.settings
        probe_s = settings.probe_s
        while not self._stopping.is_set():
            if self._suspicious:
                self._suspicious = False
                await self._check_output()
                await feed.check()
            if feed.reader.buffered:
                return True
            if await self._finish(feed):
                continue
            try:
                async with asyncio.timeout(probe_s):
                    await feed.reader.wait()
            except TimeoutError:
                self._suspicious = True
                probe_s = min(probe_s * 2, settings.probe_s * PROBE_BACKOFF_MAX)
        return False

    async def _finish(self, feed: InputFeed) -> bool:
        """What a stage leaves undone while input comes in; called when none waits. False: there was nothing."""
        return False

    async def _rest(self, seconds: float) -> None:
        """Waits, but not when told to stop."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return

    async def _is_hole(self, error: StrayFrameError) -> bool:
        """What nobody of ours wrote into the input is a hole in it. In the output it is the next stage's to heal.

        An upstream that makes it again whenever the input was emptied is not asked for ever.
        """
        ours = error.subject == input_filter(self._stage, self._partition)
        if not ours or self._holes >= STRAYS_MAX:
            log.error("%s partition %d cannot go on: %s", self._stage, self._partition, error)
            await self._rest(self._api.settings.probe_s)
            return False
        self._holes += 1
        log.error("%s partition %d: %s (attempt %d)", self._stage, self._partition, error, self._holes)
        return True

    async def _heal_hole(self) -> None:
        """Read again; then from the first message; at last empty the input, so that upstream rebuilds it.

        Only hop streams are emptied: they hold derived data.
        """
        await self._api.pause()
        stream = INPUT_STREAM[self._stage]
        if self._holes < HOLES_BEFORE_PURGE or stream not in HOPS:
            return
        receipt, _ = await last_receipt(self._api, self._partition)
        committed = receipt.origin if receipt is not None else 0
        log.warning(
            "%s partition %d: input emptied; upstream rebuilds from %d", self._stage, self._partition, committed
        )
        await self._api.purge(stream, input_filter(self._stage, self._partition))
        # What upstream had on its way may be let in behind the purge, by a server that asked what the subject's last
        # message is before it: then the input begins with a hole again, and is emptied again.
        if (tries := self._holes - HOLES_BEFORE_PURGE) > 0:
            settings = self._api.settings
            await self._rest(min(settings.probe_s, settings.retry_s_max * tries))
