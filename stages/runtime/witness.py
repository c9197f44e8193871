"""What waits on disk is read from two servers, and nothing that one of them has is left out.

A nats-server passes over a stored message that it cannot read any more (a bit of its disk has changed) and says
nothing: neither its consumer nor its log shows it, while the stream's other servers still have the message. So while a
reader works off what was stored before it came, a second one is told by another server which messages there are: their
headers, without what is in them. A message goes on once both have come as far; one that the reader's own server leaves
out has it begin again on the other. A second server that hangs is waited for, or a third one asked in its place: while
the stream has a majority there is one, and without it nothing goes on anyway. What comes in while nothing waits is in
the servers' memory, and needs no witness.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import ClassVar, Final

from contracts.budgets import WITNESS_SILENT
from stages.runtime.api import Api
from stages.runtime.messages import StoredMessage
from stages.runtime.reader import OrderedReader
from stages.runtime.telemetry import OFF

log = logging.getLogger(__name__)

AHEAD: Final = 8
"""How many times as much as the first the second asks for at once: sequences are small."""


class SecondReader(OrderedReader):
    """Is told by another server than the first's which messages there are.

    Args:
        first: the reader that it is beside: it begins where that one stands.
        arrived: called with every message.
        alone: called when there is no other server, or (`for_good=False`) all others have nothing more to tell.

    Attributes:
        seqs: of what it was told, and nobody took.
    """

    _headers_only: ClassVar = True

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
        alone: Callable[..., None],
    ) -> None:
        async def locate() -> int:
            return first.last_seq + 1

        self.seqs: deque[int] = deque()
        super().__init__(api, stream, filter_subject, batch=batch, locate=locate, nonce=nonce)
        self._probe = OFF.reader(stream, filter_subject)
        self._first_server = first.server
        self._heard: set[str] = set()
        """Servers that said that they have nothing more, since this reader was given something."""
        self.idle = False
        """Its server says that it has nothing more. Who waits for it unsets this, to know that it was said since."""
        self._note_arrival = arrived
        self._note_alone = alone

    @property
    def held(self) -> int:
        """How many it was told of, and nobody took."""
        return len(self.seqs)

    def _reset(self) -> None:
        super()._reset()
        self.seqs.clear()
        self.idle = False

    def _suits(self, server: str) -> bool:
        return server != self._first_server and server not in self._heard

    async def _make_consumer(self, start: int) -> None:
        await super()._make_consumer(start)
        if not self._suits(self.server):
            self._note_alone(for_good=not self._heard)

    def go_elsewhere(self) -> None:
        """Its server has nothing more: a third one may have."""
        self._heard.add(self.server)
        self.reopen(f"{self.server} has nothing more")

    def _keep(self, subject: bytes, seq: int, time_ns: int, block: bytes, payload: bytes) -> None:
        self.seqs.append(seq)
        self.last_seq = seq
        self.idle = False
        self._heard.clear()
        self._note_arrival()

    def _on_status(self, headers: dict[str, str]) -> None:
        super()._on_status(headers)
        self.idle = self._trouble is None and (self.idle or headers.get("Status") == "100")

    def take_one(self) -> None:
        """The first of `seqs` is done with."""
        self.seqs.popleft()
        if self._wants_more():
            self._woken.set()


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
        self._filter = filter_subject
        self._telemetry = api.telemetry
        self._held: deque[StoredMessage] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._clock = asyncio.get_running_loop().time
        self._since_s = 0.0
        """Since when what waits has waited for the other reader."""
        self._ended = False
        self._told = False
        self._second = SecondReader(
            api,
            stream,
            filter_subject,
            batch=AHEAD * batch,
            nonce=nonce,
            first=first,
            arrived=self._merge,
            alone=self._give_up,
        )
        self._second.start()

    def __len__(self) -> int:
        return len(self._held)

    def end(self) -> None:
        """From now on nothing is released. What it holds is read again by whoever wants it."""
        self._ended = True
        self._first.refused = ""
        if self._timer is not None:
            self._timer.cancel()
        self._held.clear()

    async def close(self) -> None:
        """The second reader ends too."""
        await self._second.close()

    def hold(self, message: StoredMessage) -> None:
        """The first reader was given this."""
        if not self._ended:
            self._held.append(message)
            self._merge()

    def _merge(self) -> None:
        """Releases in order what both have come to."""
        if self._ended:
            return
        held, first, second = self._held, self._first, self._second
        while held and second.seqs:
            seq, theirs = held[0].seq, second.seqs[0]
            if theirs < seq:
                self._tell(first, second, theirs)
                self._swap(f"{first.server} passes over message {theirs}")
                return
            if theirs == seq:
                second.take_one()
            else:
                self._tell(second, first, seq)
            first.release(held.popleft())
            first.refused = ""
            self._since_s = 0.0
        if held or second.seqs:
            self._watch_time()
        elif second.last_seq == first.last_seq and not second.pending:
            first.unwitness()
        else:
            self._since_s = 0.0

    def _tell(self, blind: OrderedReader, other: OrderedReader, seq: int) -> None:
        self._telemetry.unreadable(blind.stream, blind.server)
        if not self._told:
            self._told = True
            log.error(
                "%s passes over message %d, which %s has: a file of its %s is damaged. It is read from the other one. "
                "Stop that server, delete its store, and start it again, while all others are current",
                blind.server,
                seq,
                other.server,
                blind.stream,
            )

    def _swap(self, why: str) -> None:
        """The first begins again on the second's server."""
        server = self._second.server
        self.end()
        self._first.reopen(f"{why}, which {server} has", on=server)

    def _watch_time(self) -> None:
        if not self._since_s:
            self._since_s = self._clock()
            self._second.idle = False
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WITNESS_SILENT.s, self._look)

    def _look(self) -> None:
        """For what the first alone has, another is asked; for what the second alone has, the first goes over there."""
        self._timer = None
        if self._ended or not self._since_s:
            return
        if not self._held and not self._first.asks:
            # Nobody takes what it has, as behind a full hop.
            self._since_s = self._clock()
        left_s = self._since_s + WITNESS_SILENT.s - self._clock()
        if left_s > 0:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._look)
        elif self._held:
            self._wait_for_another()
        else:
            self._swap(f"{self._first.server} does not give message {self._second.seqs[0]}")

    def _wait_for_another(self) -> None:
        """A server that hangs has not said that nothing is missing: the second reader begins again until one has."""
        first, second = self._first, self._second
        if not first.refused:
            first.refused = (
                f"what {first.server} gives waits for a second server to tell that nothing is missing in it, and "
                f"{second.server or 'that one'} gives nothing: see whether all servers run, with routes to each other"
            )
            log.warning("%s: %s", self._filter, first.refused)
        if second.idle:
            second.go_elsewhere()
        self._since_s = 0.0
        self._watch_time()

    def _give_up(self, *, for_good: bool = False) -> None:
        """The first is believed alone: no other server has more, or (`for_good`) none has the stream."""
        if self._ended:
            return
        log.warning("no second server gives what %s gives: what it cannot read is not missed", self._first.server)
        while self._held:
            self._first.release(self._held.popleft())
        self._first.unwitness(silent=not for_good, for_good=for_good)
