"""Why something is not an event, in words its sender can act on. Only reached by bad input, so it may be slow.

Everything that came from outside is quoted and cut here: a reason, field or detail never holds a control character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Raw

from contracts.errors import InvalidEventError
from contracts.events import PAYLOAD_DEPTH_MAX, is_nested_beyond_reading
from contracts.wire import UNREADABLE

_REQUIRED = ("consultation_id", "event_type", "payload", "metadata")
_STRINGS = {"consultation_id": False, "event_type": False, "event_id": True, "timestamp": True}
"""String fields, and whether null stands for "not given"."""
_FIELDS = frozenset(_REQUIRED) | _STRINGS.keys()

_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,40}")
_QUOTED_CHARS_MAX = 60
_PATH_CHARS_MAX = 120
_SEARCH_ITEMS_MAX = 1000
_SEARCH_DEPTH_MAX = 8
# Possessive, and with the closing mark optional, so that no text makes it go back.
_TOKEN = re.compile(rb'"((?:[^"\\]|\\.)*+)"?|[{}\[\]]', re.DOTALL)

_decode_fields = msgspec.json.Decoder(dict[str, Raw]).decode


def quoted(value: Any) -> str:
    """`value` as ASCII on one line, cut short."""
    text = value[:_QUOTED_CHARS_MAX] if isinstance(value, str) else repr(value)[:_QUOTED_CHARS_MAX]
    return ascii(text) if isinstance(value, str) else ascii(text)[1:-1]


def duplicate_field(*path: str) -> InvalidEventError:
    """The rejection of a field given twice; `path` is empty when its name was written with escapes."""
    return InvalidEventError("field.duplicate", _path(path), "given twice: parsers would disagree on which one counts")


def explain_decoding(text: bytes, error: Exception) -> InvalidEventError:
    """Why `text` could not be read as an event's fields, given what msgspec raised on it."""
    if not text:
        return InvalidEventError("json.empty", "", "the message is empty")
    if isinstance(error, RecursionError) or is_nested_beyond_reading(text):
        return _explain_recursion(text)
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8("json", "", error)
    if not isinstance(error, msgspec.ValidationError):
        return _explain_syntax(text, error)
    try:
        fields = _decode_fields(text)
    except msgspec.ValidationError:
        return InvalidEventError("json.not_object", "", "an event is a JSON object")
    except UNREADABLE as deeper:
        return explain_decoding(text, deeper)
    return _explain_fields(fields)


def explain_part(name: str, part: bytes, error: Exception) -> InvalidEventError:
    """Why the value of `payload` or `metadata`, sound in its syntax, cannot be decoded."""
    if isinstance(error, RecursionError):
        return InvalidEventError(f"{name}.depth", name, f"nested deeper than {PAYLOAD_DEPTH_MAX}")
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8(name, name, error)
    found = _find_unstorable(part)
    path = _path((name, *found[1])) if found else name
    return InvalidEventError(f"{name}.number", path, "a number no 64-bit float or integer of 4300 digits can hold")


def _explain_fields(fields: dict[str, Raw]) -> InvalidEventError:
    for name in fields:
        if name not in _FIELDS:
            detail = f"no such field; an event has {', '.join(sorted(_FIELDS))}"
            return InvalidEventError("field.unknown", _path((name,)), detail)
    for name in _REQUIRED:
        if name not in fields:
            return InvalidEventError("field.missing", name, "required")
    for name, nullable in _STRINGS.items():
        value = bytes(fields.get(name, b'""'))
        if value[:1] != b'"' and not (nullable and value == b"null"):
            return InvalidEventError("field.type", name, "must be a string")
    return InvalidEventError("json.malformed", "", "not an event")


def _explain_syntax(text: bytes, error: Exception) -> InvalidEventError:
    """JSON it is not; but Python's more lenient reader may show that only a NaN or half a character is wrong."""
    if text.startswith(b"\xef\xbb\xbf"):
        return InvalidEventError("json.malformed", "", "begins with a byte order mark; send plain UTF-8")
    try:
        found = _find_unstorable(text)
    except UnicodeDecodeError as wrong:
        return _not_utf8("json", "", wrong)
    if found is None:
        return InvalidEventError("json.malformed", "", quoted(str(error))[1:-1])
    kind, path = found
    owner = path[0] if path and path[0] in ("payload", "metadata") else "json"
    detail = "NaN and infinities are not JSON" if kind == "number" else "half of a surrogate pair is not a character"
    return InvalidEventError(f"{owner}.{kind}", _path(path), detail)


def _explain_recursion(text: bytes) -> InvalidEventError:
    """Names the field that is nested too deeply for any parser to have reached its end."""
    depth = 0
    owner = ""
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in (b"{", b"["):
            depth += 1
            if depth > PAYLOAD_DEPTH_MAX + 1:
                break
        elif token in (b"}", b"]"):
            depth -= 1
        elif depth == 1:
            owner = match[1].decode(errors="replace")
    reason = f"{owner}.depth" if owner == "metadata" else "payload.depth"
    return InvalidEventError(reason, _path((owner,)), f"nested deeper than {PAYLOAD_DEPTH_MAX}")


def _not_utf8(owner: str, path: str, error: UnicodeDecodeError) -> InvalidEventError:
    return InvalidEventError(f"{owner}.utf8", path, f"not UTF-8: {error.reason}")


def _path(parts: tuple[str | int, ...]) -> str:
    plain = (str(part) if isinstance(part, int) or _PLAIN.fullmatch(part) else quoted(part) for part in parts)
    return ".".join(plain)[:_PATH_CHARS_MAX]


def _find_unstorable(text: bytes) -> tuple[str, tuple[str | int, ...]] | None:
    """("number" or "utf8", path) of a value that JSON or UTF-8 has no word for; None if there is none.

    The path ends early where following it further would take long.

    Raises:
        UnicodeDecodeError: the bytes are not UTF-8.
    """
    decoded = text.decode()
    try:
        value = json.loads(decoded)
    except (ValueError, RecursionError):
        return None
    kind = _unstorable(value)
    if kind is None:
        return None
    path: list[str | int] = []
    while isinstance(value, (dict, list)) and len(value) <= _SEARCH_ITEMS_MAX and len(path) < _SEARCH_DEPTH_MAX:
        items: Iterable[tuple[str | int, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in items:
            if kind == _unstorable(child):
                path.append(key)
                value = child
                break
        else:
            break
    return kind, tuple(path)


def _unstorable(value: Any) -> str | None:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return "utf8"
    except ValueError:
        return "number"
    except RecursionError:
        pass
    return None
