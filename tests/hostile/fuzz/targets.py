"""What is fuzzed: for each kind of bytes who reads it, in which modules, and what words matter in it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from contracts.errors import FiError

from . import readers
from .readers import CONSULTATION, refusal


@dataclass(frozen=True)
class Target:
    """One kind of bytes.

    Attributes:
        read: bytes → its verdict. Raises `FiError` to refuse them, and nothing else.
        modules: whose lines guide the fuzzer.
        tokens: what it puts in here and there.
    """

    read: Callable[[bytes], str]
    modules: tuple[str, ...]
    tokens: tuple[bytes, ...]

    def loaded(self) -> list[ModuleType]:
        """The modules."""
        return [importlib.import_module(name) for name in self.modules]


def verdict(target: Target, data: bytes) -> str:
    """What becomes of `data`, in a few words. Raises what is a finding."""
    try:
        return target.read(data)
    except FiError as error:
        return f"refused: {refusal(error)}"


_JSON = (
    *(b"{}", b"[]", b"null", b"true", b"-0", b"1E5", b"1e400", b"1e-400", b"9007199254740993", b"NaN", b"-Infinity"),
    *(
        b'""',
        b'"\\ud800"',
        b'"\\u0000"',
        b'"\\ud83d\\ude00"',
        b"\\",
        b'"',
        b"\xef\xbb\xbf",
        b"\xff",
        b"\xc0\x80",
        b"\x00",
    ),
    *(
        b"[" * 64,
        b"]" * 64,
        b'{"a":' * 65,
        b"}" * 65,
        b"9" * 400,
        b"9" * 4301,
        b"\xed\xa0\x80",
        b"\xe2\x80\xa8",
        b"\r\n",
    ),
)
_EVENT = (
    *(f'"{name}":'.encode() for name in ("event_id", "consultation_id", "timestamp", "event_type", "payload")),
    *(b'"metadata":', b'"user_id":"u"', b'"session_id":"s"', b'"source":"x"', b'"site_id":"clinic-1"'),
    *(b'"timezone":1', b'"2026-01-02T03:04:05Z"', b'"0001-01-01T00:00:00+23:59"', b'"9999-12-31T23:59:60Z"'),
    *(b'"MESSAGE_RECEIVED"', b'"CONSULTATION_COMMITTED"', b'"gravity_score":1e2', b'"iteration":true'),
    *(
        f'"{CONSULTATION}"'.encode(),
        b'"message_content":"x"',
        b'"message_role":"user"',
        b"\n",
        b"\n\n",
        b"\\u0070ayload",
    ),
)
_PACK = (
    *(
        b"\xc0",
        b"\xc1",
        b"\xc4\x10",
        b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\xd3\x80\0\0\0\0\0\0\0",
        b"\xdd\xff\xff\xff\xff",
    ),
    *(
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x90",
        b"\x91" * 1100,
        b"\xa1\xff",
        b"\x01",
        b"\x02",
    ),
)
_RECORD = (
    b'"v":"receipt.2"',
    b'"v":"seal.1"',
    b'"origin":-1',
    b'"ends":{"":{"shard":0,"commits":0}}',
    b'"closed":"AA=="',
)

TARGETS: dict[str, Target] = {
    "ingest": Target(
        readers.read_body,
        (
            "stages.ingest.core",
            "stages.ingest.explain",
            "contracts.events",
            "stages.segment.core",
        ),
        _JSON + _EVENT,
    ),
    "headers": Target(
        readers.read_gateway_headers,
        (
            "stages.runtime.api",
            "contracts.letters",
            "contracts.telemetry",
            "stages.ingest.core",
            "stages.ingest.explain",
        ),
        (
            b"\r\n",
            b":",
            b"traceparent: ",
            b"Fi-First-Seen: ",
            b"00-",
            b"9" * 19,
            b"1/2/3",
            b"\x0b",
            b"\xff",
            b"NATS/1.0\r\n",
        ),
    ),
    "frame": Target(
        readers.read_hop,
        (
            "contracts.frames",
            "stages.runtime.checkpoint",
            "stages.runtime.work",
            "stages.persist.core",
            "stages.segment.core",
        ),
        _PACK,
    ),
    "receipt": Target(
        readers.read_receipt, ("contracts.receipts", "contracts.lifecycle", "contracts.statements"), _JSON + _RECORD
    ),
    "seal": Target(readers.read_seal, ("contracts.receipts", "contracts.statements"), _JSON + _RECORD),
    "member": Target(
        readers.read_member, ("contracts.membership",), (*_JSON, b'"pinned":[99]', b'"stage":"persist"', b"member.2")
    ),
    "pause": Target(readers.read_pause_key, ("contracts.membership",), (*_JSON, b'"v":"pause.1"')),
    "policy": Target(
        readers.read_policy, ("contracts.rules",), (*_JSON, b'"v":"policy.1"', b'"refused_types":["MESSAGE_RECEIVED"]')
    ),
    "flush": Target(readers.read_flush, ("contracts.flush",), (*_JSON, b'"v":"flush.1"', b'"targets":{"1":2}')),
    "letter": Target(
        readers.read_dead_letter,
        ("contracts.letters", "contracts.subjects", "stages.runtime.api"),
        (
            b"Fi-Dead-Origin: ",
            b"Fi-Dead-Index: ",
            b"Fi-Dead-Subject: fi.raw.0.a.b",
            b"9" * 20,
            b"--\r\n",
            b"\r\n",
            b"\xff",
        ),
    ),
    "shard-header": Target(
        readers.read_shard_header, ("stages.persist.header",), (*_JSON, b"FI-SHARD\n", b"fi.live.2", b'"frames":[-1,9]')
    ),
    "proof": Target(readers.read_proof, ("contracts.evidence", "contracts.proofs", "contracts.statements"), _JSON),
    "settings-file": Target(
        readers.read_settings_file,
        ("cluster.config", "contracts.settings"),
        (
            b"[" * 1200,
            b"9" * 5000,
            b"partitions",
            b" = ",
            b"0x",
            b"nan",
            b"'''",
            b"[a]\n",
            b"\xff",
            b"{",
            b"\x00",
            b"1979-05-27",
        ),
    ),
    "settings-text": Target(
        readers.read_settings_text,
        ("contracts.settings",),
        (
            b"FI_PARTITIONS=",
            b"FI_PROBE_S=",
            b"\n",
            b"nan",
            b"\xff",
            b"9" * 5000,
            b"FI_FI_",
            b"partitions=",
            b"true",
            b"1e3",
        ),
    ),
}
