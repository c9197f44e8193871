"""Lines of an NDJSON file → messages a gateway may publish, or the reason why not.

Always true: what passes is accepted by the ingest stage as it is; a file read twice gives the same ids twice.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple
from uuid import UUID, uuid5

import msgspec
from msgspec import Raw

from cluster.threads import in_daemon_thread
from contracts.errors import InvalidEventError
from contracts.events import BODY_BYTES_MAX, JSON_SPACE
from contracts.policy import PAYLOAD_RULES
from contracts.wire import UNREADABLE
from stages.ingest.core import parse_message

CHUNK_BYTES = 256 * 1024

_ID_NAMESPACE = UUID("5d1c5f0e-92a7-5b52-9d0f-1a7b0c9e4f63")
_NO_SITE, _NO_CONSULTATION = "unknown", str(UUID(int=0))


class Line(NamedTuple):
    """One event ready to be published.

    Attributes:
        number: its line in the file, from 1.
        site, consultation: subject tokens; the consultation in lower case, so that it has one subject.
        event_id: UUID text.
        data: the event's JSON.
    """

    number: int
    site: str
    consultation: str
    event_id: str
    data: bytes


class _PeekMetadata(msgspec.Struct):
    site_id: Any = None


class _Peek(msgspec.Struct):
    consultation_id: str = ""
    event_id: str | None = None
    metadata: _PeekMetadata | None = None


_decode_peek = msgspec.json.Decoder(_Peek).decode
_decode_payload = msgspec.json.Decoder(dict[str, Any]).decode
_decode_fields = msgspec.json.Decoder(dict[str, Raw]).decode


class LineChecker:
    """Checks lines one after the other with the rules of ingest and, if wanted, the payload rules of segment.

    An event without an id gets one from its bytes and from how often the same bytes came before. For that it
    remembers 16 bytes for each such line; lines with ids cost no memory.
    """

    def __init__(self, site: str | None = None, *, payload_rules: bool = False) -> None:
        """`site` stands for the events that give no `metadata.site_id`; `payload_rules`: of the built-in policy."""
        self._site = site
        self._payload_rules = PAYLOAD_RULES if payload_rules else {}
        self._seen: dict[bytes, int] = {}

    def check(self, number: int, raw: bytes) -> Line | None:
        """The line as it is to be published; None when it is blank.

        Raises:
            InvalidEventError: ingest would refuse it, or segment by its payload; or there is no subject for it.
        """
        text = raw.strip(JSON_SPACE)
        if not text:
            return None
        _check_size(text)
        try:
            peek = _decode_peek(text)
        except UNREADABLE:
            peek = _Peek(_NO_CONSULTATION)
        site = self._site_of(peek)
        self._validate(text, site or _NO_SITE, peek.consultation_id or _NO_CONSULTATION)
        if site is None:
            raise InvalidEventError("site.missing", "metadata.site_id", "not given; name the site with --site")
        event_id = peek.event_id or self._derive_id(text)
        data = text if peek.event_id else _with_id(text, event_id)
        _check_size(data)
        return Line(number, site, peek.consultation_id.lower(), event_id.lower(), data)

    def _site_of(self, peek: _Peek) -> str | None:
        given = peek.metadata.site_id if peek.metadata else None
        if given is not None and not isinstance(given, str):
            raise InvalidEventError("site.invalid", "metadata.site_id", "must be a string")
        return self._site if given is None else given

    def _validate(self, text: bytes, site: str, consultation: str) -> None:
        parsed = parse_message(
            text,
            subject_site=site,
            subject_consultation=consultation,
            origin=0,
            accepted_ns=0,
            traceparent="",
            now_ns=0,
        )
        if parsed.rejected:
            raise parsed.rejected[0].error
        for event in parsed.events:
            if (rule := self._payload_rules.get(event.event_type)) is not None:
                rule(_decode_payload(event.payload))

    def _derive_id(self, text: bytes) -> str:
        digest = blake2b(text, digest_size=16).digest()
        earlier = self._seen.get(digest, 0)
        self._seen[digest] = earlier + 1
        return str(uuid5(_ID_NAMESPACE, f"{digest.hex()}/{earlier}"))


def _check_size(event: bytes) -> None:
    if len(event) > BODY_BYTES_MAX:
        raise InvalidEventError(
            "message.too_large", "", f"more than {BODY_BYTES_MAX} bytes in one line with its event_id"
        )


def _with_id(text: bytes, event_id: str) -> bytes:
    fields: dict[str, Any] = {**_decode_fields(text), "event_id": event_id}
    return msgspec.json.encode(fields)


async def read_lines(descriptor: int, *, line_bytes_max: int = BODY_BYTES_MAX + 1) -> AsyncIterator[bytes]:
    """The lines of an open file, pipe or terminal, without their line ends, as they come.

    A line longer than `line_bytes_max` is cut to that, which keeps memory bounded and still shows that it is too long.

    Args:
        descriptor: opened for reading in binary.
        line_bytes_max: bytes kept of a line.

    Raises:
        OSError: reading failed.
    """
    rest = b""
    while chunk := await in_daemon_thread(partial(os.read, descriptor, CHUNK_BYTES)):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line[:line_bytes_max]
        rest = rest[:line_bytes_max]
    if rest:
        yield rest
