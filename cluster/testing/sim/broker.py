"""The servers of the model, as one: leaders, proposals on their way, consumers, and everybody's subscriptions.

Always true: what a stream holds is what a majority of servers would hold; a publish is answered after it is applied, or
not at all. Servers lie in three ways only, as real ones do: a stale leader answers reads with what it held when it was
frozen, and refuses what does not fit to that; and followers answer direct gets with what they had a moment ago.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from cluster.testing.sim.consumers import Consumer, Peer, Pull
from cluster.testing.sim.loop import VirtualLoop
from cluster.testing.sim.streams import NS, Message, Proposal, Refusal, Stream, View, matches
from contracts.telemetry import HEADER_EXPECTED_LAST_SUBJECT_SEQ

if TYPE_CHECKING:
    from nats.js.api import StreamConfig

EPOCH_NS: Final = 1_790_000_000 * NS
"""The wall clock when a run begins."""
COMMIT_S_MIN, COMMIT_S_MAX = 0.0005, 0.004
EXPIRY_S: Final = 0.25
STALE_SHARE: Final = 0.5
"""Of the reads that reach a stream with a stale leader, how many go to that one."""


class _Waiting(NamedTuple):
    """A proposal and who waits for it."""

    proposal: Proposal
    peer: Peer
    reply: str


class Broker:
    """See the module's text.

    Args:
        loop: the run's.
        rng: draws delays and chances.
        configs: the streams.
        trace: takes a line for the trace; None: there is none.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        rng: random.Random,
        configs: tuple[StreamConfig, ...],
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.loop = loop
        self.rng = rng
        self.trace = trace
        self.context = Context()
        self.streams = {str(config.name): Stream(config) for config in configs}
        self.consumers: dict[tuple[str, str], Consumer] = {}
        self.peers: list[Peer] = []
        self.applied: Callable[[Stream, Message], None] = lambda stream, message: None
        """Called with every message that a stream took."""
        self.placed: Callable[[Consumer], None] = lambda consumer: None
        """Called with every consumer that was made: it may put it on a server."""
        self.lost_deliveries = 0.0
        """Of what consumers deliver, how much is lost on its way to the client's server."""
        self.hung: set[str] = set()
        """Servers that stand still: consumers there give nothing, and whoever asks for one there is not answered."""
        self.headless_until_s: dict[str, float] = {}
        self._log: dict[str, deque[_Waiting]] = {name: deque() for name in self.streams}
        self._commit_s: dict[str, float] = dict.fromkeys(self.streams, 0.0)
        self._stale: dict[str, tuple[View, float, float]] = {}
        """Stream → what its stale leader holds, and from when until when that answers."""
        self._stepped_s = 0.0

    def now_ns(self) -> int:
        """The servers' wall clock."""
        return EPOCH_NS + int((self.loop.time() + self._stepped_s) * NS)

    def later(self, delay_s: float, call: Callable[..., None], *args: object) -> None:
        """Calls something of the servers' own after `delay_s`."""
        self.loop.call_later(delay_s, call, *args, context=self.context)

    def say(self, text: str) -> None:
        """A line for the trace."""
        if self.trace is not None:
            self.trace(text)

    # What clients send.

    def stream_of(self, subject: str) -> Stream | None:
        """The stream that listens on `subject`."""
        for stream in self.streams.values():
            if any(matches(pattern, subject) for pattern in stream.subjects):
                return stream
        return None

    def receive(self, peer: Peer, subject: str, reply: str, data: bytes, headers: dict[str, str]) -> None:
        """A message that reached the servers."""
        heard = False
        # Nobody subscribes to the pipeline's own subjects, which most messages have.
        for other in () if subject.startswith("fi.") else self.peers:
            for subscription in other.listens(subject):
                other.deliver(subscription, subject, reply, data, headers)
                heard = True
        stream = self.stream_of(subject)
        if stream is not None:
            self._publish(stream, peer, subject, reply, data, headers)
        elif reply and not heard:
            self.no_responders(peer, reply)

    def no_responders(self, peer: Peer, reply: str) -> None:
        """Tells a client that nobody listens."""
        peer.deliver(reply, reply, "", b"", {"Status": "503"})

    def is_headless(self, stream: str) -> bool:
        """True while the stream has no leader."""
        return self.headless_until_s.get(stream, 0.0) > self.loop.time()

    def _publish(
        self, stream: Stream, peer: Peer, subject: str, reply: str, data: bytes, headers: dict[str, str]
    ) -> None:
        if self.is_headless(stream.name):
            if self.rng.random() < 0.3:
                self.no_responders(peer, reply)
            return
        if (stale := self._stale_leader(stream)) is not None:
            self._answer_stale(stream, stale, peer, subject, reply, headers)
        outcome = stream.propose(subject, data, headers, self.now_ns())
        if isinstance(outcome, Refusal):
            self.say(f"{stream.name} refuses {peer.name} {subject}: {outcome.description} ({outcome.err_code})")
            self._answer(peer, reply, {"error": outcome._asdict(), "stream": stream.name, "seq": 0})
        elif isinstance(outcome, int):
            self.say(f"{stream.name} has {peer.name} {subject} already at {outcome}")
            self._answer(peer, reply, {"stream": stream.name, "seq": outcome, "duplicate": True})
        else:
            log = self._log[stream.name]
            log.append(_Waiting(outcome, peer, reply))
            due_s = max(self._commit_s[stream.name], self.loop.time() + self.rng.uniform(COMMIT_S_MIN, COMMIT_S_MAX))
            self._commit_s[stream.name] = due_s
            self.loop.call_at(due_s, self._commit, stream, log[-1], context=self.context)

    def _answer_stale(
        self, stream: Stream, stale: View, peer: Peer, subject: str, reply: str, headers: dict[str, str]
    ) -> None:
        """A leader that does not know that it is none refuses what its own last message does not fit to, at once.

        What it lets through it can store nowhere. The leader hears the message too, and its answer comes second.
        """
        expected = headers.get(HEADER_EXPECTED_LAST_SUBJECT_SEQ)
        last = stale.last_by_subject(stream.stored_subject(subject))
        last_seq = 0 if last is None else last.seq
        if expected is not None and int(expected) != last_seq:
            refusal = Refusal(400, 10071, f"wrong last sequence: {last_seq}")
            self.say(f"a stale leader of {stream.name} refuses {peer.name} {subject}")
            self._answer(peer, reply, {"error": refusal._asdict(), "stream": stream.name, "seq": 0})

    def _commit(self, stream: Stream, waiting: _Waiting) -> None:
        log = self._log[stream.name]
        if log and log[0] is waiting and stream is self.streams.get(stream.name):
            log.popleft()
            message = self._apply(stream, waiting.proposal)
            self._answer(waiting.peer, waiting.reply, {"stream": stream.name, "seq": message.seq})

    def _apply(self, stream: Stream, proposal: Proposal) -> Message:
        message = stream.settle(proposal, self.now_ns(), applied=True)
        assert message is not None
        self.say(f"{stream.name} takes {message.subject} at {message.seq}")
        self.applied(stream, message)
        if message.expires_ns:
            self._expire_in_time(stream, message)
        for consumer in list(self.consumers.values()):
            if consumer.stream is stream and matches(consumer.pattern, message.subject):
                consumer.pump()
        return message

    def _expire_in_time(self, stream: Stream, message: Message) -> None:
        """Again, where the clock was put back meanwhile."""

        def look() -> None:
            stream.expire(self.now_ns())
            if message.seq in stream.messages and stream.messages[message.seq] is message:
                self._expire_in_time(stream, message)

        self.later((message.expires_ns - self.now_ns()) / NS + self.rng.uniform(0, EXPIRY_S), look)

    def _answer(self, peer: Peer, reply: str, answer: dict[str, object]) -> None:
        if reply:
            peer.deliver(reply, reply, "", msgspec.json.encode(answer), {})

    # Reads and consumers; `cluster.testing.sim.api` speaks for them.

    def view(self, stream: Stream) -> View:
        """What answers a read of `stream` now: the stream, or its stale leader."""
        stale = self._stale_leader(stream)
        if stale is not None:
            self.say(f"{stream.name} is read from a stale leader")
        return stale or stream

    def _stale_leader(self, stream: Stream) -> View | None:
        """What a stale leader holds, if one hears a request too, and is faster."""
        view, from_s, until_s = self._stale.get(stream.name, (None, 0.0, 0.0))
        return view if from_s <= self.loop.time() < until_s and self.rng.random() < STALE_SHARE else None

    def pull(self, stream: str, name: str, peer: Peer, pull: Pull) -> None:
        """A pull request for a consumer."""
        consumer = self.consumers.get((stream, name))
        if consumer is None:
            self.no_responders(peer, pull.inbox)
        else:
            consumer.pull(pull)

    # What goes wrong with servers.

    def step_down(self, name: str, headless_s: float) -> None:
        """The stream's leader goes. Of what it had proposed, the others have a first part, and nobody is told."""
        stream, log = self.streams.get(name), self._log[name]
        if stream is None:
            return
        kept = self.rng.randint(0, len(log))
        for place, waiting in enumerate(list(log)):
            if place < kept:
                self._apply(stream, waiting.proposal)
            else:
                stream.settle(waiting.proposal, 0, applied=False)
        log.clear()
        self.headless_until_s[name] = self.loop.time() + headless_s

    def go_stale(self, name: str, seconds: float, *, from_s: float = 0.0) -> None:
        """A leader was frozen, another one took its place, and when it thaws it answers for a while.

        Args:
            name: of the stream.
            seconds: until it knows that it leads no more.
            from_s: when it thaws, from now.
        """
        if (stream := self.streams.get(name)) is not None:
            now_s = self.loop.time()
            self._stale[name] = (stream.copy(), now_s + from_s, now_s + seconds)

    def step_clock(self, seconds: float) -> None:
        """The servers' clock is put on, or back."""
        self._stepped_s += seconds
        self.say(f"the servers' clock goes {seconds:+.1f} s")
        for stream in self.streams.values():
            self.later(EXPIRY_S, lambda stream=stream: stream.expire(self.now_ns()))

    def lose_memory(self, name: str, headless_s: float) -> None:
        """The servers of one stream forgot what it had in memory; where it is in files, it is without a leader only."""
        self.step_down(name, headless_s)
        stream = self.streams[name]
        for key, consumer in list(self.consumers.items()):
            if key[0] == name:
                del self.consumers[key]
                consumer.end("")
        if stream.in_memory:
            stream.wipe()
            self._stale.pop(name, None)

    def hang(self, server: str, seconds: float) -> None:
        """A server is frozen: nobody is told, and consumers are put there all the same."""
        self.hung.add(server)
        for consumer in self.consumers.values():
            consumer.muted = consumer.muted or consumer.server == server
        self.later(seconds, self._go_on, server)

    def _go_on(self, server: str) -> None:
        self.hung.discard(server)
        for consumer in self.consumers.values():
            if consumer.server == server:
                consumer.muted = False
                consumer.pump()

    def lose_consumers(self, share: float, *, told: bool) -> None:
        """Consumers are gone: deleted (who pulls is told), or with the server they were on (nobody is)."""
        for key, consumer in list(self.consumers.items()):
            if self.rng.random() < share:
                del self.consumers[key]
                consumer.end("Consumer Deleted" if told else "")

    def restart_all(self, headless_s: float) -> None:
        """All servers are killed at once and come back: what was in memory is gone, and so are consumers."""
        self._stale.clear()
        self.lose_consumers(1.0, told=False)
        for name, stream in self.streams.items():
            self.step_down(name, headless_s * self.rng.uniform(0.5, 1.0))
            if stream.in_memory:
                stream.wipe()
            stream.forget_ids(of_purged=True)

    def delete(self, name: str) -> Stream:
        """The stream is deleted: what was on its way to it is lost, and nobody is told. Gives what it was."""
        stream = self.streams.pop(name)
        self._log[name].clear()
        self._stale.pop(name, None)
        for key in [key for key in self.consumers if key[0] == name]:
            self.consumers.pop(key).end("Consumer Deleted")
        return stream

    def create(self, stream: Stream) -> None:
        """A stream is made, or put back."""
        self.streams[stream.name] = stream

    def heal(self) -> None:
        """Leaders everywhere, none of them stale, and room."""
        self._stale.clear()
        self.lost_deliveries = 0.0
        for server in sorted(self.hung):
            self._go_on(server)
        self.headless_until_s.clear()
        for stream in self.streams.values():
            stream.bytes_max = stream.config.max_bytes or -1
