"""A pull consumer of the model: ephemeral, on one server, in memory, without acknowledgements.

It delivers in stream order from a sequence on, numbers what it delivers, beats its heart while a pull stands and
nothing else was sent, and ends a pull that is old. A start beyond the stream's end is taken, and waits for ever.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from cluster.testing.sim.loop import VirtualLoop
from cluster.testing.sim.streams import Message, Stream

_ROUNDING_S: Final = 1e-6


class Peer(Protocol):
    """A client's connection, as the servers see it."""

    name: str

    def deliver(self, to: str, subject: str, reply: str, data: bytes, headers: dict[str, str]) -> None:
        """Sends a message to the client's subscription `to`."""

    def listens(self, subject: str) -> list[str]:
        """The client's subscriptions that `subject` goes to."""


class Servers(Protocol):
    """What a consumer needs of the servers it is on."""

    loop: VirtualLoop
    rng: random.Random
    lost_deliveries: float
    """Share of what consumers deliver that is lost on its way."""

    def later(self, delay_s: float, call: Callable[..., None], *args: object) -> None:
        """Calls it after `delay_s`."""


@dataclass(slots=True)
class Pull:
    """A standing request: how much may still be sent for it, and until when."""

    peer: Peer
    inbox: str
    left: int
    bytes_left: int
    """0: no limit."""
    until_s: float
    heartbeat_s: float


class Consumer:
    """One consumer.

    Attributes:
        stream, name, pattern: what it reads, under which name.
        config: as it was asked for.
        delivered: its own sequence.
        muted: the server it is on is frozen: nothing is sent.
        server: where it is; empty in a model that knows of one server only.
        unreadable: sequences of what that server has and cannot read: they are passed over.
    """

    def __init__(self, servers: Servers, stream: Stream, name: str, pattern: str, config: dict[str, object]) -> None:
        self.stream = stream
        self.name = name
        self.pattern = pattern
        self.config = config
        self.delivered = 0
        self.muted = False
        self.server = ""
        self.unreadable: set[int] = set()
        start = config.get("opt_start_seq")
        self._next_seq = start if isinstance(start, int) else 1
        self._last_seq = self._next_seq - 1
        self._servers = servers
        self._pulls: deque[Pull] = deque()
        self._sent_s = 0.0
        self._beating = False
        self._ended = False

    def pending(self) -> int:
        """Messages that are still to be delivered."""
        return sum(1 for _ in self.stream.following(self.pattern, self._next_seq))

    def pull(self, pull: Pull) -> None:
        """Takes a request."""
        if not self._pulls:
            self._sent_s = self._servers.loop.time()
        self._pulls.append(pull)
        self._servers.later(pull.until_s - self._servers.loop.time(), self._clear)
        self.pump()
        if not self._beating and self._pulls and pull.heartbeat_s:
            self._beating = True
            self._servers.later(pull.heartbeat_s, self._beat)

    def pump(self) -> None:
        """Sends what is there for as long as somebody asked for it."""
        if self._ended or self.muted:
            return
        while self._pulls and (message := self._next()) is not None:
            pull = self._pulls[0]
            if not self._stands(pull):
                self._pulls.popleft()
            elif pull.bytes_left and message.size_bytes > pull.bytes_left:
                self._close(self._pulls.popleft(), "409", "Message Size Exceeds MaxBytes")
            else:
                self._send(pull, message)

    def _next(self) -> Message | None:
        messages = self.stream.following(self.pattern, self._next_seq)
        return next((message for message in messages if message.seq not in self.unreadable), None)

    def _send(self, pull: Pull, message: Message) -> None:
        self._next_seq, self._last_seq = message.seq + 1, message.seq
        self.delivered += 1
        pull.left -= 1
        if pull.bytes_left:
            pull.bytes_left = max(1, pull.bytes_left - message.size_bytes)
        if not pull.left:
            self._pulls.popleft()
        place = f"{self.stream.name}.{self.name}.1.{message.seq}.{self.delivered}.{message.time_ns}.{self.pending()}"
        if self._servers.rng.random() >= self._servers.lost_deliveries:
            data = b"" if self.config.get("headers_only") else message.data
            pull.peer.deliver(pull.inbox, message.subject, f"$JS.ACK.{place}", data, message.headers)
        self._sent_s = self._servers.loop.time()

    def _stands(self, pull: Pull) -> bool:
        """False for a pull that nobody waits for any more; one that is old is told so."""
        if not pull.peer.listens(pull.inbox):
            return False
        if self._servers.loop.time() >= pull.until_s - _ROUNDING_S:
            self._close(pull, "408", "Request Timeout")
            return False
        return True

    def _clear(self) -> None:
        """Ends pulls whose time is over."""
        while self._pulls and not self._stands(self._pulls[0]):
            self._pulls.popleft()

    def _close(self, pull: Pull, status: str, description: str) -> None:
        counts = {"Nats-Pending-Messages": str(pull.left), "Nats-Pending-Bytes": str(pull.bytes_left)}
        headers = {"Status": status, "Description": description, **counts}
        pull.peer.deliver(pull.inbox, pull.inbox, "", b"", headers)

    def _beat(self) -> None:
        self._beating = False
        if self._ended:
            return
        self._clear()
        if not self._pulls:
            return
        pull = self._pulls[0]
        now_s = self._servers.loop.time()
        if not self.muted and now_s - self._sent_s >= pull.heartbeat_s - _ROUNDING_S:
            self._sent_s = now_s
            headers = {
                "Status": "100",
                "Description": "Idle Heartbeat",
                "Nats-Last-Consumer": str(self.delivered),
                "Nats-Last-Stream": str(self._last_seq),
            }
            pull.peer.deliver(pull.inbox, pull.inbox, "", b"", headers)
        self._beating = True
        self._servers.later(pull.heartbeat_s, self._beat)

    def end(self, told: str) -> None:
        """It is gone. `told`: what whoever pulls is told; empty for nothing."""
        self._ended = True
        for pull in self._pulls:
            if told:
                headers = {"Status": "409", "Description": told}
                pull.peer.deliver(pull.inbox, pull.inbox, "", b"", headers)
        self._pulls.clear()
