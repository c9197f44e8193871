"""One partition of ingest, segment or hash: read in order, work, publish the fenced frame.

Invariant: a frame is published only when everything it covers is either in it or acknowledged by `FI_DLQ`, and the
cursor moves only after the frame is acknowledged. So a lane may be killed at any instruction.

What the process's breaker does not allow is neither buried nor published: it goes back to the reader, and the lane
holds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from contracts.errors import FencedError
from contracts.events import Event
from contracts.frames import Dead, Encoded, Frame, deflate_frame
from contracts.subjects import OUTPUT_STREAM, output_subject
from contracts.telemetry import EVENT_QUEUED
from stages.runtime.api import Api
from stages.runtime.base import InputFeed, LaneBase
from stages.runtime.breaker import Breaker
from stages.runtime.checkpoint import Cursor, read_checkpoint
from stages.runtime.graveyard import Graveyard
from stages.runtime.messages import StoredMessage
from stages.runtime.pace import Pace
from stages.runtime.work import DeadLetter, StageCore
from stages.runtime.writer import FencedWriter

log = logging.getLogger(__name__)

OFFLOAD_BYTES_MIN: Final = 256 * 1024
"""Input of this size is worked on in a thread, so that the event loop keeps turning."""
HEADERS_BYTES_MAX: Final = 4096
"""Room for a frame's headers: servers count them as payload."""
LATER_BYTES_FRAME: Final = 8 * 1024
"""What later stages add to a frame at most: the memory of 256 committed consultations, and sequences."""
LATER_BYTES_EVENT: Final = 64
"""What they add to an event at most: two times, a policy's version, a hash."""


class Made(NamedTuple):
    """A frame, its bytes, and the sequence of the last message it was made from."""

    frame: Frame
    encoded: Encoded
    input_seq: int


class Lane(LaneBase):
    """Runs a `StageCore` over one partition.

    Arguments as `LaneBase`; `clock_ns` is the wall clock, `breaker` the process's (None: one of the lane's own),
    `before_session` is awaited each time the lane has found its place and before it works.
    """

    def __init__(
        self,
        api: Api,
        core: StageCore,
        partition: int,
        nonce: str,
        on_open: Callable[[int], None],
        clock_ns: Callable[[], int] = time.time_ns,
        breaker: Breaker | None = None,
        before_session: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(api, core.stage, partition, nonce, on_open)
        self._core = core
        self._clock_ns = clock_ns
        self._output = output_subject(core.stage, partition)
        self._breaker = breaker or Breaker(api.settings)
        self._before_session = before_session
        self._hold_over = asyncio.Event()
        self._pace = Pace()
        self._graveyard = Graveyard(api, core.stage, partition, nonce)
        self._writer = FencedWriter(api, OUTPUT_STREAM[core.stage], self._output, nonce)

    def stop(self, *, handing_over: bool = False) -> None:
        """See `LaneBase.stop`."""
        super().stop(handing_over=handing_over)
        self.end_hold()

    def end_hold(self) -> None:
        """A lane that the breaker holds asks it again now."""
        self._hold_over.set()

    async def _session(self, nonce: str) -> None:
        checkpoint = await read_checkpoint(self._api, self._stage, self._partition)
        if self._before_session is not None:
            await self._before_session()
        self._writer = FencedWriter(self._api, OUTPUT_STREAM[self._stage], self._output, nonce)
        self._writer.expected_seq = checkpoint.output_seq
        self._core.open(checkpoint.cursor.closed)
        feed = self._open_feed(nonce, checkpoint.cursor)
        try:
            while await self._await_input(feed):
                self._hold_over.clear()
                if hold_s := self._breaker.hold_s(asyncio.get_running_loop().time()):
                    await self._hold(hold_s)
                    # Others may have taken the partition over meanwhile.
                    self._suspicious = True
                else:
                    await self._gather(feed)
                    await self._advance(feed)
        finally:
            await feed.reader.close()

    async def _gather(self, feed: InputFeed) -> None:
        """Holds ingest's frames apart while enough comes in that the next one will hold several messages.

        What a frame costs all stages and servers hardly depends on what is in it; see ADR 0022. Downstream, frames
        follow frames.
        """
        if self._stage == "ingest":
            settings, loop = self._api.settings, asyncio.get_running_loop()
            wait_s = self._pace.wait_s(loop.time(), settings.frame_gap_s)
            if wait_s > 0 and feed.reader.buffered < settings.frame_events_max:
                await self._rest(wait_s)
            self._pace.begin(loop.time(), min(feed.reader.buffered, settings.frame_events_max))

    async def _hold(self, limit_s: float) -> None:
        if self._stopping.is_set():
            return
        try:
            async with asyncio.timeout(limit_s):
                await self._hold_over.wait()
        except TimeoutError:
            return

    async def _check_output(self) -> None:
        checkpoint = await read_checkpoint(self._api, self._stage, self._partition)
        # Where the output is empty, only the receipts tell that the partition went back.
        went_back = self._feed is not None and checkpoint.cursor.origin < self._feed.cursor.origin
        if went_back or checkpoint.output_seq != self._writer.expected_seq:
            raise FencedError(self._output, checkpoint.output_seq)

    async def _advance(self, feed: InputFeed) -> None:
        """One frame: work on what waits, bury what is refused, publish what passed, move the cursor."""
        settings = self._api.settings
        frame_bytes_max = self._api.client.max_payload - HEADERS_BYTES_MAX - LATER_BYTES_FRAME
        count_max = 1 if self._breaker.is_open else settings.frame_events_max
        messages = feed.reader.take(count_max, settings.frame_bytes_max)
        self._probe.begin(messages)
        self._core.begin()
        while True:
            made, letters = await self._work(messages, feed)
            if made is None:
                self._probe.skipped()
                return
            later_bytes = LATER_BYTES_EVENT * len(made.frame.events)
            if made.encoded.held_bytes + later_bytes <= frame_bytes_max or len(messages) == 1:
                break
            # Stages add to small events several times their size: what was taken can be too much for one message, of
            # this stage or of a later one, which cannot part what it gets.
            half = len(messages) // 2
            feed.reader.put_back(messages[half:])
            messages = messages[:half]
            self._core.open(feed.cursor.closed)
        frame, data = made.frame, made.encoded.data
        if not self._allowed(len(frame.events), letters):
            feed.reader.put_back(messages)
            self._core.open(feed.cursor.closed)
            self._probe.skipped()
            return
        self._probe.worked()
        await self._graveyard.bury(letters)
        await self._writer.publish(data, str(frame.last), self._probe.headers())
        self._probe.framed(frame, len(data))
        log.debug(EVENT_QUEUED, extra={"stage": self._stage, "partition": self._partition, "origin": frame.last})
        feed.cursor = self._known = Cursor(frame.last, made.input_seq, frame.closed, frame.stored_ns)
        self._holes = 0

    def _allowed(self, passed: int, letters: list[DeadLetter]) -> bool:
        """Asks the breaker, and says so when it opens, closes or stays open."""
        breaker, now_s = self._breaker, asyncio.get_running_loop().time()
        was_open, held_s = breaker.is_open, breaker.hold_s(now_s)
        allowed = breaker.allows(passed, letters, now_s)
        place = f"{self._stage} partition {self._partition}"
        if was_open and not breaker.is_open:
            log.warning("breaker closed by %s: going on", place)
        elif breaker.is_open and not was_open:
            log.error(
                "breaker opened by %s: %s. Nothing is buried or published by this process, and nothing is lost; trying "
                "again in %.0f s. Is a new build or policy wrong? If the events are, start with FI_DEAD_SHARE_MAX=1",
                place,
                breaker.explain(letters),
                breaker.hold_s(now_s),
            )
        elif was_open and breaker.hold_s(now_s) > held_s:
            log.warning(
                "breaker stays open: %s still refuses, e.g. %s; trying again in %.0f s",
                place,
                letters[0].error,
                breaker.hold_s(now_s),
            )
        return allowed

    async def _work(self, messages: list[StoredMessage], feed: InputFeed) -> tuple[Made | None, list[DeadLetter]]:
        """`_build`, in a thread when there is much to do."""
        if sum(map(feed.reader.weigh, [message.data for message in messages])) >= OFFLOAD_BYTES_MIN:
            return await asyncio.to_thread(self._build, messages, feed.cursor)
        return self._build(messages, feed.cursor)

    def _build(self, messages: list[StoredMessage], cursor: Cursor) -> tuple[Made | None, list[DeadLetter]]:
        """Runs the core over `messages`: what comes of them (None if nothing in them is new), and letters."""
        events: list[Event] = []
        dead: list[Dead] = []
        letters: list[DeadLetter] = []
        now_ns = self._clock_ns()
        origin, input_seq, first, stored_ns = cursor.origin, cursor.input_seq, 0, 0
        trail: tuple[int, ...] = ()
        closed = cursor.closed
        for message in messages:
            step = self._core.step(message, origin, now_ns)
            if step is None:
                continue
            first = first or step.first
            origin, input_seq, trail, closed = step.last, message.seq, step.trail, step.closed
            stored_ns = step.stored_ns
            events += step.events
            dead += step.dead
            letters += step.letters
        if not first:
            return None, letters
        frame = Frame(
            self._partition,
            cursor.origin,
            first,
            origin,
            trail,
            self._nonce,
            now_ns,
            closed,
            tuple(dead),
            tuple(events),
            stored_ns,
        )
        encoded = deflate_frame(frame, self._api.settings.frame_deflate_bytes_min)
        return Made(frame, encoded, input_seq), letters
