"""A client of the model, and all that can go wrong between it and the servers.

Always true: what goes over one connection arrives in the order it was sent, unless weather says otherwise. A connection
that is cut says nothing: what is sent is held, and the client notices by its pings after some seconds. Cut for shorter,
all of it arrives late; for longer, the connection is given up, some of what was held arrives all the same, and a new
one begins with what was sent meanwhile.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import ConnectionClosedError, MaxPayloadError, NoRespondersError

from cluster.testing.sim.api import JetStreamApi, header_block
from cluster.testing.sim.broker import Broker
from cluster.testing.sim.loop import Host
from cluster.testing.sim.streams import matches
from stages.runtime.answers import Answers
from stages.runtime.client import GuardedClient
from stages.runtime.parser import Sink

TRANSIT_S_MIN, TRANSIT_S_MAX = 0.0002, 0.003
NOTICE_S_MIN, NOTICE_S_MAX = 2.0, 3.5
"""How long a client takes to see that its connection is dead: pings each second, two outstanding."""
RECONNECT_S_MIN, RECONNECT_S_MAX = 0.1, 0.8
PAYLOAD_BYTES_MAX: Final = 8 * 1024 * 1024
ARRIVES_ALL_THE_SAME: Final = 0.3
"""The share of messages held by a connection that was given up which reach the servers later."""

_Sent = tuple[str, str, bytes, dict[str, str]]
_Delivered = tuple[str, Msg]


@dataclass
class Weather:
    """What the network does to single messages now, as probabilities, for everybody.

    Attributes:
        lost_out: a message to the servers is lost.
        lost_in: an answer or delivery is lost.
        lingers: a message to the servers is held back on its way for up to `linger_s`, and overtaken.
    """

    lost_out: float = 0.0
    lost_in: float = 0.0
    lingers: float = 0.0
    linger_s: float = 3.0


class SimSubscription(Subscription):
    """A subscription of a `SimClient`."""

    def __init__(self, client: SimClient, subject: str, call: Callable[[Msg], Awaitable[None]]) -> None:
        self._client = client
        self.name = subject
        self.call = call

    async def unsubscribe(self, limit: int = 0) -> None:
        """As nats-py's."""
        if self._client.is_closed:
            raise ConnectionClosedError
        self._client.forget(self)


class SimClient(GuardedClient):
    """What the stages take for nats-py's client. Made by `Network.connect`.

    Attributes:
        cut: nothing passes now, in either direction.
    """

    def __init__(self, network: Network, name: str, host: Host, reconnected: Callable[[], None] | None) -> None:
        self.name = name
        self.host = host
        self.cut = False
        self._network = network
        self._reconnected = reconnected
        self._subscriptions: dict[str, SimSubscription] = {}
        self._answers = Answers()
        self._inboxes = 0
        self._up = True
        self._ended = False
        self._connections = 1
        self._out_s = self._in_s = 0.0
        self._held_out: list[_Sent] = []
        self._held_in: list[_Delivered] = []
        self._unsent: list[_Sent] = []

    # What stages and gateways use of nats-py's client.

    @property
    def is_closed(self) -> bool:
        """`close` was called, or the process is dead."""
        return self._ended or self.host.dead

    @property
    def is_connected(self) -> bool:
        """As far as the client knows."""
        return self._up and not self.is_closed

    @property
    def max_payload(self) -> int:
        """Largest message, in bytes."""
        return PAYLOAD_BYTES_MAX

    def note_stream(self, *, answers: bool) -> None:
        """The model's servers are one."""

    def denial(self, subject: str) -> None:
        """Everybody may do everything."""

    def new_inbox(self) -> str:
        """A subject nobody else has."""
        self._inboxes += 1
        return f"_INBOX.{self.name}.{self._inboxes}"

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """As nats-py's."""
        if self.is_closed:
            raise ConnectionClosedError
        if len(payload) > PAYLOAD_BYTES_MAX:
            raise MaxPayloadError
        self._send((subject, reply, payload, headers or {}))

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        timeout: float = 0.5,
        old_style: bool = False,
        headers: dict[str, Any] | None = None,
    ) -> Msg:
        """As nats-py's."""
        reply = self.new_inbox()
        answer = self._answers.expect(reply, timeout)
        try:
            await self.publish(subject, payload, reply=reply, headers=headers)
            message = await answer
        finally:
            self._answers.forget(reply)
        if (message.headers or {}).get("Status") == "503":
            raise NoRespondersError
        return message

    async def subscribe(  # type: ignore[override]
        self, subject: str, *, cb: Callable[[Msg], Awaitable[None]], **limits: int
    ) -> SimSubscription:
        """As nats-py's, for callbacks that never wait."""
        if self.is_closed:
            raise ConnectionClosedError
        subscription = SimSubscription(self, subject, cb)
        self._subscriptions[subject] = subscription
        return subscription

    async def subscribe_sink(self, subject: str, sink: Sink) -> Subscription:
        """See `GuardedClient.subscribe_sink`."""

        async def take(message: Msg) -> None:
            block = header_block(message.headers or {})
            sink(message.subject.encode(), message.reply.encode(), block, message.data)

        return await self.subscribe(subject, cb=take)

    async def close(self) -> None:
        """As nats-py's. Requests under way are left to their time-outs."""
        self._ended = True
        self._subscriptions.clear()
        self._network.forget(self)

    def forget(self, subscription: SimSubscription) -> None:
        """Ends a subscription."""
        self._subscriptions.pop(subscription.name, None)

    # What the servers use.

    def listens(self, subject: str) -> list[str]:
        """See `Peer.listens`."""
        if not self._up or self.is_closed:
            return []
        if subject in self._subscriptions:
            return [subject]
        if subject.startswith("_INBOX."):
            return []
        return [name for name in self._subscriptions if matches(name, subject)]

    def deliver(self, to: str, subject: str, reply: str, data: bytes, headers: dict[str, str]) -> None:
        """See `Peer.deliver`."""
        network = self._network
        if not self._up or self.is_closed:
            return
        if network.rng.random() < network.weather.lost_in:
            network.broker.say(f"{self.name} < {subject} is lost")
            return
        message = Msg(self, subject=subject, reply=reply, data=data, headers=headers or None)
        if self.cut:
            self._held_in.append((to, message))
        else:
            self._hand_over((to, message))

    # The connection.

    def _send(self, sent: _Sent) -> None:
        network = self._network
        if not self._up:
            self._unsent.append(sent)
        elif self.cut:
            self._held_out.append(sent)
        else:
            chance = network.rng.random()
            weather = network.weather
            if chance < weather.lost_out:
                network.broker.say(f"{self.name} {sent[0]} is lost")
            elif chance < weather.lost_out + weather.lingers:
                delay_s = network.rng.uniform(0.05, weather.linger_s)
                network.broker.say(f"{self.name} {sent[0]} lingers for {delay_s:.3f} s")
                network.broker.later(delay_s, self._arrive, sent)
            else:
                now_s = network.broker.loop.time()
                self._out_s = max(self._out_s, now_s + network.rng.uniform(TRANSIT_S_MIN, TRANSIT_S_MAX))
                network.broker.loop.call_at(self._out_s, self._arrive, sent, context=network.broker.context)

    def _arrive(self, sent: _Sent) -> None:
        self._network.broker.say(f"{self.name} > {sent[0]} {len(sent[2])}")
        self._network.api.receive(self, *sent)

    def _hand_over(self, delivered: _Delivered) -> None:
        network = self._network
        now_s = network.broker.loop.time()
        self._in_s = max(self._in_s, now_s + network.rng.uniform(TRANSIT_S_MIN, TRANSIT_S_MAX))
        network.broker.loop.call_at(self._in_s, self._take, self._connections, delivered, context=self.host.context)

    def _take(self, connection: int, delivered: _Delivered) -> None:
        if self.is_closed or connection != self._connections:
            return
        to, message = delivered
        answer = self._answers.awaited(to)
        if answer is not None:
            answer.set_result(message)
            return
        subscription = self._subscriptions.get(to)
        if subscription is not None:
            call = subscription.call(message)
            try:
                call.send(None)  # type: ignore[attr-defined]
            except StopIteration:
                return
            raise AssertionError(f"the callback of {to} waits: the model does not do that")

    def lose(self) -> None:
        """The cable is cut. Nothing tells."""
        if not self.cut and not self.is_closed:
            self.cut = True
            notice_s = self._network.rng.uniform(NOTICE_S_MIN, NOTICE_S_MAX)
            self._network.broker.loop.call_later(notice_s, self._notice, self._connections, context=self.host.context)

    def mend(self) -> None:
        """The cable is whole again."""
        if not self.cut:
            return
        self.cut = False
        if self._up:
            out, self._held_out = self._held_out, []
            in_, self._held_in = self._held_in, []
            for sent in out:
                self._send(sent)
            for delivered in in_:
                self._hand_over(delivered)
        else:
            self._reconnect_soon()

    def drop(self) -> None:
        """The server closed the connection, or died: the client knows at once."""
        if self._up and not self.is_closed:
            self._break()
            if not self.cut:
                self._reconnect_soon()

    def _notice(self, connection: int) -> None:
        if self.cut and self._up and connection == self._connections and not self.is_closed:
            self._break()

    def _break(self) -> None:
        network = self._network
        network.broker.say(f"{self.name} is disconnected")
        self._up = False
        self._connections += 1
        for sent in self._held_out:
            if network.rng.random() < ARRIVES_ALL_THE_SAME:
                network.broker.later(network.rng.uniform(0.0, 4.0), self._arrive, sent)
        self._held_out.clear()
        self._held_in.clear()

    def _reconnect_soon(self) -> None:
        delay_s = self._network.rng.uniform(RECONNECT_S_MIN, RECONNECT_S_MAX)
        self._network.broker.loop.call_later(delay_s, self._reconnect, context=self.host.context)

    def _reconnect(self) -> None:
        if self._up or self.cut or self.is_closed:
            return
        if self._network.is_down():
            self._reconnect_soon()
            return
        self._network.broker.say(f"{self.name} is connected again")
        self._up = True
        unsent, self._unsent = self._unsent, []
        for sent in unsent:
            self._send(sent)
        if self._reconnected is not None:
            self._reconnected()


class Network:
    """All connections to one cluster.

    Args:
        broker: the servers.
        rng: draws delays and losses.
    """

    def __init__(self, broker: Broker, rng: random.Random) -> None:
        self.broker = broker
        self.api = JetStreamApi(broker)
        self.rng = rng
        self.weather = Weather()
        self.clients: list[SimClient] = []
        self._down_until_s = 0.0

    def is_down(self) -> bool:
        """No server can be reached."""
        return self.broker.loop.time() < self._down_until_s

    async def is_up(self) -> None:
        """Returns when a server can be reached."""
        await asyncio.sleep(max(0.0, self._down_until_s - self.broker.loop.time()))

    def connect(self, name: str, host: Host, reconnected: Callable[[], None] | None = None) -> SimClient:
        """A connection of `host`'s; it is there at once."""
        client = SimClient(self, name, host, reconnected)
        self.clients.append(client)
        self.broker.peers.append(client)
        return client

    def forget(self, client: SimClient) -> None:
        """The connection was closed."""
        if client in self.clients:
            self.clients.remove(client)
            self.broker.peers.remove(client)

    def restart_servers(self, down_s: float) -> None:
        """All servers are killed, and are back after `down_s`; leaders take as long again."""
        self._down_until_s = self.broker.loop.time() + down_s
        self.broker.restart_all(2 * down_s)
        for client in list(self.clients):
            client.drop()

    def heal(self) -> None:
        """Everybody is connected, or will be in a moment, and nothing is lost any more."""
        self.weather = Weather()
        self._down_until_s = 0.0
        for client in list(self.clients):
            client.mend()
