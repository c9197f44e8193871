"""The ordered reader: the messages of one filter subject from a position on, none skipped, without acknowledgements.

It stands on an ephemeral pull consumer (`ack_policy none`, one replica, memory). The consumer's own sequence shows
every gap in delivery; a gap, a missed heartbeat, an error status or a lost connection makes a new consumer at the
reader's position. Messages handed over are in stream order, and none that the consumer delivered is left out; what was
purged from the stream before delivery cannot be seen here (frames carry `prev` for that).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import ClassVar, Final, Protocol

import msgspec
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from contracts.budgets import WITNESS_LAG, WITNESS_LAG_MAX
from contracts.errors import CountsAnewError, FiError, TopologyError
from stages.runtime.api import NO_STREAM, Api, RequestRefusedError
from stages.runtime.consumers import create_consumer, delete_consumer, pending_of
from stages.runtime.headers import parse_headers, read_headers
from stages.runtime.messages import StoredMessage
from stages.runtime.tasks import end_tasks

log = logging.getLogger(__name__)

_NS: Final = 1_000_000_000
PLACES_TRIED: Final = 12
"""Servers put a consumer on any of the stream's, by chance."""
_NAME_SAFE: Final = str.maketrans({".": "_", ">": "all", "*": "any"})
_END_OF_PULL: Final = frozenset({"404", "408"})
_END_OF_BYTES: Final = frozenset({"Message Size Exceeds MaxBytes", "Batch Completed"})


class Holding(Protocol):
    """What holds messages back until it is certain that none is missing (`stages.runtime.witness`)."""

    def __len__(self) -> int:
        """How many it holds."""

    def hold(self, message: StoredMessage) -> None:
        """Takes a message, to release it later."""

    def end(self) -> None:
        """From now on nothing is released."""

    async def close(self) -> None:
        """Ends what it needed, after `end`."""


class OrderedReader:
    """Reads one filter subject of one stream.

    Args:
        api: the connection.
        stream, filter_subject: what to read.
        batch: messages asked for at once; fewer where the servers (`max_request_batch`) allow no more.
        locate: gives the stream sequence to start from, asked anew each time a consumer is made.
        nonce: of this process; consumer names are built from it.
        weigh: what working on a message's data takes, in bytes.
        witness: gives what holds messages back while what was stored before is read; None: nothing does.

    Attributes:
        server: which one the consumer is on; empty where there is no cluster, or none was made yet.
        last_seq: of the last message that can be, or could be, taken.
    """

    _headers_only: ClassVar = False

    def __init__(
        self,
        api: Api,
        stream: str,
        filter_subject: str,
        *,
        batch: int,
        locate: Callable[[], Awaitable[int]],
        nonce: str,
        weigh: Callable[[bytes], int] = len,
        witness: Callable[[OrderedReader], Holding] | None = None,
    ) -> None:
        self._api = api
        self.stream = self._stream = stream
        self._filter = filter_subject
        self._batch = self._batch_max = batch
        self._locate = locate
        self._nonce = nonce
        self.weigh = weigh
        self._probe = api.telemetry.reader(stream, filter_subject)
        self._gate = api.gate(stream)
        self._task: asyncio.Task[None] | None = None
        self._clock: Callable[[], float] = time.monotonic
        self._arrived = asyncio.Event()
        self._woken_up = False
        self._make_witness = witness
        self._witness: Holding | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self.server = ""
        self.last_seq = 0
        self._lag_s = WITNESS_LAG.s
        self._seen_s = 0.0
        """When the end of the stream was seen last: what was delivered since was stored then, or later."""
        self._seen_end = 0
        """The delivery that the end will be."""
        self._reset()
        self.refused = ""
        """Why the stream refuses to be read, or must not be; empty while neither is so."""
        self.opened = 0
        """How many consumers were made so far: more than one means that the reader healed itself."""
        self._wanted = ""
        """The server that the next consumer had best be on."""

    def _reset(self) -> None:
        self._buffer: deque[StoredMessage] = deque()
        self._buffered_bytes = 0
        self._outstanding = 0
        self._delivered = 0
        self._inbox = ""
        self._inbox_token = b""
        self._consumer = ""
        self._consumer_token = b""
        self.pending = 0
        """Messages the server had still to deliver when it was last heard of."""
        self._trouble: str | None = None
        self._woken = asyncio.Event()
        self._active_s = 0.0
        self._see_end()

    def start(self) -> None:
        """Begins reading. Call once."""
        self._clock = asyncio.get_running_loop().time
        self._task = asyncio.create_task(self._run(), name=f"read {self._filter}")

    async def close(self) -> None:
        """Ends reading; the server drops the consumer by itself."""
        try:
            if self._task is not None:
                await end_tasks(self._task)
        finally:
            self.unwitness()
        if self._ending:
            await asyncio.wait(self._ending)

    def release(self, message: StoredMessage) -> None:
        """What this reader was given may be taken."""
        self._buffer.append(message)
        self.last_seq = message.seq
        self._arrived.set()
        if self._wants_more():
            self._woken.set()

    def unwitness(self, *, silent: bool = False, for_good: bool = False) -> None:
        """What comes from now on may be taken at once.

        Args:
            silent: the other server gives nothing: it is asked again later than the last time.
            for_good: there is no other, however long something waits.
        """
        self._lag_s = min(2 * self._lag_s, WITNESS_LAG_MAX.s) if silent else self._lag_s
        self._make_witness = None if for_good else self._make_witness
        if self._witness is not None:
            self._witness.end()
            ending = asyncio.create_task(self._witness.close(), name=f"end witness {self._filter}")
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            self._witness = None

    def reopen(self, why: str, *, on: str = "") -> None:
        """Makes a new consumer at the position that `locate` gives, if it can be on the server `on`; empty: on any.

        What is buffered is read again.
        """
        self._trouble = self._trouble or why
        self._wanted = on or self._wanted
        self._woken.set()

    @property
    def buffered(self) -> int:
        """Messages received that can be taken."""
        return len(self._buffer)

    @property
    def asks(self) -> bool:
        """False while it is full: then nothing can come."""
        return self._outstanding > 0

    @property
    def held(self) -> int:
        """Messages received that a second reader has not come to."""
        return len(self._witness or ())

    async def count_pending(self) -> None:
        """Asks the server for `pending` when nothing is on its way that would tell: this reader is full."""
        if self._outstanding > 0 or not self._buffer or not self._consumer:
            return
        found = await pending_of(self._api, self._stream, self._consumer)
        self.pending = self.pending if found is None else found

    def wake(self) -> None:
        """Makes one `wait` return now, message or not."""
        self._woken_up = True
        self._arrived.set()

    async def wait(self) -> None:
        """Returns when at least one message can be taken, or `wake` was called.

        Raises:
            FiError: reading ended for good (the stream is gone, the connection closed).
        """
        while not self._buffer and not self._woken_up:
            if self._task is not None and self._task.done():
                self._task.result()
            self._arrived.clear()
            await self._arrived.wait()
        self._woken_up = False

    def take(self, count_max: int, bytes_max: int) -> list[StoredMessage]:
        """What is waiting, oldest first: at least one message if there is any, else up to the limits, each above 0.

        `bytes_max` is held against what the messages weigh.
        """
        taken: list[StoredMessage] = []
        size_bytes = weight_bytes = 0
        while self._buffer and len(taken) < count_max and weight_bytes < bytes_max:
            message = self._buffer.popleft()
            size_bytes += len(message.data)
            weight_bytes += self.weigh(message.data)
            taken.append(message)
        self._buffered_bytes -= size_bytes
        if self._wants_more():
            self._woken.set()
        return taken

    def put_back(self, messages: Sequence[StoredMessage]) -> None:
        """Takes back the end of what `take` gave last. If the reader reopened meanwhile, they will come twice."""
        self._buffer.extendleft(reversed(messages))
        self._buffered_bytes += sum(len(message.data) for message in messages)

    def _wants_more(self) -> bool:
        waiting = self._outstanding + len(self._buffer) + self.held
        return waiting <= self._batch // 4 and self._buffered_bytes < self._api.settings.pull_bytes_max

    async def _run(self) -> None:
        try:
            while True:
                subscription: Subscription | None = None
                try:
                    subscription = await self._open()
                    await self._feed()
                except RequestRefusedError as error:
                    if error.error.err_code == NO_STREAM:
                        raise TopologyError(f"stream {self._stream} is gone; run `fictl cluster apply`") from error
                    self._note_refusal(str(error.error))
                    await self._api.pause()
                except CountsAnewError as error:
                    self._note_refusal(str(error))
                    await self._api.pause()
                except NatsError as error:
                    log.info("%s: reader reopens: %r", self._filter, error)
                    await self._api.pause()
                finally:
                    if subscription is not None:
                        await self._drop(subscription)
        except FiError as error:
            log.error("%s: reader ended: %s", self._filter, error)
            raise
        finally:
            self._arrived.set()

    async def _drop(self, subscription: Subscription) -> None:
        try:
            await subscription.unsubscribe()
        except NatsError as error:
            log.debug("%s: unsubscribe: %r", self._filter, error)

    async def _open(self) -> Subscription:
        self._reset()
        self.unwitness()
        start = await self._locate()
        self.last_seq = start - 1
        self._probe.opened()
        inbox = self._api.client.new_inbox()
        self._inbox, self._inbox_token = inbox, inbox.encode()
        # What is under way is bounded by what was asked for: two pulls.
        subscription = await self._api.client.subscribe_sink(inbox, self._on_message)
        try:
            await self._make_consumer(start)
        except BaseException:
            await self._drop(subscription)
            raise
        self._note_refusal("")
        if self._make_witness is not None and self.server and self.pending:
            self._witness = self._make_witness(self)
        return subscription

    def _note_refusal(self, why: str) -> None:
        if why and why != self.refused:
            log.warning("%s: %s refuses to be read: %s; asking again", self._filter, self._stream, why)
        self.refused = why

    async def _make_consumer(self, start: int) -> None:
        for tries_left in reversed(range(PLACES_TRIED)):
            self.opened += 1
            self._consumer = f"{self._nonce}-{self._filter.translate(_NAME_SAFE)}-{self.opened}"
            self._consumer_token = self._consumer.encode()
            where = (self._api, self._stream, self._filter, self._consumer)
            made = await create_consumer(*where, start, headers_only=self._headers_only)
            self.pending, self.server = made.pending, made.server
            # A pull for more is refused, and so would be every one after it.
            self._batch = min(self._batch_max, made.batch_max or self._batch_max)
            if self._suits(self.server) or not tries_left:
                break
            await delete_consumer(self._api, self._stream, self._consumer)
        self._wanted = ""

    def _suits(self, server: str) -> bool:
        return self._wanted in ("", server)

    async def _feed(self) -> None:
        """Keeps a pull request standing until there is trouble."""
        settings = self._api.settings
        loop = asyncio.get_running_loop()
        silent_s_max = settings.heartbeat_s * settings.heartbeats_missed_max
        self._active_s = loop.time()
        while self._trouble is None:
            self._woken.clear()
            if self._wants_more():
                await self._pull()
            try:
                async with asyncio.timeout(settings.heartbeat_s):
                    await self._woken.wait()
            except TimeoutError:
                if self._outstanding > 0 and loop.time() - self._active_s > silent_s_max:
                    self._trouble = "heartbeats missed"
        log.info("%s: reader reopens: %s", self._filter, self._trouble)

    async def _pull(self) -> None:
        settings = self._api.settings
        count = self._batch - self._outstanding
        request = {
            "batch": count,
            "expires": int(settings.pull_expires_s * _NS),
            "idle_heartbeat": int(settings.heartbeat_s * _NS),
            "max_bytes": settings.pull_bytes_max,
        }
        if self._outstanding == 0:
            self._active_s = asyncio.get_running_loop().time()
        self._outstanding += count
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}"
        await self._api.client.publish(subject, msgspec.json.encode(request), reply=self._inbox)

    def _on_message(self, subject: bytes, reply: bytes, block: bytes, payload: bytes) -> None:
        if self._trouble is not None:
            return  # What is not kept is read again; whoever took what follows it would never miss it.
        self._active_s = self._clock()
        # A stored message keeps its own subject; only the server itself writes to the inbox. Telling them apart by a
        # header would let a gateway forge a status.
        if subject == self._inbox_token:
            self._on_status(read_headers(block))
            return
        tokens = reply.split(b".")
        if len(tokens) > 9:
            tokens = tokens[2:]  # $JS.ACK.<domain>.<account hash>.…
        if len(tokens) < 9 or tokens[3] != self._consumer_token:
            return
        seq, consumer_seq, time_ns = int(tokens[5]), int(tokens[6]), int(tokens[7])
        if consumer_seq != self._delivered + 1:
            self.reopen(f"delivery {consumer_seq} came after {self._delivered}")
            return
        self._delivered = consumer_seq
        self._gate.poke()
        self.pending = int(tokens[8])
        if self._make_witness is not None and self._lags():
            self.reopen("it lags: what it is given may be on disk by now")
            return
        self._probe.delivered()
        self._outstanding -= 1
        self._keep(subject, seq, time_ns, block, payload)

    def _lags(self) -> bool:
        """What is delivered may have been stored `WITNESS_LAG` ago, or twice that, and nothing holds it back."""
        if self._witness is not None or not self.server:
            self._see_end()
        lags = self._active_s > self._seen_s + self._lag_s
        if not self.pending:
            self._lag_s = WITNESS_LAG.s
        if not self.pending or self._delivered >= self._seen_end:
            self._see_end()
        return lags

    def _see_end(self) -> None:
        self._seen_s, self._seen_end = self._clock(), self._delivered + self.pending

    def _keep(self, subject: bytes, seq: int, time_ns: int, block: bytes, payload: bytes) -> None:
        stored = StoredMessage(subject.decode(errors="replace"), seq, time_ns, payload, parse_headers(block))
        self._buffered_bytes += len(payload)
        if self._witness is None:
            self.release(stored)
        else:
            self._witness.hold(stored)

    def _on_status(self, headers: dict[str, str]) -> None:
        status = headers.get("Status", "")
        if status == "100":
            if int(headers.get("Nats-Last-Consumer", self._delivered)) != self._delivered:
                self.reopen("the heartbeat tells of messages that never came")
            # There is nothing to deliver.
            self._seen_s, self._seen_end = self._active_s, self._delivered
            return
        text = headers.get("Description", "")
        if status in _END_OF_PULL or (status == "409" and text in _END_OF_BYTES):
            self._outstanding = max(0, self._outstanding - int(headers.get("Nats-Pending-Messages", 0)))
            self._woken.set()
            return
        self.reopen(f"status {status} {text}")
