"""What may go wrong when bytes that anybody can have written are decoded."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises on bytes that are not what they should be: text that is no UTF-8, and nesting, raise no
`MsgspecError`."""


def plain(text: str) -> str:
    """`text` without what a terminal would obey, or UTF-8 has no bytes for: a file's name may hold either."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "·" for char in text)


def plain_lines(text: str) -> str:
    """As `plain`, of each line of `text`."""
    return "\n".join(map(plain, text.split("\n")))


INT64_MAX: Final = 2**63 - 1
"""Shards, streams and index rows hold no larger number."""

Count = Annotated[int, Meta(ge=0, le=INT64_MAX)]
"""A number of things, or a place among them counted from 0."""
Sequence = Annotated[int, Meta(ge=1, le=INT64_MAX)]
"""A place in a stream."""
TimeNs = Annotated[int, Meta(ge=-INT64_MAX - 1, le=INT64_MAX)]
"""Nanoseconds since the Unix epoch."""
Id = Annotated[bytes, Meta(min_length=16, max_length=16)]
"""A UUID's 16 bytes."""
HexHash = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""A SHA-256 hash in hex."""
FileName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}\Z")]
"""A name without a path: what other machines say must not lead out of a directory."""
