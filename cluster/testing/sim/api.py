"""The JetStream API of the model: what each request is answered, as JSON, as nats-server 2.15 answers it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from cluster.testing.sim.broker import Broker
from cluster.testing.sim.consumers import Consumer, Peer, Pull
from cluster.testing.sim.streams import NO_MESSAGE, NO_STREAM, NS, Message, Refusal, Stream
from contracts.events import format_rfc3339

PREFIX: Final = "$JS.API."
_BAD_REQUEST: Final = Refusal(400, 10003, "bad request")
_NO_CONSUMER: Final = Refusal(404, 10014, "consumer not found")
_NO_SUCH_SEQ: Final = Refusal(400, 10057, "no message found")
_TYPE: Final = "io.nats.jetstream.api.v1.response"
"""Stands for the types of all answers, of which only the beginning is looked at."""
_DIRECT: Final = "DIRECT.GET."

_Answer = dict[str, Any] | Refusal | None
"""None: nobody answers."""
_Handler = Callable[[Stream, list[str], dict[str, Any]], _Answer]


_STATUS_LINE = ("Status", "Description")


class JetStreamApi:
    """Answers requests for a broker's streams."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._handlers: dict[str, tuple[_Handler, int]] = {
            "STREAM.INFO.": (self._stream_info, 0),
            "STREAM.MSG.GET.": (self._get, 0),
            "STREAM.MSG.DELETE.": (self._delete, 0),
            "STREAM.PURGE.": (self._purge, 0),
            "CONSUMER.CREATE.": (self._create_consumer, 2),
            "CONSUMER.INFO.": (self._consumer_info, 1),
            "CONSUMER.DELETE.": (self._delete_consumer, 1),
        }

    def receive(self, peer: Peer, subject: str, reply: str, data: bytes, headers: dict[str, str]) -> None:
        """A message from a client: a request to the API, or anything else."""
        broker = self._broker
        if not subject.startswith(PREFIX):
            broker.receive(peer, subject, reply, data, headers)
            return
        what = subject.removeprefix(PREFIX)
        if what.startswith("CONSUMER.MSG.NEXT."):
            self._next(peer, what.split(".")[3:], reply, data)
            return
        if what.startswith(_DIRECT):
            self._direct_get(peer, what.removeprefix(_DIRECT), reply, data)
            return
        for begin, (handler, extra) in self._handlers.items():
            if what.startswith(begin):
                name, *rest = what.removeprefix(begin).split(".", extra)
                stream = broker.streams.get(name)
                if stream is not None and broker.is_headless(name):
                    return
                answer = NO_STREAM if stream is None else handler(stream, rest, _decoded(data))
                self._answer(peer, reply, what, answer)
                return
        broker.no_responders(peer, reply)

    def _answer(self, peer: Peer, reply: str, what: str, answer: _Answer) -> None:
        if answer is None:
            return
        if isinstance(answer, Refusal):
            self._broker.say(f"{what} of {peer.name} is refused: {answer.description} ({answer.err_code})")
            answer = {"error": answer._asdict()} | ({"purged": 0} if what.startswith("STREAM.PURGE.") else {})
        peer.deliver(reply, reply, "", msgspec.json.encode({"type": _TYPE} | answer), {})

    def _stream_info(self, stream: Stream, _: list[str], body: dict[str, Any]) -> _Answer:
        state = {
            "messages": len(stream.seqs),
            "bytes": stream.bytes,
            "first_seq": stream.seqs[0] if stream.seqs else stream.last_seq + 1,
            "last_seq": stream.last_seq,
            "consumer_count": sum(consumer.stream is stream for consumer in self._broker.consumers.values()),
        }
        config = stream.config.as_dict()
        return {"config": config, "state": state, "cluster": {"leader": "n1"}, "created": "2026-01-01T00:00:00Z"}

    def _get(self, stream: Stream, _: list[str], body: dict[str, Any]) -> _Answer:
        view = self._broker.view(stream)
        if "last_by_subj" in body:
            message = view.last_by_subject(body["last_by_subj"])
        elif "next_by_subj" in body:
            message = view.next_by_subject(body["next_by_subj"], body.get("seq", 0))
        elif body.get("seq"):
            message = view.messages.get(body["seq"])
        else:
            return _BAD_REQUEST
        if message is None:
            return NO_MESSAGE
        found = {"subject": message.subject, "seq": message.seq, "data": message.data, "time": _time(message)}
        if message.headers:
            found["hdrs"] = header_block(message.headers)
        return {"message": found}

    def _delete(self, stream: Stream, _: list[str], body: dict[str, Any]) -> _Answer:
        return {"success": True} if stream.remove(body["seq"]) else _NO_SUCH_SEQ

    def _purge(self, stream: Stream, _: list[str], body: dict[str, Any]) -> _Answer:
        below_seq, keep = body.get("seq", 0), body.get("keep", 0)
        if below_seq and keep:
            return _BAD_REQUEST
        pattern = body.get("filter", ">")
        purged = stream.purge(pattern, below_seq=below_seq or None, keep=keep)
        self._broker.say(f"{stream.name} is purged of {purged} on {pattern}")
        return {"success": True, "purged": purged}

    def _create_consumer(self, stream: Stream, rest: list[str], body: dict[str, Any]) -> _Answer:
        broker, (name, pattern) = self._broker, rest
        consumer = broker.consumers.get((stream.name, name))
        if consumer is None:
            consumer = Consumer(broker, stream, name, pattern, body["config"])
            broker.consumers[stream.name, name] = consumer
            broker.placed(consumer)
            broker.say(f"{stream.name} has consumer {name} from {body['config'].get('opt_start_seq')}")
        if consumer.server in broker.hung:
            consumer.muted = True
            return None
        return self._described(consumer)

    def _consumer_info(self, stream: Stream, rest: list[str], body: dict[str, Any]) -> _Answer:
        consumer = self._broker.consumers.get((stream.name, rest[0]))
        if consumer is not None and consumer.server in self._broker.hung:
            return None
        return _NO_CONSUMER if consumer is None else self._described(consumer)

    def _delete_consumer(self, stream: Stream, rest: list[str], body: dict[str, Any]) -> _Answer:
        consumer = self._broker.consumers.pop((stream.name, rest[0]), None)
        if consumer is None:
            return _NO_CONSUMER
        consumer.end("Consumer Deleted")
        return {"success": True}

    def _described(self, consumer: Consumer) -> dict[str, Any]:
        place = {"cluster": {"leader": consumer.server}} if consumer.server else {}
        return place | {
            "stream_name": consumer.stream.name,
            "name": consumer.name,
            "config": consumer.config,
            "num_pending": consumer.pending(),
        }

    def _next(self, peer: Peer, place: list[str], inbox: str, data: bytes) -> None:
        body = _decoded(data)
        until_s = self._broker.loop.time() + body.get("expires", 0) / NS
        heartbeat_s = body.get("idle_heartbeat", 0) / NS
        pull = Pull(peer, inbox, body.get("batch", 1), body.get("max_bytes", 0), until_s, heartbeat_s)
        self._broker.pull(place[0], place[1], peer, pull)

    def _direct_get(self, peer: Peer, name: str, reply: str, data: bytes) -> None:
        """Answered by any server, so also without a leader."""
        stream = self._broker.streams.get(name)
        if stream is None or not stream.config.allow_direct:
            self._broker.no_responders(peer, reply)
            return
        found = self._broker.view(stream).last_of_each(_decoded(data)["multi_last"])
        if not found:
            peer.deliver(reply, reply, "", b"", {"Status": "404", "Description": "No Results"})
            return
        for message in found:
            about = {
                "Nats-Stream": name,
                "Nats-Subject": message.subject,
                "Nats-Sequence": str(message.seq),
                "Nats-Time-Stamp": _time(message),
            }
            peer.deliver(reply, reply, "", message.data, {**message.headers, **about})
        peer.deliver(reply, reply, "", b"", {"Status": "204", "Description": "EOB"})


def _decoded(data: bytes) -> dict[str, Any]:
    return msgspec.json.decode(data, type=dict[str, Any]) if data else {}


def _time(message: Message) -> str:
    return format_rfc3339(message.time_ns)


def header_block(headers: dict[str, str]) -> bytes:
    """Headers as they are stored and delivered; ``Status`` and ``Description`` stand in the first line."""
    status = " ".join(headers[name] for name in _STATUS_LINE if name in headers)
    lines = [f"{name}: {value}\r\n" for name, value in headers.items() if name not in _STATUS_LINE]
    return f"NATS/1.0{' ' if status else ''}{status}\r\n{''.join(lines)}\r\n".encode()
