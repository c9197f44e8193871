"""A shard describes itself: with h5py, a MessagePack reader and hashlib, and what its attributes say, all is there.

Nothing of ours is imported but what makes the shards, so that this is what a stranger could write.
"""

from __future__ import annotations

import json
import re
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import h5py
import msgspec
import pytest
from shard_maker import PartitionMaker, new_store

Fields = dict[str, Any]


@pytest.fixture
def maker(tmp_path: Path) -> PartitionMaker:
    """Two sealed shards and a live one."""
    maker = PartitionMaker(new_store(tmp_path), 3)
    for counts in ((1, 7), (0, 20, 3)):
        maker.begin()
        for count in counts:
            maker.commit(count)
        maker.seal()
    maker.begin()
    maker.commit(2)
    maker.commit(5)
    maker.close()
    return maker


def fields_of(record: bytes, about: str) -> Fields:
    """A record's fields by the names that the text about it gives."""
    match = re.search(r"a MessagePack array of: version \(1\), ([a-z_, ]+)\.", about)
    assert match is not None
    version, *values = msgspec.msgpack.decode(record)
    assert version == 1
    return dict(zip(match[1].split(", "), values, strict=True))


def sealed_records(file: h5py.File) -> list[bytes]:
    data, offset = file["records"][()].tobytes(), file["offset"][()].tolist()
    return [data[start:end] for start, end in pairwise(offset)]


def live_records(file: h5py.File) -> list[bytes]:
    end = file["index"].attrs["columns"].split(",").index("end_bytes")
    rows = file["index"][: file["watermark"][0]]
    blob, records = file["frames"][: rows[-1, end]].tobytes(), []
    while blob:
        size = int.from_bytes(blob[:4], "little")
        records.append(blob[4 : 4 + size])
        blob = blob[4 + size :]
    return records


def root_of(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1."""
    if len(leaves) < 2:
        return leaves[0] if leaves else sha256(b"").digest()
    split = 1 << ((len(leaves) - 1).bit_length() - 1)
    return sha256(b"\1" + root_of(leaves[:split]) + root_of(leaves[split:])).digest()


def subtrees_of(leaves: list[bytes]) -> list[bytes]:
    roots, start = [], 0
    for bit in reversed(range(len(leaves).bit_length())):
        if len(leaves) & 1 << bit:
            roots.append(root_of(leaves[start : start + (1 << bit)]))
            start += 1 << bit
    return roots


def check_hash(fields: Fields) -> None:
    canonical = json.dumps(json.loads(fields["payload"]), sort_keys=True, ensure_ascii=False).encode()
    assert sha256(canonical).digest() == fields["audit_hash"]


def test_a_stranger_gives_every_event_audit_hash_and_root_from_what_the_shards_say(maker: PartitionMaker) -> None:
    leaves: list[bytes] = []
    found: list[Fields] = []
    for path in sorted(maker.store.directory.glob("p003-*.h5")):
        with h5py.File(path, "r") as file:
            live = ".live." in path.name
            records = live_records(file) if live else sealed_records(file)
            rows = [fields_of(record, (file if live else file["records"]).attrs["about"]) for record in records]
            if not live:
                assert [row.tobytes() for row in file["merkle/before"][()]] == subtrees_of(leaves)
            leaves += [sha256(b"\0" + record).digest() for record in records]
            if not live:
                assert [row.tobytes() for row in file["merkle/after"][()]] == subtrees_of(leaves)
                assert (file.attrs["tree_size"], file.attrs["root"]) == (len(leaves), root_of(leaves).hex())
                for name in ("event_id", "consultation_id", "audit_hash"):
                    assert [value.tobytes() for value in file[name][()]] == [row[name] for row in rows]
                for name in ("timestamp_ns", "origin", "index"):
                    assert file[name][()].tolist() == [row[name] for row in rows]
                for name in ("site", "event_type"):
                    names = file[f"names/{name}"].asstr()[()]
                    assert [names[code] for code in file[name][()]] == [row[name] for row in rows]
            found += rows
    for fields in found:
        check_hash(fields)
    assert [str(UUID(bytes=fields["event_id"])) for fields in found] == [
        str(UUID(bytes=event.event_id)) for event in maker.events
    ]
    assert [fields["payload"] for fields in found] == [event.payload for event in maker.events]
