"""nats-py's client, made safe against what a gateway can put into a subject or a header block.

The server stores subjects of any bytes but space, tab, CR and LF, and header blocks of any bytes. nats-py 2.16 decodes
subjects and status lines as strict UTF-8 inside its read loop, reads a block's first byte unchecked, and ends a subject
at any white space of Python's. Each of these ends or restarts the connection of whoever *reads* the message; it comes
again after the reconnect, so that one such message would stop a process for good. Here they are taken in, and ingest
dead-letters what is not an event.
"""

from __future__ import annotations

import asyncio
import re
from secrets import token_hex

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import ConnectionDrainingError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.protocol import parser

from stages.runtime.api import parse_headers

_WORD = rb"([^ \t\r\n]+)"

parser.MSG_RE = re.compile(rb"\AMSG[ \t]+" + _WORD + rb"[ \t]+" + _WORD + rb"[ \t]+(" + _WORD + rb"[ \t]+)?(\d+)\r\n")
parser.HMSG_RE = re.compile(
    rb"\AHMSG[ \t]+" + _WORD + rb"[ \t]+" + _WORD + rb"[ \t]+(" + _WORD + rb"[ \t]+)?(\d+)[ \t]+(\d+)\r\n"
)


class GuardedClient(Client):
    """A client whose read loop survives any message the server delivers."""

    async def _request_new_style(
        self, subject: str, payload: bytes, timeout: float = 1, headers: dict[str, str] | None = None
    ) -> Msg:
        """As nats-py's, but a cancellation that comes together with the answer is not swallowed.

        (`asyncio.wait_for` of Python 3.11 does that: a task told to end would go on.)
        """
        if self.is_draining_pubs:
            raise ConnectionDrainingError
        if not self._resp_sub_prefix:
            await self._init_request_sub()
        prefix = bytes(self._resp_sub_prefix or b"").decode()
        token = f"{self._nuid.next().decode()}{token_hex(2)}"
        answer: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._resp_map[token] = answer
        try:
            await self.publish(subject, payload, reply=f"{prefix}{token}", headers=headers)
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            raise NatsTimeoutError from None
        finally:
            self._resp_map.pop(token, None)

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
