"""Bytes written by earlier builds are read by this one, and this one still writes the same bytes.

Each file in ``golden/`` was written once and is never changed: what streams and shards hold for years looks like it. A
new wire version adds a sample here; ``python tests/conformance/test_golden.py`` writes the files that are missing and
leaves the others alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from process_samples import READ, WRITTEN

from contracts.backups import LastBackup, decode_last_backup, encode_last_backup
from contracts.errors import FiError
from contracts.events import Event, EventKey, decode_event, decode_event_key, encode_event
from contracts.evidence import (
    ConsistencyProof,
    InclusionProof,
    check_evidence,
    decode_evidence,
    encode_evidence,
    head_of,
)
from contracts.flush import Flush, decode_flush, encode_flush
from contracts.frames import (
    Dead,
    Frame,
    FrameHead,
    PackedFrame,
    decode_frame,
    decode_frame_head,
    decode_packed_frame,
    deflate_frame,
    encode_frame,
)
from contracts.hashing import audit_hash, leaf_hash
from contracts.proofs import MerkleTree
from contracts.receipts import (
    Receipt,
    ResumePoint,
    SealRecord,
    StoreEnd,
    decode_receipt,
    decode_seal,
    encode_receipt,
)
from contracts.rules import Policy, Rules, decode_policy, encode_policy
from contracts.settings import Settings
from contracts.statements import Signer, check_signature, statement_of
from stages.persist.export.formats import ExportFormat
from stages.persist.export.manifest import Filters, Manifest, decode_manifest, encode_manifest, with_digest
from stages.persist.store import PartitionEnd

GOLDEN = Path(__file__).parent / "golden"

RAW_EVENT = Event(
    origin=4_294_967_297,
    index=2,
    event_id=bytes(range(16)),
    consultation_id=bytes(range(100, 116)),
    site="clinica-1",
    event_type="MESSAGE_RECEIVED",
    timestamp_ns=1_767_323_045_678_901_234,
    stamped=True,
    payload='{"message_content":"¿Le duele aquí?", "message_role":"user", "t":1.50}'.encode(),
    metadata=b'{"user_id":"u-1","session_id":"s-1","source":"x","timezone":"UTC"}',
    accepted_ns=1_767_323_046_000_000_001,
)
STORED_EVENT = msgspec.structs.replace(
    RAW_EVENT,
    timestamp_ns=-1_000_000_001,
    stamped=False,
    traceparent="00-" + "ab" * 16 + "-" + "cd" * 8 + "-01",
    ingest_ns=1_767_323_046_000_000_002,
    segment_ns=1_767_323_046_000_000_003,
    hash_ns=1_767_323_046_000_000_004,
    group=4,
    criticality=2,
    policy_version=7,
    audit_hash=bytes(range(32)),
)
HEAD = FrameHead(
    partition=5,
    prev=4_294_967_290,
    first=4_294_967_291,
    last=4_294_967_300,
    trail=(12, 70_000),
    writer="w-1f2e3d",
    made_ns=1_767_323_046_000_000_005,
    closed=b"\x00\x01opaque\xff",
    dead=(Dead(origin=4_294_967_292, count=3),),
)
HEAD_FIELDS = msgspec.structs.asdict(HEAD)
OLD_FRAME = Frame(**HEAD_FIELDS, events=(RAW_EVENT, STORED_EVENT))
FRAME = msgspec.structs.replace(OLD_FRAME, stored_ns=1_767_323_046_000_000_010)
PACKED = PackedFrame(
    **HEAD_FIELDS,
    events=tuple(msgspec.Raw(encode_event(e)) for e in (RAW_EVENT, STORED_EVENT)),
    stored_ns=FRAME.stored_ns,
)
OLD_EMPTY_FRAME = Frame(1, 0, 1, 1, (), "w", 0, b"", (), events=())
EMPTY_FRAME = msgspec.structs.replace(OLD_EMPTY_FRAME, stored_ns=1_767_323_046_000_000_010)
RECEIPT = Receipt(
    partition=5,
    cluster="c-77",
    writer="w-1f2e3d",
    node="server-a",
    store="st-9",
    ends={"st-9": StoreEnd(shard=3, commits=41), "st-8": StoreEnd(shard=1, commits=0)},
    origin=4_294_967_300,
    trail=(12, 70_000, 70_001),
    persisted=1_000_000,
    duplicates=7,
    dead_lettered=3,
    root="ab" * 32,
    closed=b"\x00\x01opaque\xff",
    committed_ns=1_767_323_046_000_000_006,
)
TAKEOVER = msgspec.structs.replace(RECEIPT, writer="w-2", takeover=True)
SEAL = SealRecord(
    partition=5,
    store="st-9",
    shard=3,
    file="p5-000003.h5",
    sha256="cd" * 32,
    first_origin=4_294_000_000,
    last_origin=4_294_967_300,
    events=999,
    tree_size=1_000_000,
    root="ab" * 32,
    sealed_ns=1_767_323_046_000_000_007,
    bytes=12_345_678,
)
UNSEALED = msgspec.structs.replace(
    RECEIPT, ends={"st-9": StoreEnd(shard=3, commits=41, rows={2: "cd" * 32, 3: "ef" * 32})}
)
MOVED = msgspec.structs.replace(RECEIPT, ends={"st-9": StoreEnd(shard=3, commits=41, first=2)})
RESUMED_SEAL = msgspec.structs.replace(
    SEAL,
    resume=ResumePoint(frontier=bytes(range(64)), duplicates=7, dead_lettered=3, closed=b"\x00\x01opaque\xff"),
)
STORED_RECEIPT = msgspec.structs.replace(RECEIPT, stored_ns=1_767_323_046_000_000_010)
STORED_SEAL = msgspec.structs.replace(
    RESUMED_SEAL, resume=msgspec.structs.replace(RESUMED_SEAL.resume, stored_ns=1_767_323_046_000_000_010)
)
# Ed25519 signatures are deterministic, so these samples also hold the signed statements' canonical form.
SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
SIGNED_RECEIPT = SIGNER.sign(RECEIPT)
SIGNED_SEAL = SIGNER.sign(msgspec.structs.replace(SEAL, cluster="c-77"))
PROVED = msgspec.structs.replace(STORED_EVENT, audit_hash=audit_hash(json.loads(STORED_EVENT.payload)))
TREE = MerkleTree(b"".join([leaf_hash(encode_event(PROVED)), *(leaf_hash(b"%d" % number) for number in range(6))]))
OLD_HEAD, NEW_HEAD = (
    head_of(SIGNER.sign(msgspec.structs.replace(RECEIPT, persisted=size, root=TREE.root(size).hex())))
    for size in (5, 7)
)
INCLUSION = InclusionProof(
    partition=5,
    event_id="00010203-0405-0607-0809-0a0b0c0d0e0f",
    record=encode_event(PROVED),
    index=0,
    path=tuple(value.hex() for value in TREE.inclusion_path(0, 7)),
    head=NEW_HEAD,
)
CONSISTENCY = ConsistencyProof(
    partition=5, old=OLD_HEAD, new=NEW_HEAD, path=tuple(value.hex() for value in TREE.consistency_path(5, 7))
)
MANIFEST = with_digest(
    Manifest(
        export_id="00010203-0405-0607-0809-0a0b0c0d0e0f",
        created="2026-01-02T03:04:05.678Z",
        who="ana",
        purpose="¿auditoría 12?",
        store="st-9",
        cluster="c-77",
        file_format=ExportFormat.HDF5_CONSULTATIONS,
        filters=Filters(site="clinica-1", until="2026-01-01T00:00:00.000Z"),
        snapshot=(PartitionEnd(0, None, 0, "ab" * 32), PartitionEnd(5, 4_294_967_300, None, None)),
        file="notas.h5",
        events=1_000_000,
        bytes=12_345_678,
        sha256="cd" * 32,
    )
)
FILTERED = with_digest(
    msgspec.structs.replace(
        MANIFEST,
        filters=Filters(
            consultation_id="0a1b2c3d-4e5f-4a6b-8c7d-9e0f1a2b3c4d",
            event_type="SOAP_GENERATION_COMPLETED",
            since="2025-01-01T00:00:00.000Z",
        ),
    )
)
POLICY = Policy(
    version=7,
    rules=Rules(
        check_payload=False,
        closed_remembered=128,
        payload_bytes_max=65_536,
        refused_types=("CORE_ERROR_OCCURRED", "LLM_CALL_FAILED"),
        criticality={"URGENCY_CLASSIFIED": "elevated", "LLM_CALL_COMPLETED": "critical"},
    ),
    since_ns=1_767_323_046_000_000_008,
    by="ana@server-a",
    note="¿por qué?",
    follows=5,
)
LENIENT = msgspec.structs.replace(POLICY, rules=Rules(check_lifecycle=False))
BACKUP = LastBackup(at_ns=1_767_323_046_000_000_009, to="/mnt/fi-backup/server-a", copied={0: 31, 11: 7})
FLUSH = Flush(cluster="c-77", targets={0: 4_294_967_300, 11: 12}, since_ns=1_767_323_046_000_000_009, by="ana@server-a")


@dataclass(frozen=True)
class Sample:
    """One encoded value: the file that holds it, the value, how it is written and read."""

    file: str
    value: Any
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]

    def __str__(self) -> str:
        return self.file


SAMPLES = [
    Sample("event.1.raw.bin", RAW_EVENT, encode_event, decode_event),
    Sample("event.1.stored.bin", STORED_EVENT, encode_event, decode_event),
    Sample("frame.1.stored.bin", FRAME, encode_frame, decode_frame),
    Sample("frame.1.stored.empty.bin", EMPTY_FRAME, encode_frame, decode_frame),
    Sample("receipt.1.stored.bin", STORED_RECEIPT, encode_receipt, decode_receipt),
    Sample("seal.1.stored.bin", STORED_SEAL, encode_receipt, decode_seal),
    Sample("receipt.1.bin", RECEIPT, encode_receipt, decode_receipt),
    Sample("receipt.1.takeover.bin", TAKEOVER, encode_receipt, decode_receipt),
    Sample("receipt.1.signed.bin", SIGNED_RECEIPT, encode_receipt, decode_receipt),
    Sample("receipt.1.moved.bin", MOVED, encode_receipt, decode_receipt),
    Sample("receipt.1.unsealed.bin", UNSEALED, encode_receipt, decode_receipt),
    Sample("seal.1.resume.bin", RESUMED_SEAL, encode_receipt, decode_seal),
    Sample("seal.1.bin", SEAL, encode_receipt, decode_seal),
    Sample("seal.1.signed.bin", SIGNED_SEAL, encode_receipt, decode_seal),
    Sample("inclusion-proof.1.json", INCLUSION, encode_evidence, decode_evidence),
    Sample("consistency-proof.1.json", CONSISTENCY, encode_evidence, decode_evidence),
    Sample("export-manifest.1.json", MANIFEST, encode_manifest, decode_manifest),
    Sample("export-manifest.1.filters.json", FILTERED, encode_manifest, decode_manifest),
    Sample("policy.1.lenient.json", LENIENT, encode_policy, lambda data: decode_policy(data, LENIENT.version)),
    Sample("policy.1.json", POLICY, encode_policy, lambda data: decode_policy(data, POLICY.version)),
    Sample("backup.1.json", BACKUP, encode_last_backup, decode_last_backup),
    Sample("flush.1.json", FLUSH, encode_flush, decode_flush),
    *(Sample(*sample) for sample in WRITTEN),
]
ONLY_READ = [
    # Another release of the library may deflate the same events to other bytes.
    Sample("frame.2.stored.bin", FRAME, lambda frame: deflate_frame(frame, 1).data, decode_frame),
    # Of builds whose frames did not say when their last message was stored.
    Sample("frame.1.bin", OLD_FRAME, encode_frame, decode_frame),
    Sample("frame.1.empty.bin", OLD_EMPTY_FRAME, encode_frame, decode_frame),
    Sample("frame.2.bin", OLD_FRAME, lambda frame: deflate_frame(frame, 1).data, decode_frame),
    *(Sample(*sample) for sample in READ),
]


@pytest.mark.parametrize("sample", [*SAMPLES, *ONLY_READ], ids=str)
def test_the_kept_bytes_decode_to_the_value_they_were_made_from(sample: Sample) -> None:
    assert sample.decode((GOLDEN / sample.file).read_bytes()) == sample.value


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_todays_encoder_writes_the_kept_bytes(sample: Sample) -> None:
    assert sample.encode(sample.value) == (GOLDEN / sample.file).read_bytes()


def test_a_packed_frame_is_the_same_bytes_with_its_events_left_encoded() -> None:
    kept = (GOLDEN / "frame.1.stored.bin").read_bytes()
    assert encode_frame(PACKED) == kept
    packed = decode_packed_frame(kept)
    assert [decode_event(bytes(raw)) for raw in packed.events] == [RAW_EVENT, STORED_EVENT]
    assert encode_frame(packed) == kept
    deflated = decode_packed_frame((GOLDEN / "frame.2.stored.bin").read_bytes())
    assert encode_frame(deflated) == kept


def test_kept_signatures_and_proofs_hold() -> None:
    for decode, name in ((decode_receipt, "receipt.1.signed.bin"), (decode_seal, "seal.1.signed.bin")):
        record = decode((GOLDEN / name).read_bytes())
        check_signature(statement_of(record), record.signature, [SIGNER.public_key])
    for name in ("inclusion-proof.1.json", "consistency-proof.1.json"):
        check_evidence(decode_evidence((GOLDEN / name).read_bytes()), [SIGNER.public_key])


def test_a_head_and_a_key_are_read_from_the_same_bytes() -> None:
    assert decode_frame_head((GOLDEN / "frame.1.bin").read_bytes()) == HEAD
    deflated = decode_frame_head((GOLDEN / "frame.2.bin").read_bytes())
    assert {name: getattr(deflated, name) for name in HEAD_FIELDS} == HEAD_FIELDS
    key = decode_event_key((GOLDEN / "event.1.stored.bin").read_bytes())
    assert key == EventKey(RAW_EVENT.origin, RAW_EVENT.index, RAW_EVENT.event_id)


def test_no_kept_file_is_without_a_sample() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {sample.file for sample in [*SAMPLES, *ONLY_READ]}


def structs_in(value: Any) -> Iterator[msgspec.Struct]:
    """`value` and what it is made of, as far as those are structs."""
    parts: Iterable[Any] = ()
    if isinstance(value, msgspec.Struct):
        yield value
        parts = msgspec.structs.astuple(value)
    elif isinstance(value, (list, tuple)):
        parts = value
    elif isinstance(value, dict):
        parts = value.values()
    for part in parts:
        yield from structs_in(part)


def test_every_field_of_a_kept_struct_has_a_value_of_its_own_in_some_kept_file() -> None:
    """What stands at its default everywhere may be renamed or lost, and no kept byte would tell."""
    untold: set[tuple[str, str]] = set()
    told: set[tuple[str, str]] = set()
    for struct in (part for sample in [*SAMPLES, *ONLY_READ] for part in structs_in(sample.value)):
        for field in msgspec.structs.fields(struct):
            default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
            has_its_own = getattr(struct, field.name) != default
            (told if has_its_own else untold).add((type(struct).__name__, field.name))
    assert {name for name in untold - told if name[0] != Settings.__name__} == set()


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_bytes_cut_short_are_refused(sample: Sample) -> None:
    kept = (GOLDEN / sample.file).read_bytes()
    for size in (0, 1, len(kept) // 2, len(kept) - 1):
        with pytest.raises(FiError):
            sample.decode(kept[:size])


if __name__ == "__main__":
    for missing in [*SAMPLES, *ONLY_READ]:
        if not (GOLDEN / missing.file).exists():
            (GOLDEN / missing.file).write_bytes(missing.encode(missing.value))
