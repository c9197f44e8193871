"""nats-py's client, made safe against what a gateway can put into a subject or a header block.

The server stores subjects of any bytes but space, tab, CR and LF, and header blocks of any bytes. nats-py 2.16 decodes
subjects and status lines as strict UTF-8 inside its read loop, reads a block's first byte unchecked, and ends a subject
at any white space of Python's. Each of these ends or restarts the connection of whoever *reads* the message; it comes
again after the reconnect, so that one such message would stop a process for good. Here they are taken in, and ingest
dead-letters what is not an event.

It is also quicker where every event passes: what is read for a `Sink`, and the answers to requests, go from the bytes
read to their taker without a stream, a queue or a task between them (`stages.runtime.parser`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from itertools import count
from typing import Any, Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import ConnectionDrainingError, MaxPayloadError, NoRespondersError, StaleConnectionError
from nats.errors import Error as NatsError

from contracts.budgets import CONNECTION_END, TROUBLE_COUNTS
from contracts.errors import SettingsError
from stages.runtime.access import OPEN, Access
from stages.runtime.answers import Answers, DeniedError, words_of
from stages.runtime.headers import parse_headers, read_headers
from stages.runtime.parser import Sink, SinkParser
from stages.runtime.pool import PooledClient
from stages.runtime.pulse import NOTHING, Pulse
from stages.runtime.sockets import cut, tell_of_tls, unsent_bytes, unwritten_bytes
from stages.runtime.tasks import end_tasks, run_blocking

log = logging.getLogger(__name__)

_CRLF: Final = b"\r\n"
_FEW: Final = 4
_NO_RESPONDERS: Final = "503"
_DENIED: Final = re.compile('permissions violation for (publish|subscription) to "([^"]*)"').search
_REFUSES: Final = "a server refuses: "
_PERMISSIONS: Final = "permissions violation"
_SUBSCRIBING: Final = -1
_INVALID: Final = re.compile(r"[ \t\r\n]").search
TOLD_MAX: Final = 8
"""Troubles in a row that are told: their words may hold names that are new each time."""
BACKLOG_BYTES_MAX: Final = 1024 * 1024
"""Above this what is to be written waits for the socket."""


class GuardedClient(PooledClient):
    """A client whose read loop survives any message the server delivers, and that ends when it is closed.

    Attributes:
        sinks: number of a subscription, as the server writes it → what takes its messages.
    """

    _ended = False

    def __init__(self, access: Access = OPEN) -> None:
        super().__init__()
        self._access = access
        self.sinks: dict[bytes, Sink] = {}
        self._tokens = count(1)
        self._request_inbox = ""
        self._request_id = 0
        self._answers = Answers()
        self._will_depart = False
        self._flushed: asyncio.Future[None] | None = None
        self._given = 0
        """Bytes that were given to be written, over all connections."""
        self._trouble = ""
        self._trouble_s = -math.inf
        self._told: set[str] = set()
        self._ps: SinkParser = SinkParser(self)

    @property
    def trouble(self) -> str:
        """What went wrong last with the connection, if that was within `TROUBLE_COUNTS`; empty if nothing did."""
        is_recent = asyncio.get_running_loop().time() < self._trouble_s + TROUBLE_COUNTS.s
        return self._trouble if is_recent else ""

    @property
    def reconnects(self) -> bool:
        """True when it was connected, and lost that: also while it is at one of the steps of connecting."""
        return self._reconnection_task is not None and not self.is_connected

    def note_trouble(self, text: str) -> None:
        """Something is wrong that no request is told of. The log says so once, but for a connection that never was."""
        if not self.trouble:
            self._told.clear()
        is_news = text not in self._told and len(self._told) < TOLD_MAX
        if is_news and (self.is_connected or self.reconnects):
            log.warning("%s", text)
            self._told.add(text)
        self._trouble, self._trouble_s = text, asyncio.get_running_loop().time()

    def denial(self, subject: str) -> DeniedError | None:
        """What a server said last, if that was lately and against publishing to `subject`."""
        _, refuses, words = self.trouble.partition(_REFUSES)
        return DeniedError(words) if refuses and f'"{subject.lower()}"' in words else None

    def forget_trouble(self) -> None:
        """The connection is new."""
        self._trouble = ""

    async def subscribe_sink(self, subject: str, sink: Sink) -> Subscription:
        """Has everything on `subject` taken by `sink`, without any limit on what is pending: there is no queue.

        Meant for what the server sends only when asked. End it with `Subscription.unsubscribe`.
        """
        subscription = await self.subscribe(subject)
        self.sinks[b"%d" % subscription._id] = sink
        return subscription

    async def _read_loop(self) -> None:
        stream = getattr(self._transport, "_io_reader", None)
        if stream is None:  # A WebSocket.
            await super()._read_loop()
            return
        self._ps.tap(stream)
        try:
            await super()._read_loop()
        finally:
            self._ps.untap(stream)

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self.sinks.pop(b"%d" % sid, None)
        super()._remove_sub(sid, max_msgs)

    async def _init_request_sub(self) -> None:
        # Who comes while it is sent must not subscribe a second time: every answer would come twice.
        self._request_id = _SUBSCRIBING
        self._request_inbox = self._request_inbox or f"{self.new_inbox()}."
        self._resp_sub_prefix = bytearray(self._request_inbox.encode())
        try:
            self._request_id = (await self.subscribe_sink(f"{self._request_inbox}*", self._answered))._id
        except BaseException:
            self._request_id = 0
            raise

    def _answered(self, subject: bytes, reply: bytes, block: bytes, payload: bytes) -> None:
        token = subject[len(self._request_inbox) :].decode(errors="replace")
        answer = self._answers.awaited(token)
        if answer is not None:
            answer.set_result(self._build_message(0, subject, reply, payload, read_headers(block) or None))

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        timeout: float = 0.5,
        old_style: bool = False,
        headers: dict[str, str] | None = None,
    ) -> Msg:
        """As nats-py's, in one step, and a cancellation that comes together with the answer is not swallowed.

        (`asyncio.wait_for` of Python 3.11 does that: a task told to end would go on.) `old_style` is not heeded: an
        inbox for each request has no use here. Raises `DeniedError` at once where a server says that it refuses.
        """
        if self.is_draining_pubs:
            raise ConnectionDrainingError
        if not self._request_id:
            await self._init_request_sub()
        # Unique among this connection's requests; the inbox before it is unique among connections.
        token = str(next(self._tokens))
        reply = self._request_inbox + token
        answer = self._answers.expect(token, timeout, subject, self._given + len(payload))
        try:
            if not self._send_soon(subject, payload, reply, headers):
                await self._wait_room(token, answer, len(payload))
                if not answer.done():
                    await super().publish(subject, payload, reply, headers)
            message = await answer
        finally:
            self._answers.forget(token)
        if message.headers and message.headers.get("Status") == _NO_RESPONDERS:
            raise NoRespondersError
        return message

    async def _wait_room(self, token: str, answer: asyncio.Future[Msg], size: int) -> None:
        """While more is pending than may be, waits for the flusher; no longer than for the answer."""
        while self.is_connected and self._pending_data_size > self._max_pending_size and not answer.done():
            if self._flushed is None or self._flushed.done():
                self._flushed = asyncio.get_running_loop().create_future()
                await self._flush_queue.put(self._flushed)  # type: ignore[union-attr]
            await asyncio.wait((self._flushed, answer), return_when=asyncio.FIRST_COMPLETED)
            self._answers.place(token, self._given + size)

    async def _send_command(self, cmd: bytes, priority: bool = False) -> None:
        self._given += len(cmd)
        await super()._send_command(cmd, priority)

    async def _ping_interval(self) -> None:
        """As nats-py's, but a server is not lost while something is read from it, or what it is sent leaves (`Pulse`).

        Nor does a request count as unanswered while it is still on its way.
        """
        pulse = Pulse(self.options["max_outstanding_pings"], self._left)
        while self._ping_interval_task is asyncio.current_task():
            await asyncio.sleep(self.options["ping_interval"])
            if not self.is_connected:
                continue
            heard, self._ps.heard = self._ps.heard, False
            if not pulse.beat(self._left, heard=heard):
                await self._process_op_err(StaleConnectionError())
                return
            if pulse.reached != NOTHING:
                self._answers.put_off(pulse.reached)
            try:
                await self._send_ping(pulse.ping(self._given))
            except (RuntimeError, AttributeError):
                return  # The connection was lost, which the read loop finds.

    @property
    def _left(self) -> int:
        """Of the bytes given, those that wait neither here nor in the kernel."""
        return self._given - self._pending_data_size - unsent_bytes(self._transport)

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        # Forced, nats-py would wait without end for a server to take it all, and swallow a cancellation.
        return await super()._flush_pending()

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """As nats-py's, in one step where that can be."""
        if _INVALID(reply) or not self._send_soon(subject, payload, reply, headers):
            await super().publish(subject, payload, reply, headers)

    def _send_soon(self, subject: str, payload: bytes, reply: str, headers: dict[str, str] | None) -> bool:
        """Takes a message that is well-formed and that can be sent now; False for any other: nats-py's to judge.

        Raises:
            MaxPayloadError: it and its headers are larger than the server takes.
        """
        text = "".join([f"{name}: {value}\r\n" for name, value in headers.items()]) if headers else ""
        head = f"NATS/1.0\r\n{text}\r\n".encode() if headers else b""
        # Of such a message the server says nothing to who sent it: it closes the connection.
        if len(head) + len(payload) > self._max_payload:
            raise MaxPayloadError
        if (
            self._status != Client.CONNECTED
            or self._pending_data_size > BACKLOG_BYTES_MAX
            or not subject
            or _INVALID(subject)
            # Values may be a gateway's own: one with a line break must not become two headers.
            or (headers and not text.count("\r") == text.count("\n") == len(headers))
        ):
            return False
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += len(payload)
        if headers:
            sizes = f"HPUB {subject} {reply} {len(head)} {len(head) + len(payload)}\r\n".encode()
            command = b"".join((sizes, head, payload, _CRLF))
        else:
            command = b"".join((f"PUB {subject} {reply} {len(payload)}\r\n".encode(), payload, _CRLF))
        self._given += len(command)
        if not self._pending and len(self._answers) <= _FEW and unwritten_bytes(self._transport) == 0:
            self._transport.write(command)  # type: ignore[union-attr]
            return True
        self._pending.append(command)
        self._pending_data_size += len(command)
        if not self._will_depart:
            self._will_depart = True
            asyncio.get_running_loop().call_soon(self._depart)
        return True

    def _depart(self) -> None:
        """Hands what is pending to the socket: one system call takes it all. To nats-py's flusher when it lags."""
        self._will_depart = False
        if not self._pending or self._status != Client.CONNECTED or self._flush_queue is None:
            return
        if unwritten_bytes(self._transport) == 0:
            self._transport.writelines(self._pending)  # type: ignore[union-attr]
            self._pending = []
            self._pending_data_size = 0
        elif self._flush_queue.empty():
            self._flush_queue.put_nowait(asyncio.get_running_loop().create_future())

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg:
        return self.msg_class(
            subject=subject.decode(errors="replace"),
            reply=reply.decode(errors="replace"),
            data=data,
            headers=headers,
            _client=self,
            _sid=sid,
        )

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (ValueError, IndexError):
            return parse_headers(headers)

    async def _process_err(self, err_msg: str) -> None:
        words = words_of(err_msg)
        self.note_trouble(f"{_REFUSES}{words}")
        denied = _DENIED(words)
        if denied is not None and denied[1] == "publish":
            self._answers.deny(words, denied[2])
        elif denied is not None and denied[2] == f"{self._request_inbox}*".lower():
            # The next request subscribes again: permissions may be changed while we are connected.
            self._remove_sub(self._request_id)
            self._request_id = 0
            self._answers.deny(words, None)
        if _PERMISSIONS in words:
            await super()._process_err(err_msg)
            return
        # nats-py would give up for good; but limits are raised again, and credentials are read for each connection.
        await self._process_op_err(NatsError(f"nats: {words}"))

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        self._ended = status == Client.CLOSED
        self._send_last()
        if self._ended:
            await self._end_reconnecting()
            await self._names.close()
        # Who is frozen takes nothing, and nats-py would wait for it.
        cutting = asyncio.get_running_loop().call_later(CONNECTION_END.s, cut, self._transport)
        try:
            await super()._close(status, do_cbs)
        finally:
            cutting.cancel()

    async def _attempt_reconnect(self) -> None:
        """As nats-py's, but a connection that was given up is not waited for."""
        cut(self._transport)
        await super()._attempt_reconnect()

    async def _end_reconnecting(self) -> None:
        """Ends the task that reconnects, for certain (see `end_tasks`): left behind, it keeps the loop from ending.

        Cancelled, it takes the future with it that says that the old connection is closed: nobody may wait for that.
        """
        task = self._reconnection_task
        if task is None or task.done() or task is asyncio.current_task():
            return
        await end_tasks(task)
        cut(self._transport)
        self._transport = None

    def _send_last(self) -> None:
        """What is pending goes to the connection now, or nowhere.

        nats-py would write it some turns later, also to a connection that is gone, and fail before it closed anything.
        """
        writer = getattr(self._transport, "_io_writer", None)
        if self.is_connected and writer is None and not self._transport.at_eof():  # type: ignore[union-attr]
            return  # A WebSocket, which sends when nats-py drains it.
        if self.is_connected and writer is not None and not writer.transport.is_closing():
            writer.writelines(self._pending)
        self._pending = []
        self._pending_data_size = 0

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """As nats-py's, but where TLS was asked for, nothing is sent in plain text, nor a password."""
        scheme = self._current_server.uri.scheme if self._current_server is not None else ""
        if initial_connection and not info.get("tls_required") and scheme != "wss":
            if scheme == "tls":
                raise NatsError("the URL says tls://, and this server does not speak TLS")
            if self._access.encrypted:
                raise NatsError("nats_ca_file or nats_cert_file is set, and this server does not speak TLS")
        await super()._process_info(info, initial_connection)

    async def read_papers(self) -> None:
        """Reads the files that show servers who we are, and us who they are. Raises `SettingsError`."""
        if self._access == OPEN:
            return
        papers = await run_blocking(self._access.read)
        if papers.tls is not None:
            self.options["tls"] = papers.tls
        if (own := papers.credentials) is not None:
            self._public_nkey = None if own.jwt else own.public_nkey()
            self._user_jwt_cb = (lambda: bytearray(own.jwt)) if own.jwt else None
            self._signature_cb = own.sign

    async def _process_connect_init(self) -> None:
        """As nats-py's, but a try that failed leaves no open socket behind, and none follows the end of the client.

        (A frozen server takes connections and says nothing: one socket a try, for as long as it is frozen. And
        `asyncio.wait_for` of Python 3.11 swallows the cancellation that comes together with a connection: a client
        that was closed just then would go on connecting.)
        """
        transport = self._transport
        try:
            self._stop_if_ended()
            try:
                await self.read_papers()
            except SettingsError as error:
                raise NatsError(str(error)) from error
            await super()._process_connect_init()
            self._stop_if_ended()
            if not self.is_connected:
                raise NatsError("the server answered the first ping with something else")
        except BaseException as error:
            cut(transport)
            self._transport = None  # Else nats-py waits for its end, of which one that TLS failed on never hears.
            for task in (self._reading_task, self._ping_interval_task, self._flusher_task):
                if task is not None:
                    task.cancel()
            if isinstance(error, Exception) and not isinstance(error, (NatsError, OSError)):
                # After anything else nats-py would end reconnecting for good, and nobody would see it.
                raise NatsError(f"{type(error).__name__}: {error}") from error
            raise

    def _connect_command(self) -> bytes:
        tell_of_tls(self._transport)
        return super()._connect_command()

    def _stop_if_ended(self) -> None:
        if self._ended:
            raise asyncio.CancelledError
