"""What waits on disk is read from two servers, and nothing that one of them has is left out.

A nats-server passes over a stored message that it cannot read any more (a bit of its disk has changed) and says
nothing: neither its consumer nor its log shows it, while the stream's other servers still have the message. So while a
reader works off what was stored before it came, a second one reads the same from another server, and both are merged by
sequence. What comes in while nothing waits is in the servers' memory, and needs no second reader.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from contracts.budgets import WITNESS_SILENT
from stages.runtime.api import Api, RequestRefusedError
from stages.runtime.messages import StoredMessage
from stages.runtime.reader import OrderedReader
from stages.runtime.telemetry import OFF

log = logging.getLogger(__name__)

PLACES_TRIED: Final = 12
"""Servers put a consumer on any of the stream's, by chance."""


class SecondReader(OrderedReader):
    """Reads from another server than the first.

    Args:
        first: the reader that it is beside: it begins where that one stands.
        arrived: called with every message.
        alone: called when there is no other server.
    """

    def __init__(
        self,
        api: Api,
        stream: str,
        filter_subject: str,
        *,
        batch: int,
        nonce: str,
        first: OrderedReader,
        arrived: Callable[[], None],
        alone: Callable[[], None],
    ) -> None:
        async def locate() -> int:
            return first.last_seq + 1

        super().__init__(api, stream, filter_subject, batch=batch, locate=locate, nonce=nonce)
        self._probe = OFF.reader(stream, filter_subject)
        self._avoid = first.server
        self._note_arrival = arrived
        self._note_alone = alone

    async def _create_consumer(self, start: int) -> None:
        for _ in range(PLACES_TRIED):
            await super()._create_consumer(start)
            if self.server != self._avoid:
                return
            subject = f"$JS.API.CONSUMER.DELETE.{self._stream}.{self._consumer}"
            try:
                await self._api.request(self._stream, subject, b"")
            except RequestRefusedError as error:
                log.debug("%s: %s", self._filter, error)
            self._name_consumer()
        self._note_alone()

    def _keep(self, stored: StoredMessage) -> None:
        super()._keep(stored)
        self._note_arrival()


class Witness:
    """Holds what `first` is given until a second reader has come as far.

    Args:
        api, stream, filter_subject, batch, nonce: as of the first reader.
        first: the reader, which has just begun.
    """

    def __init__(
        self, api: Api, stream: str, filter_subject: str, *, batch: int, nonce: str, first: OrderedReader
    ) -> None:
        self._first = first
        self._held: deque[StoredMessage] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._second = SecondReader(
            api,
            stream,
            filter_subject,
            batch=batch,
            nonce=nonce,
            first=first,
            arrived=self._merge,
            alone=partial(self._give_up, for_good=True),
        )
        self._second.start()

    def __len__(self) -> int:
        return len(self._held)

    def end(self) -> None:
        """From now on nothing is released. What it holds is read again by whoever wants it."""
        self._ended = True
        self._stop_timer()
        self._held.clear()

    async def close(self) -> None:
        """The second reader ends too."""
        await self._second.close()

    def hold(self, message: StoredMessage) -> None:
        """The first reader was given this."""
        self._held.append(message)
        self._merge()

    def _merge(self) -> None:
        """Releases in order what both have come to."""
        if self._ended:
            return
        held, second = self._held, self._second
        before = self._first.last_seq
        while held and second.buffered:
            theirs = second.peek()
            if theirs < held[0].seq:
                log.error(*_words(self._first, second, theirs))
                self._first.admit(second.take(1, 1)[0])
                continue
            if theirs == held[0].seq:
                second.take(1, 1)
            else:
                log.error(*_words(second, self._first, held[0].seq))
            self._first.release(held.popleft())
        if held or second.buffered:
            self._watch_time(anew=self._first.last_seq != before)
            return
        self._stop_timer()
        if second.last_seq == self._first.last_seq and not second.pending:
            self._first.unwitness()

    def _watch_time(self, *, anew: bool) -> None:
        if anew:
            self._stop_timer()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WITNESS_SILENT.s, self._one_is_silent)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _one_is_silent(self) -> None:
        """What the first alone has goes on; for what the second alone has, the first begins again, on any server."""
        if self._held or self._ended:
            self._give_up()
        else:
            at = self._second.peek()
            self._first.reopen(f"{self._second.server} has message {at}, and {self._first.server} gives nothing")

    def _give_up(self, *, for_good: bool = False) -> None:
        """The first is believed alone; `for_good`: no other server has the stream."""
        if self._ended:
            return
        log.warning("no second server gives what %s gives: what it cannot read is not missed", self._first.server)
        while self._held:
            self._first.release(self._held.popleft())
        self._first.unwitness(for_good=for_good)


def _words(blind: OrderedReader, other: OrderedReader, seq: int) -> tuple[str, str, int, str, str]:
    text = (
        "%s passes over message %d, which %s has: a file of its %s is damaged. It is read from the other one. Stop "
        "that server, delete its store, and start it again, while all others are current"
    )
    return text, blind.server, seq, other.server, blind.stream
