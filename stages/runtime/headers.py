"""Header blocks of messages, which hold any bytes: what is not UTF-8 is replaced."""

from __future__ import annotations

from typing import Final

_CRLF: Final = b"\r\n"
_SPACE: Final = " \t\n\r\v\f"
_STATUS_AT: Final = len(b"NATS/1.0 ")


def parse_headers(block: bytes) -> dict[str, str]:
    """A NATS header block → its headers; what is not UTF-8 is replaced, later lines win."""
    headers: dict[str, str] = {}
    for line in block.decode(errors="replace").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip(_SPACE)] = value.strip(_SPACE)
    return headers


def read_headers(block: bytes) -> dict[str, str]:
    """A header block as it was delivered → its headers; of a status message also ``Status`` and ``Description``."""
    if not block:
        return {}
    headers = parse_headers(block)
    if block[_STATUS_AT - 1 : _STATUS_AT] == b" ":
        status, _, description = block[_STATUS_AT : block.find(_CRLF)].decode(errors="replace").partition(" ")
        headers["Status"] = status
        if description:
            headers["Description"] = description
    return headers
